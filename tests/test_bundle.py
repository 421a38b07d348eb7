"""The bundle format: what a reader accepts, and what it says of each way in which a bundle can be damaged."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import string
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from bundles import set_manifest, sha256, sum_again
from hypothesis import given, settings
from hypothesis import strategies as st

import msa2net.runtimes.bundle as bundle_module
from msa2net import Predictor
from msa2net.errors import BundleError, RuntimeUnavailableError
from msa2net.runtimes import graphs, measure
from msa2net.runtimes.bundle import (
    MANIFEST,
    RESIZE_RULES,
    SCHEMA_VERSION,
    SUMS,
    VERDICTS,
    Bundle,
    FileEntry,
    Manifest,
    parse_manifest,
)
from msa2net.runtimes.predictor import DEMO_BUNDLE

DOCUMENT = Path(bundle_module.__file__).with_name("BUNDLE.md").read_text(encoding="utf-8")
SAMPLE = DOCUMENT.split("```json\n")[1].split("```")[0]
COPY, EXPORT, MAKE = "Copy the bundle anew.", "Export the model again.", "Make one with 'msa2net export'."
SMALL = settings(max_examples=150, deadline=None)
# One file of each kind: how a bundle names it, and the place of a complaint about it.
KINDS = (
    "manifest.json",
    "onnx/model.onnx",
    "openvino/model.xml",
    "openvino/model-1920x1080.xml",
    "openvino/model.bin",
    "torch/weights.safetensors",
    "golden/0_frame.npy",
    "golden/0_logits.npy",
    "golden/0_mask.npy",
)
ARTIFACTS = (
    ("onnxruntime", "onnx/model.onnx"),
    ("openvino", "openvino/model.xml"),
    ("openvino", "openvino/model.bin"),
    ("pytorch", "torch/weights.safetensors"),
)


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Applies `change` to the manifest and sums the bundle again."""
    document = json.loads((root / MANIFEST).read_bytes())
    change(document)
    set_manifest(root, json.dumps(document).encode())


def flip(path: Path) -> None:
    """Changes one bit, the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def refused(root: Path) -> BundleError:
    """The error that opening raises; its text is one line made of its four parts."""
    with pytest.raises(BundleError) as caught:
        Bundle(root)
    return one_line(caught.value)


def one_line(error: BundleError) -> BundleError:
    assert str(error) == f"{error.place}: {error.found}, {error.expected}. {error.advice}"
    assert str(error).isprintable()
    return error


def parts(error: BundleError) -> tuple[str, str, str, str]:
    return error.place, error.found, error.expected, error.advice


def content_of(path: str) -> bytes:
    """A short text; in an ONNX file as the producer's name, in an IR as the text of its root."""
    text = f"content of {path}".encode()
    if path.endswith(".onnx"):
        return graphs.message(2, text)
    return b"<net>%s</net>" % text if path.endswith(".xml") else text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A bundle of the format document's sample manifest; its model files are short texts."""
    folder = tmp_path / "sample.bundle"
    document = json.loads(SAMPLE)
    files = {path: content_of(path) for entry in document["golden"] for path in entry.values()}
    for artifact in document["artifacts"]:
        for entry in [*artifact["files"], *(file for graph in artifact.get("baked", ()) for file in graph["files"])]:
            content = content_of(entry["path"])
            files[entry["path"]] = content
            entry.update(bytes=len(content), sha256=sha256(content))
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    set_manifest(folder, json.dumps(document).encode())
    return folder


# What is whole ----------------------------------------------------------------------------------------------------


