"""The C and C++ library: built here, its masks against Python's, and a code and a line for each way of going wrong."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import set_manifest, sha256, sum_again
from numpy.typing import NDArray

from msa2net import Predictor
from msa2net.core.phantoms import phantom
from msa2net.export import export_bundle, parity
from msa2net.runtimes.bundle import MANIFEST, QUALITY, SUMS, Bundle

SOURCE = Path(__file__).parents[1] / "runtimes" / "cpp"
ARGUMENT, BUNDLE, UNAVAILABLE, OUTPUT = 1, 2, 3, 4
COLOUR, GREY = (180, 320, 3), (96, 128)
DEMO = Path(__file__).parents[1] / "core" / "demo.safetensors"
JSON_HEADER = Path("/usr/include/nlohmann/json.hpp")
NEEDED = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
NEEDED += [] if JSON_HEADER.exists() else ["nlohmann-json3-dev"]
NEEDED += [] if Path("/usr/include/openssl/evp.h").exists() else ["libssl-dev"]

pytestmark = pytest.mark.skipif(bool(NEEDED), reason=f"needs {', '.join(NEEDED)}")


def built(folder: Path, *options: str) -> Path:
    """The folder of the library and the example."""
    package = importlib.util.find_spec("openvino")
    assert package is not None
    assert package.origin is not None
    where = f"-DOpenVINO_DIR={Path(package.origin).parent / 'cmake'}"
    for command in (
        ("cmake", "-S", str(SOURCE), "-B", str(folder), where, *options),
        ("cmake", "--build", str(folder)),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("cpp"))


class Report(ctypes.Structure):
    _fields_ = (
        ("frames", ctypes.c_int32),
        ("logit_difference", ctypes.c_double),
        ("logit_tolerance", ctypes.c_double),
        ("pixel_agreement", ctypes.c_double),
        ("pixel_tolerance", ctypes.c_double),
    )


class Quality(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_double) for name in QUALITY), ("flags", ctypes.c_uint32))


class Library:
    """msa2net.h by ctypes.

    quality   of the last frame
    """

    def __init__(self, path: Path) -> None:
        self.quality = Quality()
        self.c = ctypes.CDLL(str(path))
        for name in ("digest", "class_name", "last_error"):
            getattr(self.c, f"msa2net_{name}").restype = ctypes.c_char_p
        self.c.msa2net_digest.argtypes = [ctypes.c_void_p]
        self.c.msa2net_class_name.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        self.c.msa2net_close.argtypes = [ctypes.c_void_p]
        self.c.msa2net_predict.argtypes = [ctypes.c_void_p] * 5
        self.c.msa2net_self_test.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def open(self, bundle: Path, shape: tuple[int, ...] = GREY, precision: str = "fp32", threads: int = 2) -> Any:
        """The handle, or the code and the line of the failure."""
        handle = ctypes.c_void_p(1)
        code = self.c.msa2net_open(
            os.fsencode(bundle), precision.encode(), *(*shape, 1)[:3], threads, ctypes.byref(handle)
        )
        if code:
            assert not handle.value
            return code, self.said()
        assert self.said() == ""
        return handle

    def said(self) -> str:
        text = self.c.msa2net_last_error().decode()
        assert text.isprintable()
        return str(text)

    def predict(self, handle: Any, frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        frame = np.ascontiguousarray(frame)
        mask, confidence = (np.full(frame.shape[:2], 255, np.uint8) for _ in range(2))
        places = (each.ctypes.data for each in (frame, mask, confidence))
        code = self.c.msa2net_predict(handle, *places, ctypes.byref(self.quality))
        assert code == 0, self.said()
        return mask, confidence


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    return Library(folder / "libmsa2net.so")


@pytest.fixture
def copy(baked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(baked, tmp_path / "copy.bundle"))


def frame(shape: tuple[int, ...], seed: int = 78) -> NDArray[np.uint8]:
    image = phantom("dermoscopy" if seed % 2 else "ultrasound", seed, (shape[0], shape[1])).image
    return np.ascontiguousarray(image if len(shape) == 3 else image[..., 1])


# What is right -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [COLOUR, GREY], ids=str)
def test_its_masks_are_pythons(library: Library, baked: Path, shape: tuple[int, ...]) -> None:
    handle = library.open(baked, shape)
    with Predictor.load(baked, runtime="openvino", frame_shape=shape, cache=False) as predictor:
        for seed in range(6):
            expected = predictor.predict(frame(shape, seed))
            mask, confidence = library.predict(handle, frame(shape, seed))
            assert np.array_equal(mask, expected.mask)
            assert np.array_equal(confidence, expected.confidence)
    assert library.c.msa2net_digest(handle).decode() == Bundle(baked).digest
    assert [library.c.msa2net_class_name(handle, i) for i in (-1, 0, 1, 2)] == [None, b"background", b"lesion", None]
    report = Report()
    assert library.c.msa2net_self_test(handle, ctypes.byref(report)) == 0
    assert report.frames == 1
    assert report.logit_difference <= report.logit_tolerance
    assert report.pixel_agreement >= report.pixel_tolerance == 0.9999
    library.c.msa2net_close(handle)


def test_the_example_segments_a_file_of_frames(folder: Path, baked: Path, tmp_path: Path) -> None:
    frames = [frame(COLOUR, seed) for seed in range(3)]
    (tmp_path / "frames").write_bytes(b"".join(each.tobytes() for each in frames))
    command = [folder / "segment", baked, "fp32", *COLOUR, tmp_path / "frames", tmp_path / "masks", 1]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"bundle {Bundle(baked).digest}: 1 golden frames pass")
    assert done.stdout.count(" ms, flags ") == 3
    masks = np.frombuffer((tmp_path / "masks").read_bytes(), np.uint8).reshape(3, *COLOUR[:2])
    with Predictor.load(baked, runtime="openvino", frame_shape=COLOUR, cache=False) as predictor:
        for each, mask in zip(frames, masks, strict=True):
            assert np.array_equal(predictor.predict(each).mask, mask)


def qualities(shape: tuple[int, ...]) -> list[NDArray[np.uint8]]:
    """Frames with and without something to say of each."""
    black, white, half = np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), frame(shape, 3)
    half[: shape[0] // 2] = 255
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return [frame(shape, 1), frame(shape, 2), black, white, half, noise]


def assert_pythons_figures(library: Library, bundle: Path, shape: tuple[int, ...]) -> set[str]:
    """The flags that came up among `qualities`."""
    seen = set()
    handle = library.open(bundle, shape)
    with Predictor.load(bundle, runtime="openvino", frame_shape=shape, cache=False) as predictor:
        for each in qualities(shape):
            expected = predictor.predict(each)
            library.predict(handle, each)
            for name in QUALITY:
                assert getattr(library.quality, name) == pytest.approx(getattr(expected.quality, name), abs=1e-6)
            flags = [name for i, name in enumerate(QUALITY) if library.quality.flags >> i & 1]
            assert tuple(flags) == expected.flags
            seen.update(flags)
    library.c.msa2net_close(handle)
    return seen


@pytest.mark.parametrize("shape", [COLOUR, GREY], ids=str)
def test_the_figures_beside_a_mask_are_pythons(library: Library, baked: Path, shape: tuple[int, ...]) -> None:
    assert {"contrast", "saturation"} <= assert_pythons_figures(library, baked, shape)


def test_the_margin_of_a_letterboxed_frame_is_of_where_it_lies(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "phantom_cases", partial(parity.phantom_cases, count=2))
    bundle = export_bundle(
        DEMO,
        tmp_path / "b",
        runtimes=("openvino",),
        fit="letterbox",
        bake=("97x61:grey", "50x300"),
        bake_outputs=("confidence",),
        progress=False,
    )
    for shape in ((61, 97), (300, 50, 3)):
        assert_pythons_figures(library, bundle, shape)


def test_a_mask_may_be_written_over_its_frame(library: Library, baked: Path) -> None:
    handle, pixels = library.open(baked), frame(GREY, 3)
    expected = library.predict(handle, pixels)[0], library.quality.contrast
    code = library.c.msa2net_predict(
        handle, pixels.ctypes.data, pixels.ctypes.data, None, ctypes.byref(library.quality)
    )
    assert code == 0
    assert np.array_equal(pixels, expected[0])
    assert library.quality.contrast == expected[1]
    library.c.msa2net_close(handle)


def test_a_bundle_without_limits_flags_nothing(library: Library, copy: Path) -> None:
    edited(lambda d: d.pop("quality"))(copy)
    handle = library.open(copy)
    library.predict(handle, np.zeros(GREY, np.uint8))
    assert (library.quality.flags, library.quality.contrast) == (32, 0)
    library.c.msa2net_close(handle)


def test_the_example_is_short_and_the_header_is_c(tmp_path: Path) -> None:
    assert len((SOURCE / "segment.cpp").read_text().splitlines()) < 80
    file = tmp_path / "a.c"
    file.write_text('#include "msa2net.h"\nint main(void) { msa2net_close(0); return MSA2NET_OK; }\n')
    strict = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", f"-I{SOURCE}")
    subprocess.run(["gcc", *strict, str(file)], check=True)


def test_several_threads_get_what_one_gets(library: Library, baked: Path) -> None:
    handle = library.open(baked)
    frames = [frame(GREY, seed) for seed in range(8)]
    expected = [library.predict(handle, each)[0] for each in frames]
    found: dict[int, NDArray[np.uint8]] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = library.predict(handle, frames[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], expected[i]) for i in range(8))
    library.c.msa2net_close(handle)


def test_the_weights_that_were_held_against_their_sum_are_those_that_run(library: Library, copy: Path) -> None:
    """A bundle that is overwritten in place, file by file, under a program that has it open."""
    handle = library.open(copy)
    expected = library.predict(handle, frame(GREY))
    for file in (copy / "openvino").iterdir():
        file.write_bytes(b"")
    assert all(map(np.array_equal, library.predict(handle, frame(GREY)), expected))
    library.c.msa2net_close(handle)


def test_a_child_after_a_fork_is_told(library: Library, baked: Path) -> None:
    handle = library.open(baked)
    if not (child := os.fork()):
        mask = np.zeros(GREY, np.uint8)
        code = library.c.msa2net_predict(handle, frame(GREY).ctypes.data, mask.ctypes.data, None, None)
        tested = library.c.msa2net_self_test(handle, ctypes.byref(Report()))
        os._exit(0 if code == tested == UNAVAILABLE and library.said().startswith("model: was opened before a") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    library.c.msa2net_close(handle)


@pytest.mark.parametrize(
    ("frames", "threads", "text"),
    [
        (None, 1, "error: FRAMES cannot be read. Check its path."),
        (GREY[0] * GREY[1] + 7, 1, "error: FRAMES ends within a frame. Check ROWS, COLUMNS, CHANNELS."),
        (GREY[0] * GREY[1], "two", "error: threads: -1, expected 0 to 1024."),
    ],
)
def test_the_example_does_not_call_half_a_job_done(
    folder: Path, baked: Path, tmp_path: Path, frames: int | None, threads: Any, text: str
) -> None:
    if frames:
        (tmp_path / "frames").write_bytes(bytes(frames))
    command = [folder / "segment", baked, "fp32", *GREY, 1, tmp_path / "frames", tmp_path / "masks", threads]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == ARGUMENT
    assert done.stderr.startswith(text)


def test_opening_and_closing_leaves_no_descriptor_open(library: Library, baked: Path) -> None:
    counts = []
    for _ in range(4):
        library.c.msa2net_close(library.open(baked))
        library.open(baked, (5, 5))  # that fails
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[1:] == counts[:-1]


# What is wrong -------------------------------------------------------------------------------------------------------


def test_what_the_caller_gives_is_checked(library: Library, baked: Path, tmp_path: Path) -> None:
    call, place = library.c.msa2net_open, ctypes.c_void_p()
    assert call(None, b"fp32", 1, 1, 1, 1, ctypes.byref(place)) == ARGUMENT
    assert call(os.fsencode(baked), b"fp32", 1, 1, 1, 1, None) == ARGUMENT
    assert library.said().startswith("msa2net_open: a null pointer, expected ")
    for shape in ((0, 5), (5, 40_000), (5, 5, 2), (5, 5, 4), (-1, 5)):
        code, text = library.open(baked, shape)
        assert code == ARGUMENT
        assert "expected 1 to 32768 rows and columns, 1 or 3 channels" in text
    assert library.open(baked, threads=-1)[0] == ARGUMENT
    assert library.open(baked, (5, 5))[1] == (
        "openvino fp32: nothing is baked for frames of 5 x 5, expected a size and precision of the bundle. "
        "Export with --bake."
    )
    assert "the bundle has no such artifact" in library.open(baked, precision="int8-portable")[1]
    assert library.open(baked, precision="fp16")[1].startswith("precision: got fp16, expected fp32, bf16, int8 or ")
    code, text = library.open(tmp_path / "none")
    assert code == BUNDLE
    assert text.endswith("No such file or directory, expected a bundle's folder. Check the path.")
    handle = library.open(baked)
    assert library.c.msa2net_predict(handle, None, None, None, None) == ARGUMENT
    assert library.c.msa2net_self_test(handle, None) == ARGUMENT
    assert library.c.msa2net_predict(None, None, None, None, None) == ARGUMENT
    library.c.msa2net_close(handle)
    library.c.msa2net_close(None)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The manifest changed, and all sums right."""

    def apply(root: Path) -> None:
        document = json.loads((root / MANIFEST).read_bytes())
        change(document)
        set_manifest(root, json.dumps(document).encode())

    return apply


