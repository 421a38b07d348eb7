"""int8: what is quantized and what is kept, what runs, on which CPU, and what is not shipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from msa2net.core import fakequant
from msa2net.core.checkpoint import load_model, model_by_rule, read_checkpoint, save_checkpoint
from msa2net.core.config import VARIANTS
from msa2net.core.maxvit import RelativePosition
from msa2net.errors import ExportError, RuntimeUnavailableError
from msa2net.export import calibration, export_bundle, onnx_file, parity, pipeline, precision, quantize
from msa2net.runtimes import Predictor, backends
from msa2net.runtimes.bundle import MANIFEST, Bundle
from msa2net.runtimes.predictor import DEMO_BUNDLE

DEMO = Path(__file__).parents[1] / "core/demo.safetensors"
RUNTIMES = ("onnxruntime", "openvino")
has_vnni = pytest.mark.skipif(bool(backends.cpu_lacks("int8")), reason="this CPU has no VNNI")
pytestmark = has_vnni


def unranked(lowering: precision.Lowering, *_: Any) -> dict[str, Any]:
    return {"places": [{"place": place, "error": 0.0, "share": 0.0} for place in lowering.places]}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """No ranking, one range method, few images."""
    few = parity.phantom_cases
    patch.setattr(parity, "phantom_cases", lambda grey, count=20: few(grey, count))
    patch.setattr(precision, "rank", unranked)
    patch.setattr(precision, "fewest", lambda _, good: good(0))
    patch.setattr(quantize, "NNCF_METHODS", {"extremes": "MINMAX"})
    patch.setattr(calibration, "MOST", 16)
    patch.setattr(calibration.frames, "__defaults__", (16,))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo in int8 on both runtimes, stage 0 kept in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield export_bundle(
            DEMO,
            tmp_path_factory.mktemp("int8") / "demo.bundle",
            runtimes=RUNTIMES,
            precisions=backends.INT8,
            keep=["stages.0"],
            allow_accuracy_loss=True,
            allow_slower=True,
            progress=False,
        )


def entry(bundle: Path, runtime: str, named: str) -> dict[str, Any]:
    found = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["artifacts"]
    (each,) = [each for each in found if (each["runtime"], each["precision"]) == (runtime, named)]
    result: dict[str, Any] = each
    return result


def require_sound(bundle: Path, *runtimes: str) -> None:
    """Skips where OpenVINO 2026.4 computes int8 wrongly, and differently at each call: with VNNI, but without AMX.

    An export refuses such an artifact; these tests let it write one.
    """
    if "openvino" not in (runtimes or RUNTIMES) or " amx_int8" in Path("/proc/cpuinfo").read_text():
        return
    for named in backends.INT8:
        if entry(bundle, "openvino", named)["parity"]["verdict"] == "failed":
            pytest.skip(f"OpenVINO's {named} is wrong on this CPU, and its verdict says so")


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("named", backends.INT8)
def test_an_int8_artifact_runs_in_int8_and_says_what_it_is(bundle: Path, runtime: str, named: str) -> None:
    require_sound(bundle, runtime)
    found = entry(bundle, runtime, named)
    assert found["parity"]["pixel_agreement"] > 0.995
    assert found["parity"]["verdict"] in ("high", "standard")
    assert set(found["precision_scan"]["forced"]) == set(found["precision_scan"]["kept"])
    assert all(place.startswith("stages.0.") for place in found["precision_scan"]["kept"])
    assert found["speed"]["ratio"][0] <= found["speed"]["ratio"][1] <= found["speed"]["ratio"][2]
    with Predictor.load(bundle, runtime=runtime, precision=named, cache=False) as predictor:
        assert predictor.self_test().passed
        assert predictor.execution.precision == named
        layers = predictor.execution.layers
        assert sum(count for kind, count in layers.items() if kind in ("int8", "i8", "u8")) > 80
    shown = [each for each in Predictor.available(bundle) if (each.runtime, each.precision) == (runtime, named)]
    assert "times" in shown[0].speed


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_second_start_gives_the_same_bits(bundle: Path, tmp_path: Path, runtime: str) -> None:
    require_sound(bundle, runtime)
    frame = parity.saturating_case().frame
    logits = []
    for cached in (False, True):
        with Predictor.load(bundle, runtime=runtime, precision="int8", cache=tmp_path) as predictor:
            assert predictor.execution.cached is cached
            logits.append(predictor.predict(frame).logits)
    assert np.array_equal(*logits)


def test_kept_places_hold_no_quantizer_and_the_others_do(bundle: Path) -> None:
    model = onnx.load(bundle / entry(bundle, "onnxruntime", "int8")["files"][0]["path"])
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm") and "stages." in node.name:
            weights = made_by.get(node.input[1], "constant")
            depthwise = any(each.name == "group" and each.i > 1 for each in node.attribute)  # faster in fp32 there
            assert (weights == "DequantizeLinear") is ("stages.0." not in node.name and not depthwise), node.name


def test_the_weights_are_a_quarter_and_those_of_the_portable_artifact_have_seven_bits(bundle: Path) -> None:
    for named, limit in (("int8", 127), ("int8-portable", 64)):
        model = onnx.load(bundle / entry(bundle, "onnxruntime", named)["files"][0]["path"])
        weights = [
            onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8
        ]
        assert max(np.abs(each.astype(int)).max() for each in weights) == limit or limit == 64
        assert max(np.abs(each.astype(int)).max() for each in weights) <= limit


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", [quantize.OnnxInt8, quantize.OpenVinoInt8])
def test_the_same_images_give_the_same_file_and_all_kept_is_fp32(tmp_path: Path, kind: Any) -> None:
    runtime = "onnxruntime" if kind is quantize.OnnxInt8 else "openvino"
    files = pipeline._FILES[runtime]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes((DEMO_BUNDLE / file).read_bytes())
    contract = Bundle(DEMO_BUNDLE).manifest.input
    tensors = calibration.tensors(calibration.frames(None, (), 3), contract)
    written = []
    for _ in range(2):
        lowering = kind(tmp_path, files, pipeline._LOWERED[runtime].format("x"), tensors[4:], tensors[:4], False)
        written.append([(tmp_path / file).read_bytes() for file in lowering.write(())])
    assert written[0] == written[1]
    expected = lowering.reference()(tensors[0])
    assert np.array_equal(lowering.infer(lowering.places)(tensors[0]), expected)
    assert not np.array_equal(lowering.infer(())(tensors[0]), expected)


def test_the_range_of_least_squares_cuts_off_what_is_rare_and_holds_zero() -> None:
    """Against every pair of ends on a coarse grid, with real rounding."""
    values = np.concatenate([np.random.default_rng(0).standard_normal(100_000), [40.0, -60.0]])
    counts = np.histogram(values, quantize._BINS, (-60, 40))[0]

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        rounded = np.round(np.clip(values, low, high) / step) * step
        return float(np.square(rounded - values).sum())

    low, high = quantize.least_squares(-60, 40, counts)
    coarse = min(error(-60 * a, 40 * b) for a in np.linspace(0.05, 1, 20) for b in np.linspace(0.05, 1, 20))
    assert error(low, high) < 1.01 * coarse < 0.85 * error(-60, 40)
    assert quantize.least_squares(2.0, 5.0, np.ones(64, np.int64))[0] == 0  # as the grid of every quantized tensor does
    assert quantize.least_squares(0.0, 0.0, np.full(64, 7)) == (0.0, 0.0)


# Which CPU -------------------------------------------------------------------------------------------------------


def test_a_cpu_without_vnni_is_refused_by_name_and_auto_takes_the_portable_artifact(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_sound(bundle)
    monkeypatch.setattr(backends, "cpu_features", lambda: {"AVX2", "FMA3"})
    for runtime in RUNTIMES:
        with pytest.raises(RuntimeUnavailableError, match="this CPU cannot run int8, it has no VNNI or dot products"):
            Predictor.load(bundle, runtime=runtime, precision="int8")
    assert {each.precision: each.available for each in Predictor.available(bundle)} == {
        "int8": False,
        "int8-portable": True,
    }
    with Predictor.load(bundle, precision="int8", cache=False) as predictor:
        assert (predictor.execution.precision, predictor.execution.precision_asked) == ("int8-portable", "int8")


@pytest.mark.parametrize("features", [{"AVX512VNNI"}, {"ASIMDDP"}])
def test_vnni_and_dot_products_run_int8(features: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cpu_features", lambda: features)
    assert not backends.cpu_lacks("int8")


def test_avx_vnni_is_believed_only_of_a_cpu_that_has_what_comes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under emulation /proc/cpuinfo speaks of the host."""
    monkeypatch.setattr(Path, "read_text", lambda *_: "flags\t\t: fpu avx2 avx_vnni gfni")
    monkeypatch.setattr(backends, "cpu_features", lambda: {"AVX2", "VAES", "GFNI"})
    assert not backends.cpu_lacks("int8")
    monkeypatch.setattr(backends, "cpu_features", lambda: {"AVX2"})
    assert backends.cpu_lacks("int8")