def test_the_sample_of_the_format_document_parses_to_what_it_says() -> None:
    manifest = parse_manifest(SAMPLE.encode())
    assert manifest.schema_version == SCHEMA_VERSION == (4, 0)
    assert (manifest.model_name, manifest.model_version, manifest.model_variant) == ("lesion", "2.1", "tiny")
    assert manifest.notice == "Not a medical device. Validate before any clinical use."
    assert manifest.model_config["depths"] == [1, 1, 1, 1]
    assert [(c.name, c.color) for c in manifest.classes] == [("background", (0, 0, 0)), ("lesion", (230, 60, 60))]
    contract = manifest.input
    assert (contract.height, contract.width, contract.channels) == (224, 224, 3)
    assert (contract.mean, contract.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (contract.resize, contract.fit, manifest.enlarge) == ("bilinear-fixed", "stretch", "nearest")
    assert [a.name for a in manifest.artifacts] == ["openvino fp32", "onnxruntime fp32", "pytorch fp32"]
    first = manifest.artifacts[0]
    assert [f.path for f in first.files] == ["openvino/model.xml", "openvino/model.bin"]
    assert first.files[1].bytes == 4283204
    assert first.versions["opset"] == "20"
    assert (first.tolerance.logit, first.tolerance.pixels) == (0.0003, 0.9999)
    assert first.parity["worst"]["image"] == "phantom ultrasound 2000013"
    assert [(a.accuracy, a.shortfalls) for a in manifest.artifacts] == [("high", ())] * 3
    assert [g.mask for g in manifest.golden] == ["golden/0_mask.npy"]


def test_the_format_document_describes_every_field_of_its_sample() -> None:
    table = DOCUMENT.split("## 4.")[1].split("### Sample")[0]
    named = set(re.findall(r"[a-z_0-9]+", " ".join(re.findall(r"`([^`]+)`", table))))
    free = {"config", "versions", "parity"}  # objects whose fields are not the format's

    def fields(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(fields, value))
        if not isinstance(value, dict):
            return set()
        return set(value).union(*(fields(v) for k, v in value.items() if k not in free))

    assert fields(json.loads(SAMPLE)) - named == set()
    assert {"verdict", "reasons"} <= named


def test_the_format_document_names_every_verdict_and_resize_rule() -> None:
    table = DOCUMENT.split("## 4.")[1].split("### Sample")[0]
    rows = {row.split("|")[1].strip(): row.split("|")[2] for row in table.splitlines() if row.startswith("| `")}
    assert set(re.findall(r"`\"([a-z]+)\"`", rows["`artifacts[].parity.verdict`"])) == set(VERDICTS)
    assert set(re.findall(r"`\"([a-z-]+)\"`", rows["`input.resize`"])) == set(RESIZE_RULES)


def test_the_format_document_names_every_figure_that_an_export_records() -> None:
    named = set(re.findall(r"`([a-z_0-9]+)`", DOCUMENT.split("What else `parity` holds today")[1].split("###")[0]))
    recorded = {key for artifact in Bundle(DEMO_BUNDLE).manifest.artifacts for key in artifact.parity}
    assert recorded - {"verdict", "reasons"} <= named
    assert len(recorded) > 15


def test_the_format_document_has_the_thresholds_that_are_judged_by() -> None:
    verdicts = DOCUMENT.split("**The verdict.**")[1].split("**The files of an artifact.**")[0]
    numbers = set(re.findall(r"[0-9]+(?:\.[0-9]+)?", verdicts))
    levels = {str(figure) for level in measure.LEVELS.values() for figure in level}
    counts = {measure.LESION_PIXELS, measure.FALSE_PIXELS, measure.CLEAN_PER_ALARM, measure.LEAST_CASES}
    assert numbers >= levels | {str(count) for count in counts} | {str(measure.LEAST_DICE)}


def test_the_version_that_had_no_verdict_is_named() -> None:
    assert "1.0 had no `verdict`" in DOCUMENT


def test_the_format_document_names_the_version_that_this_reader_reads() -> None:
    assert DOCUMENT.startswith(f"# The bundle format, version {SCHEMA_VERSION[0]}.{SCHEMA_VERSION[1]}\n")


def test_an_opened_bundle_knows_its_files_and_digest(root: Path) -> None:
    opened = Bundle(root)
    assert sorted(opened.sums) == sorted(KINDS)
    assert opened.sums[MANIFEST] == sha256((root / MANIFEST).read_bytes())
    assert opened.digest == sha256((root / SUMS).read_bytes())
    assert opened.verify() == len(KINDS)
    assert opened.read("onnx/model.onnx") == content_of("onnx/model.onnx")


def test_the_digest_changes_with_any_file(root: Path) -> None:
    digests = {Bundle(root).digest}
    for path in KINDS[1:]:
        if path.startswith("golden/"):
            flip(root / path)
            sum_again(root)
            digests.add(Bundle(root).digest)
    edit(root, lambda d: d["model"].update(name="another"))
    digests.add(Bundle(root).digest)
    assert len(digests) == 5


def test_the_demo_bundle_is_whole_and_has_what_a_bundle_must_have() -> None:
    demo = Bundle(DEMO_BUNDLE)
    assert demo.verify() == len([p for p in DEMO_BUNDLE.rglob("*") if p.is_file()]) - 1
    assert (DEMO_BUNDLE / SUMS).read_text(encoding="utf-8").splitlines() == [
        f"{digest}  {path}" for path, digest in sorted(demo.sums.items())
    ]
    assert {a.runtime for a in demo.manifest.artifacts} >= {"openvino", "onnxruntime", "pytorch"}
    assert demo.manifest.golden
    named = {f.path for a in demo.manifest.artifacts for f in a.files}
    named |= {p for g in demo.manifest.golden for p in (g.frame, g.logits, g.mask)}
    assert named | {MANIFEST, "sbom.cdx.json", "SOUP.md"} == set(demo.sums)


def test_a_bundle_may_be_reached_through_a_link_and_by_a_string(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert Bundle(str(tmp_path / "link")).digest == Bundle(root).digest


def test_the_order_of_the_sums_does_not_matter(root: Path) -> None:
    lines = (root / SUMS).read_text(encoding="utf-8").splitlines(keepends=True)
    (root / SUMS).write_text("".join(reversed(lines)), encoding="utf-8")
    assert Bundle(root).verify() == len(KINDS)


def test_names_beyond_ascii_are_read(root: Path) -> None:
    (root / "onnx/model.onnx").rename(root / "onnx/modèle 病変.onnx")
    edit(root, lambda d: d["artifacts"][1]["files"][0].update(path="onnx/modèle 病変.onnx"))
    opened = Bundle(root)
    with opened.open_artifact(opened.artifact("onnxruntime", "fp32")) as (path,):
        assert Path(path).read_bytes() == content_of("onnx/model.onnx")


def test_an_artifact_that_is_not_there_lists_those_that_are(root: Path) -> None:
    opened = Bundle(root)
    assert opened.artifact("pytorch", "fp32").files[0].path == "torch/weights.safetensors"
    with pytest.raises(RuntimeUnavailableError) as caught:
        opened.artifact("onnxruntime", "int8")
    assert str(caught.value) == (
        f"{root}: no artifact for onnxruntime in int8, it has: openvino fp32, onnxruntime fp32, pytorch fp32. "
        "Pick one, or export it."
    )


# Changed, missing and extra files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [kind for kind in KINDS if kind != MANIFEST])
def test_a_changed_byte_is_refused_by_name(root: Path, path: str) -> None:
    opened = Bundle(root)
    flip(root / path)
    found, expected = sha256((root / path).read_bytes())[:12], opened.sums[path][:12]
    with pytest.raises(BundleError) as caught:
        opened.read(path)
    assert parts(one_line(caught.value)) == (path, f"changed: SHA-256 {found}…", f"expected {expected}…", COPY)
    with pytest.raises(BundleError) as caught:
        Bundle(root).verify()
    assert parts(one_line(caught.value)) == (str(root), f"changed {path}", f"expected the sums of {SUMS}", COPY)


def test_a_changed_byte_of_the_manifest_is_refused_on_opening(root: Path) -> None:
    opened = Bundle(root)
    flip(root / MANIFEST)
    error = refused(root)
    assert (error.place, error.advice) == (MANIFEST, COPY)
    assert error.found == f"changed: SHA-256 {sha256((root / MANIFEST).read_bytes())[:12]}…"
    with pytest.raises(BundleError, match=re.escape(f"changed {MANIFEST}, expected")):
        opened.verify()


@pytest.mark.parametrize(("runtime", "path"), ARTIFACTS, ids=[path for _, path in ARTIFACTS])
def test_a_changed_artifact_is_refused_before_a_runtime_gets_a_path(root: Path, runtime: str, path: str) -> None:
    flip(root / path)
    opened = Bundle(root)
    handed_out = []
    with pytest.raises(BundleError) as caught, opened.open_artifact(opened.artifact(runtime, "fp32")) as paths:
        handed_out.append(paths)
    assert caught.value.place == path
    assert caught.value.found.startswith("changed: SHA-256 ")
    assert not handed_out


def test_verify_lists_every_changed_file(root: Path) -> None:
    flip(root / "golden/0_mask.npy")
    flip(root / "onnx/model.onnx")
    with pytest.raises(BundleError, match=r"changed golden/0_mask\.npy, onnx/model\.onnx, expected the sums"):
        Bundle(root).verify()


@pytest.mark.parametrize("path", KINDS)
def test_a_missing_file_is_named(root: Path, path: str) -> None:
    (root / path).unlink()
    expected = f"expected exactly the files of {SUMS}"
    assert parts(refused(root)) == (str(root), f"missing {path}", expected, COPY)


def test_a_file_that_goes_missing_later_is_named(root: Path) -> None:
    opened = Bundle(root)
    (root / "onnx/model.onnx").unlink()
    with pytest.raises(BundleError) as caught:
        opened.read("onnx/model.onnx")
    assert parts(one_line(caught.value)) == (
        "onnx/model.onnx",
        "cannot be read (No such file or directory)",
        "expected a readable file",
        COPY,
    )
    with pytest.raises(BundleError, match=r"missing onnx/model\.onnx, expected exactly"):
        opened.verify()


@pytest.mark.parametrize(
    "path", ["extra.txt", "onnx/.hidden", "new/folder/file", "golden/SHA256SUMS", "a\nb", "a\x1b[2J"]
)
def test_an_extra_file_is_named_in_one_line(root: Path, path: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(b"")
    shown = path if path.isprintable() else ascii(path)
    assert parts(refused(root))[1] == f"extra {shown}"


def test_an_extra_file_whose_name_is_not_unicode_is_named(root: Path) -> None:
    with open(os.fsencode(root) + b"/bad\xff", "wb"):
        pass
    assert refused(root).found == r"extra 'bad\udcff'"


def test_missing_and_extra_files_are_named_together(root: Path) -> None:
    (root / "onnx/model.onnx").rename(root / "onnx/renamed.onnx")
    assert refused(root).found == "missing onnx/model.onnx; extra onnx/renamed.onnx"


@pytest.mark.parametrize("path", [path for _, path in ARTIFACTS])
def test_a_truncated_artifact_is_refused_on_opening(root: Path, path: str) -> None:
    whole = (root / path).read_bytes()
    (root / path).write_bytes(whole[:-1])
    assert parts(refused(root)) == (
        path,
        f"got {len(whole) - 1} bytes",
        f"expected {len(whole)}",
        "The copy is incomplete: copy it anew.",
    )


def test_a_truncated_golden_file_is_refused_when_it_is_used(root: Path) -> None:
    path = root / "golden/0_logits.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"^golden/0_logits\.npy: changed: SHA-256 "):
        Bundle(root).read("golden/0_logits.npy")


def test_a_truncated_manifest_is_refused_by_its_sum_before_it_is_parsed(root: Path) -> None:
    (root / MANIFEST).write_bytes((root / MANIFEST).read_bytes()[:-10])
    assert refused(root).found.startswith("changed: SHA-256 ")


def test_no_truncation_of_the_sums_passes(root: Path) -> None:
    whole = (root / SUMS).read_bytes()
    for length in range(len(whole)):
        (root / SUMS).write_bytes(whole[:length])
        with pytest.raises(BundleError):
            Bundle(root)


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("onnx"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = ("a folder of it", "cannot be read (Permission denied)", "expected a readable file", COPY)
    assert parts(refused(root)) == found


@pytest.mark.parametrize("path", ["link", "onnx/link"])
@pytest.mark.parametrize("target", ["manifest.json", "golden", "/etc/hostname", "nowhere"])
def test_a_link_is_refused_by_name(root: Path, path: str, target: str) -> None:
    (root / path).symlink_to(target)
    assert parts(refused(root)) == (path, "is a link or a device", "expected only regular files", COPY)


def test_a_model_file_replaced_by_a_link_to_the_same_bytes_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "onnx/model.onnx").rename(tmp_path / "outside")
    (root / "onnx/model.onnx").symlink_to(tmp_path / "outside")
    assert refused(root).place == "onnx/model.onnx"


def test_a_pipe_is_refused_and_not_opened(root: Path) -> None:
    os.mkfifo(root / "golden/pipe")
    assert refused(root).place == "golden/pipe"


def test_the_sums_may_not_be_a_link(root: Path, tmp_path: Path) -> None:
    (root / SUMS).rename(tmp_path / SUMS)
    (root / SUMS).symlink_to(tmp_path / SUMS)
    assert refused(root).place == SUMS


# No bundle at all -------------------------------------------------------------------------------------------------


def test_a_folder_that_does_not_exist_is_no_bundle(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    assert parts(refused(path)) == (str(path), "no such folder", "expected a bundle", MAKE)


def test_an_empty_folder_is_no_bundle(tmp_path: Path) -> None:
    assert parts(refused(tmp_path)) == (str(tmp_path), f"no {SUMS} in it", "expected a bundle", MAKE)


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"model")
    assert parts(refused(path)) == (str(path), "no such folder", "expected a bundle", MAKE)


def test_a_folder_without_its_sums_is_no_bundle(root: Path) -> None:
    (root / SUMS).unlink()
    assert refused(root).found == f"no {SUMS} in it"


# SHA256SUMS -------------------------------------------------------------------------------------------------------

HEX = "0" * 64
NOT_A_SUM = "not a sum", "expected '<64 hex digits>  <path>'", COPY
OWN_PATH = "expected a file inside the bundle, listed once", "Do not use this bundle: export the model again."


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("", id="empty line"),
        pytest.param(HEX, id="no path"),
        pytest.param(f"{HEX}  ", id="empty path"),
        pytest.param(f"{HEX} path", id="one space"),
        pytest.param(f"{HEX} *path", id="binary mark"),
        pytest.param(f"{HEX[1:]}  path", id="63 digits"),
        pytest.param(f"{HEX}0  path", id="65 digits"),
        pytest.param(f"{'A' * 64}  path", id="upper case"),
        pytest.param(f"{'g' * 64}  path", id="not hexadecimal"),
        pytest.param(f"{HEX}  path\r", id="carriage return"),
        pytest.param(f"{HEX}  a\\b", id="backslash"),
        pytest.param(f"{HEX}  a\x00b", id="null"),
        pytest.param(f"{HEX}  a\x85b", id="next line"),
        pytest.param(f"{HEX}  a\u2028b", id="line separator"),
        pytest.param(f"\ufeff{HEX}  path", id="byte-order mark"),
        pytest.param("<<<<<<< HEAD", id="merge conflict"),
    ],
)
def test_a_malformed_line_of_the_sums_is_refused_by_number(root: Path, line: str) -> None:
    content = (root / SUMS).read_bytes()
    (root / SUMS).write_bytes(content + line.encode() + b"\n")
    assert parts(refused(root)) == (f"{SUMS} line {len(KINDS) + 1}", *NOT_A_SUM)


@pytest.mark.parametrize(
    "path",
    ["../outside", "a/../../b", "..", ".", "./a", "a/./b", "/etc/passwd", "a//b", "a/", SUMS, MANIFEST],
)
def test_a_path_that_leaves_the_bundle_or_is_listed_twice_is_refused(root: Path, path: str) -> None:
    content = (root / SUMS).read_bytes()
    (root / SUMS).write_bytes(content + f"{HEX}  {path}\n".encode())
    assert parts(refused(root)) == (f"{SUMS} line {len(KINDS) + 1}", f"got the path {path!r}", *OWN_PATH)


def test_sums_without_the_manifest_are_refused(root: Path) -> None:
    lines = (root / SUMS).read_text(encoding="utf-8").splitlines(keepends=True)
    (root / SUMS).write_text("".join(line for line in lines if MANIFEST not in line), encoding="utf-8")
    assert parts(refused(root)) == (SUMS, f"no line for {MANIFEST}", "expected one", COPY)


def test_empty_sums_are_refused(root: Path) -> None:
    (root / SUMS).write_bytes(b"")
    assert refused(root).found == f"no line for {MANIFEST}"


def test_sums_whose_last_line_has_no_end_are_refused(root: Path) -> None:
    (root / SUMS).write_bytes((root / SUMS).read_bytes()[:-1])
    assert parts(refused(root)) == (SUMS, "its last line has no end", "expected whole lines", COPY)


def test_sums_that_are_not_utf8_are_refused(root: Path) -> None:
    (root / SUMS).write_bytes((root / SUMS).read_bytes() + HEX.encode() + b"  a\xff\n")
    assert parts(refused(root)) == (SUMS, "not UTF-8", "expected lines of sha256sum", COPY)


SUMS_ALPHABET = st.sampled_from([*"0af \n\r/.\\*", "\x00", "\x85", "\u2028", "é", HEX + "  ", MANIFEST, "../", SUMS])


@SMALL
@given(st.one_of(st.binary(max_size=300), st.lists(SUMS_ALPHABET, max_size=20).map(lambda x: "".join(x).encode())))
def test_any_content_of_the_sums_is_read_or_refused(content: bytes) -> None:
    try:
        sums = Bundle._parse_sums(content)
    except BundleError as error:
        one_line(error)
        return
    assert MANIFEST in sums
    for path, digest in sums.items():
        assert re.fullmatch("[0-9a-f]{64}", digest)
        assert ".." not in path.split("/")
        assert not path.startswith("/")
    assert "".join(f"{digest}  {path}\n" for path, digest in sums.items()).encode() == content


# The manifest -----------------------------------------------------------------------------------------------------


def at(*keys: str | int) -> Callable[[dict[str, Any]], Any]:
    """The value below these keys of a document."""

    def find(document: Any) -> Any:
        for key in keys:
            document = document[key]
        return document

    return find


def json_path(keys: tuple[str | int, ...]) -> str:
    return "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)


REQUIRED: list[tuple[str | int, ...]] = [
    ("schema_version",),
    ("model",),
    *(("model", key) for key in ("name", "version", "variant", "config", "notice")),
    ("classes",),
    *(("classes", 1, key) for key in ("name", "color")),
    ("input",),
    *(("input", key) for key in ("height", "width", "channels", "mean", "std", "resize", "fit")),
    ("output",),
    ("output", "enlarge"),
    ("artifacts",),
    *(("artifacts", 2, key) for key in ("runtime", "precision", "files", "versions", "tolerance", "parity")),
    *(("artifacts", 1, "parity", key) for key in ("verdict", "reasons")),
    *(("artifacts", 0, "files", 1, key) for key in ("path", "bytes", "sha256")),
    *(("artifacts", 1, "tolerance", key) for key in ("logit", "pixels")),
    ("golden",),
    *(("golden", 0, key) for key in ("frame", "logits", "mask")),
]


@pytest.mark.parametrize("keys", REQUIRED, ids=json_path)
def test_a_missing_field_is_named_with_its_place(root: Path, keys: tuple[str | int, ...]) -> None:
    edit(root, lambda document: at(*keys[:-1])(document).pop(keys[-1]))
    place = f"{MANIFEST} {json_path(keys[:-1])}"
    assert parts(refused(root)) == (place, f"no {keys[-1]!r}", "expected that field", EXPORT)


NUMBER_1E6 = "expected a number from -1e+06 to 1e+06"
COLOR = "expected a whole number from 0 to 255"
VERDICT = "expected 'high' or 'standard' or 'failed' or 'unjudged'"
WRONG: list[tuple[tuple[str | int, ...], Any, str, str]] = [
    (("schema_version",), 1.0, "got 1.0", "expected a string"),
    (("schema_version",), "1", 'got "1"', "expected MAJOR.MINOR"),
    (("schema_version",), "1.0.0", 'got "1.0.0"', "expected MAJOR.MINOR"),
    (("schema_version",), "\u0661.\u0660", r'got "\u0661.\u0660"', "expected MAJOR.MINOR"),
    (("model",), [], "got a list of 0", "expected an object"),
    (("model", "name"), None, "got null", "expected a string"),
    (("model", "name"), "a\x1b[2J", r'got "a\u001b[2J"', "expected a string without control characters"),
    (("model", "name"), "\ud800", r'got "\ud800"', "expected a string without control characters"),
    (("model", "version"), 2, "got 2", "expected a string"),
    (("model", "variant"), {}, "got an object", "expected a string"),
    (("model", "config"), "tiny", 'got "tiny"', "expected an object"),
    (("model", "notice"), "two\nlines", r'got "two\nlines"', "expected a string without control characters"),
    (("classes",), {}, "got an object", "expected a list of 2 to 256 entries"),
    (("classes",), [{"name": "one", "color": [0, 0, 0]}], "got a list of 1", "expected a list of 2 to 256 entries"),
    (("classes", 1), "lesion", 'got "lesion"', "expected an object"),
    (("classes", 0, "color"), [0, 0], "got a list of 2", "expected a list of 3 to 3 entries"),
    (("classes", 0, "color", 2), 256, "got 256", COLOR),
    (("classes", 0, "color", 2), -1, "got -1", COLOR),
    (("classes", 0, "color", 2), 1.0, "got 1.0", COLOR),
    (("classes", 0, "color", 2), True, "got true", COLOR),
    (("input", "height"), 0, "got 0", "expected a whole number from 1 to 4096"),
    (("input", "width"), 4097, "got 4097", "expected a whole number from 1 to 4096"),
    (("input", "width"), "224", 'got "224"', "expected a whole number from 1 to 4096"),
    (("input", "channels"), 4, "got 4", "expected a whole number from 1 to 3"),
    (("input", "channels"), 2, "got 2", "expected 1 (grey) or 3 (RGB)"),
    (("input", "mean"), [0.5], "got a list of 1", "expected a list of 3 to 3 entries"),
    (("input", "mean", 1), "0.5", 'got "0.5"', NUMBER_1E6),
    (("input", "mean", 1), 10**400, f"got 1{'0' * 36}...", NUMBER_1E6),
    (("input", "mean", 1), False, "got false", NUMBER_1E6),
    (("input", "std", 0), 0, "got 0", "expected a number from 1e-06 to 1e+06"),
    (("input", "resize"), "cubic", 'got "cubic"', "expected 'bilinear' or 'bilinear-fixed' or 'spline'"),
    (("input", "fit"), "crop", 'got "crop"', "expected 'stretch' or 'letterbox'"),
    (("output", "enlarge"), "", 'got ""', "expected 'nearest' or 'aligned' or 'bilinear'"),
    (("artifacts",), [], "got a list of 0", "expected a list of 1 to 1000000 entries"),
    (("artifacts", 0), None, "got null", "expected an object"),
    (("artifacts", 0, "runtime"), 3, "got 3", "expected a string"),
    (
        ("artifacts", 0, "precision"),
        "fp8",
        'got "fp8"',
        "expected 'fp32' or 'bf16' or 'fp16' or 'int8' or 'int8-portable'",
    ),
    (("artifacts", 0, "files"), [], "got a list of 0", "expected a list of 1 to 1000000 entries"),
    (("artifacts", 0, "files", 0, "bytes"), 0, "got 0", "expected a whole number from 1 to 1099511627776"),
    (("artifacts", 0, "files", 0, "bytes"), 1e3, "got 1000.0", "expected a whole number from 1 to 1099511627776"),
    (("artifacts", 0, "files", 0, "sha256"), 0, "got 0", "expected a string"),
    (("artifacts", 0, "versions"), [], "got a list of 0", "expected an object"),
    (("artifacts", 0, "versions", "opset"), 20, "got 20", "expected a string"),
    (("artifacts", 0, "tolerance", "logit"), -1e-9, "got -1e-09", "expected a number from 0 to 1e+06"),
    (("artifacts", 0, "tolerance", "logit"), 10**400, f"got 1{'0' * 36}...", "expected a number from 0 to 1e+06"),
    (("artifacts", 0, "tolerance", "pixels"), 1.1, "got 1.1", "expected a number from 0 to 1"),
    (("artifacts", 0, "parity"), None, "got null", "expected an object"),
    (("artifacts", 0, "parity", "verdict"), "good", 'got "good"', VERDICT),
    (("artifacts", 0, "parity", "verdict"), "High", 'got "High"', VERDICT),
    (("artifacts", 0, "parity", "verdict"), None, "got null", VERDICT),
    (("artifacts", 0, "parity", "verdict"), ["high"], "got a list of 1", VERDICT),
    (("artifacts", 0, "parity", "reasons"), "none", 'got "none"', "expected a list of 0 to 1000000 entries"),
    (("artifacts", 0, "parity", "reasons"), {}, "got an object", "expected a list of 0 to 1000000 entries"),
    (("golden",), [], "got a list of 0", "expected a list of 1 to 1000000 entries"),
    (("golden", 0, "mask"), ["a"], "got a list of 1", "expected a string"),
]


@pytest.mark.parametrize(
    ("keys", "value", "found", "expected"), WRONG, ids=[f"{json_path(w[0])} {w[2][:20]}" for w in WRONG]
)
def test_a_wrong_value_is_named_with_its_place(
    root: Path, keys: tuple[str | int, ...], value: Any, found: str, expected: str
) -> None:
    def change(document: dict[str, Any]) -> None:
        at(*keys[:-1])(document)[keys[-1]] = value

    edit(root, change)
    assert parts(refused(root)) == (f"{MANIFEST} {json_path(keys)}", found, expected, EXPORT)


@pytest.mark.parametrize(
    ("reason", "found", "expected"),
    [
        (3, "got 3", "expected a string"),
        (["nested"], "got a list of 1", "expected a string"),
        ("a\nb", r'got "a\nb"', "expected a string without control characters"),
    ],
    ids=["number", "list", "two lines"],
)
def test_a_reason_that_is_no_line_of_text_is_refused(root: Path, reason: Any, found: str, expected: str) -> None:
    edit(root, lambda d: d["artifacts"][1]["parity"].update(reasons=["a good one", reason]))
    assert parts(refused(root)) == (f"{MANIFEST} $.artifacts[1].parity.reasons[1]", found, expected, EXPORT)


def test_a_version_name_with_control_characters_is_refused_in_one_line(root: Path) -> None:
    edit(root, lambda d: d["artifacts"][0]["versions"].update({"a\nb": "1"}))
    assert refused(root).found == r'got "a\nb"'


def test_one_runtime_and_precision_twice_is_refused(root: Path) -> None:
    edit(root, lambda d: d["artifacts"].append(d["artifacts"][1]))
    assert parts(refused(root)) == (
        f"{MANIFEST} $.artifacts[3]",
        "a second onnxruntime fp32",
        "expected one of each",
        EXPORT,
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [
        pytest.param(b"", "not JSON (Expecting value: line 1 column 1 (char 0))", id="empty"),
        pytest.param(b"{", None, id="unfinished"),
        pytest.param(b"\xff\xfe{\x00}\x00", None, id="utf-16"),
        pytest.param(b"\xef\xbb\xbf{}", None, id="byte-order mark"),
        pytest.param(b'{"a": "\xff"}', None, id="not utf-8"),
        pytest.param(b'{"a": NaN}', "not JSON (NaN is no JSON number)", id="NaN"),
        pytest.param(b'{"a": -Infinity}', "not JSON (-Infinity is no JSON number)", id="infinity"),
        pytest.param(b'{"a": 1e999}', "not JSON (a number is too large)", id="too large a number"),
        pytest.param(b'{"a": 1, "a": 2}', "not JSON (an object has one field twice)", id="a field twice"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", None, id="5000 digits"),
        pytest.param(b"[" * 100_000, None, id="too deep"),
    ],
)
def test_what_is_not_json_is_refused(root: Path, content: bytes, found: str | None) -> None:
    set_manifest(root, content)
    error = refused(root)
    assert (error.place, error.expected, error.advice) == (MANIFEST, "expected a JSON object", EXPORT)
    assert error.found == found if found else error.found.startswith("not JSON (")


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"[]", "got a list of 0"), (b"null", "got null"), (b'"text"', 'got "text"'), (b"1.5", "got 1.5")],
)
def test_json_that_is_no_object_is_refused(root: Path, content: bytes, found: str) -> None:
    set_manifest(root, content)
    assert parts(refused(root)) == (f"{MANIFEST} $", found, "expected an object", EXPORT)


