"""The export: what a bundle holds, what is refused, and that its name never holds a half."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from safetensors import safe_open

import msa2net
from msa2net.__main__ import main
from msa2net.core.checkpoint import load_model, model_by_rule, read_checkpoint, save_checkpoint
from msa2net.core.config import VARIANTS
from msa2net.core.data import Case, Dataset, Volume
from msa2net.core.network import is_unused
from msa2net.errors import BundleError, CheckpointError, DataError, ExportError, RuntimeUnavailableError
from msa2net.export import export_bundle, parity, pipeline, writer
from msa2net.export.sbom import SBOM, SOUP
from msa2net.export.writer import new_bundle
from msa2net.runtimes import AccuracyLossWarning, Predictor, measure
from msa2net.runtimes.backends import candidates
from msa2net.runtimes.bundle import MANIFEST, SUMS, Bundle, ClassInfo

RUNTIMES = candidates("CPU")

CONFIG = replace(VARIANTS["tiny"], num_classes=2)
CHECKOUT = Path(msa2net.__file__).resolve().parent
DEMO = CHECKOUT / "core" / "demo.safetensors"  # it finds the phantoms' lesions, so that it can be judged
METADATA = {
    "model": "by rule",
    "version": "7",
    "classes": '["background", "lesion"]',
    "mean": "[0.5, 0.5, 0.5]",
    "std": "[0.5, 0.5, 0.5]",
    "notice": "It segments nothing.",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "rule.safetensors"
    save_checkpoint(path, model_by_rule(CONFIG).state_dict(), METADATA)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole export; tests only read it. It gives torch's threads back as they were."""
    threads = torch.get_num_threads()
    bundle = export_bundle(
        checkpoint, tmp_path_factory.mktemp("export") / "rule.bundle", precisions=("fp32",), progress=False
    )
    assert torch.get_num_threads() == threads
    return bundle


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """An export for PyTorch alone, checked on two phantoms: a second instead of half a minute."""
    few = parity.phantom_cases
    monkeypatch.setattr(parity, "phantom_cases", lambda grey, count=2: few(grey, count))
    return partial(export_bundle, runtimes=("pytorch",), progress=False)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, hidden ones and empty folders included."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")
    }


# What is in it --------------------------------------------------------------------------------------------------


def test_the_bundle_opens_and_every_sum_holds(exported: Path) -> None:
    bundle = Bundle(exported)
    assert bundle.verify() == 13
    assert sorted(bundle.sums) == [
        "SOUP.md",
        *(f"golden/{i}_{name}.npy" for i in range(2) for name in ("frame", "logits", "mask")),
        "manifest.json",
        "onnx/model.onnx",
        "openvino/model.bin",
        "openvino/model.xml",
        "sbom.cdx.json",
        "torch/weights.safetensors",
    ]
    assert not list(exported.parent.glob(".msa2net*"))