_ELSEWHERE = """
import sys, warnings
import numpy as np
from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes import Predictor, backends
warnings.simplefilter("ignore")
bundle, runtime, result, *frames = sys.argv[1:]
options = {"runtime": runtime, "cache": False, "threads": 1}
try:
    Predictor.load(bundle, precision="int8", **options)
except RuntimeUnavailableError as error:
    print(error)
backends._NEEDS["int8"] = (set(), "")  # as if it were not refused
backends._NEEDS["bf16"] = ({"none"}, "an older CPU")
logits = []
for named in backends.INT8:
    with Predictor.load(bundle, precision=named, **options) as predictor:
        logits.append([predictor.predict(np.load(frame)).logits for frame in frames])
np.save(result, logits)
"""


def run_elsewhere(bundle: Path, runtime: str, result: Path, frames: list[Path], emulator: list[str], limit: str) -> str:
    """Saves the logits (precision, frame, K, h, w) of int8 and of int8-portable; returns what the process said."""
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": limit} if limit else {})
    command = [*emulator, sys.executable, "-c", _ELSEWHERE, *map(str, (bundle, runtime, result, *frames))]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def golden_frames(bundle: Path) -> list[Path]:
    return [bundle / each["frame"] for each in json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["golden"]]


def test_the_golden_frame_of_blocks_shows_that_an_older_cpu_cuts_sums_off(bundle: Path, tmp_path: Path) -> None:
    """OpenVINO's kernels, held to AVX2: int8 differs there, in silence, and int8-portable does not."""
    require_sound(bundle, "openvino")
    found = []
    for limit in ("", "AVX2"):
        file = tmp_path / f"logits{limit}.npy"
        run_elsewhere(bundle, "openvino", file, golden_frames(bundle)[-1:], [], limit)
        found.append(np.load(file))
    int8, portable = np.sqrt(np.square(found[0] - found[1]).mean((1, 2, 3, 4)))
    assert int8 > 4 * portable  # which is not 0: sums in fp32 between the products are rounded in another order


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("qemu-x86_64-static"), reason="needs qemu-user-static")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_emulated_haswell_refuses_int8_and_agrees_in_int8_portable(
    bundle: Path, tmp_path: Path, runtime: str
) -> None:
    found = []
    for name, emulator in (("here", []), ("haswell", ["qemu-x86_64-static", "-cpu", "Haswell"])):
        said = run_elsewhere(bundle, runtime, tmp_path / f"{name}.npy", golden_frames(bundle), emulator, "")
        assert ("this CPU cannot run int8, it has no VNNI or dot products" in said) is (name == "haswell")
        found.append(np.load(tmp_path / f"{name}.npy"))
    int8, portable = np.sqrt(np.square(found[0] - found[1]).mean((1, 2, 3, 4)))
    equal = (found[0].argmax(2) == found[1].argmax(2))[1].mean((1, 2))
    print(f"{runtime}: logits differ by {int8:.4f} in int8, {portable:.4f} in int8-portable; equal pixels {equal}")
    assert equal.mean() > 0.999  # sums in fp32, in another order, now and then round to the next step
    assert int8 > 4 * portable


