"""The cache of compiled models: what it never uses, what it survives, and that it changes no bit."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msa2net import Predictor
from msa2net.core.phantoms import phantom
from msa2net.errors import BundleError, RuntimeUnavailableError
from msa2net.runtimes import CacheWarning, cache
from msa2net.runtimes.backends import onnxruntime as backend
from msa2net.runtimes.cache import ENTRY, Entry, Slot, prune
from msa2net.runtimes.predictor import DEMO_BUNDLE

COMPILED = ("onnxruntime", "openvino")
FRAME = phantom("dermoscopy", 77, (120, 160)).image
FACTS = {"bundle": "0" * 64, "runtime": "none", "version": "1.0"}
CONTENT = {"model": b"graph", "weights": bytes(range(256)) * 300}


def write(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)


def read(entry: Entry) -> dict[str, bytes]:
    return {name: entry.read(name) for name in entry.files}


def used(folder: Path, facts: dict[str, Any] = FACTS) -> tuple[Slot, dict[str, bytes] | None]:
    slot = Slot(folder, facts)
    return slot, slot.use(read, write)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def filled(folder: Path) -> Path:
    """The one entry of `folder`."""
    assert used(folder)[1] == CONTENT
    return next(folder.iterdir())


def test_what_is_read_is_what_was_checked(folder: Path, filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    def overtaken(entry: Entry) -> bytes:
        with (entry.path / "weights").open("r+b") as file:
            file.write(b"\xff")
        return entry.read("weights")

    assert Slot(folder, FACTS).find(overtaken) is None
    assert "weights was changed while it was loaded" in caplog.text
    assert not filled.exists()


# A model that comes from it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", COMPILED)
def test_the_second_start_comes_from_the_cache_and_no_bit_changes(folder: Path, runtime: str) -> None:
    results = []
    for where in (False, folder, folder, str(folder)):
        with Predictor.load(DEMO_BUNDLE, runtime=runtime, cache=where) as predictor:
            results.append(predictor.predict(FRAME))
            assert predictor.self_test().passed
    assert [seg.execution.cached for seg in results] == [False, False, True, True]
    assert all(np.array_equal(seg.logits, results[0].logits) for seg in results)
    assert all(np.array_equal(seg.mask, results[0].mask) for seg in results)
    assert len({seg.execution.precision for seg in results}) == 1
    assert len({seg.execution.threads for seg in results}) == 1


def test_pytorch_compiles_nothing_and_keeps_nothing(folder: Path) -> None:
    for _ in range(2):
        with Predictor.load(DEMO_BUNDLE, runtime="pytorch", cache=folder) as predictor:
            assert not predictor.execution.cached
    assert not folder.exists()


def test_an_entry_belongs_to_its_user_alone(folder: Path) -> None:
    Predictor.load(DEMO_BUNDLE, runtime="onnxruntime", cache=folder).close()
    (entry,) = folder.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == [ENTRY, "model.data", "model.onnx"]
    assert {path.stat().st_mode & 0o777 for path in (folder, entry)} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in entry.iterdir()} == {0o600}


@pytest.mark.alone
def test_threads_are_part_of_what_openvino_compiles(folder: Path) -> None:
    for threads in (1, 2):
        with Predictor.load(DEMO_BUNDLE, runtime="openvino", threads=threads, cache=folder) as predictor:
            assert (predictor.execution.threads, predictor.execution.cached) == (threads, False)


def test_the_predictor_outlives_its_entry(folder: Path) -> None:
    for runtime in COMPILED:
        Predictor.load(DEMO_BUNDLE, runtime=runtime, cache=folder).close()
        with Predictor.load(DEMO_BUNDLE, runtime=runtime, cache=folder) as predictor:
            expected = predictor.predict(FRAME).logits
            shutil.rmtree(folder)
            assert np.array_equal(predictor.predict(FRAME).logits, expected)


@pytest.mark.parametrize("runtime", COMPILED)
def test_a_changed_artifact_is_refused_by_name_with_a_warm_cache(bundle: Path, folder: Path, runtime: str) -> None:
    Predictor.load(bundle, runtime=runtime, cache=folder).close()
    relative = {"onnxruntime": "onnx/model.onnx", "openvino": "openvino/model.bin"}[runtime]
    content = bytearray((bundle / relative).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / relative).write_bytes(content)
    with pytest.raises(BundleError, match=f"^{relative}: changed: SHA-256 [0-9a-f]{{12}}…, expected"):
        Predictor.load(bundle, runtime=runtime, cache=folder)


@pytest.mark.parametrize("runtime", COMPILED)
def test_nothing_is_compiled_from_a_changed_artifact(bundle: Path, folder: Path, runtime: str) -> None:
    for path in (*bundle.glob("onnx/*"), *bundle.glob("openvino/*.xml")):
        path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(BundleError, match=": changed: SHA-256"):
        Predictor.load(bundle, runtime=runtime, cache=folder)
    assert not folder.exists()


# What is never used --------------------------------------------------------------------------------------------------


def truncate(entry: Path) -> None:
    os.truncate(entry / "weights", 1000)


def flip(entry: Path) -> None:
    content = bytearray((entry / "weights").read_bytes())
    content[-1] ^= 1
    (entry / "weights").write_bytes(content)


def foreign(entry: Path) -> None:
    document = json.loads((entry / ENTRY).read_text())
    document["facts"]["version"] = "1.1"
    (entry / ENTRY).write_text(json.dumps(document))


def linked(entry: Path) -> None:
    (entry / "weights").rename(entry.parent / "elsewhere")
    (entry / "weights").symlink_to(entry.parent / "elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "weights is damaged"),
    "tampered": (flip, "weights is damaged"),
    "grown": (lambda entry: (entry / "model").write_bytes(b"graph and more"), "model is damaged"),
    "missing file": (lambda entry: (entry / "model").unlink(), "its files are not those it lists"),
    "extra file": (lambda entry: (entry / "other").touch(), "its files are not those it lists"),
    "link": (linked, "Too many levels of symbolic links"),
    "foreign version": (foreign, "it belongs to another model, runtime or machine"),
    "no digests": (lambda entry: (entry / ENTRY).unlink(), f"it has no {ENTRY}"),
    "digests cut off": (lambda entry: os.truncate(entry / ENTRY, 100), f"its {ENTRY} cannot be read"),
    "digests of a list": (lambda entry: (entry / ENTRY).write_text("[]"), f"its {ENTRY} cannot be read"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_not_used_and_built_anew(
    filled: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], reason: str
) -> None:
    damage(filled)
    slot, found = used(filled.parent)
    assert (found, slot.hit, slot.problem) == (CONTENT, False, "")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"cache: {filled.name} is not used and built anew: ")
    assert reason in message
    slot, found = used(filled.parent)
    assert (found, slot.hit) == (CONTENT, True)


def test_an_entry_in_the_place_of_another_is_not_used(filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = FACTS | {"bundle": "1" * 64}
    slot, found = used(filled.parent, other)
    assert found == CONTENT
    place = slot.path
    shutil.rmtree(place)
    shutil.copytree(filled, place)
    assert not used(filled.parent, other)[0].hit
    assert "it belongs to another model, runtime or machine" in caplog.text


@pytest.mark.parametrize("name", [*FACTS, "processor"])
def test_whatever_it_was_compiled_for_is_part_of_the_key(
    filled: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "processor":
        monkeypatch.setattr(cache, "processor", lambda: "another")
    slot = Slot(filled.parent, FACTS if name == "processor" else FACTS | {name: "another"})
    assert slot.path != filled
    assert slot.use(read, write) == CONTENT
    assert not slot.hit


def test_the_processor_is_told_by_its_instruction_sets() -> None:
    assert os.uname().machine in cache.processor()
    assert len(cache.processor().splitlines()) > 5


def test_a_file_replaced_while_it_loads_is_not_used(filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    def load(entry: Entry) -> bytes:
        if not slot.hit and entry.path.stat().st_mtime_ns == before:
            (entry.path / "weights").unlink()
            (entry.path / "weights").write_bytes(b"other")
        entry.require_unmoved("weights")
        return entry.files["weights"].read()

    before = filled.stat().st_mtime_ns
    slot = Slot(filled.parent, FACTS)
    assert slot.use(load, write) == CONTENT["weights"]
    assert not slot.hit
    assert "it does not load: weights was replaced while it was loaded" in caplog.text


@pytest.mark.parametrize("runtime", COMPILED)
def test_an_entry_that_the_runtime_cannot_load_is_built_anew(
    folder: Path, caplog: pytest.LogCaptureFixture, runtime: str
) -> None:
    """Its digests hold, as after a bug of an older version with the same number."""
    Predictor.load(DEMO_BUNDLE, runtime=runtime, cache=folder).close()
    (entry,) = folder.iterdir()
    document = json.loads((entry / ENTRY).read_text())
    for name in document["files"]:
        (entry / name).write_bytes(b"no model")
    with_files = {name: (entry / name).open("rb") for name in document["files"]}
    digests = cache._digests(with_files)
    for name, file in with_files.items():
        file.close()
        document["files"][name] = {"bytes": 8, "sha256": digests[name]}
    (entry / ENTRY).write_text(json.dumps(document))
    for expected in (False, True):
        with Predictor.load(DEMO_BUNDLE, runtime=runtime, cache=folder) as predictor:
            assert predictor.execution.cached is expected
            assert predictor.self_test().passed
    assert "is not used and built anew: it does not load: " in caplog.text


# A folder that cannot be used ----------------------------------------------------------------------------------------


def warned(runtime: str, folder: Path) -> str:
    """The one warning of a load that works all the same."""
    with pytest.warns(CacheWarning) as caught:
        predictor = Predictor.load(DEMO_BUNDLE, runtime=runtime, cache=folder)
    assert not predictor.execution.cached
    assert predictor.self_test().passed
    (warning,) = caught
    assert warning.filename == __file__
    return str(warning.message)


def text(folder: Path, reason: str) -> str:
    return (
        f"cache {folder}: the compiled model is not kept ({reason}), so the next start takes as long as this one. "
        "Name another folder, or pass cache=False."
    )


@pytest.mark.parametrize("mode", [0o777, 0o770], ids=["others", "group"])
def test_a_folder_that_others_may_write_to_is_refused(folder: Path, mode: int) -> None:
    used(folder)
    folder.chmod(mode)
    assert warned("onnxruntime", folder) == text(folder, "others may write to it")
    slot, found = used(folder)
    assert (found, slot.hit, slot.problem) == (None, False, "others may write to it")


def test_a_folder_of_another_user_is_refused(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: filled.stat().st_uid + 1)
    assert warned("onnxruntime", filled.parent) == text(filled.parent, "it belongs to another user")


def test_a_file_where_the_folder_should_be_means_uncached(folder: Path) -> None:
    folder.touch()
    assert warned("openvino", folder).startswith(f"cache {folder}: the compiled model is not kept (")


def test_a_read_only_disk_means_uncached_with_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    for runtime in COMPILED:
        assert warned(runtime, folder) == text(folder, "Read-only file system")


def test_an_entry_on_a_read_only_disk_is_used(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("mkdir", "utime", "rename"):
        monkeypatch.setattr(os, name, refuse)
    slot, found = used(filled.parent)
    assert (found, slot.hit, slot.problem) == (CONTENT, True, "")


@pytest.mark.parametrize("step", ["mkdir", "chmod", "write_text", "rename"])
def test_a_full_disk_at_any_step_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, full)
        slot, found = used(folder)
        assert (found, slot.problem) == (None, "No space left on device")
    assert not folder.exists() or not list(folder.iterdir())
    assert used(folder)[1] == CONTENT


# The runtime's own writes fail: a limit on the size of files does to them what a full disk does.
_LIMITED = """
import resource, sys, warnings
import numpy as np
from msa2net import Predictor
from msa2net.runtimes import CacheWarning
bundle, runtime, folder, limit = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    predictor = Predictor.load(bundle, runtime=runtime, cache=folder)
assert [warning.category for warning in caught] == [CacheWarning], [str(warning.message) for warning in caught]
assert predictor.self_test().passed and not predictor.execution.cached
"""


@pytest.mark.parametrize(
    ("runtime", "limit"),
    [
        ("onnxruntime", 1_000_000),
        ("onnxruntime", 4_400_000),
        ("onnxruntime", 6_000_000),
        ("openvino", 50),
        ("openvino", 500_000),
        ("openvino", 1_000_000),
    ],
)
def test_a_write_of_the_runtime_that_fails_leaves_nothing(folder: Path, runtime: str, limit: int) -> None:
    subprocess.run([sys.executable, "-c", _LIMITED, DEMO_BUNDLE, runtime, folder, str(limit)], check=True)
    assert not list(folder.iterdir())


# Several processes ---------------------------------------------------------------------------------------------------

_CHILD = """
import os, signal, sys
from pathlib import Path
import msa2net.runtimes.cache as cache
folder, when = Path(sys.argv[1]), sys.argv[2]
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
def write(path):
    (path / "model").write_bytes(b"half")
    if when == "write": die()
