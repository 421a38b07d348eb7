"""What several test files share."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Tests that run beside each other share the cores: a thread of a runtime that waits for another spins, and two runtimes
# on one core would take several times as long. What needs all cores is marked `alone`.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number::count] or cores)

import pytest
from bundles import set_manifest

from msa2net.runtimes.backends import candidates
from msa2net.runtimes.bundle import MANIFEST
from msa2net.runtimes.predictor import DEMO_BUNDLE, Predictor

# Read when triton is first imported: kernels run on the CPU, in its interpreter. On a GPU it is set to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """The workers' numpy is imported before this file is, and its products round by its number of threads."""
    if getattr(config.option, "numprocesses", None):
        os.environ["OPENBLAS_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the cache of the user who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSA2NET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def exported_once() -> Iterator[None]:
    """A network whose ONNX file was written before in this run gets the same one: writing takes seconds, often."""
    from msa2net.export import onnx_file

    write, known = onnx_file.write, dict[str, tuple[dict[str, str], bytes]]()

    def remembered(model: Any, channels: int, file: Path, batch: int = 1) -> dict[str, str]:
        key = hashlib.sha256(repr((model, getattr(model, "_rewrites", ()), channels, batch)).encode())
        for name, tensor in model.state_dict().items():
            key.update(name.encode())
            key.update(tensor.numpy().tobytes())
        if key.hexdigest() not in known:
            versions = write(model, channels, file, batch)
            if len(known) < 16 and file.stat().st_size < 10_000_000:
                known[key.hexdigest()] = versions, file.read_bytes()
            return versions
        versions, content = known[key.hexdigest()]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return versions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "write", remembered)
        yield


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the demo bundle, free to be damaged."""
    return Path(shutil.copytree(DEMO_BUNDLE, tmp_path / "copy.bundle"))


@pytest.fixture
def judged(bundle: Path) -> Callable[..., Path]:
    """`judged(verdict, reasons, *runtimes)`: the copy, whose artifacts for these runtimes now have this verdict."""

    def change(verdict: str, reasons: list[str], *runtimes: str) -> Path:
        document = json.loads((bundle / MANIFEST).read_bytes())
        for artifact in document["artifacts"]:
            if artifact["runtime"] in runtimes:
                artifact["parity"].update(verdict=verdict, reasons=reasons)
        set_manifest(bundle, json.dumps(document).encode())
        return bundle

    return change


@pytest.fixture
def examples() -> Callable[[str], Path]:
    """Paths of real ultrasound files in pydicom's wheel: rgb_color, ybr_color (30 frames), jpeg2k, palette_color."""
    from pydicom.examples import get_path

    return lambda name: Path(get_path(name))


@pytest.fixture(scope="session")
def predictors() -> dict[str, Predictor]:
    """The demo on every runtime for CPUs."""
    return {runtime: Predictor.load(DEMO_BUNDLE, runtime=runtime) for runtime in candidates("CPU")}


@pytest.fixture(scope="session")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with graphs for two shapes, checked on few phantoms; tests only read it."""
    from msa2net.export import export_bundle, parity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "phantom_cases", partial(parity.phantom_cases, count=2))
        return export_bundle(
            DEMO_BUNDLE.parents[1] / "core" / "demo.safetensors",
            tmp_path_factory.mktemp("baked") / "demo.bundle",
            runtimes=("onnxruntime", "openvino", "pytorch"),
            bake=("320x180", "128x96:grey"),
            bake_outputs=("colors", "confidence"),
            progress=False,
        )