# What is not shipped ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_int8_that_is_not_faster_is_withheld_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pipeline, "ratio", lambda *_: [0.98, 1.01, 1.04])
    options: dict[str, Any] = {"runtimes": ("onnxruntime",), "progress": False, "allow_accuracy_loss": True}
    made = export_bundle(DEMO, tmp_path / "demo.bundle", precisions=("fp32", "int8"), **options)
    assert [each.name for each in Bundle(made).manifest.artifacts] == ["onnxruntime fp32"]
    assert not (made / "onnx/model-int8.onnx").exists()
    last = Predictor.available(made)[-1]
    assert not last.available
    assert last.reason.startswith("not shipped, it takes 1.01 times fp32's time on ")
    alone = json.loads((made / MANIFEST).read_bytes())
    alone["artifacts"] = alone["withheld"]
    with pytest.raises(ExportError, match=r"1.01 times fp32's time .* Add fp32, or give --allow-slower"):
        pipeline._withhold(alone)


# Bad input -------------------------------------------------------------------------------------------------------


def images(folder: Path, count: int, constant: int | None = None) -> str:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(np.full_like(pixels, 7) if i == constant else pixels).save(folder / f"{i:02d}.png")
    return f"images:{folder}"


@pytest.fixture
def other_weights(tmp_path: Path) -> Path:
    """The demo's checkpoint, the lesion's logits 3 higher."""
    read = read_checkpoint(DEMO)
    bias = "decoder_0.last_layer.bias"
    state = read.state | {bias: read.state[bias] + torch.tensor([0.0, 3.0])}
    save_checkpoint(tmp_path / "tuned.safetensors", state, read.metadata)
    return tmp_path / "tuned.safetensors"