if when == "rename": Path.rename = die
if when == "digests": cache._digests = die
cache.Slot(folder, {"a": 1}).use(lambda entry: 1, write)
"""


@pytest.mark.parametrize("when", ["write", "digests", "rename"])
def test_what_a_killed_writer_leaves_is_never_used_and_cleared(folder: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD, folder, when])
    assert done.returncode == -signal.SIGKILL
    (left,) = folder.iterdir()
    assert left.name.startswith(".partial-")
    slot, found = used(folder, {"a": 1})
    assert (found, slot.hit) == (CONTENT, False)
    assert [path.name for path in folder.iterdir()] == [slot.path.name]


def test_what_a_living_writer_has_so_far_stays(folder: Path) -> None:
    def slow(path: Path) -> None:
        write(path)
        assert used(folder, {"other": 1})[1] == CONTENT  # prunes
        assert path.exists()

    assert Slot(folder, FACTS).use(read, slow) == CONTENT


def test_of_two_writers_the_first_to_finish_is_used_by_both(folder: Path) -> None:
    def slow(path: Path) -> None:
        write(path)
        assert used(folder)[1] == CONTENT

    slot = Slot(folder, FACTS)
    assert slot.use(read, slow) == CONTENT
    assert (slot.hit, slot.problem) == (False, "")
    assert list(folder.iterdir()) == [slot.path]


_BOTH = """
import sys, warnings
import numpy as np
warnings.simplefilter("error")
from msa2net import Predictor
predictor = Predictor.load(sys.argv[1], runtime=sys.argv[2], cache=sys.argv[3])
assert predictor.self_test().passed
print(predictor.predict(np.zeros((50, 60), np.uint8)).logits.tobytes().hex()[:64])
"""


@pytest.mark.parametrize("runtime", COMPILED)
def test_two_processes_that_start_at_once_both_work(folder: Path, runtime: str) -> None:
    command = [sys.executable, "-c", _BOTH, DEMO_BUNDLE, runtime, folder]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert results[0] == results[1]
    assert len(list(folder.iterdir())) == 1


# Its size ------------------------------------------------------------------------------------------------------------


def entries(folder: Path, count: int) -> list[Path]:
    """As many, each last used a second after the one before."""
    found = []
    for number in range(count):
        slot, _ = used(folder, {"number": number})
        os.utime(slot.path / ENTRY, (number, number))
        found.append(slot.path)
    return found


def test_the_entry_last_used_longest_ago_goes_first(folder: Path) -> None:
    paths = entries(folder, 4)
    slot, _ = used(folder, {"number": 0})  # in use again
    assert slot.hit
    prune(folder, paths[3], most_entries=2)
    assert set(folder.iterdir()) == {paths[0], paths[3]}


def test_the_size_is_bounded_and_the_newest_stays_in_any_case(folder: Path) -> None:
    paths = entries(folder, 4)
    size = cache._size(paths[0])
    prune(folder, paths[3], most_bytes=3 * size + 10)
    assert set(folder.iterdir()) == set(paths[1:])
    prune(folder, paths[3], most_bytes=1)
    assert list(folder.iterdir()) == [paths[3]]


def test_storing_prunes(folder: Path) -> None:
    entries(folder, cache.MOST_ENTRIES + 2)
    assert len(list(folder.iterdir())) == cache.MOST_ENTRIES


def test_what_is_not_of_the_cache_is_not_removed(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "notes").mkdir()
    (folder / "notes" / "text").touch()
    (folder / "file").touch()
    (path,) = entries(folder, 1)
    prune(folder, path, most_entries=1, most_bytes=1)
    assert {each.name for each in folder.iterdir()} == {"notes", "file", path.name}


# Where it is ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MSA2NET_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/msa2net"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/msa2net"),
        ({"MSA2NET_CACHE": "", "HOME": "/c"}, "/c/.cache/msa2net"),
        ({"MSA2NET_CACHE": "off", "HOME": "/c"}, None),
    ],
)
def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None) -> None:
    for name in ("MSA2NET_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.default_folder() == (Path(expected) if expected else None)


@pytest.mark.parametrize("where", [None, "auto"])
def test_without_a_name_the_default_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str | None) -> None:
    monkeypatch.setenv("MSA2NET_CACHE", str(folder))
    for expected in (False, True):
        with Predictor.load(DEMO_BUNDLE, runtime="onnxruntime", cache=where) as predictor:
            assert predictor.execution.cached is expected
    monkeypatch.setenv("MSA2NET_CACHE", "off")
    with Predictor.load(DEMO_BUNDLE, runtime="onnxruntime", cache=where) as predictor:
        assert not predictor.execution.cached


@pytest.mark.parametrize("where", [True, 1, b"folder"])
def test_what_names_no_folder_is_refused(where: Any) -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        Predictor.load(DEMO_BUNDLE, cache=where)
    assert str(caught.value) == (f"cache: got {where!r}, expected a folder, None, 'auto' or False. Leave it out.")


def test_a_good_start_logs_and_warns_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "msa2net"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            Predictor.load(DEMO_BUNDLE, runtime="openvino", cache=folder).close()
    assert not caplog.records


# ONNX without its weights --------------------------------------------------------------------------------------------


def test_weights_moved_out_of_an_onnx_model_are_the_same(tmp_path: Path) -> None:
    import mmap

    import onnx
    from onnx import numpy_helper

    source = next(DEMO_BUNDLE.glob("onnx/*.onnx"))
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        (tmp_path / "model.onnx").write_bytes(backend.without_weights(content, tmp_path / "weights"))
    slim, whole = onnx.load(tmp_path / "model.onnx", load_external_data=False), onnx.load(source)
    outside = [each for each in slim.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
    assert len(outside) > 50
    assert all(int(pair.value) % 4096 == 0 for each in outside for pair in each.external_data if pair.key == "offset")
    moved = onnx.load(tmp_path / "model.onnx")
    for before, after in zip(whole.graph.initializer, moved.graph.initializer, strict=True):
        assert (before.name, before.data_type, before.dims) == (after.name, after.data_type, after.dims)
        assert np.array_equal(numpy_helper.to_array(before), numpy_helper.to_array(after))
    for model in (whole, moved):
        del model.graph.initializer[:]
    assert whole == moved


@pytest.mark.parametrize("content", [b"\xff" * 20, b"no model at all", b"\x3a\xff\x7f", b"\x0b\x01"])
def test_what_is_no_onnx_model_is_refused(tmp_path: Path, content: bytes) -> None:
    import mmap

    (tmp_path / "model").write_bytes(content)
    with (
        (tmp_path / "model").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        pytest.raises(ValueError, match="not an ONNX model"),
    ):
        backend.without_weights(mapped, tmp_path / "weights")