@pytest.mark.parametrize("version", ["0.9", "1.0", "5.0", "10.0"])
def test_another_major_version_is_refused_before_any_other_field_is_read(root: Path, version: str) -> None:
    set_manifest(root, json.dumps({"schema_version": version, "model": 7}).encode())
    assert parts(refused(root)) == (
        f"{MANIFEST} $.schema_version",
        f"got version {version}",
        "expected 2.x or 3.x or 4.x",
        "Install the msa2net-edge that wrote the bundle, or export again with this one.",
    )


def test_a_newer_minor_version_is_read_with_a_warning(root: Path) -> None:
    edit(root, lambda d: d.update(schema_version="4.7", future={"a": 1}))
    with pytest.warns(UserWarning, match=r"^the bundle's schema 4\.7 is newer than this package's: what is new in it"):
        opened = Bundle(root)
    assert opened.manifest.schema_version == (4, 7)
    assert opened.manifest.model_name == "lesion"


def test_a_bundle_without_verdicts_is_refused_by_its_version(root: Path) -> None:
    """What version 1.0 wrote: its fields are whole, the verdicts apart, and none of them is looked at."""

    def change(document: dict[str, Any]) -> None:
        document["schema_version"] = "1.0"
        for artifact in document["artifacts"]:
            artifact["parity"] = {}

    edit(root, change)
    assert str(refused(root)) == (
        "manifest.json $.schema_version: got version 1.0, expected 2.x or 3.x or 4.x. "
        "Install the msa2net-edge that wrote the bundle, or export again with this one."
    )