@pytest.mark.usefixtures("quick")
def test_int8_holds_the_fine_tuned_weights_and_fp32_the_checkpoints(other_weights: Path, tmp_path: Path) -> None:
    runtimes, precisions = ["onnxruntime"], ["fp32", "int8"]
    found = export_bundle(
        DEMO,
        tmp_path / "tuned.bundle",
        runtimes=runtimes,
        precisions=precisions,
        fine_tuned=other_weights,
        allow_accuracy_loss=True,
        allow_slower=True,
        progress=False,
    )
    assert json.loads((found / MANIFEST).read_bytes())["calibration"]["fine_tuned"] is True
    assert sorted(path.name for path in found.iterdir()) == [
        "SHA256SUMS",
        "SOUP.md",
        "golden",
        MANIFEST,
        "onnx",
        "sbom.cdx.json",
    ]

    (x,) = calibration.tensors(parity.phantom_cases(False, 1), Bundle(found).manifest.input)
    files = ("model.onnx", "model-int8.onnx")
    plain, tuned = (onnx_file.runner(onnx.load(found / "onnx" / file))(x).mean((0, 2, 3)) for file in files)
    assert np.abs(tuned - plain - [0, 3]).max() < 0.5  # int8 itself moves them by tenths
    assert entry(found, "onnxruntime", "fp32")["parity"]["verdict"] == "high"
    assert entry(found, "onnxruntime", "int8")["parity"]["pixel_agreement"] < 0.999  # judged against the checkpoint's


