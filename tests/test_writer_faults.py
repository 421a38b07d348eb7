"""The writer of bundles killed, and refused, at its system calls, by strace's fault injection."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from msa2net.export.writer import new_bundle
from msa2net.runtimes.bundle import MANIFEST, SUMS

OLD, NEW = b"old " * 3000, b"new " * 4000
# The writer alone, without what makes the models: a start takes tenths of a second.
PROGRAM = """
import os, sys, types
from pathlib import Path
import msa2net
package = types.ModuleType("msa2net.export")
package.__path__ = [str(Path(msa2net.__file__).parent / "export")]
sys.modules["msa2net.export"] = package
from msa2net.errors import ExportError
from msa2net.export.writer import new_bundle
content = sys.argv[2].encode() * 4000
os.access("/msa2net-begins", 0)
try:
    with new_bundle(Path(sys.argv[1]), force=True) as folder:
        (folder / "onnx").mkdir()
        (folder / "manifest.json").write_bytes(content)
        (folder / "onnx/model.onnx").write_bytes(content)
except ExportError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
finally:
    os.access("/msa2net-ends", 0)
"""
ERRORS = {"ENOSPC": "No space left on device", "EROFS": "Read-only file system", "EACCES": "Permission denied"}
WRITES = ("openat", "mkdir", "write", "fsync", "renameat2", "fchmodat", "chmod")

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


def child(target: Path, *strace: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    command = ["strace", "-f", "-qq", *strace, sys.executable, "-c", PROGRAM, str(target), "new "]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder / "lesion.bundle"


def write_old(target: Path) -> None:
    with new_bundle(target, force=True) as folder:
        (folder / MANIFEST).write_bytes(OLD)


def calls(target: Path) -> list[tuple[str, int]]:
    """Every system call of the writer, by name and as the how manieth of that name in its process."""
    log = target.parent.parent / "strace.log"
    done = child(target, "-o", str(log))
    assert done.returncode == 0, done.stderr
    found, counts, inside = [], Counter[str](), False
    for line in log.read_text().splitlines():
        name = re.match(r"\d+ +(\w+)\(", line)
        if name is None:
            continue
        counts[name[1]] += 1
        if "/msa2net-begins" in line:
            inside = True
        elif "/msa2net-ends" in line:
            break
        elif inside:
            found.append((name[1], counts[name[1]]))
    return found


def require_whole(target: Path, old: bool) -> bytes | None:
    """The bundle is the old or the new one, each file as its sum has it; what it holds, or None if there is none."""
    if not target.exists():
        assert not old
        return None
    sums = dict(reversed(line.split("  ")) for line in (target / SUMS).read_text().splitlines())
    files = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
    assert sums.keys() == files.keys() - {SUMS}
    contents = {name: files[name].read_bytes() for name in sums}
    assert all(hashlib.sha256(content).hexdigest() == sums[name] for name, content in contents.items())
    kinds = {contents[name] for name in contents}
    assert len(kinds) == 1
    (kind,) = kinds
    assert kind in (OLD, NEW)
    assert (kind == NEW) == ("onnx/model.onnx" in sums)
    return kind


def require_no_litter(target: Path) -> None:
    """After the next export there is the bundle alone."""
    with new_bundle(target, force=True) as folder:
        (folder / MANIFEST).write_bytes(OLD)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def killed_at_each(target: Path, every: int, old: bool) -> Counter[str]:
    """Kills the writer at each `every`-th of its calls; how often the old and the new bundle were there then."""
    if old:
        write_old(target)
    places = calls(target)
    assert len(places) > 100
    assert {name for name, _ in places} >= {"openat", "mkdir", "write", "fsync", "renameat2", "flock"}
    outcomes = Counter[str]()
    for name, number in places[::every]:
        shutil.rmtree(target, ignore_errors=True)
        if old:
            write_old(target)
        done = child(target, "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}")
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), (name, number, done.returncode)
        kind = require_whole(target, old)
        outcomes["none" if kind is None else "old" if kind == OLD else "new"] += 1
        require_no_litter(target)
    return outcomes


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_a_kill_at_some_system_calls_leaves_the_old_bundle_or_the_new_one(target: Path, old: bool) -> None:
    outcomes = killed_at_each(target, 17, old)
    assert outcomes["old" if old else "none"] > 3


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_a_kill_at_any_system_call_leaves_the_old_bundle_or_the_new_one(target: Path, old: bool) -> None:
    outcomes = killed_at_each(target, 1, old)
    print(f"killed at {sum(outcomes.values())} system calls: {dict(outcomes)}")
    assert outcomes["new"] > 3
    assert outcomes["old" if old else "none"] > 50


def failing(target: Path, every: int, error: str) -> int:
    write_old(target)
    places = [(name, number) for name, number in calls(target) if name in WRITES]
    tried = 0
    for name, number in places[::every]:
        write_old(target)
        done = child(target, "-e", f"trace={name}", "-e", f"inject={name}:error={error}:when={number}")
        kind = require_whole(target, old=True)
        if done.returncode == 2:
            assert ERRORS[error] in done.stderr, (name, number, done.stderr)
            assert kind == OLD or "is written, but its name may be lost" in done.stderr
        else:  # what fails while the old bundle is cleared away changes nothing
            assert done.returncode == 0, (name, number, done.stderr)
            assert kind == NEW
        require_no_litter(target)
        tried += 1
    return tried


@pytest.mark.parametrize("error", list(ERRORS))
def test_a_disk_that_is_full_or_read_only_is_named_and_the_old_bundle_stays(target: Path, error: str) -> None:
    assert failing(target, 7, error) > 3


@pytest.mark.slow
@pytest.mark.parametrize("error", list(ERRORS))
def test_an_error_of_any_writing_call_is_named_and_the_old_bundle_stays(target: Path, error: str) -> None:
    print(f"{error} at {failing(target, 1, error)} system calls")


def test_two_that_write_one_name_at_once_leave_one_whole_bundle(target: Path) -> None:
    write_old(target)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    both = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(target), "new "], env=environment) for _ in range(4)]
    assert [each.wait() for each in both] == [0] * 4
    assert require_whole(target, old=True) == NEW
    require_no_litter(target)