def test_its_bill_of_materials_is_valid_and_lists_its_files(exported: Path, checkpoint: Path) -> None:
    text = (exported / SBOM).read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill, sums = json.loads(text), Bundle(exported).sums
    files = {each["name"]: each["hashes"][0]["content"] for each in bill["components"] if each["type"] == "file"}
    assert files == {name: digest for name, digest in sums.items() if name not in (SBOM, SOUP)}
    (ancestor,) = bill["metadata"]["component"]["pedigree"]["ancestors"]
    assert ancestor["hashes"][0]["content"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_its_sums_are_in_the_format_of_sha256sum(exported: Path) -> None:
    lines = (exported / SUMS).read_text(encoding="utf-8").splitlines()
    expected = [
        f"{hashlib.sha256((exported / line[66:]).read_bytes()).hexdigest()}  {line[66:]}"
        for line in sorted(lines, key=lambda line: line[66:])
    ]
    assert lines == expected


def test_the_manifest_says_what_the_checkpoint_says(exported: Path) -> None:
    manifest = Bundle(exported).manifest
    assert (manifest.model_name, manifest.model_version, manifest.notice) == ("by rule", "7", "It segments nothing.")
    assert manifest.model_variant == "tiny"
    assert manifest.model_config == CONFIG.to_json()
    assert [info.name for info in manifest.classes] == ["background", "lesion"]
    assert manifest.classes[0].color == (0, 0, 0)
    assert manifest.input.mean == manifest.input.std == (0.5, 0.5, 0.5)


def test_the_onnx_file_is_plain_opset_20_with_its_weights_inside(exported: Path) -> None:
    content = (exported / "onnx/model.onnx").read_bytes()
    proto = onnx.load_model_from_string(content)
    graph = proto.graph
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    assert proto.ir_version <= 10
    assert not proto.functions
    assert not proto.metadata_props
    assert not graph.metadata_props
    assert not any(tensor.external_data for tensor in graph.initializer)
    assert {tensor.data_location for tensor in graph.initializer} == {onnx.TensorProto.DEFAULT}
    items = [proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output]
    assert not [item for item in items if item.doc_string]
    assert not [item for item in graph.node if item.metadata_props]
    shapes = [
        (value.name, value.type.tensor_type.elem_type, [d.dim_value for d in value.type.tensor_type.shape.dim])
        for value in (*graph.input, *graph.output)
    ]
    assert shapes == [
        ("image", onnx.TensorProto.FLOAT, [1, 3, 224, 224]),
        ("logits", onnx.TensorProto.FLOAT, [1, 2, 224, 224]),
    ]


def test_no_file_tells_where_it_was_made(exported: Path, checkpoint: Path) -> None:
    places = {
        str(CHECKOUT),
        str(Path.home()),
        str(exported.parent),
        str(checkpoint.parent),
        sys.prefix,
        "site-packages",
    }
    assert places.isdisjoint({"/", ""})
    for name, content in snapshot(exported).items():
        told = [place for place in places if f"{place.rstrip('/')}".encode() in content]
        assert told == [], name


def test_the_openvino_weights_are_float32_and_no_others(exported: Path) -> None:
    text = (exported / "openvino/model.xml").read_text(encoding="utf-8")
    constants = [line for line in text.splitlines() if "<data" in line and 'offset="' in line]
    types = {line.partition('element_type="')[2].partition('"')[0] for line in constants}
    assert len(constants) > 100
    assert "f32" in types
    assert not types & {"f16", "bf16", "i8", "u8"}
    assert (exported / "openvino/model.bin").stat().st_size > 4_000_000  # a million weights of four bytes


def test_the_torch_weights_hold_every_used_key_and_no_other(exported: Path) -> None:
    with safe_open(exported / "torch/weights.safetensors", framework="numpy") as file:
        keys = set(file.keys())
    expected = {key for key in model_by_rule(CONFIG).state_dict() if not is_unused(key, CONFIG)}
    assert keys == expected
    assert len(keys) > 400


def test_every_artifact_carries_its_evidence_within_the_limits(exported: Path) -> None:
    artifacts = Bundle(exported).manifest.artifacts
    assert [artifact.name for artifact in artifacts] == [f"{runtime} fp32" for runtime in RUNTIMES]
    for artifact in artifacts:
        figures = artifact.parity
        assert (figures["data"], figures["images"], figures["against"]) == ("phantoms", 40, "fp32 mask")
        assert artifact.accuracy in ("high", "standard", "unjudged")
        assert 1 < figures["largest_logit"] < 100
        assert 0 <= figures["logit_difference"] <= parity.LOGIT_LIMIT * figures["largest_logit"]
        assert figures["pixel_agreement"] >= parity.PIXEL_LIMIT
        assert figures["worst"]["pixel_agreement"] >= 0.999
        assert figures["worst"]["image"].startswith("phantom ")
        assert list(figures["dice"]) == ["background", "lesion"]
        assert all(abs(each["change"] or 0) <= 1e-3 for each in figures["dice"].values())
        assert artifact.tolerance.pixels == parity.PIXEL_LIMIT
        assert parity.LOGIT_LIMIT <= artifact.tolerance.logit <= parity.LOGIT_LIMIT * figures["largest_logit"] * 1.5


@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_the_self_test_passes(exported: Path, runtime: str) -> None:
    with Predictor.load(exported, runtime=runtime, threads=1) as predictor:
        result = predictor.self_test()
    assert result.passed, result
    assert result.frames == 2


def test_the_golden_outputs_are_the_references(exported: Path) -> None:
    bundle = Bundle(exported)
    infer = parity.reference(model_by_rule(CONFIG))
    for case, entry in zip(parity.phantom_cases(False, 2), bundle.manifest.golden, strict=True):
        result = parity.run_case(case, bundle.manifest, infer)
        assert np.array_equal(np.load(exported / entry.frame), case.frame)
        assert np.abs(np.load(exported / entry.logits) - result.logits).max() <= 1e-5
        assert np.array_equal(np.load(exported / entry.mask), result.mask)


@pytest.mark.alone
def test_an_export_by_another_process_elsewhere_gives_the_same_bytes(
    exported: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Hash seed, folder and all that ran before differ: nothing in a bundle may depend on them."""
    subprocess.run(
        [sys.executable, "-m", "msa2net", "export", "--checkpoint", str(checkpoint), "--output", "again.bundle"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    first, second = snapshot(exported), snapshot(tmp_path / "again.bundle")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dual_attention", "lka"])
def test_the_released_size_exports_to_every_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Nine classes, half a gigabyte a checkpoint, on four phantoms."""
    few = parity.phantom_cases
    monkeypatch.setattr(parity, "phantom_cases", lambda grey, count=4: few(grey, count))
    path = tmp_path / "released.safetensors"
    save_checkpoint(path, model_by_rule(replace(VARIANTS["small"], deep_decoder=form)).state_dict())
    bundle = Bundle(export_bundle(path, tmp_path / "b", progress=False))
    path.unlink()
    assert bundle.verify() == 11
    assert bundle.manifest.model_variant == "small"
    used = {"dual_attention": 112_767_981 - 36_161_315, "lka": 93_660_877 - 22_647_578}[form]
    for artifact in bundle.manifest.artifacts:
        size = sum(entry.bytes for entry in artifact.files)
        assert 4 * used * 0.95 < size < 4 * used * 1.1, artifact.name  # position tables replace their small networks
        with Predictor.load(bundle.path, runtime=artifact.runtime, threads=1) as predictor:
            assert predictor.self_test().passed, artifact.name


# Options --------------------------------------------------------------------------------------------------------


def test_what_is_named_wins_over_the_checkpoints_metadata(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    output = quick(
        checkpoint,
        tmp_path / "b",
        classes=["skin", "naevus"],
        mean=[0.25],
        std=[0.2, 0.3, 0.4],
        fit="letterbox",
        enlarge="bilinear",
        name="named",
        model_version="8",
    )
    manifest = Bundle(output).manifest
    assert [info.name for info in manifest.classes] == ["skin", "naevus"]
    assert (manifest.input.mean, manifest.input.std) == ((0.25,) * 3, (0.2, 0.3, 0.4))
    assert (manifest.input.fit, manifest.enlarge) == ("letterbox", "bilinear")
    assert (manifest.model_name, manifest.model_version) == ("named", "8")
    assert [artifact.runtime for artifact in manifest.artifacts] == ["pytorch"]


@pytest.mark.parametrize(
    ("resize", "enlarge", "expected"),
    [
        (None, None, "nearest"),
        ("spline", None, "aligned"),
        ("spline", "nearest", "nearest"),
        (None, "aligned", "aligned"),
    ],
)
def test_a_mask_goes_back_on_the_grid_that_its_frame_came_by(
    checkpoint: Path, quick: Callable[..., Path], tmp_path: Path, resize: Any, enlarge: Any, expected: str
) -> None:
    bundle = quick(checkpoint, tmp_path / "b", resize=resize, enlarge=enlarge)
    manifest = Bundle(bundle).manifest
    assert (manifest.input.resize, manifest.enlarge) == (resize or "bilinear-fixed", expected)


def test_a_grey_network_gets_one_channel_and_grey_golden_frames(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    output = quick(checkpoint, tmp_path / "b", channels=1, mean=[0.4])
    manifest = Bundle(output).manifest
    assert (manifest.input.channels, manifest.input.mean, manifest.input.std) == (1, (0.4,), (0.5,))
    assert {np.load(output / entry.frame).ndim for entry in manifest.golden} == {2}
    with Predictor.load(output, threads=1) as predictor:
        assert predictor.self_test().passed


def test_a_runtime_that_is_named_twice_is_exported_once(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    output = quick(checkpoint, tmp_path / "b", runtimes=["pytorch", "pytorch"])
    assert [artifact.runtime for artifact in Bundle(output).manifest.artifacts] == ["pytorch"]


# The images of the accuracy check ---------------------------------------------------------------------------------


def labelled(root: Path, values: tuple[int, ...] = (0, 255), count: int = 3) -> Path:
    """images/ and masks/ for patients whose names no message and no file may hold."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (60, 70), np.uint8)).save(root / "images" / f"patient_{i}.png")
        mask = np.full((60, 70), values[0], np.uint8)
        mask[10:40, 20:50] = values[1]
        Image.fromarray(mask).save(root / "masks" / f"patient_{i}.png")
    return root


def holds_none_of(bundle: Path, images: Path) -> bool:
    """Whether no file of the bundle has a name of the images, or the pixels of one, compressed or not."""
    files = [path for path in images.rglob("*") if path.is_file()]
    assert files
    pieces = [b"patient", *(path.read_bytes()[-200:] for path in files)]
    for path in files:
        with Image.open(path) as image:
            if len(np.unique(np.asarray(image))) > 2:  # rows of a mask can be in anything
                pieces += [np.asarray(image)[row].tobytes() for row in (0, 30, 59)]
    return not any(piece in content for content in snapshot(bundle).values() for piece in pieces)


def test_with_labels_dice_is_against_the_truth_and_no_image_is_kept(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    root = labelled(tmp_path / "data")
    figures = Bundle(quick(checkpoint, tmp_path / "b", data=f"folder:{root}")).manifest.artifacts[0].parity
    assert (figures["data"], figures["against"]) == ("folder", "truth")
    assert (figures["images"], figures["judged"], figures["cases"]) == (3, 3, 3)
    assert figures["worst"]["image"] in ("image 1", "image 2", "image 3")
    # Noise is nothing that the network knows: against the truth its Dice is no 1, and the artifact's is the same.
    assert figures["dice"]["lesion"]["fp32"] < 0.9
    assert figures["dice"]["lesion"]["change"] == pytest.approx(0, abs=1e-3)
    assert figures["verdict"] == "unjudged"
    assert figures["reason"] == "images of 3 cases can be judged, 10 are needed: give more"
    assert holds_none_of(tmp_path / "b", root)


def test_without_labels_dice_is_against_the_references_mask_and_no_image_is_kept(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    root = labelled(tmp_path / "data") / "images"
    figures = Bundle(quick(checkpoint, tmp_path / "b", data=f"images:{root}")).manifest.artifacts[0].parity
    assert (figures["data"], figures["images"], figures["against"]) == ("images", 3, "fp32 mask")
    assert {each["fp32"] for each in figures["dice"].values()} <= {1.0, None}
    assert holds_none_of(tmp_path / "b", root)


def test_labels_that_the_network_has_no_class_for_are_refused_and_leave_nothing(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    root = labelled(tmp_path / "data", (0, 2))
    with pytest.raises(DataError) as caught:
        quick(checkpoint, tmp_path / "b", data=f"folder:{root}")
    assert str(caught.value) == (
        "folder data, image 1 of 3, its mask: got 900 pixels of other values, most often 2, "
        "expected only 0 and 1, or 0 and 255. Save masks without loss, as PNG."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def read_volume(depth: int, side: int, top: int | None, bits: int | None = None) -> Volume:
    """`depth` frames, each filled with its number, whose labels reach `top`, if they have any."""
    frames = tuple(np.full((side, side), i, np.uint16 if bits else np.uint8) for i in range(depth))
    if top is None:
        return Volume(frames, None, bits)
    labels = np.zeros((depth, side, side), np.uint8)
    labels[-1, 0, 0] = top
    return Volume(frames, labels, bits)


def dataset(*volumes: tuple[int, int, int | None]) -> Dataset:
    cases = tuple(Case(f"volume {i}", partial(read_volume, *volume)) for i, volume in enumerate(volumes, 1))
    return Dataset("synapse", ("background", "a", "b"), cases)


def test_frames_of_a_volume_are_named_by_number_and_belong_to_one_case() -> None:
    cases = parity.data_cases(dataset((3, 4, 2), (1, 5, 0)), 3)
    assert [(case.name, case.case) for case in cases] == [
        ("volume 1 frame 1", "volume 1"),
        ("volume 1 frame 2", "volume 1"),
        ("volume 1 frame 3", "volume 1"),
        ("volume 2", "volume 2"),
    ]
    assert [int(case.frame[0, 0]) for case in cases] == [0, 1, 2, 0]
    assert [case.frame.shape for case in cases] == [(4, 4)] * 3 + [(5, 5)]
    assert [int(case.truth[0, 0]) for case in cases if case.truth is not None] == [0, 0, 2, 0]
    assert {case.bits for case in cases} == {None}


def test_bits_and_missing_labels_are_passed_on() -> None:
    data = Dataset("dicom", ("background", "a"), (Case("series 1", partial(read_volume, 2, 4, None, 12)),))
    cases = parity.data_cases(data, 2)
    assert [(case.bits, case.truth, case.frame.dtype) for case in cases] == [(12, None, np.uint16)] * 2


@pytest.mark.parametrize(
    ("depths", "limit", "expected"),
    [
        pytest.param([10, 10], 4, {1: [1, 6], 2: [1, 6]}, id="two of each"),
        pytest.param([9, 1], 6, {1: [1, 4, 7], 2: [1]}, id="a short one keeps its share"),
        pytest.param([2, 2, 2], 6, {1: [1, 2], 2: [1, 2], 3: [1, 2]}, id="just all"),
        pytest.param([5] * 6, 3, {2: [1], 5: [1], 6: [1]}, id="more cases than frames"),
        pytest.param([5] * 3, 5, {1: [1], 2: [1], 3: [1]}, id="no more than the limit"),
    ],
)
def test_at_most_the_limit_of_frames_is_taken_evenly_over_cases(
    depths: list[int], limit: int, expected: dict[int, list[int]]
) -> None:
    found: dict[int, list[int]] = {}
    for case in parity.data_cases(dataset(*((depth, 2, 0) for depth in depths)), 3, limit):
        found.setdefault(int(case.case.split()[1]), []).append(int(case.frame[0, 0]) + 1)
    assert found == expected
    assert sum(map(len, found.values())) <= limit


def test_the_limit_is_1000_frames_and_what_is_not_taken_is_not_read() -> None:
    read: list[int] = []

    def case(number: int) -> Case:
        def pixels() -> Volume:
            read.append(number)
            return read_volume(1, 2, None)

        return Case(f"image {number}", pixels)

    cases = parity.data_cases(Dataset("images", ("background", "a"), tuple(map(case, range(2000)))), 2)
    assert parity.MAX_FRAMES == len(cases) == len(read) == 1000
    assert read == sorted(set(read))
    assert 450 < sum(number % 2 for number in read) < 550  # of two kinds in turn, as many of each


def test_a_label_beyond_the_classes_is_refused_by_its_case() -> None:
    data = dataset((3, 4, 1), (3, 4, 2))
    with pytest.raises(ExportError) as caught:
        parity.data_cases(data, 2)
    assert str(caught.value) == "volume 2: has the label 2, expected less than 2. Is it another task's?"
    assert len(parity.data_cases(data, 3)) == 6


def test_a_data_set_without_images_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        parity.data_cases(dataset(), 3)
    assert str(caught.value) == "--data synapse: no images, expected some for the parity check. Name others."


# The resize rule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "named", "expected"),
    [
        ({}, None, "bilinear-fixed"),
        ({"resize": "bilinear"}, None, "bilinear-fixed"),
        ({"resize": "spline"}, None, "spline"),
        ({"resize": "spline"}, "bilinear", "bilinear"),
    ],
    ids=["nobody", "checkpoint", "another checkpoint", "caller"],
)
def test_the_resize_rule_is_the_callers_then_the_checkpoints(
    quick: Callable[..., Path], tmp_path: Path, said: dict[str, str], named: str | None, expected: str
) -> None:
    path = tmp_path / "w.safetensors"
    save_checkpoint(path, model_by_rule(CONFIG).state_dict(), METADATA | said)
    output = quick(path, tmp_path / "b", resize=named)
    assert Bundle(output).manifest.input.resize == expected
    with Predictor.load(output, threads=1) as predictor:
        assert predictor.self_test().passed


def test_a_checkpoint_of_an_unknown_resize_rule_is_refused(quick: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_checkpoint(path, model_by_rule(CONFIG).state_dict(), METADATA | {"resize": "lanczos"})
    with pytest.raises(CheckpointError) as caught:
        quick(path, tmp_path / "b")
    assert str(caught.value) == (
        f"{path}: its metadata 'resize' is 'lanczos', expected one of bilinear, bilinear-fixed, spline. Give --resize."
    )
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


# What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"classes": ["a", "b", "c"]},
            ExportError,
            "classes: got a, b, c, expected 2 different names. Name all.",
        ),
        ({"classes": ["a", "a"]}, ExportError, "classes: got a, a, expected 2 different names. Name all."),
        (
            {"mean": [0.1, 0.2]},
            ExportError,
            "mean: got [0.1, 0.2], expected 1 or 3 numbers. Give one for each channel.",
        ),
        (
            {"std": [0.1, 0.2, 0.3, 0.4]},
            ExportError,
            "std: got [0.1, 0.2, 0.3, 0.4], expected 1 or 3 numbers. Give one for each channel.",
        ),
        (
            {"runtimes": ["tensorflow"]},
            ExportError,
            "runtimes: got 'tensorflow', expected some of onnxruntime, openvino, pytorch, tensorrt, "
            "tensorrt-rtx, torch-tensorrt. Check the spelling.",
        ),
        (
            {"runtimes": []},
            ExportError,
            "runtimes: got none, expected some of onnxruntime, openvino, pytorch, tensorrt, "
            "tensorrt-rtx, torch-tensorrt. Check the spelling.",
        ),
        (
            {"mean": [float("nan")]},
            ExportError,
            "mean: got [nan, nan, nan], expected finite numbers. They are of pixels scaled to [0, 1].",
        ),
        ({"std": [0]}, ExportError, "std: got [0.0, 0.0, 0.0], expected numbers above 0. It divides every pixel."),
        ({"fit": "crop"}, ExportError, "fit: got 'crop', expected one of stretch, letterbox. Pick one."),
        ({"channels": 2}, ExportError, "channels: got 2, expected one of 1, 3. Pick one."),
        (
            {"resize": "lanczos"},
            ExportError,
            "resize: got 'lanczos', expected one of bilinear, bilinear-fixed, spline, None. Pick one.",
        ),
        (
            {"data": "photos:folder"},
            DataError,
            "data: got a name of an unknown kind, expected KIND:PATH with KIND one of "
            "synapse, isic2018, folder, pairs, images, dicom, phantoms",
        ),
    ],
    ids=[
        "three-names",
        "one-name-twice",
        "two-means",
        "four-deviations",
        "unknown-runtime",
        "no-runtime",
        "nan-mean",
        "no-deviation",
        "unknown-fit",
        "two-channels",
        "unknown-resize",
        "unknown-kind-of-data",
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    quick: Callable[..., Path],
    checkpoint: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error) as caught:
        quick(checkpoint, tmp_path / "b", **options)
    assert str(caught.value) == text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["classes", "mean", "std"])
def test_metadata_that_is_no_json_list_is_refused_by_name(quick: Callable[..., Path], tmp_path: Path, key: str) -> None:
    path = tmp_path / "w.safetensors"
    save_checkpoint(path, model_by_rule(CONFIG).state_dict(), METADATA | {key: "0.5; 0.5"})
    with pytest.raises(
        CheckpointError, match=f"w.safetensors: its metadata {key!r} is '0.5; 0.5', expected a JSON list"
    ):
        quick(path, tmp_path / "b")
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            {},
            "images data: found nothing, expected image files (.png, .jpg, .tif, .bmp, .npy, .dcm). "
            "Check the path and the names.",
        ),
        ({"a.png": b"no image"}, "images data, image 1 of 1: not a readable image, expected "),
    ],
    ids=["empty", "unreadable"],
)
def test_a_folder_without_readable_images_is_refused_and_leaves_nothing(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path, content: dict[str, bytes], text: str
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, data in content.items():
        (images / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        quick(checkpoint, tmp_path / "b", data=f"images:{images}")
    assert str(caught.value).startswith(text)
    assert "a.png" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def damaged(error: float) -> Callable[[str], type]:
    """`backend_class` for a backend whose logits of class 1 are off by `error`."""
    real = parity.backend_class

    def choose(runtime: str) -> type:
        class Damaged(real(runtime)):  # type: ignore[misc]
            def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
                logits = super().infer(x).copy()
                logits[:, 1] += np.float32(error)
                return logits

        return Damaged

    return choose


@pytest.mark.parametrize("force", [False, True], ids=["new", "over-an-old-one"])
def test_a_model_that_misses_parity_is_refused_with_its_figures_and_leaves_nothing(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    if force:
        quick(checkpoint, tmp_path / "b")
    before = snapshot(tmp_path)
    monkeypatch.setattr(parity, "backend_class", damaged(0.01))
    with pytest.raises(ExportError) as caught:
        quick(checkpoint, tmp_path / "b", force=force)
    text = str(caught.value)
    assert text.startswith("parity of pytorch fp32: largest logit difference 1.00e-02, equal pixels 99.")
    assert "expected the verdict 'standard' over 2 images (worst: phantom " in text
    assert text.endswith(
        "). Nothing was written. --report DIR draws the worst image, --allow-accuracy-loss writes it all the same."
    )
    assert snapshot(tmp_path) == before


# The gate can fail: weights damaged on purpose --------------------------------------------------------------------

JUDGED = 16  # phantoms; enough of them show a lesion to be judged
MILD, STRONG = 0.06, 1.0  # standard deviations of the noise on the weights, in those of each tensor


@pytest.fixture(scope="module")
def sound_onnx(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], bytes]:
    """The demo network as ONNX, and the versions that wrote it: written once, since that takes longest."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    model = load_model(read_checkpoint(DEMO))
    return pipeline.onnx_file.write(model, 3, path), path.read_bytes()


def with_noise(content: bytes, noise: float) -> bytes:
    """The ONNX file with noise on each matrix and kernel; what is left out are vectors, such as biases."""
    proto = onnx.load_model_from_string(content)
    rng = np.random.default_rng(1)
    damaged = 0
    for tensor in proto.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.dtype == np.float32 and weight.ndim > 1:
            added = weight + noise * weight.std() * rng.standard_normal(weight.shape)
            tensor.CopyFrom(numpy_helper.from_array(added.astype(np.float32), tensor.name))
            damaged += 1
    assert damaged > 50
    return bytes(proto.SerializeToString())


@pytest.fixture(scope="module")
def damaging(sound_onnx: tuple[dict[str, str], bytes]) -> Callable[[pytest.MonkeyPatch, float], Callable[..., Path]]:
    """`damaging(patch, noise)`: an export of the demo network whose ONNX file comes out damaged."""

    def prepare(patch: pytest.MonkeyPatch, noise: float) -> Callable[..., Path]:
        versions, content = sound_onnx

        def write(_model: object, _channels: int, file: Path, _batch: int) -> dict[str, str]:
            file.parent.mkdir(parents=True)
            file.write_bytes(with_noise(content, noise) if noise else content)
            return versions

        few = parity.phantom_cases
        patch.setattr(parity, "phantom_cases", lambda grey, count=JUDGED: few(grey, count))
        patch.setattr(pipeline.onnx_file, "write", write)
        return partial(export_bundle, DEMO, runtimes=("onnxruntime",), progress=False)

    return prepare


Damaging = Callable[[pytest.MonkeyPatch, float], Callable[..., Path]]


def test_sound_weights_pass_and_are_reported_too(
    damaging: Damaging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the damaged ones are held against: without it, a gate that refuses everything would pass below."""
    bundle = Bundle(damaging(monkeypatch, 0)(tmp_path / "b", report=tmp_path / "report"))
    (artifact,) = bundle.manifest.artifacts
    assert (artifact.accuracy, artifact.shortfalls) == ("high", ())
    assert artifact.parity["cases"] >= measure.LEAST_CASES
    assert artifact.parity["ratio_bound"] == pytest.approx(1, abs=1e-4)
    each = json.loads((tmp_path / "report" / "onnxruntime-fp32.json").read_text(encoding="utf-8")).pop("each")
    assert min(image["pixel_agreement"] for image in each) > 0.999


@pytest.mark.parametrize("noise", [MILD, STRONG], ids=["mild", "strong"])
def test_damaged_weights_are_refused_with_their_figures_and_reported(
    damaging: Damaging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: float
) -> None:
    report = tmp_path / "report"
    with pytest.raises(ExportError) as caught:
        damaging(monkeypatch, noise)(tmp_path / "b", report=report)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    assert sorted(path.name for path in report.iterdir()) == ["onnxruntime-fp32.json", "onnxruntime-fp32.png"]

    figures = json.loads((report / "onnxruntime-fp32.json").read_text(encoding="utf-8"))
    assert (figures["verdict"], figures["images"], len(figures["each"])) == ("failed", JUDGED, JUDGED)
    assert [image["name"] for image in figures["each"]] == [case.name for case in parity.phantom_cases(False, JUDGED)]
    limit = parity.logit_limit(figures["largest_logit"])
    assert str(caught.value) == (
        f"parity of onnxruntime fp32: {'; '.join(figures['reasons'])}, "
        f"expected the verdict 'standard' over {JUDGED} images (worst: {figures['worst']['image']}). "
        "Nothing was written. --report DIR draws the worst image, --allow-accuracy-loss writes it all the same."
    )
    assert figures["reasons"][0] == (
        f"largest logit difference {figures['logit_difference']:.2e}, equal pixels {figures['pixel_agreement']:.4%}: "
        f"fp32 needs {limit:.2e} and 99.99%"
    )
    assert figures["reasons"][-1].startswith("bound 0.")
    assert figures["reasons"][-1].endswith(" of the reference's mean Dice, standard needs 0.99")
    assert figures["ratio_bound"] < 0.99
    worst = min(image["pixel_agreement"] for image in figures["each"])
    assert (worst < 0.9) == (noise == STRONG)
    assert figures["logit_difference"] > 100 * limit
    # The frame, the reference's mask and the artifact's in a row: without a truth there is no fourth picture.
    cases = {case.name: case.frame.shape for case in parity.phantom_cases(False, JUDGED)}
    rows, columns = cases[figures["worst"]["image"]][:2]
    with Image.open(report / "onnxruntime-fp32.png") as picture:
        assert picture.size == (3 * round(320 * columns / rows), 338)


def test_mild_damage_changes_some_masks_and_strong_damage_most(
    damaging: Damaging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the two amounts of noise are what their names say, and that nothing but noise is between them."""
    dice = {}
    for noise in (MILD, STRONG):
        with monkeypatch.context() as patch:
            bundle = Bundle(damaging(patch, noise)(tmp_path / str(noise), allow_accuracy_loss=True))
        dice[noise] = bundle.manifest.artifacts[0].parity["dice"]["lesion"]["artifact"]
    assert 0.9 < dice[MILD] < 0.9999
    assert dice[STRONG] < 0.7


@pytest.fixture(scope="module")
def lossy(damaging: Damaging, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Damaged ONNX beside sound PyTorch weights, written all the same; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        export = damaging(patch, MILD)
        yield export(
            tmp_path_factory.mktemp("lossy") / "lossy.bundle",
            runtimes=("onnxruntime", "pytorch"),
            allow_accuracy_loss=True,
        )


def test_a_loss_that_was_allowed_is_written_into_the_manifest(lossy: Path) -> None:
    bundle = Bundle(lossy)
    assert bundle.verify() == 11
    failed, passed = bundle.manifest.artifacts
    assert (failed.name, failed.accuracy) == ("onnxruntime fp32", "failed")
    assert failed.shortfalls[0].startswith("largest logit difference ")
    assert failed.shortfalls[-1].endswith(" of the reference's mean Dice, standard needs 0.99")
    assert (passed.name, passed.accuracy, passed.shortfalls) == ("pytorch fp32", "high", ())
    document = json.loads((lossy / MANIFEST).read_bytes())
    assert [entry["parity"]["verdict"] for entry in document["artifacts"]] == ["failed", "high"]
    assert document["artifacts"][0]["parity"]["reasons"] == list(failed.shortfalls)


def test_large_frames_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = np.zeros((10, 10), np.uint8)
    cases = tuple(Case(f"image {i}", lambda: Volume((frame,))) for i in range(32))
    monkeypatch.setattr(parity, "MAX_BYTES", 1000)
    kept = [each.name for each in parity.data_cases(Dataset("images", ("a", "b"), cases), 2)]
    assert len(kept) == 8
    assert kept == parity.sample(parity.sample([case.name for case in cases], 16), 8)
    monkeypatch.setattr(parity, "MAX_BYTES", 50)  # one is kept, whatever its size
    assert len(parity.data_cases(Dataset("images", ("a", "b"), cases), 2)) == 1


def test_a_report_that_cannot_be_written_is_named(checkpoint: Path, quick: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ExportError) as caught:
        quick(checkpoint, tmp_path / "x.bundle", report=tmp_path / "taken")
    assert str(caught.value) == (
        f"{tmp_path / 'taken'}: cannot be written (File exists), expected a folder. Name another --report."
    )
    assert not (tmp_path / "x.bundle").exists()


def test_a_loss_that_was_allowed_is_told_wherever_the_artifact_is_used(
    lossy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = Bundle(lossy).manifest.artifacts[0].shortfalls
    assert [(entry.runtime, entry.accuracy) for entry in Predictor.available(lossy)] == [
        ("onnxruntime", "failed"),
        ("pytorch", "high"),
    ]
    with pytest.warns(AccuracyLossWarning) as caught:
        loaded = Predictor.load(lossy, runtime="onnxruntime")
    with loaded as predictor:
        seg = predictor.predict(parity.phantom_cases(False, 1)[0].frame)
        assert not predictor.self_test().passed
    assert seg.execution.accuracy == "failed"
    assert [str(warning.message) for warning in caught] == [
        f"onnxruntime fp32 failed its accuracy check at export: {'; '.join(reasons)}"
    ]
    assert main(["info", str(lossy)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " fp32 " in line]
    assert [(row[0], row[4]) for row in rows] == [("onnxruntime", "failed"), ("pytorch", "high")]


def test_auto_takes_the_artifact_that_passed(lossy: Path) -> None:
    with Predictor.load(lossy) as predictor:  # a warning would fail this
        assert (predictor.execution.runtime, predictor.execution.accuracy) == ("pytorch", "high")


def test_auto_with_only_a_failed_artifact_says_why_there_is_none(
    damaging: Damaging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = damaging(monkeypatch, STRONG)(tmp_path / "b", allow_accuracy_loss=True)
    with pytest.raises(RuntimeUnavailableError) as caught:
        Predictor.load(output)
    text = str(caught.value)
    assert text.startswith(
        "runtime 'auto': nothing can run here: onnxruntime fp32: failed its accuracy check at export. "
        "Name the runtime to use it all the same.; "
    )
    assert "no artifact for openvino in fp32" in text


# The verdict alone, without an export -----------------------------------------------------------------------------


def figures(verdict: str, *reasons: str, reason: str | None = None) -> dict[str, Any]:
    return {
        "images": 2,
        "worst": {"image": "phantom ultrasound 1"},
        "verdict": verdict,
        "reason": reason,
        "reasons": list(reasons),
    }


@pytest.mark.parametrize(
    ("verdict", "precision"),
    [
        *((verdict, precision) for verdict in ("high", "standard") for precision in ("fp32", "fp16", "int8")),
        ("unjudged", "fp32"),
    ],
)
def test_these_verdicts_pass(verdict: str, precision: str) -> None:
    parity.require(f"x {precision}", figures(verdict, "one loss", reason="too few"), precision)


@pytest.mark.parametrize(
    ("found", "precision", "told"),
    [
        (figures("failed", "first", "second"), "fp32", "first; second"),
        (figures("failed", "first"), "int8", "first"),
        (figures("failed", "first", reason="too few images"), "fp32", "first; too few images"),
        (figures("unjudged", reason="too few images"), "int8", "too few images"),
        (figures("unjudged", "an alarm", reason="too few images"), "bf16", "an alarm; too few images"),
    ],
    ids=["fp32", "int8", "fp32 unjudged by Dice", "int8 unjudged", "bf16 unjudged with an alarm"],
)
def test_these_verdicts_are_refused_with_all_that_is_known(found: dict[str, Any], precision: str, told: str) -> None:
    with pytest.raises(ExportError) as caught:
        parity.require(f"x {precision}", found, precision)
    assert str(caught.value) == (
        f"parity of x {precision}: {told}, expected the verdict 'standard' over 2 images (worst: phantom ultrasound 1)."
        " Nothing was written. --report DIR draws the worst image, --allow-accuracy-loss writes it all the same."
    )


CLASSES = (ClassInfo(name="skin", color=(0, 0, 0)), ClassInfo(name="lesion", color=(230, 60, 60)))


def square(side: int, missing: int = 0) -> NDArray[np.uint8]:
    """(200, 200) with a square lesion of the side, `missing` pixels of it left out."""
    mask = np.zeros((200, 200), np.uint8)
    mask[:side, :side] = 1
    mask.ravel()[np.flatnonzero(mask)[:missing]] = 0
    return mask


def compared(
    masks: Sequence[NDArray[np.uint8]],
    precision: str = "fp32",
    *,
    logit: float = 5.0,
    differences: Sequence[float] | None = None,
    reference: NDArray[np.uint8] | None = None,
    truth: NDArray[np.uint8] | None = None,
    report: Path | None = None,
) -> dict[str, Any]:
    """`parity.compare` of these masks with the reference's, and of logits that differ by so much in each image."""
    want = square(100) if reference is None else reference
    frame = np.full((200, 200), 90, np.uint8)
    cases = [parity.Case(f"image {i}", frame, truth=truth) for i in range(len(masks))]
    expected = [parity.Result(np.full((2, 2, 2), logit, np.float32), want) for _ in masks]
    found = [
        parity.Result(np.full((2, 2, 2), logit + change, np.float32), mask)
        for change, mask in zip(differences or [0.0] * len(masks), masks, strict=True)
    ]
    return parity.compare(cases, expected, iter(found), CLASSES, precision, report, "some runtime fp32")


def test_compare_gives_the_logits_beside_the_judgement() -> None:
    found = compared([square(100)] * 11 + [square(100, 3)], differences=[0.0] * 11 + [-4e-4], logit=-5.0)
    assert found["logit_difference"] == pytest.approx(4e-4, rel=1e-2)
    assert found["largest_logit"] == 5
    assert (found["images"], found["judged"], found["against"]) == (12, 12, "fp32 mask")
    assert found["worst"] == {"image": "image 11", "pixel_agreement": 1 - 3 / 40_000}
    assert (found["verdict"], found["reasons"]) == ("high", [])
    assert list(found)[:2] == ["logit_difference", "largest_logit"]


@pytest.mark.parametrize(
    ("difference", "logit", "passes"),
    [
        (4.9e-4, 5.0, True),
        (5.1e-4, 5.0, False),
        (-5.1e-4, -5.0, False),
        (0.9e-4, 0.1, True),
        (1.1e-4, 0.1, False),
        (float("nan"), 5.0, False),
        (float("inf"), 5.0, False),
    ],
    ids=str,
)
def test_fp32_logits_may_differ_by_rounding_alone(difference: float, logit: float, passes: bool) -> None:
    """Even in a single image, neither the first nor the last, whose mask is the same."""
    differences = [0.0] * 6 + [difference] + [0.0] * 5
    found = compared([square(100)] * 12, differences=differences, logit=logit)
    assert found["verdict"] == ("high" if passes else "failed")
    assert bool(found["reasons"]) == (not passes)
    assert compared([square(100)] * 12, "fp16", differences=differences, logit=logit)["verdict"] == "high"


@pytest.mark.parametrize(("missing", "passes"), [(3, True), (5, False)])
def test_fp32_masks_may_differ_in_one_pixel_of_ten_thousand(missing: int, passes: bool) -> None:
    found = compared([square(100, missing)] * 12)
    assert found["verdict"] == ("high" if passes else "failed")
    if not passes:
        assert found["reasons"] == [
            "largest logit difference 0.00e+00, equal pixels 99.9875%: fp32 needs 5.00e-04 and 99.99%"
        ]
    assert compared([square(100, missing)] * 12, "int8")["verdict"] == "high"


def test_another_precision_is_judged_by_dice_alone() -> None:
    found = compared([square(100, 150)] * 12, "int8", differences=[1.0] * 12)
    assert found["verdict"] == "standard"
    assert found["reasons"] == ["bound 0.9924 of the reference's mean Dice, high needs 0.999"]
    parity.require("x int8", found, "int8")
    lost = compared([square(100, 900)] * 12, "int8", differences=[1.0] * 12)
    assert lost["verdict"] == "failed"
    assert lost["reasons"] == ["bound 0.9528 of the reference's mean Dice, standard needs 0.99"]


def test_images_that_allow_no_judgement_are_enough_for_fp32_and_for_no_other_precision() -> None:
    nothing = np.zeros((200, 200), np.uint8)
    for precision in ("fp32", "bf16", "fp16", "int8"):
        found = compared([nothing] * 12, precision, reference=nothing)
        assert found["verdict"] == "unjudged"
        if precision == "fp32":
            parity.require("x fp32", found, precision)
        else:
            with pytest.raises(ExportError, match=f"^parity of x {precision}: no image has 500 pixels of foreground"):
                parity.require(f"x {precision}", found, precision)


def test_fp32_whose_logits_are_off_fails_though_its_images_allow_no_judgement() -> None:
    nothing = np.zeros((200, 200), np.uint8)
    found = compared([nothing] * 12, reference=nothing, differences=[0.01] * 12)
    assert found["verdict"] == "failed"
    with pytest.raises(ExportError) as caught:
        parity.require("x fp32", found, "fp32")
    assert str(caught.value).startswith(
        "parity of x fp32: largest logit difference 1.00e-02, equal pixels 100.0000%: fp32 needs 5.00e-04 and 99.99%; "
        "no image has 500 pixels of foreground in the reference mask"
    )


def test_with_a_truth_both_are_held_against_it() -> None:
    found = compared([square(100)] * 12, truth=square(80))
    assert found["against"] == "truth"
    assert found["dice"]["lesion"]["fp32"] == found["dice"]["lesion"]["artifact"] == pytest.approx(12_800 / 16_400)
    assert found["ratio"] == 1


def test_frames_of_one_case_are_one_case() -> None:
    frame, result = np.zeros((200, 200), np.uint8), parity.Result(np.ones((2, 2, 2), np.float32), square(100))
    cases = [parity.Case(f"volume {i % 4} frame {i}", frame, case=f"volume {i % 4}") for i in range(12)]
    found = parity.compare(cases, [result] * 12, [result] * 12, CLASSES, "fp32")
    assert (found["images"], found["cases"], found["verdict"]) == (12, 4, "unjudged")


def test_the_report_draws_the_worst_image_and_lists_all(tmp_path: Path) -> None:
    masks = [square(100)] * 5 + [square(100, 900)] + [square(100)] * 6
    found = compared(masks, "int8", truth=square(90), report=tmp_path / "new" / "report")
    assert sorted(path.name for path in (tmp_path / "new" / "report").iterdir()) == [
        "some-runtime-fp32.json",
        "some-runtime-fp32.png",
    ]
    written = json.loads((tmp_path / "new" / "report" / "some-runtime-fp32.json").read_text(encoding="utf-8"))
    each = written.pop("each")
    assert written == found
    assert found["worst"]["image"] == "image 5"
    assert [image["name"] for image in each] == [f"image {i}" for i in range(12)]
    assert [image["pixel_agreement"] for image in each] == [1 - 900 / 40_000 if i == 5 else 1.0 for i in range(12)]
    with Image.open(tmp_path / "new" / "report" / "some-runtime-fp32.png") as picture:
        assert picture.size == (4 * 320, 338)
        panels = [np.asarray(picture)[18:, 320 * i : 320 * (i + 1)] for i in range(4)]
    # Frame, reference, artifact, truth: the corner that the artifact lost is red in the second and fourth alone.
    assert [bool(panel[8, 8, 0] > 1.3 * panel[8, 8, 2]) for panel in panels] == [False, True, False, True]


# The target -----------------------------------------------------------------------------------------------------


def test_an_existing_bundle_is_not_touched_without_force(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    target = quick(checkpoint, tmp_path / "b")
    before = snapshot(tmp_path)
    with pytest.raises(ExportError) as caught:
        quick(checkpoint, target, name="other")
    assert str(caught.value) == f"{target}: exists, expected a new name. Use --force to replace it."
    assert snapshot(tmp_path) == before


def test_force_replaces_a_bundle_and_leaves_nothing_else(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    target = quick(checkpoint, tmp_path / "b", name="old")
    quick(checkpoint, target, name="new", force=True)
    bundle = Bundle(target)
    assert bundle.verify() == 10
    assert bundle.manifest.model_name == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_force_never_replaces_what_is_no_bundle(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "b"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
    elif kind == "file":
        target.write_text("years of work")
    else:
        quick(checkpoint, tmp_path / "real")
        target.symlink_to(tmp_path / "real")
    before = snapshot(tmp_path)
    with pytest.raises(ExportError) as caught:
        quick(checkpoint, target, force=True)
    assert str(caught.value) == (
        f"{target}: exists and is no bundle, expected a bundle to replace. Choose another name."
    )
    assert snapshot(tmp_path) == before


def start_and_kill(checkpoint: Path, output: Path) -> None:
    """Starts an export and kills it the hard way as soon as a model file lies in its partial folder."""
    command = [sys.executable, "-m", "msa2net", "export", "--checkpoint", str(checkpoint), "--runtimes", "pytorch"]
    child = subprocess.Popen(
        [*command, "--output", str(output), "--force"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not list(output.parent.glob(".msa2net-partial-*/torch/weights.safetensors")):
            assert child.poll() is None, "the export ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("old", [False, True], ids=["new", "over-an-old-one"])
def test_a_killed_export_leaves_the_name_as_it_was_and_the_next_one_clears_up(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path, old: bool
) -> None:
    target = tmp_path / "b"
    if old:
        quick(checkpoint, target, name="old")
    start_and_kill(checkpoint, target)
    litter = list(tmp_path.glob(".msa2net-partial-*"))
    assert len(litter) == 1
    assert target.exists() == old
    if old:
        assert Bundle(target).verify() == 10
        assert Bundle(target).manifest.model_name == "old"
    quick(checkpoint, tmp_path / "next")
    assert sorted(path.name for path in tmp_path.iterdir()) == (["b", "next"] if old else ["next"])


# The writer alone, without a network ----------------------------------------------------------------------------


def write_to(target: Path, text: str = "new", *, force: bool = False, then: Callable[[Path], object] = str) -> None:
    """A bundle whose one model file holds `text`; `then` is called in the block, after it is written."""
    with new_bundle(target, force=force) as folder:
        fill(folder, text)
        then(folder)


def fill(folder: Path, text: str = "new") -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text(text)
    (folder / MANIFEST).write_text("{}")


def old_bundle(target: Path) -> None:
    write_to(target, "old")


def test_the_writer_sums_every_file_and_opens_the_folder_to_all(tmp_path: Path) -> None:
    with new_bundle(tmp_path / "b") as folder:
        fill(folder)
        assert not (tmp_path / "b").exists()
        assert folder.parent == tmp_path  # the same file system, or it could not be renamed
    expected = [
        f"{hashlib.sha256(b'{}').hexdigest()}  manifest.json",
        f"{hashlib.sha256(b'new').hexdigest()}  onnx/model.onnx",
    ]
    assert (tmp_path / "b" / SUMS).read_text().splitlines() == expected
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "b").rglob("*") if path.is_file()} == {"0o644"}
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "b", tmp_path / "b" / "onnx")} == {"0o755"}


@pytest.mark.parametrize("old", [False, True], ids=["new", "over-an-old-one"])
def test_an_exception_in_the_block_leaves_everything_as_it_was(tmp_path: Path, old: bool) -> None:
    if old:
        old_bundle(tmp_path / "b")
    before = snapshot(tmp_path)

    def interrupt(_folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_to(tmp_path / "b", force=old, then=interrupt)
    assert snapshot(tmp_path) == before


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "b"
    with pytest.raises(ExportError) as caught:
        write_to(target, then=lambda _: (target / "mine").mkdir(parents=True))
    assert str(caught.value) == f"{target}: exists, expected a new name. Use --force to replace it."
    assert snapshot(tmp_path) == {"b": b"", "b/mine": b""}


def test_a_target_that_appears_after_the_last_check_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename itself refuses: between the check and it there is always a moment."""
    target = tmp_path / "b"
    real = writer._publish

    def late(partial: Path, output: Path, *, replace: bool) -> None:
        (output / "mine").mkdir(parents=True)
        real(partial, output, replace=replace)

    monkeypatch.setattr(writer, "_publish", late)
    with pytest.raises(ExportError) as caught:
        write_to(target)
    assert str(caught.value) == f"{target}: cannot be written (File exists). Nothing was changed."
    assert snapshot(tmp_path) == {"b": b"", "b/mine": b""}


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        write_to(tmp_path / "none" / "b")
    expected = "no such folder, expected the folder that will hold the bundle. Create it."
    assert str(caught.value) == f"{tmp_path / 'none'}: {expected}"
    assert not list(tmp_path.iterdir())


def test_a_parent_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(writer.tempfile, "mkdtemp", refuse)  # the superuser may write anywhere, so it is acted
    with pytest.raises(ExportError) as caught:
        write_to(tmp_path / "b")
    assert str(caught.value) == f"{tmp_path / 'b'}: cannot be written (Permission denied). Nothing was changed."
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("old", [False, True], ids=["new", "over-an-old-one"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    if old:
        old_bundle(tmp_path / "b")
    before = snapshot(tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError) as caught:
        write_to(tmp_path / "b", force=old)
    assert str(caught.value) == f"{tmp_path / 'b'}: cannot be written (No space left on device). Nothing was changed."
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_folder_that_cannot_be_listed_is_not_summed_as_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """os.walk passes over it without a word, unless it is told not to; the calls are those of the sums and the sync."""
    before, calls, real = snapshot(tmp_path), 0, os.scandir

    def scandir(path: Any) -> Any:
        nonlocal calls
        calls += "msa2net-partial" in str(path)
        if calls == nth:
            calls += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ExportError, match=r"cannot be written \(Too many open files\). Nothing was changed.$"):
        write_to(tmp_path / "b")
    monkeypatch.undo()
    assert snapshot(tmp_path) == before


def test_every_file_and_folder_is_synced_before_the_name_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    target = tmp_path / "b"
    real = os.fsync

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        top = ".".join(path.relative_to(tmp_path).parts[1:])
        events.append(("parent" if path == tmp_path else top or "bundle") + (" named" if target.exists() else ""))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_to(target)
    assert events[:2] == ["onnx.model.onnx", "onnx"]
    assert sorted(events[2:4]) == ["SHA256SUMS", "manifest.json"]
    assert events[4:] == ["bundle", "parent named"]


class FakeLibrary:
    """A C library whose renameat2 fails with `code`."""

    def __init__(self, code: int) -> None:
        self.code = code

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(self.code)
        return -1


def fail_rename(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: FakeLibrary(code))


@pytest.mark.parametrize("old", [False, True], ids=["new", "over-an-old-one"])
def test_a_rename_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    if old:
        old_bundle(tmp_path / "b")
    before = snapshot(tmp_path)
    fail_rename(monkeypatch, errno.EROFS)
    with pytest.raises(ExportError) as caught:
        write_to(tmp_path / "b", force=old)
    assert str(caught.value) == f"{tmp_path / 'b'}: cannot be written (Read-only file system). Nothing was changed."
    assert snapshot(tmp_path) == before


def test_a_file_system_without_the_flag_still_gets_a_new_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_rename(monkeypatch, errno.EINVAL)
    write_to(tmp_path / "b")
    assert (tmp_path / "b" / SUMS).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_file_system_that_cannot_exchange_keeps_the_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_bundle(tmp_path / "b")
    before = snapshot(tmp_path)
    fail_rename(monkeypatch, errno.EINVAL)
    with pytest.raises(ExportError) as caught:
        write_to(tmp_path / "b", force=True)
    expected = "this file system cannot exchange two folders in one step. Export to a new name instead."
    assert str(caught.value) == f"{tmp_path / 'b'}: {expected}"
    assert snapshot(tmp_path) == before


def test_force_never_lets_the_name_go_missing(tmp_path: Path) -> None:
    """A reader that looks as often as it can while bundles replace each other."""
    target = tmp_path / "b"
    old_bundle(target)
    seen: list[bool] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append((target / SUMS).is_file())

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for i in range(20):
            write_to(target, str(i), force=True)
    finally:
        done.set()
        reader.join()
    assert len(seen) > 20
    assert all(seen)
    assert (target / "onnx" / "model.onnx").read_text() == "19"


def test_the_folder_of_a_running_export_is_not_cleared(tmp_path: Path) -> None:
    with new_bundle(tmp_path / "a") as first:
        fill(first, "first")
        with new_bundle(tmp_path / "b") as second:
            fill(second, "second")
            assert first != second
    assert (tmp_path / "a" / "onnx" / "model.onnx").read_text() == "first"
    assert (tmp_path / "b" / "onnx" / "model.onnx").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_of_two_exports_to_one_name_the_second_to_finish_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "b"
    with pytest.raises(ExportError, match="b: exists, expected a new name"):
        write_to(target, "first", then=lambda _: write_to(target, "second"))
    assert (tmp_path / "b" / "onnx" / "model.onnx").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_the_folder_of_a_dead_export_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    litter = tmp_path / ".msa2net-partial-dead"
    litter.mkdir()
    (litter / "half").write_text("half")
    (tmp_path / ".msa2net-notes").mkdir()
    old_bundle(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".msa2net-notes", "b"]


def test_a_link_in_the_block_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"^weights: is a link or a device"):
        write_to(tmp_path / "b", then=lambda folder: (folder / "weights").symlink_to("/dev/null"))
    assert not list(tmp_path.iterdir())
