"""The export: what a bundle holds, what is refused, and that its name never holds a half."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

import msa2net
from msa2net.core.checkpoint import model_by_rule, save_checkpoint
from msa2net.core.config import VARIANTS
from msa2net.core.network import is_unused
from msa2net.errors import BundleError, CheckpointError, ExportError
from msa2net.export import export_bundle, parity, pipeline, writer
from msa2net.export.writer import new_bundle
from msa2net.runtimes import Predictor
from msa2net.runtimes.backends import RUNTIMES
from msa2net.runtimes.bundle import MANIFEST, SUMS, Bundle

CONFIG = replace(VARIANTS["tiny"], num_classes=2)
CHECKOUT = Path(msa2net.__file__).resolve().parent
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
    bundle = export_bundle(checkpoint, tmp_path_factory.mktemp("export") / "rule.bundle", progress=False)
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
    assert bundle.verify() == 11
    assert sorted(bundle.sums) == [
        *(f"golden/{i}_{name}.npy" for i in range(2) for name in ("frame", "logits", "mask")),
        "manifest.json",
        "onnx/model.onnx",
        "openvino/model.bin",
        "openvino/model.xml",
        "torch/weights.safetensors",
    ]
    assert not list(exported.parent.glob(".msa2net*"))


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
        assert figures["images"] == 16
        assert 1 < figures["largest_logit"] < 100
        assert 0 <= figures["logit_difference"] <= parity.LOGIT_LIMIT * figures["largest_logit"]
        assert figures["pixel_agreement"] >= parity.PIXEL_LIMIT
        assert figures["worst"]["pixel_agreement"] >= 0.999
        assert figures["worst"]["image"].startswith("phantom ")
        assert list(figures["dice"]) == ["background", "lesion"]
        assert min(figures["dice"].values()) >= 0.999
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


def test_parity_is_checked_on_the_users_images_and_none_of_them_is_kept(
    quick: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        np.save(images / f"patient_{i}.npy", np.full((40, 50 + i), 60 * i + 7, np.uint8))
    output = quick(checkpoint, tmp_path / "b", images=images)
    figures = Bundle(output).manifest.artifacts[0].parity
    assert figures["images"] == 3
    assert figures["worst"]["image"].startswith("image ")
    assert not any(b"patient" in content for content in snapshot(output).values())


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
            "runtimes: got 'tensorflow', expected some of onnxruntime, openvino, pytorch. Check the spelling.",
        ),
        (
            {"runtimes": []},
            ExportError,
            "runtimes: got none, expected some of onnxruntime, openvino, pytorch. Check the spelling.",
        ),
        (
            {"mean": [float("nan")]},
            ExportError,
            "mean: got [nan, nan, nan], expected finite numbers. They are of pixels scaled to [0, 1].",
        ),
        ({"std": [0]}, ExportError, "std: got [0.0, 0.0, 0.0], expected numbers above 0. It divides every pixel."),
        ({"fit": "crop"}, ExportError, "fit: got 'crop', expected one of stretch, letterbox. Pick one."),
        ({"channels": 2}, ExportError, "channels: got 2, expected one of 1, 3. Pick one."),
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
        ({}, "--images: a folder without images, expected some for the parity check. Name another."),
        ({"a.png": b"no image"}, "image 1 of 1: "),
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
    with pytest.raises(ExportError) as caught:
        quick(checkpoint, tmp_path / "b", images=images)
    assert text in str(caught.value)
    assert "a.png" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def damaged(error: float) -> Callable[[str], type]:
    """`backend_class` for a backend whose logits of class 1 are off by `error`."""
    real = pipeline.backend_class

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
    monkeypatch.setattr(pipeline, "backend_class", damaged(0.01))
    with pytest.raises(ExportError) as caught:
        quick(checkpoint, tmp_path / "b", force=force)
    text = str(caught.value)
    assert text.startswith("parity of pytorch fp32: largest logit difference 1.00e-02, equal pixels 99.")
    assert "% (worst: phantom " in text
    assert text.endswith(" and at least 99.99% over 2 images. Nothing was written.")
    assert snapshot(tmp_path) == before


def figures(**changes: float) -> dict[str, Any]:
    return {
        "images": 2,
        "logit_difference": 1e-6,
        "largest_logit": 5.0,
        "pixel_agreement": 1.0,
        "worst": {"image": "phantom ultrasound 1"},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, True),
        ({"logit_difference": 4.9e-4}, True),
        ({"logit_difference": 5.1e-4}, False),
        ({"logit_difference": 0.9e-4, "largest_logit": 0.1}, True),
        ({"logit_difference": 1.1e-4, "largest_logit": 0.1}, False),
        ({"pixel_agreement": 0.99991}, True),
        ({"pixel_agreement": 0.99989}, False),
        ({"logit_difference": float("nan")}, False),
        ({"pixel_agreement": float("nan")}, False),
    ],
    ids=str,
)
def test_the_parity_limits_scale_with_the_largest_logit(changes: dict[str, float], passes: bool) -> None:
    if passes:
        parity.require("x fp32", figures(**changes))
        return
    with pytest.raises(ExportError, match=r"^parity of x fp32: largest logit difference .*worst: phantom ultrasound 1"):
        parity.require("x fp32", figures(**changes))


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
    assert bundle.verify() == 8
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
        assert Bundle(target).verify() == 8
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


def test_compare_reports_the_worst_image_and_each_classs_dice() -> None:
    def result(mask: Sequence[Sequence[int]], logit: float) -> parity.Result:
        return parity.Result(np.full((2, 2, 2), logit, np.float32), np.array(mask, np.uint8))

    cases = [parity.Case(name, np.zeros((2, 2), np.uint8)) for name in ("first", "second")]
    expected = [result([[0, 0], [1, 1]], 3.0), result([[0, 0], [1, 1]], -4.0)]
    found = [result([[0, 0], [1, 1]], 3.5), result([[0, 1], [1, 1]], -4.25)]
    assert parity.compare(cases, expected, found, ["skin", "lesion"]) == {
        "images": 2,
        "logit_difference": 0.5,
        "largest_logit": 4.0,
        "pixel_agreement": 0.875,
        "dice": {"skin": pytest.approx((1 + 2 / 3) / 2), "lesion": pytest.approx((1 + 0.8) / 2)},
        "worst": {"image": "second", "pixel_agreement": 0.75},
    }
