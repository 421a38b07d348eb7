"""Compiled models kept on the device, so that the next start need not compile: `Cache` is a folder, `Slot` one model.

    FOLDER/<key>/entry.json    what it was compiled from and for, size and digests of the other files
    FOLDER/<key>/…             the runtime's own files

An entry is written beside its place and renamed into it, never changed, and used only after every byte of it was held
against its digests and its facts against what is asked for: anything else is removed and built anew. Nothing here is
an error: a folder that cannot be used means a start without it, and `Slot.problem` says why.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger("msa2net")
T = TypeVar("T")
VARIABLE = "MSA2NET_CACHE"
ENTRY = "entry.json"
VERDICT = "verdict.json"  # of the golden frames, beside what a backend has built
FORMAT = 1  # of an entry, and of what the backends write into one: a change of either is a new number
MOST_ENTRIES, MOST_BYTES = 32, 4 << 30
_BLOCK = 1 << 25  # what one digest covers; several are computed at once
_READ = 1 << 18
_PARTIAL, _DEAD, _LOCK = ".partial-", ".dead-", ".lock-"


class CacheWarning(UserWarning):
    """The compiled model could not be kept: this start works without it, and the next will take as long."""


def default_folder() -> Path | None:
    """$MSA2NET_CACHE (None if it is "off"), else $XDG_CACHE_HOME/msa2net, else ~/.cache/msa2net."""
    if named := os.environ.get(VARIABLE):
        return None if named == "off" else Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))) / "msa2net"


def cpu_features() -> set[str]:
    """The CPU's instruction sets, such as "AVX512BF16", as numpy reads them by CPUID; empty if it does not tell.

    Under user-mode emulation /proc/cpuinfo shows the host's, and this the emulated one's.
    """
    for package in ("numpy._core", "numpy.core"):  # since numpy 2, before it
        with suppress(ImportError):
            features = importlib.import_module(f"{package}._multiarray_umath").__cpu_features__
            return {name for name, there in features.items() if there}
    return set()


def processor_name() -> str:
    """The processor as the system calls it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine


def processor() -> str:
    """The processor's model and instruction sets: what is compiled for one may not run on another."""
    lines: set[str] = set()
    with suppress(OSError):  # the names of both on x86, of the latter on Arm
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        lines = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(wanted)}
    return "\n".join([os.uname().machine, *sorted(lines | cpu_features())])


class Entry:
    """An entry whose every byte has been checked: `path`, and `files`, the descriptors that were hashed, by name.

    Raises FileNotFoundError if there is none, OSError or ValueError with the reason if it must not be used.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.files: dict[str, BufferedReader] = {}
        self._stack = ExitStack()
        with ExitStack() as stack:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, folder)
            try:
                document = json.loads(self._open(stack, folder, ENTRY).read())
                listed = {name: (about["bytes"], about["sha256"]) for name, about in document["files"].items()}
            except FileNotFoundError as error:
                raise ValueError(f"it has no {ENTRY}") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"its {ENTRY} cannot be read") from error
            if document.get("facts") != facts:
                raise ValueError("it belongs to another model, runtime or machine")
            if set(os.listdir(folder)) != {ENTRY, *listed}:
                raise ValueError("its files are not those it lists")
            self.files = {name: self._open(stack, folder, name) for name in listed}
            found = _digests(self.files)
            for name, file in self.files.items():
                if (os.fstat(file.fileno()).st_size, found[name]) != listed[name]:
                    raise ValueError(f"{name} is damaged")
            self._digests = found
            self._stack = stack.pop_all()

    @staticmethod
    def _open(stack: ExitStack, folder: int, name: str) -> BufferedReader:
        flags = os.O_NOFOLLOW | os.O_CLOEXEC
        file = open(name, "rb", opener=lambda path, mode: os.open(path, mode | flags, dir_fd=folder))  # noqa: SIM115
        stack.callback(file.close)
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{name} is not a regular file")
        return file

    def read(self, name: str) -> bytes:
        """A file's bytes, held against its digests once more: these very bytes are what is loaded."""
        content = self.files[name].read()
        view = memoryview(content)
        digests = [hashlib.sha256(view[at : at + _BLOCK]).hexdigest() for at in range(0, len(content), _BLOCK)]
        if digests != self._digests[name]:
            raise ValueError(f"{name} was changed while it was loaded")
        return content

    def require_unmoved(self, name: str) -> None:
        """Raises ValueError unless the file's path still leads to the descriptor that was hashed.

        For a runtime that takes no descriptor: asked after it has loaded.
        """
        if not os.path.samestat(os.stat(self.path / name), os.fstat(self.files[name].fileno())):
            raise ValueError(f"{name} was replaced while it was loaded")

    def close(self) -> None:
        self._stack.close()