def test_fine_tuned_weights_that_no_artifact_would_hold_are_refused(other_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--fine-tuned: no int8 artifact is asked for"):
        export_bundle(DEMO, tmp_path / "x.bundle", fine_tuned=other_weights)


def test_fine_tuned_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = model_by_rule(replace(VARIANTS["tiny"], num_classes=3))
    save_checkpoint(tmp_path / "other.safetensors", other.state_dict())
    with pytest.raises(ExportError, match="--fine-tuned: its network has num_classes 3, expected 2, as --checkpoint's"):
        export_bundle(DEMO, tmp_path / "x.bundle", precisions=["int8"], fine_tuned=tmp_path / "other.safetensors")


def test_too_few_calibration_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--calibration: 15 images, expected at least 16"):
        calibration.frames(images(tmp_path / "few", 15), ("a", "b"), 3)


def test_a_calibration_image_of_one_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has the one value 7, expected something to see"):
        calibration.frames(images(tmp_path / "same", 16, constant=3), ("a", "b"), 3)


def test_images_of_another_kind_than_the_judged_ones_are_warned_of() -> None:
    model = load_model(read_checkpoint(DEMO))
    contract = Bundle(DEMO_BUNDLE).manifest.input
    ours = calibration.tensors(calibration.frames(None, (), 3, 32), contract)
    assert calibration.compare(model, ours[:16], ours[16:]) < calibration.MOST_APART
    dermoscopy, ultrasound = ours[::2], ours[1::2]
    with pytest.warns(calibration.CalibrationWarning, match=r"differ by a factor of 1\.1\d, .* are both of one kind"):
        calibration.compare(model, dermoscopy, ultrasound)


def test_a_place_that_does_not_exist_is_refused_with_the_nearest() -> None:
    places = ("stages.0.blocks.0.conv.se.fc1", "stem.conv1")
    assert precision.named(places, ["stem", "stages.0"]) == ("stem.conv1", "stages.0.blocks.0.conv.se.fc1")
    with pytest.raises(
        ExportError, match=r"--keep: no place is called 'stem.conv2', the nearest are stem.conv1, stages"
    ):
        precision.named(places, ["stem.conv2"])


@pytest.mark.usefixtures("quick")
def test_keeping_every_place_is_refused(tmp_path: Path) -> None:
    everything = ["stem", "stages", *(f"decoder_{i}" for i in range(4))]
    with pytest.raises(ExportError, match="--keep: names every place, expected some left for int8"):
        export_bundle(
            DEMO,
            tmp_path / "demo.bundle",
            runtimes=("onnxruntime",),
            precisions=("int8",),
            keep=everything,
            progress=False,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_cancelled_export_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cancelled(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(precision, "rank", cancelled)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(DEMO, tmp_path / "demo.bundle", runtimes=("onnxruntime",), precisions=("int8",), progress=False)
    assert list(tmp_path.iterdir()) == []


# The fine-tune ---------------------------------------------------------------------------------------------------


def test_rounding_keeps_to_the_grid_and_lets_the_gradient_pass() -> None:
    weight = torch.randn(5, 3, 2, 2, requires_grad=True)
    rounded = fakequant.rounded_weight(weight)
    steps = rounded / (weight.abs().amax((1, 2, 3), keepdim=True) / 63)
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert (rounded - weight).abs().max() <= weight.abs().max() / 126 + 1e-6
    rounded.sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 1).float().mean() > 0.9
    x = torch.rand(4, 7) * 3 + 1  # the grid holds 0, too
    assert (fakequant.rounded_activation(x) - x).abs().max() <= 4 / 255 / 2 + 1e-6
    assert len(fakequant.rounded_activation(torch.randn(10_000)).unique()) <= 256


def test_a_network_that_rounds_keeps_its_parameters_names_and_comes_near_its_fp32_self() -> None:
    plain, rounding = (load_model(read_checkpoint(DEMO)) for _ in range(2))
    fakequant.simulate_int8(rounding)
    assert rounding.state_dict().keys() == plain.state_dict().keys()
    frame = Bundle(DEMO_BUNDLE).manifest
    x = torch.from_numpy(calibration.tensors(parity.phantom_cases(False, 1), frame.input)[0])
    with torch.inference_mode():
        a, b = plain(x), rounding(x)
    assert not torch.equal(a, b)
    assert (a.argmax(1) == b.argmax(1)).float().mean() > 0.99
    tables = [[m() for m in model.modules() if isinstance(m, RelativePosition)] for model in (plain, rounding)]
    assert tables[0]
    assert all(map(torch.equal, *tables))  # as in an artifact, which holds them in fp32


def test_nothing_is_reported_over_the_network() -> None:
    """NNCF's telemetry falls back to a stub where its client cannot be imported."""
    script = "from msa2net.export import quantize; quantize._import_nncf(); quantize._import_nncf(); "
    script += "import nncf.telemetry.wrapper as wrapper; print(isinstance(wrapper.telemetry, wrapper.NNCFTelemetry))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stdout.split()[-1] == "False"
