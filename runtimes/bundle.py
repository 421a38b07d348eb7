"""Reading a bundle: digests first, then the manifest, then the files that a runtime loads. `BUNDLE.md` is normative.

Standard library only. Nothing is parsed before its digest holds, and a model file is opened once: the descriptor that
was hashed is the one the runtime gets.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import stat
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from msa2net.errors import BundleError, RuntimeUnavailableError
from msa2net.runtimes import graphs

SCHEMA_VERSION = (4, 0)
READS = (2, 3, 4)  # major versions
SUMS, MANIFEST = "SHA256SUMS", "manifest.json"
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int8-portable")
RESIZE_RULES = ("bilinear", "bilinear-fixed", "spline")
FITS = ("stretch", "letterbox")
ENLARGE_RULES = ("nearest", "aligned", "bilinear")
# The way back on the grid of a resize rule.
ENLARGE_OF = {"bilinear": "nearest", "bilinear-fixed": "nearest", "spline": "aligned"}
BAKED_OUTPUTS = ("logits", "mask", "confidence", "colors")  # in this order; the first two always
# Of an artifact's files, by runtime: the ending says what a graph is held against before its runtime parses it.
ENDINGS = {
    "onnxruntime": (".onnx",),
    "openvino": (".xml", ".bin"),
    "pytorch": (".safetensors",),
    "tensorrt": (".onnx",),
    "tensorrt-rtx": (".engine",),
    "torch-tensorrt": (".safetensors",),
}
QUALITY = ("contrast", "saturation", "margin", "border", "area")  # the figures of `quality.Quality`
HARDWARE_COMPATIBILITY = ("none", "ampere+", "same-capability")
MOST_IMAGES = 1024  # of a batch
MOST_BAKED, MOST_SIDE = 64, 2**15  # graphs of an artifact; rows or columns of their frames
TARGETS = ("8.6", "8.9", "12.0")  # compute capabilities that engines are built for by default: GeForce RTX 30, 40, 50
VERDICTS = ("high", "standard", "failed", "unjudged")
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"  # not in any text: it would end up in logs and terminals
_TEXT = re.compile(f"[^{_CONTROL}]*")
_SUMS_LINE = re.compile(f"([0-9a-f]{{64}})  ([^{_CONTROL}\\\\]+)")
_DO_NOT_USE = "Do not use this bundle: export the model again."
_VERSION = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}")
_COPY_ANEW = "Copy the bundle anew."
MOST_BYTES, MOST_DEPTH = 1 << 20, 32  # of the manifest and the sums; of the manifest, objects and lists in each other
_PACKAGE = Path(__file__).resolve().parent  # an installer may have linked its files


@dataclass(frozen=True, kw_only=True)
class ClassInfo:
    """One class: its name and the colour of its overlay (R, G, B, 0 to 255)."""

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class InputContract:
    """How pixels become the network's input: resize by `resize` and `fit`, to [0, 1] by dtype, (x - mean) / std."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "bilinear"
    fit: str = "stretch"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of an artifact: POSIX path below the bundle, size in bytes, SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What the self-test allows against the golden outputs: largest |difference| of a logit, share of equal pixels."""

    logit: float
    pixels: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """An int8 artifact's time over the fastest higher precision's, measured at export in interleaved rounds.

    ratio     lower quartile, median and upper quartile of the rounds' ratios
    over      that precision, and `milliseconds`, of the artifact and of it
    machine   the processor, and `threads`, that it was measured with
    """

    ratio: tuple[float, float, float]
    over: str
    milliseconds: tuple[float, float]
    machine: str
    threads: int

    @property
    def faster(self) -> bool:
        """By more than the rounds scatter."""
        return self.ratio[2] < 1

    def __str__(self) -> str:
        return f"{self.ratio[1]:.2f} times {self.over}'s time on {self.machine}, {self.threads} threads"


@dataclass(frozen=True, kw_only=True)
class Withheld:
    """An artifact that was exported and judged, and not shipped: it was no faster than a higher precision."""

    runtime: str
    precision: str
    accuracy: str
    speed: Speed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an NVIDIA runtime builds an engine from the artifact with, or needs to run the engine that it is.

    version                  of the runtime's library: at least the first, below the second
    batch                    frames that one inference takes at most; 1: the shapes are fixed
    workspace                bytes of GPU memory that the build may use
    hardware_compatibility   one of `HARDWARE_COMPATIBILITY`: the GPUs that an engine built on one may run on
    compute_capabilities     of the GPUs that a ready engine is for, such as "8.6"; empty if it is built on the device
    """

    version: tuple[str, str]
    batch: int
    workspace: int
    hardware_compatibility: str
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Baked:
    """The artifact's network as a graph that takes a camera's frames and gives masks.

    frame     shape of its uint8 frames, (H, W) or (H, W, 3)
    outputs   some of `BAKED_OUTPUTS`
    """

    frame: tuple[int, ...]
    outputs: tuple[str, ...]
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model for one runtime in one precision. `files[0]` is the file that the runtime opens.

    rest         of int8: the precision of what is not in int8, where the CPU has it, else fp32
    speed        of int8, else None; of int8 for a GPU None, too, as it was not exported on one
    recipe       for NVIDIA's runtimes, else None
    baked        the same network for frames of one size each
    accuracy     the verdict of its check against fp32 at export, one of `VERDICTS`
    shortfalls   what keeps it from a better one, with figures
    parity       the whole evidence, for people
    """

    runtime: str
    precision: str
    files: tuple[FileEntry, ...]
    versions: dict[str, str]
    tolerance: Tolerance
    rest: str
    speed: Speed | None
    recipe: Recipe | None
    baked: tuple[Baked, ...]
    accuracy: str
    shortfalls: tuple[str, ...]
    parity: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.runtime} {self.precision}"

    @property
    def passed(self) -> bool:
        """Whether it may be picked for a user."""
        return has_passed(self.accuracy, self.precision)


@dataclass(frozen=True, kw_only=True)
class GoldenEntry:
    """A frame and the reference's logits and mask for it, as paths of `.npy` files below the bundle."""

    frame: str
    logits: str
    mask: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`, checked.

    quality   least and most of each of `QUALITY`; None if it has no limits
    """

    schema_version: tuple[int, int]
    model_name: str
    model_version: str
    model_variant: str
    model_config: dict[str, Any]
    notice: str
    classes: tuple[ClassInfo, ...]
    input: InputContract
    enlarge: str
    artifacts: tuple[Artifact, ...]
    withheld: tuple[Withheld, ...]
    golden: tuple[GoldenEntry, ...]
    quality: dict[str, tuple[float, float]] | None


def has_passed(verdict: str, precision: str) -> bool:
    """Whether the verdict is good enough. In fp32 the logits have been compared, if masks allowed no judgement."""
    return verdict in ("high", "standard") or (verdict == "unjudged" and precision == "fp32")


class _Node:
    """A JSON value with its path, so that every complaint names the place."""

    def __init__(self, value: Any, path: str = "$") -> None:
        self.value, self.path = value, path

    def refuse(self, expected: str) -> BundleError:
        if isinstance(self.value, dict):
            shown = "an object"
        elif isinstance(self.value, list):
            shown = f"a list of {len(self.value)}"
        else:
            shown = json.dumps(self.value)
            shown = shown if len(shown) <= 40 else shown[:37] + "..."
        return BundleError(f"{MANIFEST} {self.path}", f"got {shown}", f"expected {expected}", "Export the model again.")

    def get(self, key: str) -> _Node:
        if not isinstance(self.value, dict):
            raise self.refuse("an object")
        if key not in self.value:
            raise BundleError(
                f"{MANIFEST} {self.path}", f"no {key!r}", "expected that field", "Export the model again."
            )
        return _Node(self.value[key], f"{self.path}.{key}")

    def optional(self, key: str) -> _Node | None:
        return self.get(key) if key in self.object() else None

    def items(self, least: int = 0, most: int = 1_000_000) -> list[_Node]:
        if not isinstance(self.value, list) or not least <= len(self.value) <= most:
            raise self.refuse(f"a list of {least} to {most} entries")
        return [_Node(value, f"{self.path}[{i}]") for i, value in enumerate(self.value)]

    def object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.refuse("an object")
        return self.value

    def text(self, *choices: str) -> str:
        if not isinstance(self.value, str) or (choices and self.value not in choices):
            raise self.refuse(" or ".join(map(repr, choices)) or "a string")
        if not _TEXT.fullmatch(self.value):
            raise self.refuse("a string without control characters")
        return self.value

    def version(self) -> str:
        if not _VERSION.fullmatch(self.text()):
            raise self.refuse("a version such as '10.3' or '1.7.1.116'")
        return self.text()

    def integer(self, least: int, most: int) -> int:
        if type(self.value) is not int or not least <= self.value <= most:
            raise self.refuse(f"a whole number from {least} to {most}")
        return self.value

    def number(self, least: float, most: float) -> float:
        if type(self.value) not in (int, float) or not least <= self.value <= most:
            raise self.refuse(f"a number from {least:g} to {most:g}")
        return float(self.value)


def parse_manifest(content: bytes) -> Manifest:
    """The manifest from its bytes. Raises BundleError naming the JSON path, the value and what was expected."""
    if len(content) > MOST_BYTES:
        raise BundleError(
            MANIFEST, f"got {len(content)} bytes", f"expected at most {MOST_BYTES}", "Export the model again."
        )
    try:
        text = content.decode("utf-8")
        _require_shallow(text)
        root = _Node(json.loads(text, object_pairs_hook=_unique, parse_constant=_not_json, parse_float=_finite))
    except (ValueError, RecursionError) as error:
        raise BundleError(
            MANIFEST, f"not JSON ({error})", "expected a JSON object", "Export the model again."
        ) from error
    version = _schema_version(root.get("schema_version"))
    model, contract = root.get("model"), root.get("input")
    channels = contract.get("channels").integer(1, 3)
    if channels == 2:
        raise contract.get("channels").refuse("1 (grey) or 3 (RGB)")
    manifest = Manifest(
        schema_version=version,
        model_name=model.get("name").text(),
        model_version=model.get("version").text(),
        model_variant=model.get("variant").text(),
        model_config=model.get("config").object(),
        notice=model.get("notice").text(),
        classes=tuple(
            ClassInfo(
                name=node.get("name").text(),
                color=tuple(c.integer(0, 255) for c in node.get("color").items(3, 3)),  # type: ignore[arg-type]
            )
            for node in root.get("classes").items(2, 256)
        ),
        input=InputContract(
            height=contract.get("height").integer(1, 4096),
            width=contract.get("width").integer(1, 4096),
            channels=channels,
            mean=tuple(node.number(-1e6, 1e6) for node in contract.get("mean").items(channels, channels)),
            std=tuple(node.number(1e-6, 1e6) for node in contract.get("std").items(channels, channels)),
            resize=contract.get("resize").text(*RESIZE_RULES),
            fit=contract.get("fit").text(*FITS),
        ),
        enlarge=root.get("output").get("enlarge").text(*ENLARGE_RULES),
        artifacts=tuple(_artifact(node) for node in root.get("artifacts").items(1)),
        withheld=tuple(
            Withheld(
                runtime=node.get("runtime").text(),
                precision=node.get("precision").text(*PRECISIONS),
                accuracy=node.get("verdict").text(*VERDICTS),
                speed=_speed(node.get("speed")),
            )
            for node in (root.optional("withheld") or _Node([])).items()
        ),
        golden=tuple(
            GoldenEntry(**{key: node.get(key).text() for key in ("frame", "logits", "mask")})
            for node in root.get("golden").items(1)
        ),
        quality=_limits(limits) if (limits := root.optional("quality")) else None,
    )
    if len({info.name for info in manifest.classes}) != len(manifest.classes):
        raise BundleError(
            f"{MANIFEST} $.classes", "one name twice", "expected different names", "Export the model again."
        )
    names = [artifact.name for artifact in manifest.artifacts]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise BundleError(
                f"{MANIFEST} $.artifacts[{i}]", f"a second {name}", "expected one of each", "Export the model again."
            )
    return manifest


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)  # a string, or what opens or closes


def _require_shallow(text: str) -> None:
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > MOST_DEPTH:
            raise ValueError(f"objects and lists lie deeper than {MOST_DEPTH} in each other")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields. Readers differ in which of two equal ones they take, so two are refused."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has one field twice")
    return found


def _not_json(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _schema_version(node: _Node) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,4})\.([0-9]{1,4})", node.text())
    if not found:
        raise node.refuse("MAJOR.MINOR")
    version = int(found[1]), int(found[2])
    if version[0] not in READS:
        raise BundleError(
            f"{MANIFEST} {node.path}",
            f"got version {node.value}",
            f"expected {' or '.join(f'{major}.x' for major in READS)}",
            "Install the msa2net-edge that wrote the bundle, or export again with this one.",
        )
    if version > SCHEMA_VERSION:
        warnings.warn(
            f"the bundle's schema {node.value} is newer than this package's: what is new in it is ignored", stacklevel=2
        )
    return version


def parse_speed(value: dict[str, Any]) -> Speed:
    """A manifest's `speed`. Raises BundleError."""
    return _speed(_Node(value))


def _speed(node: _Node) -> Speed:
    low, median, high = (each.number(0, 1e6) for each in node.get("ratio").items(3, 3))
    own, other = (each.number(0, 1e9) for each in node.get("milliseconds").items(2, 2))
    return Speed(
        ratio=(low, median, high),
        over=node.get("over").text(*PRECISIONS),
        milliseconds=(own, other),
        machine=node.get("machine").text(),
        threads=node.get("threads").integer(1, 4096),
    )


def _limits(node: _Node) -> dict[str, tuple[float, float]]:
    found = {}
    for name in QUALITY:
        limits = node.get("limits").get(name)
        least, most = (each.number(0, 1) for each in limits.items(2, 2))
        found[name] = (least, most)
    return found


def version_numbers(version: str) -> list[int]:
    """The first four of a version, [10, 3, 0, 0] of "10.3" as of "10.3.0.post1": they compare as versions do."""
    return [*(int(part) for part in re.findall(r"(?<![a-z])\d+", version)), 0, 0, 0, 0][:4]


def parse_recipe(value: dict[str, Any]) -> Recipe:
    """A manifest's `recipe`. Raises BundleError."""
    return _recipe(_Node(value))


def _recipe(node: _Node) -> Recipe:
    versions = node.get("version")
    least, below = (each.version() for each in versions.items(2, 2))
    if version_numbers(least) >= version_numbers(below):
        raise versions.refuse("the first below the second")
    return Recipe(
        version=(least, below),
        batch=node.get("batch").integer(1, MOST_IMAGES),
        workspace=node.get("workspace").integer(1, 2**40),
        hardware_compatibility=node.get("hardware_compatibility").text(*HARDWARE_COMPATIBILITY),
        compute_capabilities=tuple(each.version() for each in node.get("compute_capabilities").items(0, 32)),
    )


def _files(node: _Node, runtime: str) -> tuple[FileEntry, ...]:
    found = tuple(
        FileEntry(
            path=file.get("path").text(),
            bytes=file.get("bytes").integer(1, 2**40),
            sha256=file.get("sha256").text(),
        )
        for file in node.get("files").items(1)
    )
    endings = ENDINGS.get(runtime)
    if endings and tuple(os.path.splitext(file.path)[1] for file in found) != endings:
        node = node.get("files")
        raise BundleError(
            f"{MANIFEST} {node.path}",
            f"got {', '.join(_shown(file.path) for file in found)}",
            f"expected {' and '.join(f'one {ending}' for ending in endings)} for {runtime}",
            "Export the model again.",
        )
    return found


def _baked(node: _Node, runtime: str) -> Baked:
    sides, outputs = node.get("frame").items(2, 3), node.get("outputs")
    names = tuple(each.text(*BAKED_OUTPUTS) for each in outputs.items(2, len(BAKED_OUTPUTS)))
    if names != tuple(name for name in BAKED_OUTPUTS if name in (*BAKED_OUTPUTS[:2], *names)):
        raise outputs.refuse(f"some of {', '.join(BAKED_OUTPUTS)} in this order, the first two always")
    shape = [each.integer(1, MOST_SIDE) for each in sides[:2]] + [each.integer(3, 3) for each in sides[2:]]
    return Baked(frame=tuple(shape), outputs=names, files=_files(node, runtime))


def _all_baked(node: _Node, runtime: str) -> tuple[Baked, ...]:
    found = tuple(_baked(each, runtime) for each in node.items(0, MOST_BAKED))
    if len({graph.frame for graph in found}) != len(found):
        raise node.refuse("one graph for each shape")
    return found


def _artifact(node: _Node) -> Artifact:
    tolerance, versions, parity = node.get("tolerance"), node.get("versions"), node.get("parity")
    runtime = node.get("runtime").text()
    rest, speed, recipe, baked = (node.optional(key) for key in ("rest", "speed", "recipe", "baked"))
    return Artifact(
        runtime=runtime,
        precision=node.get("precision").text(*PRECISIONS),
        files=_files(node, runtime),
        versions={_Node(key, versions.path).text(): versions.get(key).text() for key in versions.object()},
        tolerance=Tolerance(logit=tolerance.get("logit").number(0, 1e6), pixels=tolerance.get("pixels").number(0, 1)),
        rest=rest.text("fp32", "bf16") if rest else "fp32",
        speed=_speed(speed) if speed else None,
        recipe=_recipe(recipe) if recipe else None,
        baked=_all_baked(baked, runtime) if baked else (),
        accuracy=parity.get("verdict").text(*VERDICTS),
        shortfalls=tuple(reason.text() for reason in parity.get("reasons").items()),
        parity=parity.object(),
    )


def digest_of(file: BufferedReader) -> str:
    """SHA-256 of an open file, in hexadecimal; read in blocks, then rewound."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def digest_of_path(path: Path) -> str:
    """SHA-256 of the file that a writer has just written there; a reader hashes what it has opened."""
    with path.open("rb") as file:
        return digest_of(file)


def _shown(path: str) -> str:
    """A path as it may stand in a message of one line: a file system allows any byte in it."""
    return path if path.isprintable() else ascii(path)


def raised(error: OSError) -> None:
    """For os.walk, which otherwise passes over a folder that cannot be read as if it were empty."""
    raise error


def files_below(root: Path) -> list[str]:
    """Sorted POSIX paths of all files below `root`.

    Raises BundleError for anything but folders and regular files, and OSError for a folder that cannot be read.
    A regular file that has another name elsewhere could be changed by that: it is refused, unless an installer may have
    linked it.
    """
    found = []
    installed = root.resolve().is_relative_to(_PACKAGE)
    for folder, folders, names in os.walk(root, onerror=raised):
        for name in folders + names:
            path = Path(folder, name)
            about = path.lstat()
            mode, relative = about.st_mode, path.relative_to(root).as_posix()
            if stat.S_ISREG(mode) and about.st_nlink > 1 and not installed:
                raise BundleError(
                    _shown(relative), "is a hard link", "expected a file without another name", _COPY_ANEW
                )
            if stat.S_ISREG(mode):
                found.append(relative)
            elif not stat.S_ISDIR(mode):
                raise BundleError(_shown(relative), "is a link or a device", "expected only regular files", _COPY_ANEW)
    return sorted(found)


def _unreadable(relative: str, error: OSError) -> BundleError:
    return BundleError(relative, f"cannot be read ({error.strerror})", "expected a readable file", _COPY_ANEW)


class Bundle:
    """An opened bundle: `path`, `manifest`, `sums` (path -> SHA-256) and `digest`, the SHA-256 of its SHA256SUMS.

    Opening checks that exactly the listed files are there, the manifest's digest, its schema, and the artifacts'
    sums and sizes. The digest of a model or golden file is checked when it is used, that of every file by `verify`.
    Raises BundleError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise BundleError(self.path, "no such folder", "expected a bundle", "Make one with 'msa2net export'.")
        if not (self.path / SUMS).is_file():
            raise BundleError(self.path, f"no {SUMS} in it", "expected a bundle", "Make one with 'msa2net export'.")
        try:
            with (self.path / SUMS).open("rb") as file:
                content = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise _unreadable(SUMS, error) from error
        if len(content) > MOST_BYTES:
            raise BundleError(SUMS, f"got over {MOST_BYTES} bytes", "expected fewer", _COPY_ANEW)
        self.digest = hashlib.sha256(content).hexdigest()
        self.sums = self._parse_sums(content)
        self._check_listing()
        self.manifest = parse_manifest(self.read(MANIFEST))
        for artifact in self.manifest.artifacts:
            for entry in (*artifact.files, *(file for graph in artifact.baked for file in graph.files)):
                self._check_entry(entry)
        for golden in self.manifest.golden:
            for relative in (golden.frame, golden.logits, golden.mask):
                self._check_listed(relative)

    @staticmethod
    def _parse_sums(content: bytes) -> dict[str, str]:
        try:
            *lines, rest = content.decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise BundleError(SUMS, "not UTF-8", "expected lines of sha256sum", _COPY_ANEW) from error
        if rest:
            raise BundleError(SUMS, "its last line has no end", "expected whole lines", _COPY_ANEW)
        sums: dict[str, str] = {}
        folded: dict[str, str] = {SUMS.casefold(): SUMS}
        for number, line in enumerate(lines, 1):
            place = f"{SUMS} line {number}"
            found = _SUMS_LINE.fullmatch(line)
            if not found:
                raise BundleError(place, "not a sum", "expected '<64 hex digits>  <path>'", _COPY_ANEW)
            path, parts = found[2], found[2].split("/")
            if path in sums or path == SUMS or not all(parts) or {".", ".."} & set(parts) or ":" in path:
                raise BundleError(
                    place, f"got the path {path!r}", "expected a file inside the bundle, listed once", _DO_NOT_USE
                )
            if unicodedata.normalize("NFC", path) != path:
                raise BundleError(
                    place, f"got the path {path!r}", "expected its characters composed (NFC)", _DO_NOT_USE
                )
            if (other := folded.setdefault(path.casefold(), path)) != path:
                raise BundleError(
                    place, f"got the path {path!r}", f"expected more than case to tell it from {other!r}", _DO_NOT_USE
                )
            sums[path] = found[1]
        if MANIFEST not in sums:
            raise BundleError(SUMS, f"no line for {MANIFEST}", "expected one", _COPY_ANEW)
        return sums

    def _check_listing(self, changed: Sequence[str] = ()) -> None:
        """Raises BundleError with what is missing, what is extra and, if it is given, what has changed."""
        try:
            present = set(files_below(self.path)) - {SUMS}
        except OSError as error:
            raise _unreadable("a folder of it", error) from error
        kinds = {"missing": self.sums.keys() - present, "extra": present - self.sums.keys(), "changed": set(changed)}
        complaints = [f"{kind} {', '.join(map(_shown, sorted(paths)))}" for kind, paths in kinds.items() if paths]
        if complaints:
            what = "the sums" if kinds["changed"] and len(complaints) == 1 else "exactly the files"
            raise BundleError(self.path, "; ".join(complaints), f"expected {what} of {SUMS}", _COPY_ANEW)

    def _check_entry(self, entry: FileEntry) -> None:
        self._check_listed(entry.path)
        if self.sums[entry.path] != entry.sha256:
            raise BundleError(
                entry.path, f"its sums in {MANIFEST} and {SUMS} differ", "expected the same", "Export the model again."
            )
        size = (self.path / entry.path).stat().st_size
        if size != entry.bytes:
            raise BundleError(
                entry.path, f"got {size} bytes", f"expected {entry.bytes}", "The copy is incomplete: copy it anew."
            )

    def _check_listed(self, relative: str) -> None:
        if relative not in self.sums:
            raise BundleError(
                MANIFEST, f"names the file {relative!r}", f"expected one listed in {SUMS}", "Export the model again."
            )

    @contextmanager
    def open(self, relative: str) -> Iterator[BufferedReader]:
        """The file, open for reading and with its digest already held against the sums."""
        with self._opened(relative) as file:
            self._check(relative, file)
            yield file

    @contextmanager
    def _opened(self, relative: str) -> Iterator[BufferedReader]:
        self._check_listed(relative)
        with ExitStack() as stack:
            try:
                # Not by pathlib, which interns each part anew: after some hundred reads that table grows by 0.5 MB.
                file = stack.enter_context(open(os.path.join(self.path, relative), "rb"))
            except OSError as error:
                raise _unreadable(relative, error) from error
            yield file

    def _check(self, relative: str, file: BufferedReader) -> None:
        try:
            found = digest_of(file)
        except OSError as error:
            raise _unreadable(relative, error) from error
        if found != self.sums[relative]:
            raise BundleError(
                relative, f"changed: SHA-256 {found[:12]}…", f"expected {self.sums[relative][:12]}…", _COPY_ANEW
            )

    def read(self, relative: str) -> bytes:
        with self.open(relative) as file:
            return file.read()

    @contextmanager
    def open_artifact(self, artifact: Artifact | Baked) -> Iterator[tuple[str, ...]]:
        """Paths under which a runtime reads the very descriptors that were hashed, in the order of `artifact.files`.

        They are valid inside the `with` block. Where the system has no /proc/self/fd the files' own paths are given.
        """
        with self.open_unchecked(artifact) as (paths, check):
            check()
            yield paths

    @contextmanager
    def open_unchecked(self, artifact: Artifact | Baked) -> Iterator[tuple[tuple[str, ...], Callable[[], None]]]:
        """As `open_artifact`, but the digests are checked when the second value is called, in any thread, and what
        the graphs hold, see `graphs.check`.

        It raises BundleError. Until it has returned, nothing in these files may be parsed and no result given out.
        """
        with ExitStack() as stack:
            files = {entry.path: stack.enter_context(self._opened(entry.path)) for entry in artifact.files}

            def check() -> None:
                for relative, file in files.items():
                    self._check(relative, file)
                for relative, file in files.items():
                    if relative.endswith((".onnx", ".xml")):
                        try:
                            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                        except OSError as error:
                            raise _unreadable(relative, error) from error
                        with content:
                            graphs.check(relative, content)

            paths = {relative: f"/proc/self/fd/{file.fileno()}" for relative, file in files.items()}
            yield (
                tuple(path if os.path.exists(path) else str(self.path / relative) for relative, path in paths.items()),
                check,
            )

    def verify(self) -> int:
        """Checks the list of files and the digest of each; returns their number. Raises BundleError listing all."""
        changed = []
        for relative in self.sums:
            try:
                with self.open(relative):
                    pass
            except BundleError:
                if (self.path / relative).exists():
                    changed.append(relative)
        self._check_listing(changed)
        return len(self.sums)

    def require_version(self, least: str) -> None:
        """Raises BundleError unless the model's version is at least this; both are numbers with dots, as in "2.1"."""
        found = self.manifest.model_version
        for what, version in (("minimum_version", least), (f"{MANIFEST} $.model.version", found)):
            if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){0,3}", version):
                raise BundleError(what, f"got {version!r}", "expected numbers with dots, as in '2.1'", "Check it.")
        if version_numbers(found) < version_numbers(least):
            raise BundleError(
                self.path, f"holds version {found} of its model", f"expected at least {least}", "Use a newer bundle."
            )

    def artifact(self, runtime: str, precision: str) -> Artifact:
        """The artifact for `runtime` in `precision`; RuntimeUnavailableError, listing those there are, if none."""
        for artifact in self.manifest.artifacts:
            if (artifact.runtime, artifact.precision) == (runtime, precision):
                return artifact
        there = ", ".join(artifact.name for artifact in self.manifest.artifacts)
        raise RuntimeUnavailableError(
            self.path, f"no artifact for {runtime} in {precision}", f"it has: {there}", "Pick one, or export it."
        )