class Slot:
    """The place of one compiled model, known by its facts (a mapping of strings to JSON values).

    hit       whether the model came from here
    problem   why there is no use of it, or ""
    confirm   called before anything is compiled; what it raises ends the matter
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], confirm: Callable[[], object] = lambda: None) -> None:
        self.folder, self.confirm = folder, confirm
        self.facts = {"format": FORMAT, "processor": processor(), **facts}
        key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        self.path = folder / key[:32]
        self.hit, self.problem = False, ""
        self._entry: Entry | None = None
        self._held = ExitStack()  # the lock of `find`
        self._look()

    def _look(self) -> None:
        try:
            _require_private(self.folder)
            self._entry = Entry(self.path, self.facts)
        except FileNotFoundError:
            pass
        except PermissionError as error:
            self.problem = _reason(error)
        except (OSError, ValueError) as error:
            self._remove(str(error))

    def find(self, load: Callable[[Entry], T], *, exclusive: bool = False) -> T | None:
        """The model, loaded from the entry; None if there is none that loads.

        exclusive   if there is none, this process alone is to make it, until `close`; if another is at it, it is waited
                    for, and what it made is loaded. Where no lock can be had, `problem` says why.
        """
        model = self._loaded(load)
        if model is None and exclusive and not self.problem:
            try:
                self._exclude()
            except OSError as error:
                self.problem = _reason(error)
            else:
                self._look()
                model = self._loaded(load)
        return model

    def _exclude(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(self.folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.folder / f"{_LOCK}{self.path.name}", flags, 0o600)
        self._held.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("cache: another process makes %s: waiting for it", self.path.name)
            fcntl.flock(descriptor, fcntl.LOCK_EX)

    def _loaded(self, load: Callable[[Entry], T]) -> T | None:
        if not self._entry:
            return None
        try:
            model = load(self._entry)
        except Exception as error:  # each runtime has its own kinds
            self._remove(f"it does not load: {_reason(error)}")
            return None
        else:
            self.hit = True
            with suppress(OSError):  # when it was last used; a disk may be read-only
                os.utime(self.path / ENTRY)
            return model
        finally:
            self._close_entry()

    def keep(self, write: Callable[[Path], None]) -> None:
        """Stores what `write` puts into a folder in place of what is there; where it cannot, `problem` says why."""
        if self.problem:
            return
        try:
            if self.path.exists():
                _discard(self.path)
            self._store(write)
        except Exception as error:  # each runtime has its own kinds
            self.problem = _reason(error)

    def use(self, load: Callable[[Entry], T], write: Callable[[Path], None]) -> T | None:
        """The model, loaded from the entry; from one that `write` first puts into a folder, if there is none.

        None if that fails; the reason is `problem`. Whatever `load` needs of the entry it must map or read. Raises what
        `confirm` does.
        """
        if (model := self.find(load)) is not None:
            return model
        self.confirm()
        if self.problem:
            return None
        try:
            self._store(write)
            self._entry = Entry(self.path, self.facts)
            return load(self._entry)
        except Exception as error:
            self.problem = _reason(error)
            if self._entry:  # written well, and yet no use
                self._remove(self.problem)
            return None
        finally:
            self._close_entry()

    def close(self) -> None:
        self._close_entry()
        self._held.close()

    def _close_entry(self) -> None:
        if self._entry:
            self._entry.close()
            self._entry = None

    def _remove(self, reason: str) -> None:
        log.warning("cache: %s is not used and built anew: %s", self.path.name, reason)
        with suppress(OSError):
            _discard(self.path)

    def _store(self, write: Callable[[Path], None]) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(self.folder)
        partial_path = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.folder))
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, partial_path, ignore_errors=True)  # nothing is left there after the rename
            _lock(stack, partial_path)
            write(partial_path)
            files = {}
            for path in sorted(partial_path.iterdir()):
                path.chmod(0o600)
                files[path.name] = stack.enter_context(path.open("rb"))
            digests = _digests(files)
            about = {
                name: {"bytes": os.fstat(file.fileno()).st_size, "sha256": digests[name]}
                for name, file in files.items()
            }
            # Not synced to the disk: after a power cut its digests do not hold, and it is built anew.
            entry = partial_path / ENTRY
            entry.write_text(json.dumps({"facts": self.facts, "files": about}), encoding="utf-8")
            entry.chmod(0o600)
            try:
                partial_path.rename(self.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was first: its entry serves
                    raise
        with suppress(OSError):
            prune(self.folder, self.path)


def prune(folder: Path, keep: Path, most_entries: int = MOST_ENTRIES, most_bytes: int = MOST_BYTES) -> None:
    """Removes what a killed process left, then the entries last used longest ago until both limits hold.

    `keep` stays in any case. Only what this module has written is touched.
    """
    entries = []
    for path in folder.iterdir():
        if path.name.startswith(_DEAD):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(_PARTIAL):
            with suppress(OSError), ExitStack() as stack:  # its writer holds the lock for as long as it lives
                _lock(stack, path)
                shutil.rmtree(path, ignore_errors=True)
        elif path != keep:
            with suppress(OSError):  # another process may remove it, too
                entries.append(((path / ENTRY).stat().st_mtime_ns, _size(path), path))
    count, total = 1 + len(entries), _size(keep) + sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if count <= most_entries and total <= most_bytes:
            break
        with suppress(OSError):
            _discard(path)
        count, total = count - 1, total - size


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _discard(path: Path) -> None:
    """Out of its place in one step; a process that has mapped its files keeps them."""
    dead = Path(tempfile.mkdtemp(prefix=_DEAD, dir=path.parent))
    path.rename(dead)  # onto an empty folder
    shutil.rmtree(dead, ignore_errors=True)


def _lock(stack: ExitStack, folder: Path) -> None:
    """Raises OSError if another process holds it. The lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _require_private(folder: Path) -> None:
    """Raises PermissionError if others could put a model there, FileNotFoundError if there is no such folder."""
    about = folder.stat()
    if about.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "others may write to it")


def _digests(files: Mapping[str, BufferedReader]) -> dict[str, list[str]]:
    """SHA-256 of each file's blocks, read through the descriptor. hashlib lets several threads compute at once."""
    blocks = [
        (name, start) for name, file in files.items() for start in range(0, os.fstat(file.fileno()).st_size, _BLOCK)
    ]

    def digest(block: tuple[str, int]) -> str:
        name, start = block
        descriptor, total, buffer = files[name].fileno(), hashlib.sha256(), memoryview(bytearray(_READ))
        for offset in range(start, start + _BLOCK, _READ):
            total.update(buffer[: os.preadv(descriptor, [buffer], offset)])
        return total.hexdigest()

    found: dict[str, list[str]] = {name: [] for name in files}
    with ThreadPoolExecutor(2) as pool:
        for (name, _), value in zip(blocks, pool.map(digest, blocks), strict=True):
            found[name].append(value)
    return found


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())
