"""Baked graphs: both ends against `preprocess` and `postprocess`, and a bundle with them behind `Predictor`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ends
import numpy as np
import onnx
import openvino
import pytest
from numpy.typing import NDArray

from msa2net import Predictor
from msa2net.core.phantoms import phantom
from msa2net.errors import BundleError, ExportError, FrameError, OutputError, RuntimeUnavailableError
from msa2net.export import bake, export_bundle, onnx_file, parity
from msa2net.export.bake import FrameSize
from msa2net.runtimes import postprocess, preprocess
from msa2net.runtimes.backends import cpu_lacks
from msa2net.runtimes.bundle import MANIFEST, Bundle, Manifest
from msa2net.runtimes.predictor import DEMO_BUNDLE

Run = Callable[[onnx.ModelProto, NDArray[Any]], list[NDArray[Any]]]
DEMO = Path(bake.__file__).parents[1] / "core" / "demo.safetensors"
BAKED = ("onnxruntime", "openvino")
COLOUR, GREY = (180, 320, 3), (96, 128)


def in_openvino(model: onnx.ModelProto, x: NDArray[Any]) -> list[NDArray[Any]]:
    core = openvino.Core()
    hint = {"INFERENCE_PRECISION_HINT": openvino.Type.f32}
    found = core.compile_model(core.read_model(model.SerializeToString()), "CPU", hint)([x])
    return [found[i] for i in range(len(found))]


def in_onnxruntime(model: onnx.ModelProto, x: NDArray[Any]) -> list[NDArray[Any]]:
    onnx_file.check(model)
    session = onnx_file.session(model)
    return list(session.run(None, {session.get_inputs()[0].name: x}))


def contract(fit: str, resize: str, enlarge: str, classes: int = 2) -> Manifest:
    manifest = Bundle(DEMO_BUNDLE).manifest
    named = [replace(manifest.classes[0], name=str(i), color=(i, 2 * i, 255 - i)) for i in range(classes)]
    changed = replace(manifest.input, fit=fit, resize=resize, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return replace(manifest, input=changed, enlarge=enlarge, classes=tuple(named))


@pytest.mark.parametrize(("run", "fused"), [(in_openvino, True), (in_onnxruntime, False)], ids=["OpenVINO", "ONNX"])
@pytest.mark.parametrize(
    ("text", "fit", "resize", "enlarge", "classes"),
    [
        ("1920x1080", "stretch", "bilinear", "nearest", 2),
        ("1920x1080", "stretch", "bilinear-fixed", "nearest", 2),
        ("227x301", "letterbox", "bilinear-fixed", "nearest", 9),
        ("150x100:grey", "stretch", "bilinear-fixed", "nearest", 3),
        ("97x61:grey", "letterbox", "bilinear-fixed", "bilinear", 2),
        ("224x300", "stretch", "bilinear-fixed", "nearest", 2),
        ("300x224", "stretch", "bilinear-fixed", "nearest", 2),
        ("224x224", "stretch", "bilinear-fixed", "nearest", 2),
        ("3000x2", "stretch", "bilinear-fixed", "nearest", 2),
        ("227x301", "letterbox", "bilinear", "nearest", 9),
        ("150x100:grey", "stretch", "bilinear", "aligned", 3),
        ("640x480:grey", "letterbox", "spline", "aligned", 2),
        ("224x224", "stretch", "bilinear", "nearest", 2),
        ("1x1", "stretch", "bilinear", "nearest", 2),
        ("1000x7", "letterbox", "spline", "bilinear", 3),
        ("97x61:grey", "stretch", "bilinear", "bilinear", 2),
        ("3000x2", "stretch", "bilinear", "nearest", 2),
    ],
)
def test_both_ends_do_what_pre_and_postprocessing_do(
    run: Run, fused: bool, text: str, fit: str, resize: str, enlarge: str, classes: int
) -> None:
    manifest, size, rng = contract(fit, resize, enlarge, classes), FrameSize.parse(text), np.random.default_rng(0)
    frame = rng.integers(0, 256, size.shape).astype(np.uint8)
    expected = preprocess.to_tensor(frame, manifest.input)
    (found,) = run(bake.front(manifest, size, fused), frame)
    assert found.shape == expected.shape
    # In fixed-point numbers to the last bit: so the network gives the same bits, too.
    assert np.abs(found - expected).max() <= (0 if resize == "bilinear-fixed" else 4e-6)

    logits = rng.normal(size=(1, classes, 224, 224)).cumsum(2).cumsum(3).astype(np.float32) / 50
    mask, confidence, colors = run(bake.back(manifest, size, bake.EXTRAS, fused), logits)
    maps, wanted, spot = postprocess.finish(logits, manifest, size.rows, size.columns)
    assert (mask == wanted).mean() >= (0.9999 if enlarge == "bilinear" else 1)
    assert mask.dtype == confidence.dtype == colors.dtype == np.uint8
    assured = postprocess.to_confidence(maps, spot, (size.rows, size.columns), enlarge)
    assert np.abs(confidence.astype(int) - assured).max() <= 1
    assert np.array_equal(colors, np.array([info.color for info in manifest.classes], np.uint8)[mask])


ENDS = [
    (text, fit, resize, enlarge, classes)
    for text in ("640x360", "640x360:grey", "224x224", "300x224:grey", "100x80")
    for fit in ("stretch", "letterbox")
    for resize, classes in (("bilinear-fixed", 2), ("bilinear-fixed", 3), ("bilinear", 2))
    for enlarge in ("nearest", "bilinear")
]


def write(folder: Path, text: str, fit: str, resize: str, enlarge: str, classes: int) -> None:
    """What `ends.py` takes: a small network, alone and with both ends."""
    manifest, size, rng = contract(fit, resize, enlarge, classes), FrameSize.parse(text), np.random.default_rng(0)
    x = openvino.opset15.parameter([1, 3, 224, 224], np.float32, name="image")
    weights = openvino.opset15.constant(rng.normal(size=(classes, 3, 3, 3)).astype(np.float32))
    network = openvino.opset15.convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    network.get_output_tensor(0).set_names({"logits"})
    files = folder / "network.xml", folder / "network.bin"
    openvino.save_model(openvino.Model([network], [x]), files[0], compress_to_fp16=False)
    bake.openvino_baked(files, manifest, size, ("confidence",), folder / "baked.xml")
    frame = rng.integers(0, 256, size.shape).astype(np.uint8)
    np.save(folder / "frame.npy", frame)
    np.save(folder / "image.npy", preprocess.to_tensor(frame, manifest.input))


@pytest.mark.skipif(bool(cpu_lacks("bf16")), reason="this CPU cannot compute in bf16")
@pytest.mark.parametrize("case", ENDS, ids=lambda case: "-".join(map(str, case)))
def test_beside_a_network_in_bf16_both_ends_stay_in_fp32(tmp_path: Path, case: tuple[Any, ...]) -> None:
    folder = tmp_path / case[2]
    folder.mkdir()
    write(folder, *case)
    assert ends.complaints(folder) == []


@pytest.mark.parametrize("text", ["", "1920", "1920x", "0x5", "5x0", "-1x5", "1920x1080:red", "40000x5", "20000x20000"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ExportError, match=r"^--bake: got "):
        FrameSize.parse(text)


def test_a_size_is_columns_by_rows() -> None:
    assert FrameSize.parse("1920x1080").shape == (1080, 1920, 3)
    assert FrameSize.parse("640x480:grey").shape == (480, 640)
    assert str(FrameSize.parse("640x480:grey")) == "640x480:grey"


# A bundle -----------------------------------------------------------------------------------------------------------


def frame(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    image = phantom("dermoscopy", 78, (shape[0], shape[1])).image
    return image if len(shape) == 3 else np.ascontiguousarray(image[..., 1])


def test_its_manifest_lists_the_graphs_and_its_files_are_shared(baked: Path) -> None:
    bundle = Bundle(baked)
    bundle.verify()
    onnx_artifact, ir, torch_artifact = bundle.manifest.artifacts
    for artifact in (onnx_artifact, ir):
        assert [graph.frame for graph in artifact.baked] == [COLOUR, GREY]
        assert all(graph.outputs == ("logits", "mask", "confidence", "colors") for graph in artifact.baked)
    assert torch_artifact.baked == ()
    assert {graph.files[1] for graph in ir.baked} == {ir.files[1]}  # one .bin
    assert ir.files[1].bytes < 4_341_064 + 400_000
    assert [np.load(baked / entry.frame).shape for entry in bundle.manifest.golden[-2:]] == [COLOUR, GREY]
    entries = json.loads((baked / MANIFEST).read_bytes())["artifacts"]
    assert all(graph["pixel_agreement"] == 1 for entry in entries for graph in entry.get("baked", ()))


@pytest.mark.parametrize("output", ["confidence", "colors"])
def test_what_a_graph_gives_beside_the_mask_is_tested_too(baked: Path, output: str) -> None:
    with Predictor.load(baked, runtime="openvino", frame_shape=COLOUR, cache=False) as predictor:
        graph = predictor._baked[COLOUR]
        run: Any = graph.backend.run  # type: ignore[attr-defined]  # a baked graph's has it
        which = graph.outputs.index(output)

        def spoiled(pixels: NDArray[np.uint8]) -> list[NDArray[Any]]:
            found = list(run(pixels))
            found[which] = found[which] ^ np.uint8(4)
            return found

        assert predictor.self_test().pixel_agreement == 1
        graph.backend.run = spoiled  # type: ignore[attr-defined]
        assert predictor.self_test().pixel_agreement == 0
        with pytest.raises(OutputError, match="expected the golden frames to pass"):
            predictor.reset()


@pytest.mark.parametrize("runtime", BAKED)
def test_a_frame_that_fits_takes_its_graph_and_gets_the_same_mask(baked: Path, runtime: str) -> None:
    with (
        Predictor.load(baked, runtime=runtime, cache=False) as predictor,
        Predictor.load(baked, runtime=runtime, cache=False) as plain,
    ):
        plain._baked.clear()
        for shape in (COLOUR, GREY):
            for pixels in (frame(shape), frame(shape)[::-1]):  # one that is not contiguous, too
                found, expected = predictor.predict(pixels), plain.predict(pixels)
                assert found.execution.graph == "baked " + "x".join(map(str, shape))
                assert expected.execution.graph == "network"
                assert np.array_equal(found.logits, expected.logits)
                assert np.array_equal(found.mask, expected.mask)
                assert np.abs(found.confidence.astype(int) - expected.confidence).max() <= 1
                assert np.array_equal(found.colors, expected.colors)
                assert found.execution.precision == "fp32"
                assert np.abs(found.probabilities - expected.probabilities).max() <= 1e-6
        other = predictor.predict(frame((100, 100, 3)))
        deep = predictor.predict(frame(GREY).astype(np.uint16) * 257)
        assert other.execution.graph == deep.execution.graph == "network"
        assert predictor.self_test().passed
        assert predictor.self_test().frames == len(predictor.bundle.manifest.golden)


@pytest.mark.parametrize("runtime", BAKED)
def test_one_shape_alone_can_be_loaded(baked: Path, runtime: str, tmp_path: Path) -> None:
    for cached in (False, True):
        with Predictor.load(baked, runtime=runtime, frame_shape=GREY, cache=tmp_path / runtime) as predictor:
            assert predictor.execution.cached is cached
            assert predictor.predict(frame(GREY)).execution.graph == "baked 96x128"
            assert predictor.self_test().passed
            assert predictor.self_test().frames == 1
            expected = r"^frame: got uint8 \(180, 320, 3\), expected uint8 \(96, 128\): the predictor was loaded for it"
            with pytest.raises(FrameError, match=expected):
                predictor.predict(frame(COLOUR))
            with pytest.raises(FrameError, match="no network for it is loaded"):
                predictor.logits(np.zeros((1, 3, 224, 224), np.float32))


def test_a_shape_that_nothing_is_baked_for_is_refused(baked: Path) -> None:
    with pytest.raises(
        RuntimeUnavailableError, match=r"frame_shape: got \(5, 5\), expected a baked graph's \(\(180, 32"
    ):
        Predictor.load(baked, runtime="openvino", frame_shape=(5, 5))
    with pytest.raises(RuntimeUnavailableError, match=r"expected a baked graph's \(none\). Export with --bake"):
        Predictor.load(baked, runtime="pytorch", frame_shape=GREY)


def test_a_changed_graph_is_refused(baked: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(baked, tmp_path / "copy.bundle"))
    path = copy / Bundle(copy).artifact("onnxruntime", "fp32").baked[0].files[0].path
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="changed: SHA-256"):
        Predictor.load(copy, runtime="onnxruntime", frame_shape=COLOUR, cache=False)


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({"logits": np.full((1, 2, 224, 224), np.nan, np.float32)}, "logits: got NaN or infinity"),
        ({"mask": np.zeros((9, 9), np.uint8)}, r"mask: got uint8 \(9, 9\), expected uint8 \(96, 128\)"),
        ({"mask": np.zeros(GREY, np.int64)}, r"mask: got int64 \(96, 128\), expected uint8 \(96, 128\)"),
        ({"colors": np.zeros(GREY, np.uint8)}, r"colors: got uint8 \(96, 128\), expected uint8 \(96, 128, 3\)"),
    ],
)
def test_outputs_that_cannot_be_right_give_no_mask(
    baked: Path, monkeypatch: pytest.MonkeyPatch, outputs: dict[str, NDArray[Any]], text: str
) -> None:
    with Predictor.load(baked, runtime="onnxruntime", frame_shape=GREY, cache=False) as predictor:
        graph = predictor._baked[GREY]
        run = graph.backend.run  # type: ignore[attr-defined]

        def broken(x: NDArray[Any]) -> list[NDArray[Any]]:
            return [outputs.get(name, found) for name, found in zip(graph.outputs, run(x), strict=True)]

        monkeypatch.setattr(graph.backend, "run", broken)
        with pytest.raises(OutputError, match=text):
            predictor.predict(frame(GREY))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"runtimes": ("pytorch",), "bake": ("9x9",)}, "--bake: no runtime takes it, expected onnxruntime or openvino"),
        ({"bake": ("9x9",), "bake_outputs": ("depth",)}, "--bake-outputs: got 'depth', expected confidence, colors"),
        ({"bake": ("31x999",)}, "--bake: got 31x999, expected at least 32 a side. Give the camera's size."),
        ({"bake": ("9x9",), "channels": 1}, "--bake: got 9x9, expected grey: the network takes grey. As 9x9:grey."),
    ],
)
def test_what_cannot_be_baked_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ExportError) as caught:
        export_bundle(DEMO, tmp_path / "b", progress=False, **options)
    assert str(caught.value).startswith(text)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_does_something_else_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "phantom_cases", partial(parity.phantom_cases, count=2))
    monkeypatch.setattr(bake, "nearest_grid", lambda _, size, __: tuple(np.zeros(n, np.intp) for n in size))
    with pytest.raises(
        ExportError, match=r"^onnxruntime fp32, baked for 64x48:grey: .* of the pixels of phantoms are equal to those"
    ):
        export_bundle(DEMO, tmp_path / "b", runtimes=("onnxruntime",), bake=("64x48:grey",), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_feeds_the_network_something_else_is_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its masks alone would not tell: nothing is found in these frames, whatever the network is given."""
    monkeypatch.setattr(parity, "phantom_cases", partial(parity.phantom_cases, count=2))
    black = parity.Case("black", np.zeros((48, 64), np.uint8))
    monkeypatch.setattr(parity, "shaped_cases", lambda _, count=1: [black] * count)
    front = bake.front

    def darker(manifest: Manifest, *rest: Any) -> onnx.ModelProto:
        return front(replace(manifest, input=replace(manifest.input, mean=(0.5001,) * 3)), *rest)

    monkeypatch.setattr(bake, "front", darker)
    with pytest.raises(
        ExportError, match=r"baked for 64x48:grey: 100\.0000% of the pixels .*, logits differ by [0-9.]+, expected"
    ):
        export_bundle(DEMO, tmp_path / "b", runtimes=("onnxruntime",), bake=("64x48:grey",), progress=False)
    assert not list(tmp_path.iterdir())
