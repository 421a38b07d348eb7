"""The bundle on an emulated 64-bit Arm processor: ONNX Runtime and OpenVINO, every precision that this machine
can export and a Cortex-A76 can run, baked graphs included. Whether the results are right, never how fast they come.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from msa2net.export import export_bundle, parity
from msa2net.runtimes.backends import cpu_lacks
from msa2net.runtimes.predictor import DEMO_BUNDLE

CHECKOUT = Path(__file__).parents[1]
NEEDED = [tool for tool in ("qemu-aarch64-static", "apt-get", "dpkg") if shutil.which(tool) is None]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(NEEDED), reason=f"needs {', '.join(NEEDED)}")]


def test_every_golden_frame_passes_on_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is asked here is whether Arm computes the same, not how good int8 is: few images serve.
    monkeypatch.setattr(parity, "phantom_cases", partial(parity.phantom_cases, count=12))
    int8 = ["int8-portable"] if cpu_lacks("int8") else ["int8", "int8-portable"]
    bundle = export_bundle(
        DEMO_BUNDLE.parents[1] / "core" / "demo.safetensors",
        tmp_path / "arm.bundle",
        runtimes=("onnxruntime", "openvino"),
        precisions=("fp32", "fp16", *int8),
        bake=("320x180", "128x96:grey"),
        bake_outputs=("colors", "confidence"),
        allow_accuracy_loss=True,
        allow_slower=True,
        progress=False,
    )
    command = [
        "sh",
        str(CHECKOUT / "tests" / "arm.sh"),
        str(CHECKOUT / "build" / "arm"),
        "-W",
        "ignore",
        "-m",
        "msa2net",
    ]
    done = subprocess.run([*command, "verify", str(bundle)], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "golden frames" in line]
    ran = {(runtime, precision) for runtime, precision, verdict, *_ in lines if verdict == "pass:"}
    assert {("onnxruntime", "fp32"), ("openvino", "fp32"), ("onnxruntime", "fp16")} <= ran
    assert {(runtime, precision) for runtime in ("onnxruntime", "openvino") for precision in int8} <= ran
