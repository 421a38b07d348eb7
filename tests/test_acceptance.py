"""The acceptance test on the device: what it reports, when it fails, and that such a device does not start."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import set_manifest

from msa2net import Predictor
from msa2net.__main__ import main
from msa2net.errors import BundleError, Msa2NetError, OutputError, RuntimeUnavailableError
from msa2net.runtimes import acceptance
from msa2net.runtimes.backends import candidates
from msa2net.runtimes.backends.onnxruntime import OnnxRuntimeBackend
from msa2net.runtimes.bundle import MANIFEST, Bundle
from msa2net.runtimes.files import write_json

RUNTIMES = candidates("CPU")


def loader(bundle: Path, runtime: str = "onnxruntime") -> Callable[[], Predictor]:
    return lambda: Predictor.load(bundle, runtime=runtime, cache=False)


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's logits are wrong by more than the tolerance allows."""
    infer = OnnxRuntimeBackend.infer
    monkeypatch.setattr(OnnxRuntimeBackend, "infer", lambda self, x: infer(self, x) + np.float32(0.01))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_sound_device_passes(bundle: Path, runtime: str) -> None:
    report = acceptance.accept(bundle, loader(bundle, runtime), rounds=2)
    opened = Bundle(bundle)
    assert report["passed"]
    assert report["reasons"] == []
    assert report["bundle"]["digest"] == opened.digest
    assert report["bundle"]["files"] == len(opened.sums)
    assert report["golden"]["frames"] == len(opened.manifest.golden)
    assert report["golden"]["logit_difference"] <= report["golden"]["logit_tolerance"]
    assert report["execution"]["runtime"] == runtime
    assert report["device"]["architecture"] == platform.machine()
    assert report["device"]["packages"]["numpy"] == np.__version__
    assert {entry["graph"] for entry in report["milliseconds"]} == {"network"}
    assert all(0 < entry["inference"] <= entry["longest"] for entry in report["milliseconds"])
    assert report["inference_at_export"]["ratio"] is None  # fp32 has no speed in the manifest


def test_it_tells_neither_paths_nor_the_host(bundle: Path, tmp_path: Path) -> None:
    text = json.dumps(acceptance.accept(bundle, loader(bundle), rounds=1))
    assert str(tmp_path) not in text
    assert platform.node() not in text or len(platform.node()) < 4


@pytest.mark.usefixtures("off")
def test_a_device_whose_masks_are_off_fails(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    code = main(["selftest", str(bundle), "--runtime", "onnxruntime", "--rounds", "1", "--report", str(file)])
    out, _ = capsys.readouterr()
    assert code == 1
    assert "FAIL: FAIL: 2 golden frames, largest logit difference 1.00e-02" in out
    assert json.loads(file.read_text())["passed"] is False


def test_a_device_whose_runtime_fails_fails_and_replaces_the_last_report(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    command = ["selftest", str(bundle), "--runtime", "onnxruntime", "--rounds", "1", "--report", str(file)]
    assert main(command) == 0
    infer = OnnxRuntimeBackend.infer
    monkeypatch.setattr(OnnxRuntimeBackend, "infer", lambda self, x: infer(self, x) * np.float32(np.nan))
    assert main(command) == 1
    report = json.loads(file.read_text())
    assert not report["passed"]
    assert report["reasons"][0].startswith("logits: got NaN")
    assert report["bundle"]["digest"] == Bundle(bundle).digest
    assert report["device"]["packages"]["numpy"] == np.__version__
    assert capsys.readouterr().out.splitlines()[-1] == f"FAIL: {report['reasons'][0]}"


@pytest.mark.usefixtures("off")
def test_such_a_device_does_not_start_if_it_is_asked_to_test_itself(bundle: Path) -> None:
    with pytest.raises(OutputError, match="what runs on this device does not do what was exported"):
        Predictor.load(bundle, runtime="onnxruntime", cache=False, self_test=True)
    with Predictor.load(bundle, runtime="openvino", cache=False, self_test=True) as sound:
        assert sound.self_test().passed


def test_a_device_that_is_too_slow_fails(bundle: Path) -> None:
    report = acceptance.accept(bundle, loader(bundle), rounds=1, limit=1e-6)
    assert not report["passed"]
    assert report["reasons"][0].endswith("the limit is 1e-06")
    assert acceptance.accept(bundle, loader(bundle), rounds=1, limit=1e6)["passed"]
    for limit in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(RuntimeUnavailableError, match=r"limit: got .*, expected milliseconds above 0"):
            acceptance.accept(bundle, loader(bundle), rounds=1, limit=limit)


def test_the_time_at_export_stands_beside_that_here(bundle: Path) -> None:
    document: dict[str, Any] = json.loads((bundle / MANIFEST).read_bytes())
    speed = {"ratio": [0.5, 0.5, 0.5], "over": "fp32", "milliseconds": [1e-3, 1.0], "machine": "a CPU", "threads": 2}
    for artifact in document["artifacts"]:
        artifact["speed"] = speed
    set_manifest(bundle, json.dumps(document).encode())
    found = acceptance.accept(bundle, loader(bundle), rounds=1)["inference_at_export"]
    assert found["machine"] == "a CPU"
    assert found["ratio"] > 1


def test_a_changed_file_is_an_error_and_no_report(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "torch/weights.safetensors").write_bytes(b"changed")
    with pytest.raises(BundleError):
        acceptance.accept(bundle, loader(bundle), rounds=1)
    file = tmp_path / "report.json"
    assert main(["selftest", str(bundle), "--runtime", "onnxruntime", "--report", str(file)]) == 2
    assert "weights.safetensors" in capsys.readouterr().err
    assert not file.exists()


def test_the_command_prints_what_it_found(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", str(bundle), "--runtime", "openvino", "--rounds", "2"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"bundle       {Bundle(bundle).digest}, ")
    assert out.endswith("PASS\n")
    assert main(["selftest", str(bundle), "--rounds", "0"]) == 2


def test_a_report_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    write_json(file, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Msa2NetError, match=r"cannot be written \(No space left on device\)"):
        write_json(file, {"b": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
