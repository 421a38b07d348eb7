"""Writing a bundle so that its name holds the old one, the new one, or nothing: never a half.

Everything is written to a locked sibling folder, synced, and moved to the bundle's name in one step. What a killed
export left behind is an unlocked sibling; the next export beside it clears it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msa2net.errors import ExportError
from msa2net.runtimes.bundle import MANIFEST, SUMS, digest_of_path, files_below, raised

_NO_REPLACE, _EXCHANGE, _HERE = 1, 2, -100  # renameat2's flags and AT_FDCWD
_PARTIAL = ".msa2net-partial-"


@contextmanager
def new_bundle(output: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to write a bundle into; when the block ends it is summed, synced and becomes `output`.

    If the block raises, the folder is removed and `output` is as it was.
    Raises ExportError if `output` exists and not `force`, if it exists and is no bundle, or if it cannot be written.
    """
    output = output.absolute()
    check_target(output, force)
    if not output.parent.is_dir():
        raise ExportError(
            output.parent, "no such folder", "expected the folder that will hold the bundle", "Create it."
        )
    with _explained(output), _locked(output.parent):
        _clear_abandoned(output.parent)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=output.parent))
        lock = _lock(partial)
    try:
        with _explained(output):
            yield partial
            _write_sums(partial)
            _sync(partial)
            check_target(output, force)
            _publish(partial, output, replace=force and output.exists())
        _sync_entry(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after an exchange this is the old bundle
        os.close(lock)


def check_target(output: Path, force: bool) -> None:
    """Raises ExportError if a bundle may not be written to `output`."""
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise ExportError(output, "exists", "expected a new name", "Use --force to replace it.")
    if output.is_symlink() or not (output / SUMS).is_file() or not (output / MANIFEST).is_file():
        raise ExportError(output, "exists and is no bundle", "expected a bundle to replace", "Choose another name.")


def _lock(folder: Path, wait: bool = True) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _clear_abandoned(parent: Path) -> None:
    for partial in parent.glob(f"{_PARTIAL}*"):
        try:
            lock = _lock(partial, wait=False)
        except OSError:
            continue  # its export is still running
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _write_sums(folder: Path) -> None:
    lines = []
    for relative in files_below(folder):
        lines.append(f"{digest_of_path(folder / relative)}  {relative}\n")
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _sync(folder: Path) -> None:
    """Files, then the folders that name them, the deepest first."""
    for below, _, names in os.walk(folder, topdown=False, onerror=raised):
        for name in [*names, "."]:
            path = Path(below, name)
            path.chmod(0o755 if name == "." else 0o644)
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(
            output, f"cannot be written ({error.strerror or error})", "", "Nothing was changed."
        ) from error


def _publish(partial: Path, output: Path, *, replace: bool) -> None:
    """Gives `partial` the name `output`: in exchange with the bundle there, or only if nothing has that name."""
    libc = ctypes.CDLL(None, use_errno=True)
    flag = _EXCHANGE if replace else _NO_REPLACE
    if not libc.renameat2(_HERE, os.fsencode(partial), _HERE, os.fsencode(output), flag):
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code))
    if replace:
        raise ExportError(
            output, "this file system cannot exchange two folders in one step", "", "Export to a new name instead."
        )
    partial.rename(output)  # without the flag a folder that is not empty, or a file, is still refused


def _sync_entry(output: Path) -> None:
    """The parent folder, so that the new name outlasts a power cut."""
    try:
        descriptor = os.open(output.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ExportError(
            output, f"is written, but its name may be lost in a power cut ({error.strerror})", "", "Check the disk."
        ) from error