@pytest.mark.parametrize("rule", RESIZE_RULES)
def test_every_resize_rule_is_read(root: Path, rule: str) -> None:
    edit(root, lambda d: d["input"].update(resize=rule))
    assert Bundle(root).manifest.input.resize == rule


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_verdict_is_read_with_its_reasons(root: Path, verdict: str) -> None:
    reasons = ["bound 0.98 of the reference's mean Dice, standard needs 0.99", "and another"]
    edit(root, lambda d: d["artifacts"][2]["parity"].update(verdict=verdict, reasons=reasons, future=1))
    artifact = Bundle(root).manifest.artifacts[2]
    assert (artifact.accuracy, artifact.shortfalls) == (verdict, tuple(reasons))
    assert artifact.parity["future"] == 1


def test_unknown_fields_and_runtimes_are_passed_over(root: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["future"] = [1]
        document["artifacts"][0]["runtime"] = "abacus"

    edit(root, change)
    assert Bundle(root).manifest.artifacts[0].name == "abacus fp32"


def test_sums_that_differ_between_manifest_and_list_are_refused(root: Path) -> None:
    edit(root, lambda d: d["artifacts"][1]["files"][0].update(sha256=HEX))
    found = f"its sums in {MANIFEST} and {SUMS} differ"
    assert parts(refused(root)) == ("onnx/model.onnx", found, "expected the same", EXPORT)


def test_a_size_that_differs_from_the_manifest_is_refused(root: Path) -> None:
    edit(root, lambda d: d["artifacts"][1]["files"][0].update(bytes=5))
    size = len(content_of("onnx/model.onnx"))
    assert parts(refused(root))[:3] == ("onnx/model.onnx", f"got {size} bytes", "expected 5")


UNLISTED = ["../outside.onnx", "onnx/other.onnx", "a.onnx", f"{SUMS}.onnx", "/etc/hostname.onnx"]


@pytest.mark.parametrize("path", UNLISTED)
@pytest.mark.parametrize(
    "keys",
    [("artifacts", 1, "files", 0, "path"), ("golden", 0, "frame"), ("golden", 0, "logits"), ("golden", 0, "mask")],
    ids=json_path,
)
def test_a_manifest_that_names_an_unlisted_file_is_refused(root: Path, keys: tuple[str | int, ...], path: str) -> None:
    def change(document: dict[str, Any]) -> None:
        at(*keys[:-1])(document)[keys[-1]] = path

    edit(root, change)
    expected = f"expected one listed in {SUMS}"
    assert parts(refused(root)) == (MANIFEST, f"names the file {path!r}", expected, EXPORT)


@pytest.mark.parametrize("path", UNLISTED)
def test_an_unlisted_file_is_never_opened(root: Path, path: str) -> None:
    opened = Bundle(root)
    with pytest.raises(BundleError, match="names the file"):
        opened.read(path)
    artifact = replace(opened.manifest.artifacts[0], files=(FileEntry(path=path, bytes=1, sha256=HEX),))
    with pytest.raises(BundleError, match="names the file"), opened.open_artifact(artifact):
        pass


def parsed(content: bytes) -> Manifest | None:
    """The manifest, or None if it was refused in one line; anything else raised fails the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the bundle's schema", UserWarning)
        try:
            return parse_manifest(content)
        except BundleError as error:
            one_line(error)
            return None


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(sorted({str(k) for keys in REQUIRED for k in keys})), inner, max_size=6),
    ),
    max_leaves=12,
)


@SMALL
@given(st.one_of(st.binary(max_size=200), st.text(string.printable, max_size=200).map(str.encode)))
def test_any_bytes_as_a_manifest_are_read_or_refused(content: bytes) -> None:
    assert parsed(content) is None


@SMALL
@given(JSON_VALUES)
def test_any_json_as_a_manifest_is_read_or_refused(value: Any) -> None:
    assert parsed(json.dumps(value).encode()) is None
    assert parsed(json.dumps({"schema_version": "2.0", **(value if isinstance(value, dict) else {})}).encode()) is None


def places(value: Any, keys: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The keys of every value in a document, its root apart."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, below in inner for place in ((*keys, key), *places(below, (*keys, key)))]


SCHEMA = jsonschema.Draft202012Validator(
    json.loads(Path(bundle_module.__file__).with_name("manifest.schema.json").read_text(encoding="utf-8"))
)


def test_the_schema_is_one_and_holds_of_the_sample_and_the_demo() -> None:
    SCHEMA.check_schema(SCHEMA.schema)
    SCHEMA.validate(json.loads(SAMPLE))
    SCHEMA.validate(json.loads((DEMO_BUNDLE / MANIFEST).read_bytes()))


def test_the_schema_refuses_what_the_reader_refuses_field_by_field() -> None:
    """Each field of the sample replaced by a value of each kind: where one refuses, so does the other."""
    for keys in places(json.loads(SAMPLE)):
        for value in (None, True, -1, 0.5, 2**63, "", "\x1b", "word", [], [[]], {}, {"a": 1}):
            document = json.loads(SAMPLE)
            at(*keys[:-1])(document)[keys[-1]] = value
            read = parsed(json.dumps(document).encode()) is not None
            # The lists of mean and std have as many entries as channels, which a schema cannot say.
            if keys != ("input", "channels") and keys[:2] not in (("input", "mean"), ("input", "std")):
                assert SCHEMA.is_valid(document) == read, (keys, value)


@SMALL
@given(st.sampled_from(places(json.loads(SAMPLE))), JSON_VALUES)
def test_any_value_in_any_place_of_a_manifest_is_read_or_refused(keys: tuple[str | int, ...], value: Any) -> None:
    document = json.loads(SAMPLE)
    at(*keys[:-1])(document)[keys[-1]] = value
    manifest = parsed(json.dumps(document).encode())
    if manifest is None:
        return
    SCHEMA.validate(document)  # it refuses nothing that is read
    # What was read is sound, whatever it was.
    assert manifest.input.channels in (1, 3)
    assert len(manifest.input.mean) == len(manifest.input.std) == manifest.input.channels
    assert all(0 <= a.tolerance.logit <= 1e6 and 0 <= a.tolerance.pixels <= 1 for a in manifest.artifacts)
    assert all(isinstance(v, str) for a in manifest.artifacts for v in a.versions.values())
    assert all(a.accuracy in VERDICTS for a in manifest.artifacts)
    assert all(isinstance(reason, str) for a in manifest.artifacts for reason in a.shortfalls)


# The bytes that are hashed are the bytes that are loaded -----------------------------------------------------------


def test_a_file_replaced_after_it_was_hashed_is_not_what_the_runtime_reads(root: Path, tmp_path: Path) -> None:
    opened = Bundle(root)
    with opened.open_artifact(opened.artifact("openvino", "fp32")) as paths:
        for name in ("openvino/model.xml", "openvino/model.bin"):
            (tmp_path / "new").write_bytes(b"something else")
            (tmp_path / "new").replace(root / name)
        contents = [Path(path).read_bytes() for path in paths]
    assert (root / "openvino/model.xml").read_bytes() == b"something else"
    assert contents == [content_of("openvino/model.xml"), content_of("openvino/model.bin")]


def test_a_file_removed_after_it_was_hashed_can_still_be_read_from_its_start(root: Path) -> None:
    opened = Bundle(root)
    with opened.open_artifact(opened.artifact("pytorch", "fp32")) as (path,):
        (root / "torch/weights.safetensors").unlink()
        assert Path(path).read_bytes() == b"content of torch/weights.safetensors"
        assert Path(path).read_bytes() == b"content of torch/weights.safetensors"


def test_the_descriptors_are_closed_after_use(root: Path) -> None:
    opened = Bundle(root)
    before = len(os.listdir("/proc/self/fd"))
    with opened.open_artifact(opened.artifact("openvino", "fp32")) as paths:
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(paths) == 2


def test_without_proc_the_files_own_paths_are_given(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle(root)
    monkeypatch.setattr(bundle_module.os.path, "exists", lambda path: not str(path).startswith("/proc/"))
    with opened.open_artifact(opened.artifact("openvino", "fp32")) as paths:
        assert paths == (str(root / "openvino/model.xml"), str(root / "openvino/model.bin"))


# What a model file may not hold -------------------------------------------------------------------------------------


def onnx_model(*nodes: bytes, graph: bytes = b"", rest: bytes = b"") -> bytes:
    """An ONNX file by hand: messages of nodes, other fields of the graph, other fields of the model."""
    m = graphs.message
    return m(8, m(1, b"")) + m(7, b"".join(m(1, node) for node in nodes) + graph) + rest


def onnx_node(domain: bytes = b"", attribute: bytes = b"") -> bytes:
    m = graphs.message
    return m(4, b"Relu") + m(7, domain) + (m(5, attribute) if attribute else b"")


def outside() -> bytes:
    """A tensor with its weights in another file."""
    m = graphs.message
    return m(8, b"w") + m(13, m(1, b"location") + m(2, b"../../etc/passwd"))


DO_NOT_USE = "Do not use this bundle: export the model again."
m = graphs.message
STANDARD, INSIDE = "expected standard ones", "expected them inside"
HOSTILE = {
    "external data": (onnx_model(graph=m(5, outside())), "has weights outside its file", INSIDE),
    "external by location alone": (
        onnx_model(graph=m(5, graphs.varint(14 << 3) + b"\x01")),
        "has weights outside its file",
        INSIDE,
    ),
    "external data of a sparse tensor": (
        onnx_model(graph=m(15, m(1, outside()))),
        "has weights outside its file",
        INSIDE,
    ),
    "external data in an attribute": (
        onnx_model(onnx_node(attribute=m(5, outside()))),
        "has weights outside its file",
        INSIDE,
    ),
    "external data in a graph of an attribute": (
        onnx_model(onnx_node(attribute=m(6, m(5, outside())))),
        "has weights outside its file",
        INSIDE,
    ),
    "external data in one of many graphs": (
        onnx_model(onnx_node(attribute=m(11, b"") + m(11, m(5, outside())))),
        "has weights outside its file",
        INSIDE,
    ),
    "a domain of a node": (
        onnx_model(onnx_node(b"com.evil")),
        "has operators of the domain 'com.evil'",
        STANDARD,
    ),
    "a domain of Microsoft": (
        onnx_model(onnx_node(b"com.microsoft")),
        "has operators of the domain 'com.microsoft'",
        STANDARD,
    ),
    "a domain that is imported": (
        onnx_model(rest=m(8, m(1, b"ai.onnx.ml"))),
        "has operators of the domain 'ai.onnx.ml'",
        STANDARD,
    ),
    "a domain with control characters": (
        onnx_model(onnx_node(b"a\x1b[2J\n")),
        r"has operators of the domain 'a\x1b[2J\n'",
        STANDARD,
    ),
    "a domain in a nested graph": (
        onnx_model(onnx_node(attribute=m(6, m(1, onnx_node(b"com.evil"))))),
        "has operators of the domain 'com.evil'",
        STANDARD,
    ),
    "a function": (onnx_model(rest=m(25, b"")), "defines functions", "expected standard operators alone"),
    "a truncated file": (onnx_model(onnx_node())[:-1], "is not an ONNX model", "expected one"),
    "a length beyond the file": (b"\x3a\xff\xff\xff\xff\x0f", "is not an ONNX model", "expected one"),
    "a varint without end": (b"\xff" * 20, "is not an ONNX model", "expected one"),
    "a group": (b"\x0b\x0c", "is not an ONNX model", "expected one"),
    "text": (b"not a model", "is not an ONNX model", "expected one"),
    "another format": (b"PK\x03\x04" + bytes(60), "is not an ONNX model", "expected one"),
}
PLAIN = "expected a plain IR"
HOSTILE_IR = {
    "an entity": (
        b'<!DOCTYPE net [<!ENTITY x SYSTEM "file:///etc/passwd">]><net>&x;</net>',
        "declares a document type or an entity",
        PLAIN,
    ),
    "a document type elsewhere": (
        b'<!DOCTYPE net SYSTEM "x.dtd"><net/>',
        "declares a document type or an entity",
        PLAIN,
    ),
    "entities in each other": (
        b'<!DOCTYPE net [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><net>&b;</net>',
        "declares a document type or an entity",
        PLAIN,
    ),
    "a style sheet": (b'<?xml-stylesheet href="x"?><net/>', "declares a document type or an entity", PLAIN),
    "an extension's layer": (
        b'<net><layer version="extension"/></net>',
        "has a layer of 'extension'",
        "expected OpenVINO's own operators",
    ),
    "a layer of no version": (b"<net><layer/></net>", "has a layer of ''", "expected OpenVINO's own operators"),
    "a layer of control characters": (
        b'<net><layer version="opset1&#x7f;"/></net>',
        r"has a layer of 'opset1\x7f'",
        "expected OpenVINO's own operators",
    ),
    "another file": (
        b'<net><layer version="opset1"><data path="/etc/passwd"/></layer></net>',
        "asks for another file",
        "expected its weights in its .bin",
    ),
    "a layer of a namespace": (
        b'<net xmlns:a="b"><a:layer version="extension"/></net>',
        "uses XML namespaces",
        PLAIN,
    ),
    "a default namespace": (b'<net xmlns="b"/>', "uses XML namespaces", PLAIN),
    "a prefix of nothing": (b'<net><a:layer version="extension"/></net>', "uses XML namespaces", PLAIN),
    "half a file": (b"<net>", "is no XML (no element found: line 1, column 5)", "expected an IR"),
    "text": (b"net", "is no XML (syntax error: line 1, column 0)", "expected an IR"),
    "an unknown entity": (b"<net>&x;</net>", "is no XML (undefined entity: line 1, column 5)", "expected an IR"),
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda graphs: graphs.append(graphs[0]), "expected one graph for each shape"),
        (lambda graphs: graphs[0].update(outputs=["mask", "logits"]), "in this order, the first two always"),
        (lambda graphs: graphs[0].update(outputs=["logits", "confidence"]), "in this order, the first two always"),
        (lambda graphs: graphs[0].update(outputs=["logits", "mask", "mask"]), "in this order, the first two always"),
        (lambda graphs: graphs[0].update(frame=[1080, 1920, 4]), "got 4, expected a whole number from 3 to 3"),
        (lambda graphs: graphs[0].update(frame=[1080]), "got a list of 1, expected a list of 2 to 3 entries"),
        (lambda graphs: graphs[0].update(frame=[2**15 + 1, 1]), "expected a whole number from 1 to 32768"),
    ],
)
def test_a_baked_graph_that_no_frame_fits_is_refused(root: Path, change: Callable[[Any], None], found: str) -> None:
    edit(root, lambda document: change(document["artifacts"][0]["baked"]))
    assert found in str(refused(root))


@pytest.mark.parametrize(
    ("number", "path"),
    [
        (0, "openvino/model.txt"),
        (0, "openvino/model.XML"),
        (1, "onnx/model.dat"),
        (2, "torch/weights.pth"),
        (1, ".onnx"),
    ],
)
def test_a_file_of_another_ending_is_refused_since_nothing_would_look_into_it(
    root: Path, number: int, path: str
) -> None:
    edit(root, lambda document: document["artifacts"][number]["files"][0].update(path=path))
    error = refused(root)
    assert error.place == f"manifest.json $.artifacts[{number}].files"
    assert error.found.startswith(f"got {path}")
    assert error.expected.startswith("expected one .")


def test_a_baked_graph_s_files_are_checked_as_the_artifact_s_are(root: Path) -> None:
    edit(root, lambda document: document["artifacts"][0]["baked"][0]["files"][0].update(bytes=7))
    assert refused(root).place == "openvino/model-1920x1080.xml"


def replaced(root: Path, path: str, content: bytes) -> None:
    """The bundle with this file instead, every sum and size right."""
    (root / path).write_bytes(content)

    def change(document: dict[str, Any]) -> None:
        for artifact in document["artifacts"]:
            for file in artifact["files"]:
                if file["path"] == path:
                    file.update(bytes=len(content), sha256=sha256(content))

    edit(root, change)


@pytest.mark.parametrize(
    ("path", "runtime", "case"),
    [
        *(("onnx/model.onnx", "onnxruntime", case) for case in HOSTILE),
        *(("openvino/model.xml", "openvino", case) for case in HOSTILE_IR),
    ],
)
def test_a_graph_that_is_no_plain_graph_is_refused_before_a_runtime_sees_it(
    root: Path, path: str, runtime: str, case: str
) -> None:
    content, found, expected = (HOSTILE if path.endswith(".onnx") else HOSTILE_IR)[case]
    replaced(root, path, content)
    opened = Bundle(root)
    with pytest.raises(BundleError) as caught, opened.open_artifact(opened.artifact(runtime, "fp32")):
        pytest.fail("it was given out")
    assert parts(one_line(caught.value)) == (path, found, expected, DO_NOT_USE)
    with pytest.raises(BundleError) as caught:
        Predictor.load(root, runtime=runtime, cache=False)
    assert parts(caught.value) == (path, found, expected, DO_NOT_USE)


def test_graphs_deep_in_each_other_are_refused() -> None:
    graph = m(1, onnx_node())
    for _ in range(40):
        graph = m(1, onnx_node(attribute=m(6, graph)))
    with pytest.raises(BundleError, match="has graphs deep in each other, expected at most 16"):
        graphs.check("a.onnx", m(7, graph))


def test_a_plain_graph_passes() -> None:
    plain = onnx_model(onnx_node(b"ai.onnx", m(5, m(9, b"1234"))), graph=m(5, m(9, bytes(5000))))
    graphs.check("a.onnx", plain)
    graphs.check("a.xml", b'<net><layer version="opset13"><data offset="0" size="4"/></layer></net>')
    for runtime in ("onnxruntime", "openvino"):
        demo = Bundle(DEMO_BUNDLE)
        with demo.open_artifact(demo.artifact(runtime, "fp32")) as paths:
            assert paths


@given(content=st.binary(max_size=200), name=st.sampled_from(["a.onnx", "a.xml"]))
def test_any_bytes_as_a_graph_pass_or_are_refused(content: bytes, name: str) -> None:
    with contextlib.suppress(BundleError):
        graphs.check(name, content)


# Names, sizes and depth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("C:/windows/model.onnx", "expected a file inside the bundle, listed once"),
        ("onnx/model.onnx:stream", "expected a file inside the bundle, listed once"),
        ("ONNX/model.onnx", "expected more than case to tell it from 'onnx/model.onnx'"),
        ("Manifest.JSON", "expected more than case to tell it from 'manifest.json'"),
        ("sha256sums", "expected more than case to tell it from 'SHA256SUMS'"),
        ("mode\u0300le.onnx", "expected its characters composed (NFC)"),
    ],
)
def test_a_name_that_means_another_file_elsewhere_is_refused(root: Path, path: str, expected: str) -> None:
    content = (root / SUMS).read_bytes()
    (root / SUMS).write_bytes(content + f"{HEX}  {path}\n".encode())
    assert parts(refused(root)) == (f"{SUMS} line {len(KINDS) + 1}", f"got the path {path!r}", expected, DO_NOT_USE)


def test_a_hard_link_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    os.link(root / "onnx/model.onnx", tmp_path / "other")
    assert parts(refused(root)) == ("onnx/model.onnx", "is a hard link", "expected a file without another name", COPY)


def test_an_installed_bundle_may_be_linked(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As installers do to save space."""
    os.link(root / "onnx/model.onnx", tmp_path / "other")
    monkeypatch.setattr("msa2net.runtimes.bundle._PACKAGE", tmp_path.resolve())
    assert Bundle(root).verify() == len(KINDS)


def test_a_folder_that_is_a_link_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.move(root / "onnx", tmp_path / "elsewhere")
    (root / "onnx").symlink_to(tmp_path / "elsewhere")
    assert parts(refused(root)) == ("onnx", "is a link or a device", "expected only regular files", COPY)


def test_sums_and_manifests_beyond_a_megabyte_are_refused_unread(root: Path) -> None:
    content = (root / MANIFEST).read_bytes()
    set_manifest(root, content + b" " * (1 << 20))
    assert refused(root).found == f"got {len(content) + (1 << 20)} bytes"
    (root / SUMS).write_bytes(f"{HEX}  a\n".encode() * 20_000)
    assert parts(refused(root)) == (SUMS, "got over 1048576 bytes", "expected fewer", COPY)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [31, 32, 5000])
