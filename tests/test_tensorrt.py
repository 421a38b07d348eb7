"""TensorRT: what is exported is built to real engines by TensorRT for RTX; the backend runs above `fake_tensorrt`."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_tensorrt as fake
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bundles import set_manifest, sha256

from msa2net import Predictor
from msa2net.__main__ import main
from msa2net.benchmarks import gpu as gpu_benchmark
from msa2net.core import DEEP_DECODERS, VARIANTS, MSA2Net
from msa2net.core.phantoms import KINDS, phantom
from msa2net.core.rewrites import chosen, rewritten
from msa2net.errors import BundleError, ExportError, OutputError, RuntimeUnavailableError
from msa2net.export import export_bundle, fp16, onnx_file, parity, precision, quantize, tensorrt
from msa2net.export.pipeline import TARGETS
from msa2net.runtimes import CacheWarning, backends, preprocess
from msa2net.runtimes.backends import why_no_gpu
from msa2net.runtimes.bundle import Bundle, parse_recipe

CHECKPOINT = Path(__file__).parent.parent / "core" / "demo.safetensors"
PRECISIONS = ("fp32", "fp16", "int8")
FRAME = phantom("dermoscopy", 77, (120, 160)).image


@pytest.fixture(scope="module", autouse=True)
def few_phantoms() -> Iterator[None]:
    """And no ranking."""
    phantoms = parity.phantom_cases
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "rank", lambda lowering, *_: {"places": [{"place": each} for each in lowering.places]})
        patch.setattr(parity, "phantom_cases", lambda grey, count=16: phantoms(grey, count))
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx")
    return export_bundle(
        CHECKPOINT,
        tmp_path_factory.mktemp("export") / "demo.bundle",
        runtimes=("onnxruntime", "tensorrt", "tensorrt-rtx"),
        precisions=("fp32", "fp16"),
        progress=False,
    )


@pytest.fixture(scope="module")
def inputs(bundle: Path) -> list[Any]:
    contract = Bundle(bundle).manifest.input
    return [preprocess.to_tensor(phantom(KINDS[i % 2], 900 + i, (224, 224)).image, contract, None) for i in range(6)]


@pytest.fixture(scope="module")
def int8(bundle: Path, inputs: list[Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[tensorrt.Int8, Path]:
    folder = tmp_path_factory.mktemp("int8")
    shutil.copy(bundle / "onnx/model.onnx", folder / "model.onnx")
    lowering = tensorrt.Int8(folder, ("model.onnx",), "int8.onnx", inputs[2:], inputs[:2], False)
    lowering.write(())
    return lowering, folder / "int8.onnx"


# Export -------------------------------------------------------------------------------------------------------------


def test_tensorrt_shares_the_file_of_onnxruntime_and_its_verdict(bundle: Path) -> None:
    manifest = Bundle(bundle).manifest
    assert {each.name for each in manifest.artifacts} == {
        f"{runtime} {named}" for runtime in ("onnxruntime", "tensorrt", "tensorrt-rtx") for named in ("fp32", "fp16")
    }
    for named in ("fp32", "fp16"):
        ours, theirs, engine = (
            Bundle(bundle).artifact(each, named) for each in ("tensorrt", "onnxruntime", "tensorrt-rtx")
        )
        assert (ours.files, ours.parity, ours.tolerance) == (theirs.files, theirs.parity, theirs.tolerance)
        assert theirs.recipe is None
        assert ours.recipe is not None
        assert ours.recipe.compute_capabilities == ()
        assert engine.parity == ours.parity
        assert engine.recipe is not None
        assert engine.recipe.compute_capabilities == ("8.6", "8.9", "12.0")
        assert engine.versions["tensorrt_rtx"] == engine.recipe.version[0]
    assert {path.relative_to(bundle).parts[0] for path in bundle.rglob("*")} == {
        *("SHA256SUMS", "SOUP.md", "manifest.json", "golden", "onnx", "sbom.cdx.json", "tensorrt-rtx")
    }


def test_an_engine_is_the_same_bytes_each_time(bundle: Path) -> None:
    entry = next(
        each for each in json.loads((bundle / "manifest.json").read_text())["artifacts"] if "built_from" in each
    )
    model = (bundle / "onnx/model.onnx").read_bytes()
    _, engine = tensorrt.engine(model, entry["recipe"], entry["recipe"]["compute_capabilities"])
    assert engine == (bundle / entry["files"][0]["path"]).read_bytes()


@pytest.mark.parametrize("target", ["8.6", "8.9", "12.0"])
def test_int8_builds_for_every_target(int8: tuple[tensorrt.Int8, Path], bundle: Path, target: str) -> None:
    recipe = json.loads((bundle / "manifest.json").read_text())["artifacts"][-1]["recipe"]
    assert len(tensorrt.engine(int8[1].read_bytes(), recipe, [target])[1]) > 1_000_000


def products(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, dict[str, onnx.NodeProto]]]:
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            yield node, makers


def require_qdq(model: onnx.ModelProto, meant: set[str]) -> None:
    """Q/DQ on both inputs of every product that is meant, and of no other, and none for nothing."""
    read = set()
    for node, makers in products(model):
        rounded = [name in makers and makers[name].op_type == "DequantizeLinear" for name in node.input[:2]]
        assert rounded == [node.name in meant] * 2
        if node.name in meant:
            read.update(node.input[:2])
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.name)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":  # for a product, and for nothing else
            assert node.output[0] in read
            assert readers[node.output[0]] <= meant
            zero = onnx.numpy_helper.to_array(constants[node.input[2]])
            assert zero.dtype == np.int8
            assert not zero.any()
        if node.op_type == "QuantizeLinear":  # of what has not been rounded before
            source = makers.get(node.input[0])
            while source is not None and source.op_type in ("Reshape", "Transpose", "Cast"):
                source = makers.get(source.input[0])
            assert source is None or source.op_type != "DequantizeLinear"


def test_every_product_meant_for_int8_has_qdq_on_both_inputs_and_nothing_else_has(
    int8: tuple[tensorrt.Int8, Path],
) -> None:
    lowering, path = int8
    meant = set(quantize.quantized_nodes(onnx.load(path.parent / "model.onnx")))
    assert len(meant) > 100
    require_qdq(onnx.load(path), meant)
    assert sorted(lowering.places) == sorted({quantize.fine_place(name) for name in meant})
    assert max(row["sum"] for row in lowering.found()["largest"]) < 65_504 / 4


def test_int8_and_fp16_do_on_a_cpu_what_fp32_does(
    int8: tuple[tensorrt.Int8, Path], bundle: Path, inputs: list[Any]
) -> None:
    lowering, path = int8
    expected = [lowering.reference()(x) for x in inputs]
    for file, least, most in ((path, 0.998, 0.5), (bundle / "onnx/model-fp16.onnx", 0.9995, 0.02)):
        infer = fp16.emulation(file)
        found = [infer(x) for x in inputs]
        assert precision.boundary_error(expected, found) < most
        for a, b in zip(expected, found, strict=True):
            assert np.mean(a.argmax(1) == b.argmax(1)) >= least


def test_a_place_that_is_kept_loses_its_quantizers_and_no_other_does(int8: tuple[tensorrt.Int8, Path]) -> None:
    lowering, _ = int8
    kept = lowering.places[0]
    before, after = (lowering._with_quantizers(each) for each in ((), (kept,)))
    rounded = [{node.name for node, makers in products(model) if node.input[1] in makers} for model in (before, after)]
    lost = {name for name in rounded[0] - rounded[1] if "/" in name}
    assert {quantize.fine_place(name) for name in lost} == {kept}


def test_a_product_that_fp16_cannot_hold_is_not_rounded(bundle: Path, inputs: list[Any], tmp_path: Path) -> None:
    """Its weights are made so large that its sums leave the range of fp16."""
    model = onnx.load(bundle / "onnx/model.onnx")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    first = next(node for node in model.graph.node if node.name in quantize.quantized_nodes(model))
    for name in first.input[1:]:
        values = onnx.numpy_helper.to_array(weights[name])
        weights[name].CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1e5), name))
    onnx.save(model, tmp_path / "model.onnx")
    lowering = tensorrt.Int8(tmp_path, ("model.onnx",), "int8.onnx", inputs[:1], inputs[1:2], False)
    (rounded,) = (node.name for node in lowering._with_quantizers(()).graph.node if node.output[0] == first.output[0])
    assert rounded == first.name
    assert first.name not in lowering._nodes
    assert len(lowering._nodes) >= 50


def test_weights_are_rounded_with_the_scale_that_fp16_holds() -> None:
    weights = np.array([[1e-3, 2e-9], [-5.2e-4, 0]], np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "product/y")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [value("x", 1, [2, 2])],
        [value("y", 1, [2, 2])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", onnx_file.OPSET)], ir_version=10)
    made = tensorrt.with_qdq(model, ["product/y"], {"x": 1.0})
    onnx.checker.check_model(made, full_check=True)
    found = {each.name: onnx.numpy_helper.to_array(each) for each in made.graph.initializer}
    assert np.array_equal(found["w/scale"], found["w/scale"].astype(np.float16))
    assert np.abs(found["w/int8"] * found["w/scale"] - weights).max() <= found["w/scale"].max() / 2
    assert found["x/scale"] == pytest.approx(1 / 127, rel=1e-3)
    x = np.array([[0.5, -0.25], [1.0, 0.1]], np.float32)
    assert np.abs(onnx_file.runner(made, fuse=False)(x) - x @ weights).max() < 2e-2 * np.abs(x @ weights).max()


def test_a_batch_gets_a_profile_and_an_engine(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    output = export_bundle(
        CHECKPOINT, tmp_path / "b", runtimes=("tensorrt", "tensorrt-rtx"), batch=4, targets=["8.6"], progress=False
    )
    artifact = Bundle(output).artifact("tensorrt", "fp32")
    assert artifact.recipe is not None
    assert artifact.recipe.batch == 4
    assert [file.path for file in artifact.files] == ["tensorrt/model.onnx"]
    shape = onnx.load(output / "tensorrt/model.onnx").graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_param
    x = np.random.default_rng(0).normal(size=(3, 3, 224, 224)).astype(np.float32)
    infer = onnx_file.runner(onnx.load(output / "tensorrt/model.onnx"))
    assert np.abs(infer(x) - np.concatenate([infer(each[None]) for each in x])).max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["8.7"]}, r"targets: got 8\.7, expected some of .*8\.6"),
        ({"targets": []}, "targets: got none, expected some of"),
        ({"batch": 0}, "batch: got 0, expected 1 to 1024"),
        ({"hardware_compatibility": "all"}, "hardware_compatibility: got 'all', expected one of none, ampere"),
        ({"precisions": ("bf16",)}, "precisions: got 'bf16', expected what a runtime has"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ExportError, match=message):
        export_bundle(CHECKPOINT, tmp_path / "b", runtimes=("tensorrt-rtx",), progress=False, **options)


def test_a_target_that_cannot_run_the_precision_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    message = (
        r"^tensorrt-rtx fp32: no engine was built: .*, expected an engine for 7\.5\. "
        r"Leave out a target, or the precision that it cannot run\.$"
    )
    with pytest.raises(ExportError, match=message):
        export_bundle(CHECKPOINT, tmp_path / "b", runtimes=("tensorrt-rtx",), targets=["7.5"], progress=False)
    assert not list(tmp_path.iterdir())


def require_supported(*files: Path) -> None:
    """By Polygraphy's capability report, in a folder of its own: it writes what is not supported beside it."""
    pytest.importorskip("polygraphy")
    for file in files:
        done = subprocess.run(
            [Path(sys.executable).parent / "polygraphy", "inspect", "capability", file],
            env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
            cwd=file.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "fully supported" in done.stdout.lower(), done.stdout[-2000:] + done.stderr[-2000:]


def test_polygraphy_finds_no_node_that_is_not_supported(
    int8: tuple[tensorrt.Int8, Path], bundle: Path, tmp_path: Path
) -> None:
    for file in (bundle / "onnx/model.onnx", bundle / "onnx/model-fp16.onnx", int8[1]):
        shutil.copy(file, tmp_path)
    require_supported(*tmp_path.glob("*.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("form", DEEP_DECODERS)
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_every_network_builds_for_every_target_in_every_precision(size: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    torch.manual_seed(0)
    model = MSA2Net(dataclasses.replace(VARIANTS[size], deep_decoder=form)).eval()
    onnx_file.write(rewritten(model, chosen("onnxruntime")), 3, tmp_path / "fp32.onnx")
    inputs = [np.random.default_rng(i).normal(size=(1, 3, 224, 224)).astype(np.float32) for i in range(2)]
    fp16.Fp16(tmp_path, "fp32.onnx", "fp16.onnx", inputs[:1]).write(())
    lowering = tensorrt.Int8(tmp_path, ("fp32.onnx",), "int8.onnx", inputs[:1], inputs[1:], False)
    lowering.write(())
    require_qdq(onnx.load(tmp_path / "int8.onnx"), set(lowering._nodes))
    require_supported(*(tmp_path / f"{named}.onnx" for named in PRECISIONS))
    sizes = {}
    for named, target in itertools.product(PRECISIONS, TARGETS):
        content = (tmp_path / f"{named}.onnx").read_bytes()
        recipe = {"batch": 1, "workspace": 1 << 30, "hardware_compatibility": "none"}
        engines = [tensorrt.engine(content, recipe, [target])[1] for _ in range(2 if target == TARGETS[0] else 1)]
        assert len(set(engines)) == 1
        sizes[named, target] = len(engines[0])
    print(sizes)
    assert all(size > (tmp_path / f"{named}.onnx").stat().st_size / 2 for (named, _), size in sizes.items())


# The backend, above the fake ------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fake in place of NVIDIA's modules."""
    for name in ("tensorrt", "tensorrt_rtx", "cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("cuda", "tensorrt"):
        monkeypatch.delitem(sys.modules, f"msa2net.runtimes.backends.{name}", raising=False)
    before = dict(fake.GPU)
    fake.FAULTS.clear()
    fake.COUNTS.clear()
    fake.install(sys.modules)
    monkeypatch.setattr(backends, "why_no_gpu", str)
    yield
    left = len(fake._memory)
    fake._memory.clear()
    assert not left, "GPU memory was not given back"
    fake.FAULTS.clear()
    fake.GPU.update(before)
    for name in ("cuda", "tensorrt"):
        sys.modules.pop(f"msa2net.runtimes.backends.{name}", None)


@pytest.fixture
def faked(bundle: Path, tmp_path: Path) -> Path:
    """The bundle with fake engines in place of the real ones, which the fake cannot run."""
    copy = tmp_path / "demo.bundle"
    shutil.copytree(bundle, copy)
    document = json.loads((copy / "manifest.json").read_text())
    for entry in document["artifacts"]:
        if entry["runtime"] == "tensorrt-rtx":
            (file,) = entry["files"]
            source = "onnx/model.onnx" if entry["precision"] == "fp32" else "onnx/model-fp16.onnx"
            engine = fake.engine_of(copy / source)
            (copy / file["path"]).write_bytes(engine)
            file |= {"bytes": len(engine), "sha256": sha256(engine)}
    set_manifest(copy, json.dumps(document).encode())
    return copy


def load(root: Path, runtime: str = "tensorrt", cache: Any = False, **options: Any) -> Predictor:
    return Predictor.load(root, runtime=runtime, cache=cache, **options)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_an_inference_is_one_graph_and_the_result_is_the_callers(faked: Path, runtime: str) -> None:
    with load(faked, runtime) as predictor, load(faked, "onnxruntime") as other:
        first, second = predictor.predict(FRAME), predictor.predict(FRAME[::-1].copy())
        assert np.abs(first.logits - other.predict(FRAME).logits).max() < 1e-4
        assert not np.array_equal(first.logits, second.logits)
        execution = predictor.execution
        assert (execution.device, execution.device_asked) == ("Fake GPU", "cuda")
        assert execution.provider.endswith("one CUDA graph")
        assert execution.layers == {"fp16": 1}
        assert not execution.cached
        assert fake.COUNTS["launches"] == 2 + 2 * len(predictor.bundle.manifest.golden)  # each twice


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fault", ["not_capturable", "capture"])
def test_what_cannot_be_captured_runs_all_the_same_and_says_so(faked: Path, fault: str) -> None:
    fake.FAULTS.add(fault)
    with load(faked) as predictor:
        assert "without a CUDA graph" in predictor.execution.provider
        assert predictor.self_test().passed


@pytest.mark.usefixtures("gpu")
def test_eight_threads_get_what_one_gets(faked: Path) -> None:
    frames = [np.roll(FRAME, i * 7, axis=1) for i in range(16)]
    with load(faked) as predictor, ThreadPoolExecutor(8) as pool:
        expected = [predictor.predict(frame).logits for frame in frames]
        found = list(pool.map(lambda frame: predictor.predict(frame).logits, frames))
    assert all(map(np.array_equal, expected, found))


@pytest.mark.usefixtures("gpu")
def test_a_thread_that_waits_while_it_is_closed_gets_an_error_and_touches_no_freed_memory(faked: Path) -> None:
    predictor = load(faked)
    backend: Any = predictor._network.backend
    backend._lock.acquire()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(predictor.predict, FRAME)
        time.sleep(0.2)
        backend._lock.release()
        predictor.close()
        with contextlib.suppress(OutputError, RuntimeUnavailableError):  # it may have been first
            assert waiting.result().mask.shape == FRAME.shape[:2]
    with pytest.raises(RuntimeError, match="it was closed"):
        backend.infer(np.zeros((1, 3, 224, 224), np.float32))


@pytest.mark.usefixtures("gpu")
def test_one_that_is_dropped_gives_its_memory_back(faked: Path) -> None:
    load(faked)
    gc.collect()
    assert not fake._memory


@pytest.mark.usefixtures("gpu")
def test_a_batch_is_a_profile_of_the_build(bundle: Path) -> None:
    trt = importlib.import_module("tensorrt")
    recipe = dataclasses.replace(parse_recipe(RECIPE), compute_capabilities=(), batch=4)
    fake.PROFILES.clear()
    build = importlib.import_module("msa2net.runtimes.backends.tensorrt").build
    build(trt, (bundle / "onnx/model.onnx").read_bytes(), recipe)
    assert fake.PROFILES == [[("image", (1, 3, 224, 224), (4, 3, 224, 224), (4, 3, 224, 224))]]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_the_second_start_comes_from_the_cache_with_the_verdict_beside_it(
    faked: Path, tmp_path: Path, runtime: str
) -> None:
    folder = tmp_path / "cache"
    for cached in (False, True, True):
        with load(faked, runtime, folder) as predictor:
            assert predictor.execution.cached == cached
    assert fake.COUNTS.get("builds", 0) == (runtime == "tensorrt")
    (verdict,) = folder.glob("*/verdict.json")
    assert json.loads(verdict.read_text())["passed"] is True
    assert len(list(folder.glob("*/timings"))) == (runtime == "tensorrt")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("change", ["truncated", "flipped", "another entry", "foreign bytes", "link"])
def test_an_engine_that_was_changed_is_never_deserialised(
    faked: Path, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    load(faked, cache=folder).close()
    (engine,) = folder.glob("*/engine")
    content = engine.read_bytes()
    if change == "truncated":
        engine.write_bytes(content[:-1])
    elif change == "flipped":
        engine.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif change == "another entry":
        facts = json.loads((engine.parent / "entry.json").read_text())
        facts["facts"]["driver"] = "1.0"
        (engine.parent / "entry.json").write_text(json.dumps(facts))
    elif change == "foreign bytes":
        engine.write_bytes(b"not an engine")
    else:
        shutil.move(engine, tmp_path / "elsewhere")
        engine.symlink_to(tmp_path / "elsewhere")
    fake.COUNTS.clear()
    with load(faked, cache=folder) as predictor:
        assert not predictor.execution.cached
        assert predictor.self_test().passed
    assert fake.COUNTS["builds"] == 1
    assert fake.COUNTS["deserialisations"] == 1  # of what was built anew
    assert "is not used and built anew" in caplog.text
    with load(faked, cache=folder) as predictor:
        assert predictor.execution.cached


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "change",
    [{"name": "Another GPU"}, {"minor": 9}, {"driver": 12060}],
    ids=lambda each: next(iter(each)),
)
def test_another_gpu_or_driver_gets_an_engine_of_its_own(faked: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    load(faked, cache=tmp_path / "cache").close()
    fake.GPU.update(change)
    with load(faked, cache=tmp_path / "cache") as predictor:
        assert not predictor.execution.cached
    assert fake.COUNTS["builds"] == 2


@pytest.mark.usefixtures("gpu")
def test_another_precision_or_version_gets_an_engine_of_its_own(faked: Path, tmp_path: Path) -> None:
    load(faked, cache=tmp_path / "cache").close()
    load(faked, cache=tmp_path / "cache", precision="fp16").close()
    fake.install(sys.modules, version="10.17.0")
    load(faked, cache=tmp_path / "cache").close()
    assert fake.COUNTS["builds"] == 3


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fault", ["wrong", "nan"])
def test_an_engine_that_fails_the_golden_frames_is_neither_used_nor_kept(
    faked: Path, tmp_path: Path, fault: str
) -> None:
    fake.FAULTS.add(fault)
    with pytest.raises(OutputError):
        load(faked, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/engine"))
    fake.FAULTS.clear()
    with load(faked, cache=tmp_path / "cache") as predictor:
        assert not predictor.execution.cached


@pytest.mark.usefixtures("gpu")
def test_a_folder_that_cannot_be_written_to_means_a_build_in_memory_and_a_warning(
    faked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.warns(CacheWarning, match="the compiled model is not kept"),
        load(faked, cache=tmp_path / "file/in") as p,
    ):
        assert p.self_test().passed

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with (
        pytest.warns(CacheWarning, match="No space left on device"),
        load(faked, cache=tmp_path / "cache") as predictor,
    ):
        assert predictor.self_test().passed
    assert not [each for each in (tmp_path / "cache").iterdir() if not each.name.startswith(".lock-")]


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import fake_tensorrt as fake
fake.install(sys.modules)
from msa2net import Predictor
with Predictor.load({bundle!r}, runtime="tensorrt", cache={cache!r}) as predictor:
    print(predictor.execution.cached, predictor.self_test().passed)
"""


def start(faked: Path, tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    program = PROGRAM.format(tests=str(Path(__file__).parent), bundle=str(faked), cache=str(tmp_path / "cache"))
    environment = os.environ | {
        "FAKE_TENSORRT_LOG": str(tmp_path / "log"),
        "FAKE_TENSORRT_SECONDS": str(seconds),
    }
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def events(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []


def test_two_processes_that_start_at_once_build_once(faked: Path, tmp_path: Path) -> None:
    both = [start(faked, tmp_path, 3) for _ in range(2)]
    said = [each.communicate(timeout=120) for each in both]
    assert sorted(out.strip() for out, _ in said) == ["False True", "True True"], said
    assert events(tmp_path).count("builds") == 1


def test_a_build_that_is_killed_leaves_nothing_that_hinders_the_next(faked: Path, tmp_path: Path) -> None:
    first = start(faked, tmp_path, 600)
    deadline = time.monotonic() + 60
    while "builds" not in events(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = start(faked, tmp_path, 0)  # waits for the first
    time.sleep(1)
    first.send_signal(signal.SIGKILL)
    out, err = second.communicate(timeout=120)
    assert out.strip() == "False True", err
    first.communicate()
    assert start(faked, tmp_path, 0).communicate(timeout=120)[0].strip() == "True True"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("fault", "options", "message"),
    [
        (
            "no_driver",
            {},
            r"no GPU can be used \(cudaGetDeviceCount: no driver .cudaErrorInsufficientDriver.\), expected",
        ),
        ("", {"device": "CPU"}, "got device 'CPU', expected 'cuda' or 'cuda:N'"),
        ("", {"device": "cuda:"}, "got device 'cuda:', expected"),
        ("", {"device": "cuda:3"}, "got device 'cuda:3', expected a number below 1"),
        ("build", {}, "no engine was built: out of GPU memory"),
        ("deserialize", {}, "the engine cannot be loaded: the magic tag does not match"),
        ("context", {}, "the engine cannot be prepared: it gave no reason"),
        ("execute", {}, "the engine cannot run"),
    ],
)
def test_what_goes_wrong_on_the_device_has_a_name(
    faked: Path, fault: str, options: dict[str, Any], message: str
) -> None:
    fake.FAULTS.add(fault)
    with pytest.raises(RuntimeUnavailableError, match=message):
        load(faked, **options)


@pytest.mark.usefixtures("gpu")
def test_a_launch_that_fails_gives_no_mask(faked: Path) -> None:
    with load(faked) as predictor:
        before = predictor.predict(FRAME)
        fake.FAULTS.add("launch")
        with pytest.raises(
            OutputError, match=r"runtime 'tensorrt': failed .*launch: out of memory .cudaErrorMemoryAll"
        ):
            predictor.predict(FRAME)
        fake.FAULTS.clear()
        assert np.array_equal(predictor.predict(FRAME).logits, before.logits)


@pytest.mark.usefixtures("gpu")
def test_a_build_shows_how_far_it_is_on_a_terminal(
    faked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(faked).close()
    assert [line.split() for line in re.split(r"[\r\n]+", capsys.readouterr().err.strip())] == [
        ["building", "1", "of", "2"],
        ["building", "2", "of", "2"],
    ]


@pytest.mark.usefixtures("gpu")
def test_too_little_gpu_memory_has_a_name(faked: Path) -> None:
    fake.GPU["bytes"] = 1_000_000
    with pytest.raises(RuntimeUnavailableError, match=r"0\.\d MB of \S+ memory: out of memory .cudaErrorMemoryAlloc"):
        load(faked)


@pytest.mark.usefixtures("gpu")
def test_versions_and_gpus_that_do_not_fit_are_named(faked: Path) -> None:
    fake.GPU.update(major=8, minor=7)
    expected = r"Fake GPU has compute capability 8\.7, expected 8\.6 or 8\.9 or 12\.0, which the engine was built for"
    with pytest.raises(RuntimeUnavailableError, match=expected):
        load(faked, "tensorrt-rtx")
    fake.install(sys.modules, version="9.3.0", rtx_version="1.6.0.1")
    with pytest.raises(
        RuntimeUnavailableError, match=r"tensorrt 9\.3\.0 is installed, expected at least 10\.3 and below 12"
    ):
        load(faked)
    with pytest.raises(RuntimeUnavailableError, match=r"tensorrt_rtx 1\.6\.0\.1 is installed, expected at least 1\.7"):
        load(faked, "tensorrt-rtx")


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_the_library_finds_invalid_is_not_deserialised(bundle: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"the engine does not fit this device \(UNSUPPORTED_CC\)"):
        load(bundle, "tensorrt-rtx")  # a real engine is none to the fake
    assert "deserialisations" not in fake.COUNTS


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_a_changed_file_is_neither_parsed_nor_deserialised(
    faked: Path, tmp_path: Path, runtime: str, cached: bool
) -> None:
    if cached:
        load(faked, runtime, tmp_path / "cache").close()
    fake.COUNTS.clear()
    (file,) = Bundle(faked).artifact(runtime, "fp32").files
    content = (faked / file.path).read_bytes()
    (faked / file.path).write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(BundleError, match="changed: SHA-256"):
        load(faked, runtime, tmp_path / "cache")
    assert "builds" not in fake.COUNTS
    assert runtime == "tensorrt" or "deserialisations" not in fake.COUNTS


@pytest.mark.usefixtures("gpu")
def test_a_missing_artifact_is_named_with_those_there_are(faked: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="no artifact for tensorrt in int8, it has: onnxruntime fp32"):
        load(faked, precision="int8")


@pytest.mark.usefixtures("gpu")
def test_auto_takes_tensorrt_on_a_gpu_and_never_on_a_cpu(faked: Path) -> None:
    with load(faked, "auto", device="cuda") as predictor:
        assert predictor.execution.runtime == "tensorrt"
    with load(faked, "auto") as predictor:
        assert predictor.execution.runtime == "onnxruntime"


def test_auto_on_a_gpu_passes_over_what_cannot_run_there(
    bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "why_no_gpu", lambda: "there is none")
    caplog.set_level("INFO", "msa2net")
    with pytest.raises(RuntimeUnavailableError, match=r"nothing can run here: .*has no CUDAExecutionProvider"):
        load(bundle, "auto", device="cuda")
    assert "passed over onnxruntime" in caplog.text


def test_without_a_driver_it_is_said_and_nothing_runs_on_the_cpu(bundle: Path) -> None:
    found = {each.runtime: each for each in Predictor.available(bundle) if each.precision == "fp32"}
    if found["tensorrt-rtx"].available:
        pytest.skip("there is a GPU")
    assert "there is no NVIDIA driver (libcuda.so.1)" in found["tensorrt-rtx"].reason
    for runtime in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(RuntimeUnavailableError), warnings.catch_warnings():
            load(bundle, runtime)


@pytest.mark.usefixtures("gpu")
def test_build_engine_keeps_it_for_the_next_start(
    faked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["build-engine", str(faked), "--precision", "fp16", "--cache", str(tmp_path / "cache")]
    assert main(command) == 0
    assert main(command) == 0
    first, layers, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("tensorrt fp16 on Fake GPU: built in ")
    assert first.endswith("its golden frames passed; TensorRT, one CUDA graph")
    assert layers == "layers   1 in fp16"
    assert second.startswith("tensorrt fp16 on Fake GPU: was there; ")
    (tmp_path / "file").write_text("")
    assert main([*command[:-1], str(tmp_path / "file/in")]) == 2
    assert "the compiled model is not kept" in capsys.readouterr().err
    monkeypatch.setenv("MSA2NET_CACHE", "off")
    assert main(command[:-2]) == 2
    assert "error: build-engine: $MSA2NET_CACHE is off, expected a folder. Give --cache." in capsys.readouterr().err


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fault", ["", "wrong"])
def test_the_benchmark_runs_what_can_and_names_what_cannot(faked: Path, fault: str) -> None:
    fake.FAULTS.update({fault} - {""})
    saved: list[str] = []
    result = gpu_benchmark.measure(
        faked, rounds=5, phantoms=12, save=lambda so_far: saved.append(json.dumps(so_far, allow_nan=False))
    )
    names = [f"{runtime} {named}" for runtime in ("tensorrt", "tensorrt-rtx") for named in ("fp32", "fp16")]
    assert [row["name"] for row in result["rows"]] == ([] if fault else names)
    assert result["passed"] == (not fault)
    assert "has no CUDAExecutionProvider" in result["not_run"]["onnxruntime fp32"]
    text = gpu_benchmark.table(result)
    if fault:
        assert "what it built on this device does not do what was exported" in result["not_run"]["tensorrt fp16"]
        assert "not run: tensorrt fp16" in text
    else:
        assert len(saved) == 5
        assert all(
            len(row[key]) == 5 for row in result["rows"] for key in ("milliseconds", "milliseconds_without_graph")
        )
        assert all(row["cached"] and row["memory"] > 0 and row["pixel_agreement"] > 0.999 for row in result["rows"])
        assert text.count(" pass ") == 4


def test_the_benchmark_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if not why_no_gpu():
        pytest.skip("there is a GPU")
    assert gpu_benchmark.main([]) == 2
    assert capsys.readouterr().err.startswith("error: benchmarks.gpu: there is no NVIDIA driver")


# Torch-TensorRT, above a fake of it -----------------------------------------------------------------------------------


@pytest.fixture
def torch_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A FAKE of `torch_tensorrt`, whose engine is the exported program itself, and of the GPU, which is the CPU."""
    saved: list[str] = []
    state = SimpleNamespace(compiled=0, saved=saved, wrong=False, full=False)

    def compile_(program: Any, **settings: Any) -> Any:
        assert settings["disable_tf32"]
        assert settings["require_full_compilation"]
        assert not Path(settings["timing_cache_path"]).exists()
        state.compiled += 1
        module = program.module()
        return (lambda x: -module(x)) if state.wrong else module

    def save(module: Any, path: str, *, output_format: str, arg_inputs: list[Any]) -> None:
        assert output_format == "exported_program"
        if state.full:
            raise RuntimeError("No space left on device")
        torch.export.save(torch.export.export(module, tuple(arg_inputs)), path)
        saved.append(path)

    module = ModuleType("torch_tensorrt")
    vars(module).update(
        __version__="2.14.0",
        __spec__=SimpleNamespace(name="torch_tensorrt"),
        dynamo=SimpleNamespace(compile=compile_),
        save=save,
        load=torch.export.load,
    )
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    monkeypatch.delitem(sys.modules, "msa2net.runtimes.backends.torch_tensorrt", raising=False)
    backend = importlib.import_module("msa2net.runtimes.backends.torch_tensorrt")
    monkeypatch.setattr(backend, "target_of", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(backend, "Graph", lambda module, *_: module)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Fake GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    return state


@pytest.fixture(scope="module")
def torch_bundle(few_phantoms: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001  # it is used
    return export_bundle(
        CHECKPOINT,
        tmp_path_factory.mktemp("torch") / "demo.bundle",
        runtimes=("pytorch", "torch-tensorrt"),
        progress=False,
    )


def test_torch_tensorrt_is_compiled_once_proven_and_kept(
    torch_gpu: SimpleNamespace, torch_bundle: Path, tmp_path: Path
) -> None:
    artifact = Bundle(torch_bundle).artifact("torch-tensorrt", "fp32")
    assert artifact.files == Bundle(torch_bundle).artifact("pytorch", "fp32").files
    assert artifact.accuracy == "high"
    with load(torch_bundle, "pytorch") as reference:
        expected = reference.predict(FRAME).logits
    for cached in (False, True):
        with load(torch_bundle, "torch-tensorrt", tmp_path / "cache") as predictor:
            assert predictor.execution.cached == cached
            assert np.abs(predictor.predict(FRAME).logits - expected).max() < 1e-4
    assert torch_gpu.compiled == len(torch_gpu.saved) == 1
    assert len(list((tmp_path / "cache").glob("*/verdict.json"))) == 1


def test_torch_tensorrt_that_is_wrong_is_not_used_and_a_full_disk_is_a_warning(
    torch_gpu: SimpleNamespace, torch_bundle: Path, tmp_path: Path
) -> None:
    torch_gpu.wrong = True
    with pytest.raises(OutputError, match="does not do what was exported"):
        load(torch_bundle, "torch-tensorrt", tmp_path / "cache")
    assert not torch_gpu.saved
    torch_gpu.wrong, torch_gpu.full = False, True
    with (
        pytest.warns(CacheWarning, match="No space left"),
        load(torch_bundle, "torch-tensorrt", tmp_path / "cache") as p,
    ):
        assert p.self_test().passed


def test_torch_tensorrt_without_a_gpu_is_an_error(
    torch_gpu: SimpleNamespace, torch_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    backend = importlib.import_module("msa2net.runtimes.backends.torch_tensorrt")
    pytorch = importlib.import_module("msa2net.runtimes.backends.pytorch")
    monkeypatch.setattr(backend, "target_of", pytorch.target_of)
    for device, message in (("CPU", "got device 'CPU', expected 'cuda'"), ("cuda", "got device 'cuda', this PyTorch")):
        with pytest.raises(RuntimeUnavailableError, match=message):
            load(torch_bundle, "torch-tensorrt", device=device)
    assert torch_gpu.compiled == 0


# ONNX Runtime on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"got device 'cuda', the package that is installed has no CUDAExecutionProvider, expected 'CPU', or onnx",
        ),
        ({"device": "cuda:x"}, "got device 'cuda:x', expected 'cuda' or 'cuda:N'"),
        ({"device": "tensorrt"}, "TensorRT's provider would compute float32 in TF32, expected NVIDIA_TF32_OVERRIDE=0"),
        ({"device": "tensorrt", "precision": "fp16"}, "has no TensorrtExecutionProvider"),
    ],
)
def test_onnxruntime_without_its_gpu_package_is_an_error(bundle: Path, options: dict[str, Any], message: str) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(RuntimeUnavailableError, match=message):
        load(bundle, "onnxruntime", **({"device": "cuda"} | options))


@pytest.mark.parametrize("dropped", [False, True])
def test_a_provider_that_does_not_load_is_an_error_and_nothing_runs_on_the_cpu(
    bundle: Path, dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    if dropped:  # without an error, as it may
        session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    message = "runs on CPUExecutionProvider, expected CUDA" if dropped else "cannot load the model on cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ONNX Runtime, that it drops the provider
        with pytest.raises(RuntimeUnavailableError, match=message):
            load(bundle, "onnxruntime", device="cuda")


def test_bound_memory_gives_what_copies_give_and_the_caller_keeps_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = importlib.import_module("msa2net.runtimes.backends.onnxruntime")

    def on_cpu(file: str, *_: Any) -> Any:
        return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(backend, "_on_gpu", on_cpu)
    monkeypatch.setattr(backend, "_MEMORY", "cpu")
    with load(bundle, "onnxruntime", device="cuda") as predictor, load(bundle, "onnxruntime") as other:
        first = predictor.predict(FRAME).logits
        before = first.copy()
        predictor.predict(FRAME[::-1].copy())
        assert np.array_equal(first, before)
        assert np.abs(first - other.predict(FRAME).logits).max() < 1e-4


# What the inspector says ---------------------------------------------------------------------------------------------


def test_layers_count_as_the_lowest_precision_that_they_touch() -> None:
    layers = importlib.import_module("msa2net.runtimes.backends.tensorrt").layers

    def layer(kind: str, *formats: str) -> dict[str, Any]:
        return {
            "LayerType": kind,
            "Inputs": [{"Format/Datatype": formats[0]}],
            "Outputs": [{"Format/Datatype": formats[1]}],
        }

    said = {
        "Layers": [
            layer(
                "CaskConvolution",
                "Thirty-two wide channel vectorized row major Int8 format",
                "Row major linear FP16 format",
            ),
            layer("gemm", "Half", "Half"),
            layer("kgen", "Row major linear FP32", "Float"),
            layer("kgen", "BFloat16", "BFloat16"),
            layer("Reformat", "Row major linear FP32", "Row major linear FP16 format"),
            layer("strange", "?", "?"),
            "a name alone",
        ]
    }
    assert layers(json.dumps(said)) == {"bf16": 1, "fp16": 1, "fp32": 1, "int8": 1, "other": 1}
    for text in ("", "{}", "[]", '{"Layers": null}', '{"Layers": 3}'):
        assert layers(text) == {}
    assert layers('{"Layers": [{"LayerType": "x", "Inputs": null, "Outputs": ["a"]}]}') == {"other": 1}


# The manifest's recipe ------------------------------------------------------------------------------------------------

RECIPE = {
    "version": ["10.3", "12"],
    "batch": 1,
    "workspace": 1,
    "hardware_compatibility": "none",
    "compute_capabilities": ["8.6"],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": ["10.3"]}, "expected a list of 2 to 2 entries"),
        ({"version": ["10.3", "twelve"]}, "expected a version such as"),
        ({"version": ["12", "10.3"]}, "expected the first below the second"),
        ({"batch": 0}, "expected a whole number from 1 to 1024"),
        ({"batch": True}, "expected a whole number from 1 to 1024"),
        ({"workspace": -1}, "expected a whole number from 1"),
        ({"hardware_compatibility": "every"}, "expected 'none' or 'ampere"),
        ({"compute_capabilities": [8.6]}, "expected a string"),
    ],
)
def test_a_recipe_that_is_not_one_is_refused(change: dict[str, Any], message: str) -> None:
    assert parse_recipe(RECIPE).compute_capabilities == ("8.6",)
    with pytest.raises(BundleError, match=message):
        parse_recipe(RECIPE | change)
