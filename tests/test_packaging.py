"""What imports what, and what a wheel and a bare environment hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# What each room may import of the others. Exceptions are single files.
ALLOWED = {
    "core": {"core", "errors"},
    "runtimes": {"runtimes", "errors"},
    "export": {"export", "core", "runtimes", "errors"},
    "benchmarks": {"benchmarks", "export", "core", "runtimes", "errors"},
}
EXCEPTIONS = {
    "runtimes/backends/pytorch.py": {"core"},  # inside functions
    "runtimes/backends/torch_tensorrt.py": {"core"},
    "export/__main__.py": {"__main__"},  # `python -m msa2net.export` is the one command line
    "core/train.py": {"runtimes"},  # scores and resizes as everything else does
    **{
        f"core/data/{name}.py": {"runtimes"} for name in ("dicom", "folder", "frames", "layout")
    },  # read images as a device does
}


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "msa2net" else [node.module]
            )
        rooms |= {name.split(".")[1] for name in names if name.startswith("msa2net.")}
    return rooms


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_arrows_go_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        relative = file.relative_to(ROOT).as_posix()
        assert imported_rooms(file) <= ALLOWED[room] | EXCEPTIONS.get(relative, set()), relative


def loaded_by(statement: str, python: str = sys.executable) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(done.stdout.split())


def test_importing_the_package_loads_numpy_and_no_runtime() -> None:
    loaded = loaded_by("import msa2net")
    assert "numpy" in loaded
    assert not loaded & {"torch", "onnx", "onnxruntime", "openvino", "scipy", "PIL", "pydicom", "safetensors"}


def test_one_runtime_loads_no_other() -> None:
    loaded = loaded_by(
        "import numpy, msa2net; msa2net.Predictor.load(runtime='onnxruntime').predict(numpy.zeros((50, 60), 'uint8'))"
    )
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "onnx", "openvino", "scipy", "PIL", "pydicom", "safetensors"}


@pytest.mark.parametrize("module", ["core.data", "core.phantoms", "benchmarks.accuracy", "benchmarks.metrics"])
def test_scoring_a_bundle_needs_no_torch(module: str) -> None:
    assert not loaded_by(f"import msa2net.{module}") & {"torch", "monai", "onnx", "onnxruntime", "openvino"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_only_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"msa2net"}
    assert {"msa2net/py.typed", "msa2net/__init__.py", "msa2net/runtimes/BUNDLE.md"} <= set(names)
    assert "msa2net/runtimes/demo.bundle/SHA256SUMS" in names
    assert not [name for name in names if name.startswith("msa2net/tests")]


def test_a_device_with_numpy_pillow_and_one_runtime_segments(wheel: Path, tmp_path: Path) -> None:
    """The wheel alone, in an environment that sees numpy, Pillow and ONNX Runtime and nothing else of ours."""
    import onnxruntime

    site = Path(onnxruntime.__file__).parents[1]
    environment = tmp_path / "device"
    venv.create(environment, with_pip=False, symlinks=True)
    target = next(environment.glob("lib/python3*/site-packages"))
    zipfile.ZipFile(wheel).extractall(target)
    needed = ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime", "flatbuffers", "google", "packaging")
    for name in needed:
        if (site / name).exists():
            (target / name).symlink_to(site / name)
    python = str(environment / "bin" / "python")
    loaded = loaded_by(
        "import numpy, msa2net\n"
        "seg = msa2net.Predictor.load(runtime='onnxruntime').predict(numpy.zeros((50, 60), 'uint8'))\n"
        "assert seg.mask.shape == (50, 60)",
        python,
    )
    assert not loaded & {"torch", "onnx", "scipy", "openvino"}
    code = "from msa2net import Predictor; Predictor.load(runtime='openvino')"
    refused = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    assert "runtime 'openvino': needs the package openvino. pip install 'msa2net-edge[openvino]'" in refused.stderr


def test_the_type_checker_sees_the_mapped_package(tmp_path: Path) -> None:
    """A wrong type planted in a copy is found: `make check` does not pass by looking at nothing."""
    package = tmp_path / "msa2net"
    (package / "runtimes").mkdir(parents=True)
    for name in ("__init__.py", "runtimes/__init__.py"):
        (package / name).write_text("")
    (package / "errors.py").write_text((ROOT / "errors.py").read_text())
    source = (ROOT / "runtimes" / "measure.py").read_text()
    (package / "runtimes" / "measure.py").write_text(source + "\n\nplanted: int = timed(lambda: None)\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "msa2net"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"MYPYPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 1
    assert "Incompatible types in assignment" in done.stdout


# Lock files ---------------------------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = sorted(set(PROJECT["optional-dependencies"]) - {"torch-tensorrt"})  # NVIDIA's own index has those


def requirements(extra: str) -> list[Requirement]:
    """What an extra set asks for, with the sets that it names in turn."""
    found = []
    for text in PROJECT["optional-dependencies"][extra]:
        asked = Requirement(text)
        if asked.name == PROJECT["name"]:
            found += [each for inner in asked.extras for each in requirements(inner)]
        else:
            found.append(asked)
    return found


def test_every_extra_set_has_a_lock_file() -> None:
    assert sorted(path.stem for path in (ROOT / "locks").iterdir()) == LOCKED


@pytest.mark.parametrize("extra", LOCKED)
def test_a_lock_file_pins_what_its_set_asks_for_with_hashes(extra: str) -> None:
    text = (ROOT / "locks" / f"{extra}.txt").read_text().replace("\\\n", " ")
    pins: dict[str, list[str]] = {}
    for line in text.splitlines():
        pinned, *hashes = line.split("--hash=")
        pin = Requirement(pinned)
        ((operator, version),) = [(each.operator, each.version) for each in pin.specifier]
        assert operator == "==", line
        assert hashes, line
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64} *", each) for each in hashes), line
        pins.setdefault(canonicalize_name(pin.name), []).append(version)
    for asked in [*map(Requirement, PROJECT["dependencies"]), *requirements(extra)]:
        versions = pins[canonicalize_name(asked.name)]
        assert all(asked.specifier.contains(version) for version in versions), asked