def test_a_manifest_deeper_than_32_is_refused_before_it_is_parsed(
    root: Path, opening: str, closing: str, depth: int
) -> None:
    document = (root / MANIFEST).read_text(encoding="utf-8")
    inner = opening * depth + "1" + closing * depth
    set_manifest(root, document.replace('"parity": {', f'"extra": ["}}]", {inner}], "parity": {{', 1).encode())
    if depth < 28:  # the field lies in four of them
        Bundle(root)
    else:
        assert refused(root).found == "not JSON (objects and lists lie deeper than 32 in each other)"


def test_brackets_in_strings_are_no_depth(root: Path) -> None:
    edit(root, lambda d: d["model"].update(name='[[[["{{\\' * 40))
    assert Bundle(root).manifest.model_name.startswith("[[[[")


@pytest.mark.parametrize(
    ("held", "least", "found", "expected"),
    [
        ("2.1", "2.1", "", ""),
        ("2.1", "2.0.9", "", ""),
        ("2.1", "2.1.0", "", ""),
        ("2.10", "2.9", "", ""),
        ("2.1", "2.1.1", "holds version 2.1 of its model", "expected at least 2.1.1"),
        ("2.1", "10", "holds version 2.1 of its model", "expected at least 10"),
        ("2.1", "new", "got 'new'", "expected numbers with dots, as in '2.1'"),
        ("beta", "1", "got 'beta'", "expected numbers with dots, as in '2.1'"),
    ],
)
def test_an_older_model_than_asked_for_is_refused(root: Path, held: str, least: str, found: str, expected: str) -> None:
    edit(root, lambda d: d["model"].update(version=held))
    if not found:
        Bundle(root).require_version(least)
        return
    with pytest.raises(BundleError) as caught:
        Predictor.load(root, minimum_version=least)
    assert (caught.value.found, caught.value.expected) == (found, expected)
