"""Lower precisions: what a CPU can run, what is asked for by name, the ranking, and fp16 where it cannot be run."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

import msa2net.runtimes.backends as backends
from msa2net.errors import ExportError, RuntimeUnavailableError
from msa2net.export import export_bundle, fp16, fp16_sums, onnx_file, openvino_ir, parity, pipeline, precision
from msa2net.runtimes import Predictor, preprocess
from msa2net.runtimes.bundle import MANIFEST, Bundle
from msa2net.runtimes.predictor import DEMO_BUNDLE

DEMO = Path(__file__).resolve().parents[1] / "core" / "demo.safetensors"
can_run_bf16 = pytest.mark.skipif(bool(backends.cpu_lacks("bf16")), reason="this CPU cannot compute in bf16")


# What is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "place"),
    [
        ("backbone.backbone.stages.2.blocks.4.attn_grid.mlp.fc2/linear_71", "stages.2.blocks.4"),
        ("backbone.backbone.stem.conv1/conv2d", "stem"),
        ("decoder_0.layer_up/mul", "decoder_0.layer_up"),
        ("MVN.51", "other"),
    ],
)
def test_a_node_is_of_the_place_that_its_name_tells(node: str, place: str) -> None:
    assert precision.place_of(node) == place


def test_a_precision_that_no_runtime_has_is_refused() -> None:
    with pytest.raises(ExportError, match="precisions: got 'bf16', expected what a runtime has"):
        pipeline._artifacts(("onnxruntime",), ("fp32", "bf16"))


def test_bf16_is_refused_where_it_cannot_be_judged_and_fp16_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cpu_features", set)
    with pytest.raises(ExportError, match="openvino bf16: this CPU cannot run bf16, it has no AVX512_BF16"):
        pipeline._artifacts(("openvino",), ("bf16",))
    assert pipeline._artifacts(("onnxruntime",), ("fp16",)) == [("onnxruntime", "fp16")]


@pytest.mark.parametrize(
    ("named", "features", "runs"),
    [
        ("fp16", {"ASIMD", "ASIMDHP"}, True),
        ("fp16", {"AVX512F", "AVX512BF16"}, False),
        ("bf16", {"ASIMDBF16"}, True),
        ("bf16", {"AVX512F"}, False),
        ("fp32", set[str](), True),
    ],
)
def test_what_a_cpu_lacks(monkeypatch: pytest.MonkeyPatch, named: str, features: set[str], runs: bool) -> None:
    monkeypatch.setattr(backends, "cpu_features", lambda: features)
    assert (backends.cpu_lacks(named) == "") == runs


# The ranking ----------------------------------------------------------------------------------------------------


def test_the_error_is_of_the_pixels_near_a_change_of_class() -> None:
    want = np.zeros((1, 2, 10, 10), np.float32)
    want[0, 1] = np.arange(1, 101, dtype=np.float32).reshape(10, 10)
    far, near = want.copy(), want.copy()
    far[0, 1, 9] += 5
    near[0, 1, 0] += 5
    assert precision.boundary_error([want], [far]) == 0
    assert precision.boundary_error([want], [near]) == pytest.approx(5)


class Adding:
    """A network whose places each add a known error in quadrature, and one that the runtime cannot run apart."""

    places = ("a", "b", "c", "d")
    base = 0.5

    def __init__(self) -> None:
        self.errors = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 0.0}

    def reference(self) -> precision.Infer:
        return lambda x: np.stack([np.zeros_like(x[0, :1]), x[0, :1]], 1)

    def infer(self, kept: Collection[str]) -> precision.Infer:
        if set(kept) == {"a", "b", "c"}:
            raise RuntimeError("cannot be compiled")
        power = sum(self.errors[name] ** 2 for name in self.places if name not in kept) + self.base**2
        return lambda x: np.stack([np.zeros_like(x[0, :1]), x[0, :1] + np.float32(power**0.5)], 1)

    def write(self, kept: Collection[str]) -> tuple[str, ...]:
        raise AssertionError("ranking writes nothing")


def test_places_are_ranked_by_their_own_error_with_what_none_accounts_for_taken_off() -> None:
    told: list[str] = []
    found = precision.rank(Adding(), [np.ones((1, 1, 8, 8), np.float32)] * 2, told.append)
    assert [row["place"] for row in found["places"]] == ["b", "c", "a", "d"]
    assert [row["error"] for row in found["places"][:3]] == pytest.approx([3, 2, 1], rel=1e-5)
    assert found["error"] == pytest.approx(14.25**0.5, rel=1e-5)
    assert found["error_of_unmarkable"] == pytest.approx(0.5, rel=1e-5)
    assert found["places"][0]["share"] == pytest.approx(9 / 14.25, rel=1e-5)
    assert found["places"][3]["share"] is None
    assert told == ["fp32", "nothing kept", "all kept", "a", "b", "c", "d"]


@pytest.mark.parametrize("least", [0, 1, 2, 3, 4, 5, 11, 30, 31, 32, 40, 41])
def test_the_fewest_places_are_found_to_an_eighth(least: int) -> None:
    tried: list[int] = []

    def good(count: int) -> bool:
        tried.append(count)
        return count >= least

    precision.fewest(40, good)
    assert tried[:3] == [0, 1, 2][: len(tried)]
    assert len(set(tried)) == len(tried) <= 12
    assert max(tried) <= 40
    if least <= 40:
        found = min(filter(least.__le__, tried))
        assert least <= found <= least + max(0, found // 8 - 1)


# fp16 -----------------------------------------------------------------------------------------------------------

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def network(*nodes: onnx.NodeProto, outcome: tuple[int, ...] = (1, 4), **constants: NDArray[Any]) -> ModelProto:
    """image (1, 4) -> logits (outcome), of these nodes; each is named `place/<its output>`."""
    for node in nodes:
        node.name = f"place/{node.output[0]}"
    graph = helper.make_graph(
        list(nodes),
        "network",
        [helper.make_tensor_value_info("image", FLOAT, (1, 4))],
        [helper.make_tensor_value_info("logits", FLOAT, outcome)],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    onnx.checker.check_model(model, full_check=True)
    return onnx_file.runner(model)(x)


def types(model: ModelProto) -> dict[str, int]:
    return {name: kind for name, (kind, _) in fp16.typed_shapes(model).items()}


SQUARE = (
    helper.make_node("Mul", ["image", "image"], ["square"]),
    helper.make_node("Reshape", ["square", "target"], ["moved"]),
    helper.make_node("Sqrt", ["moved"], ["root"]),
    helper.make_node("Add", ["root", "one"], ["logits"]),
)
CONSTANTS: dict[str, Any] = {"outcome": (4, 1), "target": np.array([4, 1]), "one": np.float32([1])}


def test_the_inputs_and_outputs_stay_in_fp32_and_all_between_is_fp16() -> None:
    half = fp16.convert(network(*SQUARE, **CONSTANTS), ())
    found = types(half)
    assert (found["image"], found["logits"]) == (FLOAT, FLOAT)
    assert {name: found[name] for name in ("square", "moved", "root", "one/fp16")} == dict.fromkeys(
        ("square", "moved", "root", "one/fp16"), HALF
    )
    assert "one" not in found
    assert run(fp16.emulated(half), np.float32([[1, 2, 3, 4]])).ravel() == pytest.approx([2, 3, 4, 5])


def test_a_square_beyond_the_range_overflows_in_the_emulation_and_not_in_onnx_runtime() -> None:
    half = fp16.convert(network(*SQUARE, **CONSTANTS), ())
    x = np.float32([[300, 255, 1, 1]])
    assert run(fp16.emulated(half), x).ravel().tolist() == [np.inf, 256, 2, 2]
    # What makes the emulation necessary. If this fails, ONNX Runtime has learnt to compute fp16 on this CPU.
    if backends.cpu_lacks("fp16"):
        options = onnxruntime.SessionOptions()
        session = onnxruntime.InferenceSession(half.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert session.run(None, {"image": x})[0].ravel()[0] == 301


def test_what_would_overflow_is_kept_in_fp32_with_what_reads_it() -> None:
    model = network(*SQUARE, **CONSTANTS)
    x = np.float32([[300, 255, 1, 1]])
    found = fp16.ranges(model, [x, x / 2])
    assert found["place/square"] == (90000, 90000)
    assert "place/moved" not in found
    kept = fp16.unfit(model, found, ())
    assert kept == {"place/square", "place/root"}
    half = fp16.convert(model, kept)
    assert types(half)["moved"] == FLOAT
    assert run(fp16.emulated(half), x).ravel().tolist() == [301, 256, 2, 2]


def test_there_is_headroom_for_larger_values_than_were_measured() -> None:
    model = network(*SQUARE, **CONSTANTS)
    for value, kept in ((127.0, False), (129.0, True)):  # the square of 128 is a quarter of the limit
        found = fp16.ranges(model, [np.full((1, 4), value, np.float32)])
        assert ("place/square" in fp16.unfit(model, found, ())) is kept


@pytest.mark.parametrize(
    ("node", "inside", "outcome"),
    [
        (helper.make_node("ReduceL2", ["image"], ["logits"]), 4 * 9, (1, 1)),
        (helper.make_node("ReduceMean", ["image"], ["logits"]), 4 * 3, (1, 1)),
        (helper.make_node("Relu", ["image"], ["logits"]), 3, (1, 4)),
    ],
    ids=["norm", "mean", "relu"],
)
def test_the_sums_that_a_node_makes_inside_count(node: onnx.NodeProto, inside: float, outcome: tuple[int, ...]) -> None:
    found = fp16.ranges(network(node, outcome=outcome), [np.full((1, 4), 3, np.float32)])
    assert found["place/logits"][1] == pytest.approx(inside, rel=1e-6)


def test_a_value_that_is_not_finite_fits_nowhere() -> None:
    model = network(helper.make_node("Log", ["image"], ["logits"]))
    found = fp16.ranges(model, [np.float32([[-1, 1, 1, 1]])])
    assert fp16.unfit(model, found, ()) == {"place/logits"}


def test_an_epsilon_that_vanishes_is_named_and_kept_with_the_division_by_it() -> None:
    model = network(
        helper.make_node("ReduceL2", ["image"], ["norm"]),
        helper.make_node("Clip", ["norm", "eps"], ["clipped"]),
        helper.make_node("Expand", ["clipped", "target"], ["wide"]),
        helper.make_node("Div", ["image", "wide"], ["logits"]),
        eps=np.array(1e-12, np.float32),
        target=np.array([1, 4]),
    )
    assert fp16.vanishing(model) == {"place/clipped": pytest.approx(1e-12)}
    zeros = np.zeros((1, 4), np.float32)
    assert np.isnan(run(fp16.emulated(fp16.convert(model, ())), zeros)).all()
    kept = fp16.unfit(model, fp16.ranges(model, [zeros]), fp16.vanishing(model))
    assert kept == {"place/clipped", "place/logits"}
    assert (run(fp16.emulated(fp16.convert(model, kept)), zeros) == 0).all()


def test_a_constant_that_both_precisions_read_is_there_in_both() -> None:
    model = network(
        helper.make_node("Mul", ["image", "third"], ["a"]),
        helper.make_node("Mul", ["a", "third"], ["logits"]),
        third=np.float32([1 / 3]),
    )
    half = fp16.convert(model, {"place/a"})
    found = types(half)
    assert (found["third"], found["third/fp16"], found["a"]) == (FLOAT, HALF, FLOAT)
    x = np.float32([[1, 2, 3, 4]])
    third = np.float16(1 / 3)
    expected = np.float16(np.float32(np.float16(x / 3)) * np.float32(third)).astype(np.float32)
    assert (run(fp16.emulated(half), x) == expected).all()


def summed(a: NDArray[np.float16], b: NDArray[np.float16]) -> NDArray[np.float16]:
    """(M, K) @ (K, N), each product added and rounded to fp16 before the next."""
    total = np.zeros((len(a), b.shape[1]), np.float16)
    for k in range(a.shape[1]):
        total = (total + np.outer(a[:, k].astype(np.float64), b[k].astype(np.float64))).astype(np.float16)
    return total


def in_fp16_sums(
    tmp_path: Path,
    x: NDArray[np.float32],
    outcome: tuple[int, ...],
    node: onnx.NodeProto,
    **constants: NDArray[np.float32],
) -> NDArray[np.float32]:
    """image -> `node`, which reads it as "x" and gives "y" -> logits, as Arm's kernels compute it in fp16."""
    graph = helper.make_graph(
        [node],
        "network",
        [helper.make_tensor_value_info("image", FLOAT, x.shape)],
        [helper.make_tensor_value_info("logits", FLOAT, outcome)],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(fp16.convert(model, ()).SerializeToString())
    return fp16_sums.emulation(tmp_path / "model.onnx")(x)


def test_a_sum_in_fp16_loses_what_one_in_fp32_holds(tmp_path: Path) -> None:
    """2048 and then ones: in fp16, 2049 is 2048 again, as often as one is added."""
    x = np.ones((1, 65), np.float32)
    weights = np.ones((65, 2), np.float32)
    weights[0] = 2048, 2
    node = helper.make_node("MatMul", ["image", "weights"], ["logits"], name="place/product")
    assert in_fp16_sums(tmp_path, x, (1, 2), node, weights=weights).tolist() == [[2048, 66]]
    assert fp16.emulation(tmp_path / "model.onnx")(x).tolist() == [[2112, 66]]


@pytest.mark.parametrize("turned", [False, True])
def test_a_product_with_a_bias_sums_in_fp16(tmp_path: Path, turned: bool) -> None:
    rng = np.random.default_rng(0)
    x, weights, bias = (rng.normal(size=size).astype(np.float16) for size in ((5, 300), (300, 7), (7,)))
    node = helper.make_node(
        "Gemm", ["image", "weights", "bias"], ["logits"], name="place/product", transB=int(turned), alpha=0.5
    )
    wide = {"weights": weights.T.copy() if turned else weights, "bias": bias}
    found = in_fp16_sums(
        tmp_path, x.astype(np.float32), (5, 7), node, **{name: each.astype(np.float32) for name, each in wide.items()}
    )
    expected = np.float32(0.5) * summed(x, weights).astype(np.float32) + bias.astype(np.float32)
    assert np.array_equal(found, expected.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_sums_in_fp16(tmp_path: Path, groups: int) -> None:
    rng = np.random.default_rng(groups)
    x = rng.normal(size=(1, 4, 9, 8)).astype(np.float16)
    weights = rng.normal(size=(8, 4 // groups, 3, 2)).astype(np.float16)
    bias = rng.normal(size=8).astype(np.float16)
    node = helper.make_node(
        "Conv",
        ["image", "weights", "bias"],
        ["logits"],
        name="place/conv",
        group=groups,
        strides=[2, 1],
        dilations=[1, 2],
        pads=[1, 0, 2, 3],
    )
    found = in_fp16_sums(
        tmp_path,
        x.astype(np.float32),
        (1, 8, 5, 9),
        node,
        weights=weights.astype(np.float32),
        bias=bias.astype(np.float32),
    )
    padded = np.pad(x, ((0, 0), (0, 0), (1, 2), (0, 3)))[0]
    for channel, row, column in np.ndindex(8, 5, 9):
        first = channel // (8 // groups) * (4 // groups)
        seen = padded[first : first + 4 // groups, 2 * row : 2 * row + 3, column : column + 3 : 2]
        total = summed(weights[channel].reshape(1, -1), seen.reshape(-1, 1))[0, 0]
        assert found[0, channel, row, column] == np.float16(np.float32(total) + np.float32(bias[channel]))


def test_what_stays_in_fp32_sums_in_it(tmp_path: Path) -> None:
    weights = np.ones((4, 4), np.float32)
    weights[0] = 2048
    model = network(helper.make_node("MatMul", ["image", "weights"], ["logits"]), weights=weights)
    (tmp_path / "model.onnx").write_bytes(fp16.convert(model, {"place/logits"}).SerializeToString())
    assert fp16_sums.emulation(tmp_path / "model.onnx")(np.ones((1, 4), np.float32)).tolist() == [[2051] * 4]


def test_weights_beyond_the_range_are_refused_by_name() -> None:
    model = network(helper.make_node("Mul", ["image", "large"], ["logits"]), large=np.float32([1e5]))
    with pytest.raises(ExportError, match="fp16: large: has weights beyond 65504"):
        fp16.convert(model, ())


def test_every_node_has_a_name_of_its_own_for_onnx_runtime_asks_for_it() -> None:
    onnx_file = DEMO_BUNDLE / "onnx/model.onnx"
    half = fp16.convert(onnx.load(onnx_file), ())
    names = [node.name for node in half.graph.node]
    assert len(set(names)) == len(names)


# Real artifacts -------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Exports the demo in a lower precision alone, ranked on one frame and judged on ten: the bundle and the entry."""
    few = parity.phantom_cases
    monkeypatch.setattr(parity, "phantom_cases", lambda grey, count=20: few(grey, count))
    monkeypatch.setattr(pipeline, "_SCAN_CASES", 1)

    def export(runtime: str, named: str, **options: Any) -> tuple[Path, dict[str, Any]]:
        bundle = export_bundle(
            DEMO, tmp_path / "low.bundle", runtimes=(runtime,), precisions=(named,), progress=False, **options
        )
        (entry,) = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["artifacts"]
        return bundle, entry

    return export


def test_an_fp16_artifact_is_judged_ranked_and_half_the_size_and_is_no_fp32_on_this_cpu(
    quick: Callable[..., tuple[Path, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, entry = quick("onnxruntime", "fp16", report=tmp_path / "report")
    assert [file["path"] for file in entry["files"]] == ["onnx/model-fp16.onnx"]
    assert not (bundle / "onnx/model.onnx").exists()
    assert entry["files"][0]["bytes"] < 0.6 * (DEMO_BUNDLE / "onnx/model.onnx").stat().st_size
    assert entry["parity"]["verdict"] == "high"
    assert 0 < entry["parity"]["logit_difference"] < 0.1
    assert entry["tolerance"]["logit"] < 0.2
    golden = [np.load(bundle / "golden" / f"0_{name}.npy") for name in ("frame", "logits")]
    tensor = preprocess.to_tensor(golden[0], Bundle(bundle).manifest.input)
    summed_in_fp16 = fp16_sums.emulation(bundle / "onnx/model-fp16.onnx")(tensor)[0]
    summed_in_fp32 = fp16.emulation(bundle / "onnx/model-fp16.onnx")(tensor)[0]
    off, less = (float(np.abs(each - golden[1]).max()) for each in (summed_in_fp16, summed_in_fp32))
    assert less < off <= entry["tolerance"]["logit"] / parity.MARGIN
    scan = entry["precision_scan"]
    assert scan["steps"][0]["verdict"] == "high"
    assert scan["kept"] == []
    assert scan["ranges"]["largest"][0]["sum"] < 65504 / 4
    clamps = [row["node"].rpartition("/")[0] for row in scan["ranges"]["vanishing"]]
    assert clamps == [f"decoder_2.tran_layer{i}.channel_attn" for i in (1, 1, 2, 2)]
    assert json.loads((tmp_path / "report/onnxruntime-fp16-places.json").read_text()) == scan
    if backends.cpu_lacks("fp16"):
        with pytest.raises(RuntimeUnavailableError, match="this CPU cannot run fp16"):
            Predictor.load(bundle, runtime="onnxruntime", precision="fp16")
        monkeypatch.setattr(backends, "cpu_lacks", lambda _: "")
        with pytest.raises(RuntimeUnavailableError, match="computes every product of this fp16 model in fp32"):
            Predictor.load(bundle, runtime="onnxruntime", precision="fp16")


def test_an_fp16_artifact_whose_sums_overflow_in_fp16_fails(
    quick: Callable[..., tuple[Path, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    overflown = np.full((1, 2, 224, 224), np.inf, np.float32)
    monkeypatch.setattr(fp16_sums, "emulation", lambda _: lambda _: overflown)
    with pytest.raises(ExportError, match=r"fp16: with sums in fp16, as Arm's kernels take them: logits: .* infinity"):
        quick("onnxruntime", "fp16")


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ranking at hand, in place of the measured one."""
    places = ("stages.0.blocks.0", "stem", "decoder_0.layer_up", "decoder_2.tran_layer1", "decoder_1.ag_attn")
    monkeypatch.setattr(precision, "rank", lambda *_: {"places": [{"place": place} for place in places]})


@can_run_bf16
@pytest.mark.usefixtures("ranked")
def test_a_bf16_artifact_shares_its_weights_and_runs_in_bf16(
    quick: Callable[..., tuple[Path, dict[str, Any]]],
) -> None:
    bundle, entry = quick("openvino", "bf16")
    assert [file["path"] for file in entry["files"]][1] == "openvino/model.bin"
    assert entry["parity"]["verdict"] in ("high", "standard")
    with Predictor.load(bundle, runtime="openvino", precision="bf16") as predictor:
        assert predictor.self_test().passed
        assert predictor.execution.layers["bf16"] > 300


@can_run_bf16
@pytest.mark.usefixtures("ranked")
def test_places_are_kept_until_the_verdict_is_high(
    quick: Callable[..., tuple[Path, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = itertools.chain(["failed", "standard", "standard", "high"], itertools.repeat("standard"))
    compare = parity.compare
    monkeypatch.setattr(parity, "compare", lambda *a: compare(*a) | {"verdict": next(verdicts)})
    bundle, entry = quick("openvino", "bf16")
    scan = entry["precision_scan"]
    run_steps = [step for step in scan["steps"] if step["verdict"]]
    assert [step["verdict"] for step in run_steps][:4] == ["failed", "standard", "standard", "high"]
    kept = run_steps[3]["kept"]
    assert scan["kept"] == [row["place"] for row in scan["places"][:kept]]
    assert [file["path"] for file in entry["files"]] == ["openvino/model-bf16.xml", "openvino/model.bin"]
    marked = [
        precision.place_of(layer.get("name", ""))
        for layer in ElementTree.parse(bundle / "openvino/model-bf16.xml").getroot().iter("layer")
        if layer.find("rt_info/attribute[@name='precise']") is not None
    ]
    assert set(marked) == set(scan["kept"])
    with Predictor.load(bundle, runtime="openvino", precision="bf16") as predictor:
        assert predictor.self_test().passed
        assert predictor.execution.layers["f32"] > 20


@can_run_bf16
@pytest.mark.usefixtures("ranked")
def test_the_best_step_is_taken_if_none_is_high(
    quick: Callable[..., tuple[Path, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["failed", "standard"]  # of the first two steps; all later ones fail
    compare = parity.compare
    monkeypatch.setattr(parity, "compare", lambda *a: compare(*a) | {"verdict": given.pop(0) if given else "failed"})
    _, entry = quick("openvino", "bf16", allow_accuracy_loss=True)
    scan = entry["precision_scan"]
    assert scan["kept"] == [scan["places"][0]["place"]]
    assert entry["files"][0]["path"] == "openvino/model-bf16.xml"


def test_the_nodes_of_a_kept_place_are_marked_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(
        '<net><layers><layer name="decoder_0/add" type="Add"><data/><output/></layer>'
        '<layer name="decoder_1/add" type="Add"/><layer name="decoder_0/c" type="Const"/></layers></net>'
    )
    assert openvino_ir.keep(tmp_path / "a.xml", tmp_path / "b.xml", ["decoder_0"]) == 1
    first, second, constant = ElementTree.parse(tmp_path / "b.xml").getroot().iter("layer")
    assert [child.tag for child in first] == ["data", "rt_info", "output"]
    assert len(second) == len(constant) == 0