def manifest_of(content: bytes) -> Callable[[Path], None]:
    return lambda root: set_manifest(root, content)


def flipped(name: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        content = bytearray((root / name).read_bytes())
        content[len(content) // 2] ^= 1
        (root / name).write_bytes(content)

    return apply


def sums_of(text: str) -> Callable[[Path], None]:
    return lambda root: (root / SUMS).write_text(text) and None


def with_graph(text: bytes) -> Callable[[Path], None]:
    """The graph for grey frames replaced, every sum right."""

    def apply(root: Path) -> None:
        document = json.loads((root / MANIFEST).read_bytes())
        for artifact in document["artifacts"]:
            for graph in artifact.get("baked", ()):
                if artifact["runtime"] == "openvino" and graph["frame"] == list(GREY):
                    entry = graph["files"][0]
                    (root / entry["path"]).write_bytes(text)
                    entry |= {"bytes": len(text), "sha256": sha256(text)}
        set_manifest(root, json.dumps(document).encode())

    return apply


def openvino_entry(document: dict[str, Any]) -> dict[str, Any]:
    return next(each for each in document["artifacts"] if each["runtime"] == "openvino")


ZERO, XML = "0" * 64, "openvino/model-128x96-grey.xml"
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no sums": (lambda root: (root / SUMS).unlink(), "SHA256SUMS: cannot be read (No such file or directory)"),
    "empty sums": (sums_of(""), "SHA256SUMS: no line for manifest.json"),
    "half a line": (sums_of(f"{ZERO}  manifest.json"), "SHA256SUMS line 1: has no end"),
    "no digits": (sums_of(f"{'g' * 64}  a\n"), "SHA256SUMS line 1: is no sum"),
    "outside": (sums_of(f"{ZERO}  ../a\n"), "SHA256SUMS line 1: names '../a', expected a file inside the bundle"),
    "absolute": (sums_of(f"{ZERO}  /etc/passwd\n"), "SHA256SUMS line 1: names '/etc/passwd', expected a file inside"),
    "a drive": (sums_of(f"{ZERO}  C:/a\n"), "SHA256SUMS line 1: names 'C:/a', expected a file inside the bundle"),
    "twice": (sums_of(f"{ZERO}  a\n{ZERO}  a\n"), "SHA256SUMS line 2: names 'a' again, expected each file once"),
    "long sums": (sums_of("\n" * (1 << 21)), "SHA256SUMS: has over 1048576 bytes"),
    "an extra file": (lambda root: (root / "extra").write_bytes(b""), "the bundle: extra extra, expected exactly"),
    "a missing file": (lambda root: (root / "golden/0_mask.npy").unlink(), "the bundle: missing golden/0_mask.npy"),
    "a link": (lambda root: (root / "link").symlink_to("/etc/passwd"), "link: is a link or a device"),
    "a pipe": (lambda root: os.mkfifo(root / "pipe"), "pipe: is a link or a device"),
    "a hard link": (lambda root: os.link(root / MANIFEST, root.parent / "other"), "manifest.json: is a hard link"),
    "a changed manifest": (flipped(MANIFEST), "manifest.json: changed: SHA-256 "),
    "changed weights": (flipped("openvino/model.bin"), "openvino/model.bin: changed: SHA-256 "),
    "a changed graph": (flipped("openvino/model-128x96-grey.xml"), "openvino/model-128x96-grey.xml: changed: SHA-256 "),
    "no JSON": (manifest_of(b"{"), "manifest.json: [json.exception.parse_error"),
    "a list": (manifest_of(b"[]"), "manifest.json: [json.exception.type_error"),
    "NaN": (manifest_of(b'{"a": NaN}'), "manifest.json: [json.exception.parse_error"),
    "too deep": (
        manifest_of(b'{"a":' * 40 + b"1" + b"}" * 40),
        "manifest.json: its objects lie too deep in each other",
    ),
    "a field twice": (manifest_of(b'{"a": 1, "a": 2}'), "manifest.json: an object has one field twice"),
    "another schema": (edited(lambda d: d.update(schema_version="5.0")), "manifest.json: got schema version 5.0"),
    "no input": (edited(lambda d: d.pop("input")), "manifest.json: [json.exception.out_of_range"),
    "one class": (edited(lambda d: d.update(classes=d["classes"][:1])), "manifest.json: 1 classes, expected 2 to 256"),
    "failed": (
        edited(lambda d: openvino_entry(d)["parity"].update(verdict="failed")),
        "openvino fp32: its accuracy check at export says failed",
    ),
    "an unlisted file": (
        edited(lambda d: openvino_entry(d)["baked"][1]["files"][0].update(path="../x")),
        "manifest.json: names the file '../x', expected one listed in SHA256SUMS",
    ),
    "other sums": (
        edited(lambda d: openvino_entry(d)["baked"][1]["files"][0].update(sha256=ZERO)),
        "openvino/model-128x96-grey.xml: its sums in manifest and SHA256SUMS differ",
    ),
    "no outputs": (
        edited(lambda d: openvino_entry(d)["baked"][1].update(outputs=["mask"])),
        'manifest.json: a graph\'s outputs are ["mask"], expected logits, mask, then confidence',
    ),
    "other outputs": (
        edited(lambda d: openvino_entry(d)["baked"][1].update(outputs=["logits", "mask"])),
        "openvino/model-128x96-grey.xml: has other inputs or outputs",
    ),
    "unjudged": (
        edited(lambda d: openvino_entry(d)["parity"].update(verdict="none")),
        "openvino fp32: its accuracy check at export says none",
    ),
    "another rest": (
        edited(lambda d: openvino_entry(d).update(rest="int4")),
        "manifest.json: the rest of int8 is in int4",
    ),
    "another fit": (edited(lambda d: d["input"].update(fit="crop")), "manifest.json: the fit is crop, expected "),
    "a limit beyond": (
        edited(lambda d: d["quality"]["limits"].update(area=[0, 1.5])),
        "manifest.json: got a limit of 1.5, expected a number from 0 to 1",
    ),
    "one limit": (
        edited(lambda d: d["quality"]["limits"].update(area=[0])),
        "manifest.json: the limits of area are [0], expected two",
    ),
    "half the limits": (
        edited(lambda d: d["quality"]["limits"].pop("border")),
        "manifest.json: [json.exception.out_of_range",
    ),
    "half a schema": (edited(lambda d: d.update(schema_version="3.x")), "manifest.json: got schema version 3.x"),
    "a document type": (with_graph(b"<!DOCTYPE a><net/>"), f"{XML}: declares a document type"),
    "a style sheet": (with_graph(b"<net><?a b?></net>"), f"{XML}: declares a document type"),
    "an extension's layer": (
        with_graph(b'<net><layer version="extension"/></net>'),
        f"{XML}: has a layer that is not OpenVINO's own",
    ),
    "a layer of no version": (with_graph(b"<net><layer/></net>"), f"{XML}: has a layer that is not OpenVINO's own"),
    "another file": (
        with_graph(b"<net><!-- > --><layer version='opset1'><data  path = '/etc/passwd' /></layer></net>"),
        f"{XML}: asks for another file",
    ),
    "a comment that hides a layer": (
        with_graph(b"<net><!--><x a='--><layer version=\"other\"></layer><!-- '/> --></net>"),
        f"{XML}: has a layer that is not OpenVINO's own",
    ),
    "an attribute twice": (
        with_graph(b'<net><layer version="other" version="opset1"/></net>'),
        f"{XML}: has an attribute twice",
    ),
    "a class of two lines": (
        edited(lambda d: d["classes"][1].update(name="lesion\nnone")),
        "manifest.json: got a class named 'lesion none', expected names in one line",
    ),
    "two classes of one name": (
        edited(lambda d: d["classes"][1].update(name="background")),
        "manifest.json: got a class named 'background'",
    ),
    "an artifact twice": (
        edited(lambda d: d["artifacts"].append(openvino_entry(d))),
        "manifest.json: openvino fp32 is there twice",
    ),
    "a frame twice": (
        edited(lambda d: openvino_entry(d)["baked"].append(openvino_entry(d)["baked"][1])),
        "manifest.json: openvino fp32 has two graphs for frames of 96 x 128",
    ),
    "outputs out of order": (
        edited(lambda d: openvino_entry(d)["baked"][1].update(outputs=["logits", "mask", "colors", "confidence"])),
        'manifest.json: a graph\'s outputs are ["logits","mask","colors","confidence"]',
    ),
    "an unknown output": (
        edited(lambda d: openvino_entry(d)["baked"][1].update(outputs=["logits", "mask", "all"])),
        'manifest.json: a graph\'s outputs are ["logits","mask","all"]',
    ),
    "another size": (
        edited(lambda d: openvino_entry(d)["baked"][1]["files"][1].update(bytes=5)),
        "openvino/model.bin: has ",
    ),
    "half a height": (edited(lambda d: d["input"].update(height=223.5)), "manifest.json: height is 223.5"),
    "a namespace": (with_graph(b'<net xmlns:a="b"/>'), f"{XML}: uses XML namespaces"),
    "a default namespace": (with_graph(b'<net xmlns="b"/>'), f"{XML}: uses XML namespaces"),
    "half an element": (with_graph(b'<net a="b"'), f"{XML}: has half an element"),
    "half a comment": (with_graph(b"<net><!-- "), f"{XML}: has half a comment"),
    "another root": (with_graph(b"<a/>"), f"{XML}: is no IR"),
    "text": (with_graph(b"text"), f"{XML}: is no IR"),
    "UTF-16": (with_graph("<net/>".encode("utf-16")), f"{XML}: is no XML"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_bundle_that_is_not_whole_is_refused_by_name(library: Library, copy: Path, case: str) -> None:
    damage, text = CASES[case]
    damage(copy)
    code, said = library.open(copy)
    assert code == BUNDLE
    assert said.startswith(text)


def test_a_graph_that_openvino_cannot_read_is_an_error_and_no_crash(library: Library, copy: Path) -> None:
    with_graph(b'<net name="a"><layers><layer id="0" name="x" type="None" version="opset1"/></layers></net>')(copy)
    code, said = library.open(copy)
    assert code == UNAVAILABLE
    assert said.startswith("openvino fp32: cannot be loaded (")


def test_golden_frames_that_are_off_are_an_error(library: Library, copy: Path) -> None:
    path = copy / Bundle(copy).manifest.golden[-1].logits
    np.save(path, np.load(path) + np.float32(0.5))
    sum_again(copy)
    handle = library.open(copy)
    report = Report()
    assert library.c.msa2net_self_test(handle, ctypes.byref(report)) == OUTPUT
    assert library.said().startswith("golden frames: a logit differs by 0.5")
    assert report.frames == 1
    assert report.logit_difference > report.logit_tolerance > 0
    library.c.msa2net_close(handle)


# TBB opens a library in a way that the sanitizers refuse; in the example itself, this comes before theirs.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
void *dlopen(const char *file, int mode) {
  void *(*next)(const char *, int) = (void *(*)(const char *, int))dlsym(RTLD_NEXT, "dlopen");
  return next(file, mode & ~RTLD_DEEPBIND);
}
"""


@pytest.mark.slow
def test_the_sanitizers_find_nothing(baked: Path, tmp_path: Path) -> None:
    """The example on whole and damaged bundles, built with the address and undefined-behaviour sanitizers."""
    source, shim = tmp_path / "shim.c", tmp_path / "shim.o"
    source.write_text(SHIM)
    subprocess.run(["gcc", "-c", str(source), "-o", str(shim)], check=True)
    options = ("-DMSA2NET_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_EXE_LINKER_FLAGS={shim} -rdynamic -ldl")
    folder = built(tmp_path / "build", *options)
    (tmp_path / "frames").write_bytes(frame(GREY).tobytes() * 3)

    def run(bundle: Path) -> subprocess.CompletedProcess[str]:
        command = [folder / "segment", bundle, "fp32", *GREY, 1, tmp_path / "frames", tmp_path / "masks"]
        # OpenVINO keeps some of what it takes to the end of the process.
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)

    done = run(baked)
    assert done.returncode == 0, done.stderr
    assert "Sanitizer" not in done.stderr
    for case, (damage, text) in CASES.items():
        broken = Path(shutil.copytree(baked, tmp_path / "broken" / case))
        damage(broken)
        done = run(broken)
        assert done.returncode == BUNDLE, (case, done.stderr)
        assert done.stderr.startswith(f"error: {text}"), done.stderr
        shutil.rmtree(tmp_path / "broken")
