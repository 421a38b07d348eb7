"""`Predictor` on every runtime: parity, determinism, threads, and what it refuses."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import msa2net.runtimes.backends as backends
from msa2net import Predictor
from msa2net.core.phantoms import phantom
from msa2net.errors import BundleError, FrameError, OutputError, RuntimeUnavailableError
from msa2net.runtimes import AccuracyLossWarning, DemoModelWarning, preprocess
from msa2net.runtimes.bundle import VERDICTS, Bundle
from msa2net.runtimes.images import read_frames
from msa2net.runtimes.measure import pixel_agreement
from msa2net.runtimes.predictor import DEMO_BUNDLE

CPU_RUNTIMES = backends.candidates("CPU")
REAL = ("rgb_color", "ybr_color", "jpeg2k", "palette_color")
FRAME = phantom("dermoscopy", 77, (120, 160)).image


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_the_golden_frames_pass(predictors: dict[str, Predictor], runtime: str) -> None:
    result = predictors[runtime].self_test()
    assert result.passed
    assert result.frames >= 2
    assert 0 <= result.logit_difference <= result.logit_tolerance


def test_the_self_test_fails_when_the_runtime_computes_something_else() -> None:
    with Predictor.load(DEMO_BUNDLE, runtime="onnxruntime") as predictor:
        infer = predictor._network.backend.infer
        predictor._network.backend.infer = lambda x: infer(x) + np.float32(0.01)  # type: ignore[method-assign]
        result = predictor.self_test()
    assert not result.passed
    assert str(result).startswith("FAIL: ")
    assert result.logit_difference == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(
    ("replaced", "text"),
    [
        (np.zeros((2, 224, 224), np.float64), "got float64 (2, 224, 224), expected finite float32 (2, 224, 224)"),
        (np.full((2, 224, 224), np.nan, np.float32), "got float32 (2, 224, 224), expected finite float32"),
        (np.zeros((2, 1, 1), np.float32), "got float32 (2, 1, 1), expected finite float32 (2, 224, 224)"),
    ],
    ids=["dtype", "NaN", "shape"],
)
def test_golden_logits_that_cannot_be_compared_are_an_error(
    predictors: dict[str, Predictor], monkeypatch: pytest.MonkeyPatch, replaced: np.ndarray, text: str
) -> None:
    predictor = predictors["onnxruntime"]
    entry = predictor.bundle.manifest.golden[0]
    read = predictor.bundle.read
    content = io.BytesIO()
    np.save(content, replaced)
    monkeypatch.setattr(
        predictor.bundle, "read", lambda path: content.getvalue() if path == entry.logits else read(path)
    )
    with pytest.raises(BundleError) as caught:
        predictor.self_test()
    assert str(caught.value).startswith(f"{entry.logits}: {text}")


@pytest.mark.parametrize("name", REAL)
def test_real_ultrasound_gives_the_same_mask_on_every_runtime(
    predictors: dict[str, Predictor], examples: Callable[[str], Path], name: str
) -> None:
    for pixels, bits in list(read_frames(examples(name)))[:3]:
        masks = [predictor.predict(pixels, bits=bits).mask for predictor in predictors.values()]
        assert all(mask.shape == pixels.shape[:2] for mask in masks)
        assert min(pixel_agreement(masks[0], mask) for mask in masks[1:]) >= 0.9999


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(FRAME, id="rgb uint8"),
        pytest.param(FRAME[..., 0], id="grey uint8"),
        pytest.param(FRAME.astype(np.uint16) * 257, id="rgb uint16"),
        pytest.param((FRAME / 255).astype(np.float32), id="rgb float32"),
        pytest.param(FRAME[::-1, ::2], id="not contiguous"),
        pytest.param(FRAME[:1, :1], id="one pixel"),
        pytest.param(np.resize(FRAME, (1, 10_000, 3)), id="one row"),
        pytest.param(np.resize(FRAME, (10_000, 1)), id="one column"),
        pytest.param(np.resize(FRAME, (4320, 7680)), id="8k"),
    ],
)
def test_a_frame_gives_the_same_bits_at_every_call(
    predictors: dict[str, Predictor], runtime: str, frame: np.ndarray
) -> None:
    first, second = predictors[runtime].predict(frame), predictors[runtime].predict(frame)
    assert first.mask.shape == frame.shape[:2]
    assert first.mask.dtype == np.uint8
    assert np.array_equal(first.logits, second.logits)
    assert np.array_equal(first.mask, second.mask)


def test_depth_of_pixels_does_not_change_the_mask(predictors: dict[str, Predictor]) -> None:
    predictor = predictors["onnxruntime"]
    expected = predictor.predict(FRAME).logits
    for frame in (FRAME.astype(np.uint16) * 257, (FRAME / 255).astype(np.float32)):
        assert np.abs(predictor.predict(frame).logits - expected).max() < 1e-3


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_a_kept_result_is_not_overwritten_by_the_next(predictors: dict[str, Predictor], runtime: str) -> None:
    first = predictors[runtime].predict(FRAME)
    kept = first.logits.copy()
    predictors[runtime].predict(255 - FRAME)
    assert np.array_equal(first.logits, kept)


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_several_threads_get_what_one_gets(predictors: dict[str, Predictor], runtime: str) -> None:
    frames = [np.roll(FRAME, 7 * i, axis=1) for i in range(4)]
    expected = [predictors[runtime].predict(frame).logits for frame in frames]
    found: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        found[i] = predictors[runtime].predict(frames[i]).logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(frames))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], expected[i]) for i in range(len(frames)))


def test_probabilities_sum_to_one_and_their_argmax_is_the_mask(predictors: dict[str, Predictor]) -> None:
    seg = predictors["openvino"].predict(FRAME)
    assert seg.probabilities.shape == (2, *FRAME.shape[:2])
    assert seg.probabilities.sum(0) == pytest.approx(1, abs=1e-6)
    assert np.array_equal(seg.probabilities.argmax(0), seg.mask)


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_execution_says_what_was_asked_and_what_ran(predictors: dict[str, Predictor], runtime: str) -> None:
    execution = predictors[runtime].predict(FRAME).execution
    assert (execution.runtime, execution.runtime_asked) == (runtime, runtime)
    assert (execution.precision, execution.precision_asked) == ("fp32", "fp32")
    assert (execution.device, execution.device_asked) == ("CPU", "CPU")
    assert execution.threads == backends.default_threads()
    assert execution.bundle_digest == predictors[runtime].bundle.digest
    assert execution.runtime_version[0].isdigit()
    assert execution.accuracy == predictors[runtime].artifact.accuracy == "high"


def test_execution_as_json_says_how_accurate_the_artifact_is(predictors: dict[str, Predictor]) -> None:
    execution = predictors["onnxruntime"].execution
    document = json.loads(json.dumps(execution.to_json()))
    assert document["accuracy"] == "high"
    assert document == {field.name: getattr(execution, field.name) for field in fields(execution)}


def test_timings_are_there_and_positive(predictors: dict[str, Predictor]) -> None:
    timings = predictors["onnxruntime"].predict(FRAME).timings
    assert min(timings.preprocess, timings.inference, timings.postprocess) > 0
    assert timings.total == timings.preprocess + timings.inference + timings.postprocess


def test_paths_and_pillow_images_give_what_the_array_gives(predictors: dict[str, Predictor], tmp_path: Path) -> None:
    from PIL import Image

    image = Image.fromarray(FRAME)
    image.save(tmp_path / "frame.png")
    expected = predictors["onnxruntime"].predict(FRAME).logits
    for source in (tmp_path / "frame.png", str(tmp_path / "frame.png"), image):
        assert np.array_equal(predictors["onnxruntime"].predict(source).logits, expected)


def test_a_dicom_dataset_gives_what_its_file_gives(
    predictors: dict[str, Predictor], examples: Callable[[str], Path]
) -> None:
    import pydicom

    path = examples("rgb_color")
    expected = predictors["onnxruntime"].predict(path)
    assert np.array_equal(predictors["onnxruntime"].predict(pydicom.dcmread(path)).logits, expected.logits)


def test_a_clip_is_refused_where_one_frame_is_expected(
    predictors: dict[str, Predictor], examples: Callable[[str], Path]
) -> None:
    with pytest.raises(FrameError, match="image: holds several frames, expected one"):
        predictors["onnxruntime"].predict(examples("ybr_color"))


def test_logits_that_are_not_finite_give_an_error_and_no_mask() -> None:
    with Predictor.load(DEMO_BUNDLE, runtime="onnxruntime") as predictor:
        good = predictor.predict(FRAME)
        infer = predictor._network.backend.infer

        def broken(x: Any) -> Any:
            logits = infer(x)
            logits[0, 1, 5, 5] = np.nan
            return logits

        predictor._network.backend.infer = broken  # type: ignore[method-assign]
        with pytest.raises(OutputError, match="logits: got NaN or infinity, expected finite values"):
            predictor.predict(FRAME)
        predictor._network.backend.infer = infer  # type: ignore[method-assign]
        assert np.array_equal(predictor.predict(FRAME).mask, good.mask)


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_a_refused_frame_does_not_harm_the_next(predictors: dict[str, Predictor], runtime: str) -> None:
    before = predictors[runtime].predict(FRAME).mask
    for bad in (np.zeros((0, 5), np.uint8), np.full((4, 4), np.nan, np.float32), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(FrameError):
            predictors[runtime].predict(bad)
    assert np.array_equal(predictors[runtime].predict(FRAME).mask, before)


# The network alone --------------------------------------------------------------------------------------------------


def prepared(predictor: Predictor) -> np.ndarray:
    return preprocess.to_tensor(FRAME, predictor.bundle.manifest.input)


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_the_logits_of_a_prepared_tensor_are_those_of_its_frame(predictors: dict[str, Predictor], runtime: str) -> None:
    predictor = predictors[runtime]
    found = predictor.logits(prepared(predictor))
    assert found.dtype == np.float32
    assert found.shape == (2, 224, 224)
    assert np.array_equal(found, predictor.predict(FRAME).logits)


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_a_tensor_of_another_memory_order_gives_the_same_logits(predictors: dict[str, Predictor], runtime: str) -> None:
    predictor = predictors[runtime]
    tensor = prepared(predictor)
    expected = predictor.logits(tensor)
    turned = np.ascontiguousarray(tensor.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not turned.flags.c_contiguous
    assert np.array_equal(predictor.logits(turned), expected)
    assert np.array_equal(turned, tensor)


def broken(value: float) -> np.ndarray:
    tensor = np.zeros((1, 3, 224, 224), np.float32)
    tensor[0, 2, 223, 223] = value
    return tensor


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (np.zeros((1, 3, 224, 224)), "got float64 (1, 3, 224, 224)"),
        (np.zeros((1, 3, 224, 224), np.float16), "got float16 (1, 3, 224, 224)"),
        (np.zeros((1, 3, 224, 224), np.uint8), "got uint8 (1, 3, 224, 224)"),
        (np.zeros((3, 224, 224), np.float32), "got float32 (3, 224, 224)"),
        (np.zeros((2, 3, 224, 224), np.float32), "got float32 (2, 3, 224, 224)"),
        (np.zeros((1, 1, 224, 224), np.float32), "got float32 (1, 1, 224, 224)"),
        (np.zeros((1, 3, 224, 225), np.float32), "got float32 (1, 3, 224, 225)"),
        (np.zeros((1, 224, 224, 3), np.float32), "got float32 (1, 224, 224, 3)"),
        (broken(np.nan), "got float32 (1, 3, 224, 224)"),
        (broken(-np.inf), "got float32 (1, 3, 224, 224)"),
    ],
    ids=["float64", "float16", "uint8", "no batch", "two", "grey", "too wide", "channels last", "NaN", "infinity"],
)
def test_a_tensor_that_does_not_fit_is_refused(
    predictors: dict[str, Predictor], tensor: np.ndarray, found: str
) -> None:
    with pytest.raises(FrameError) as caught:
        predictors["onnxruntime"].logits(tensor)
    assert str(caught.value) == f"tensor: {found}, expected finite float32 (1, 3, 224, 224). Resize it first."


def test_a_closed_predictor_gives_no_logits() -> None:
    with Predictor.load(DEMO_BUNDLE, runtime="onnxruntime") as predictor:
        tensor = prepared(predictor)
    with pytest.raises(RuntimeUnavailableError) as caught:
        predictor.logits(tensor)
    assert str(caught.value) == "predictor: is closed, expected an open one. Load it again."


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (broken(0)[:, :2] + np.float32(np.nan), "logits: got NaN or infinity, expected finite values"),
        (np.zeros((1, 3, 224, 224), np.float32), "logits: got float32 (1, 3, 224, 224), expected float32 (1, 2, 224"),
    ],
    ids=["NaN", "shape"],
)
def test_what_a_runtime_returns_is_checked_for_tensors_as_for_frames(raw: np.ndarray, text: str) -> None:
    with Predictor.load(DEMO_BUNDLE, runtime="onnxruntime") as predictor:
        tensor = prepared(predictor)
        predictor._network.backend.infer = lambda _: raw  # type: ignore[method-assign]
        for call in (lambda: predictor.logits(tensor), lambda: predictor.predict(FRAME)):
            with pytest.raises(OutputError) as caught:
                call()
            assert str(caught.value).startswith(text)


# What its accuracy check said ---------------------------------------------------------------------------------------

Judged = Callable[..., Path]
REASONS = ["largest logit difference 1.83e+00", "bound 0.9863 of the reference's mean Dice, standard needs 0.99"]


def test_an_artifact_that_failed_is_loaded_by_name_with_a_warning_and_says_so(judged: Judged) -> None:
    path = judged("failed", REASONS, "onnxruntime")
    with pytest.warns(AccuracyLossWarning) as caught:
        predictor = Predictor.load(path, runtime="onnxruntime")
    assert [str(warning.message) for warning in caught] == [
        "onnxruntime fp32 failed its accuracy check at export: largest logit difference 1.83e+00; "
        "bound 0.9863 of the reference's mean Dice, standard needs 0.99"
    ]
    assert caught[0].filename == __file__
    seg = predictor.predict(FRAME)
    assert seg.execution.accuracy == seg.execution.to_json()["accuracy"] == "failed"


@pytest.mark.parametrize("verdict", [verdict for verdict in VERDICTS if verdict != "failed"])
def test_any_other_verdict_is_loaded_in_silence_and_by_auto(judged: Judged, verdict: str) -> None:
    path = judged(verdict, REASONS, "onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor = Predictor.load(path)
    assert (predictor.execution.runtime, predictor.execution.accuracy) == ("onnxruntime", verdict)


def test_auto_passes_over_what_failed_and_says_so(judged: Judged, caplog: pytest.LogCaptureFixture) -> None:
    path = judged("failed", REASONS, "onnxruntime")
    with caplog.at_level("INFO", "msa2net"), warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor = Predictor.load(path)
    assert (predictor.execution.runtime, predictor.execution.accuracy) == ("openvino", "high")
    assert [record.getMessage() for record in caplog.records] == [
        "auto: passed over onnxruntime: onnxruntime fp32: failed its accuracy check at export. "
        "Name the runtime to use it all the same.",
        "auto: picked openvino fp32",
    ]


def test_auto_with_nothing_but_failures_names_each(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    path = judged("failed", REASONS, "onnxruntime", "openvino")
    hide(monkeypatch, "torch")
    with pytest.raises(RuntimeUnavailableError) as caught:
        Predictor.load(path)
    text = str(caught.value)
    assert text.startswith("runtime 'auto': nothing can run here: ")
    for runtime in ("onnxruntime", "openvino"):
        assert f"{runtime} fp32: failed its accuracy check at export. Name the runtime to use it all" in text
    assert "runtime 'pytorch': needs the package torch" in text


def test_available_says_how_accurate_each_artifact_is(judged: Judged) -> None:
    path = judged("failed", REASONS, "openvino")
    judged("unjudged", [], "pytorch")
    found = {entry.runtime: (entry.accuracy, entry.available) for entry in Predictor.available(path)}
    assert found == {"onnxruntime": ("high", True), "openvino": ("failed", True), "pytorch": ("unjudged", True)}


def test_the_demo_model_has_passed_on_every_runtime() -> None:
    assert {artifact.accuracy for artifact in Bundle(DEMO_BUNDLE).manifest.artifacts} <= {"high", "standard"}


# What is asked for by name ------------------------------------------------------------------------------------------


def test_no_path_means_the_demo_model_and_a_warning() -> None:
    with pytest.warns(DemoModelWarning, match="trained on synthetic phantoms. Not for clinical use"):
        predictor = Predictor.load(runtime="onnxruntime")
    assert predictor.bundle.path == DEMO_BUNDLE


def test_auto_takes_the_first_that_can_run_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hide(monkeypatch, "onnxruntime")
    with caplog.at_level("INFO", "msa2net"):
        predictor = Predictor.load(DEMO_BUNDLE)
    assert (predictor.execution.runtime, predictor.execution.runtime_asked) == ("openvino", "auto")
    assert "auto: passed over onnxruntime: runtime 'onnxruntime': needs the package onnxruntime" in caplog.text
    assert "auto: picked openvino" in caplog.text


def test_auto_with_nothing_installed_names_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "openvino", "onnxruntime", "torch")
    with pytest.raises(RuntimeUnavailableError) as caught:
        Predictor.load(DEMO_BUNDLE)
    for package in ("openvino", "onnxruntime", "torch"):
        assert f"needs the package {package}" in str(caught.value)


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if these packages were not installed."""
    found = backends.importlib.util.find_spec
    monkeypatch.setattr(
        backends.importlib.util, "find_spec", lambda name, *a: None if name in modules else found(name, *a)
    )


def test_a_runtime_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "openvino")
    with pytest.raises(RuntimeUnavailableError) as caught:
        Predictor.load(DEMO_BUNDLE, runtime="openvino")
    assert str(caught.value) == ("runtime 'openvino': needs the package openvino. pip install 'msa2net-edge[openvino]'")


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        Predictor.load(DEMO_BUNDLE, runtime="tensorflow")
    assert str(caught.value) == (
        "runtime: got 'tensorflow', expected one of auto, onnxruntime, openvino, pytorch, tensorrt, tensorrt-rtx, "
        "torch-tensorrt. Check the spelling."
    )


def test_a_precision_the_bundle_lacks_is_refused_with_what_it_has() -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        Predictor.load(DEMO_BUNDLE, runtime="onnxruntime", precision="int8")
    assert str(caught.value) == (
        f"{DEMO_BUNDLE}: no artifact for onnxruntime in int8, "
        "it has: onnxruntime fp32, openvino fp32, pytorch fp32. Pick one, or export it."
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"precision": "fp8"}, "precision: got 'fp8', expected one of fp32, bf16, fp16, int8"),
        ({"threads": 0}, "threads: got 0, expected a whole number of at least 1"),
        ({"threads": 1.5}, "threads: got 1.5, expected a whole number of at least 1"),
        ({"runtime": "onnxruntime", "device": "GPU"}, "runtime 'onnxruntime': got device 'GPU', expected 'CPU'"),
        ({"runtime": "pytorch", "device": "cuda"}, "runtime 'pytorch': got device 'cuda', this PyTorch ("),
        (
            {"runtime": "pytorch", "device": "cuda:x"},
            "runtime 'pytorch': got device 'cuda:x', expected 'cuda' or 'cuda:N'. Check it.",
        ),
        ({"runtime": "pytorch", "device": "GPU"}, "runtime 'pytorch': got device 'GPU', expected 'CPU'"),
        ({"runtime": "openvino", "device": "NPU"}, "runtime 'openvino': got device 'NPU', expected one of"),
    ],
    ids=[
        "precision",
        "no threads",
        "half a thread",
        "onnxruntime device",
        "no GPU",
        "no number",
        "pytorch device",
        "openvino device",
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        Predictor.load(DEMO_BUNDLE, **options)
    assert str(caught.value).startswith(text)


def test_a_closed_predictor_says_so_and_closes_once() -> None:
    with Predictor.load(DEMO_BUNDLE, runtime="onnxruntime") as predictor:
        predictor.close()
    with pytest.raises(RuntimeUnavailableError, match="predictor: is closed, expected an open one"):
        predictor.predict(FRAME)


def test_a_runtime_that_fails_is_an_error_of_ours() -> None:
    with Predictor.load(DEMO_BUNDLE, runtime="onnxruntime") as predictor:

        def failing(_: Any) -> Any:
            raise RuntimeError("out of\nmemory")

        predictor._network.backend.infer = failing  # type: ignore[method-assign]
        with pytest.raises(OutputError) as caught:
            predictor.predict(FRAME)
    assert str(caught.value) == (
        "runtime 'onnxruntime': failed (RuntimeError: out of memory). Verify the bundle on this device."
    )


REFUSES_INT8 = {
    "onnxruntime": "computes every product of this int8 model in fp32, expected int8",
    "openvino": "runs in f32 with nodes in .*, expected int8",
    "pytorch": "got precision 'int8', expected 'fp32'",
}


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_a_precision_that_a_backend_cannot_run_is_refused_and_not_relabelled(
    predictors: dict[str, Predictor], runtime: str
) -> None:
    bundle = predictors[runtime].bundle
    backend = backends.backend_class(runtime)
    lacks = backends.cpu_lacks("int8") and runtime != "pytorch"  # then it is not even tried
    text = "this CPU cannot run int8" if lacks else REFUSES_INT8[runtime]
    refused = pytest.raises(RuntimeUnavailableError, match=text)
    with bundle.open_artifact(bundle.artifact(runtime, "fp32")) as files, refused:
        backend(files, bundle.manifest, "CPU", "int8", 1)


def test_threads_are_passed_on() -> None:
    for runtime in ("onnxruntime", "openvino"):
        with Predictor.load(DEMO_BUNDLE, runtime=runtime, threads=1) as predictor:
            assert predictor.execution.threads == 1


V1 = "25 1 0:22 {root} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"
V2 = "25 1 0:22 {root} /sys/fs/cgroup rw - cgroup2 none rw"


def system(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A file system of control groups; `files` are below sys/fs/cgroup."""
    texts = {"proc/self/cgroup": groups, "proc/self/mountinfo": f"1 0 8:1 / / rw - ext4 /dev/sda rw\n{mounts}\n"}
    for name, text in (texts | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1(quota: int, period: int = 100_000, group: str = "") -> dict[str, str]:
    return {f"cpu{group}/cpu.cfs_quota_us": f"{quota}\n", f"cpu{group}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "quota"),
    [
        ("0::/\n", V2.format(root="/"), {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", V2.format(root="/"), {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 0.5),
        ("0::/a/b\n", V2.format(root="/"), {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "200000 100000\n"}, 2),
        ("0::/a\n", V2.format(root="/"), {"a/cpu.max": "max 100000\n"}, math.inf),
        ("0::/a\n", V2.format(root="/"), {"a/cpu.weight": "100\n"}, math.inf),
        ("0::/../x\n", V2.format(root="/"), {"cpu.max": "100000 100000\n"}, 1),
        ("0::/docker/c\n", V2.format(root="/docker/c"), {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/docker/c/d\n", V2.format(root="/docker/c"), {"cpu.max": "9 3\n", "d/cpu.max": "4 2\n"}, 2),
        ("4:cpuacct,cpu:/a\n0::/x\n", V1.format(root="/"), v1(-1) | v1(120_000, group="/a"), 1.2),
        ("4:cpu,cpuacct:/docker/c\n", V1.format(root="/docker/c"), v1(50_000), 0.5),
        ("4:cpu,cpuacct:/elsewhere\n", V1.format(root="/docker/c"), v1(70_000), 0.7),
        ("4:cpu:/a\n", V1.format(root="/"), v1(-1, group="/a"), math.inf),
        ("4:memory:/a\n", V1.format(root="/"), v1(50_000, group="/a"), math.inf),
        ("0::/\n", V2.format(root="/"), {"cpu.max": "nonsense\n"}, math.inf),
        ("0::/\n", V2.format(root="/"), {"cpu.max": "100 0\n"}, math.inf),
        ("broken\n", "broken", {"cpu.max": "100000 100000\n"}, math.inf),
    ],
    ids=[
        "v2",
        "v2 parent",
        "v2 own",
        "v2 no limit",
        "v2 no controller",
        "v2 outside the namespace",
        "v2 container",
        "v2 below a container",
        "v1",
        "v1 container",
        "v1 container with a namespace",
        "v1 no limit",
        "v1 other controller",
        "nonsense",
        "no period",
        "no groups",
    ],
)
def test_the_quota_of_the_control_groups(
    tmp_path: Path, groups: str, mounts: str, files: dict[str, str], quota: float
) -> None:
    assert backends.cpu_quota(system(tmp_path, groups, mounts, files)) == quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert backends.cpu_quota(tmp_path) == math.inf


@pytest.mark.parametrize(
    ("cores", "quota", "threads"), [(4, math.inf, 4), (4, 1.2, 2), (4, 2.0, 2), (2, 8.0, 2), (4, 0.05, 1)]
)
def test_the_default_of_threads_is_the_smaller_of_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, cores: int, quota: float, threads: int
) -> None:
    monkeypatch.setattr(backends.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(backends, "cpu_quota", lambda: quota)
    assert backends.default_threads() == threads


def test_loading_openvino_loads_no_telemetry_and_its_converter_still_works() -> None:
    code = """
import sys
from msa2net import Predictor
Predictor.load(runtime="openvino", cache=False)
assert not [name for name in sys.modules if name.startswith(("openvino_telemetry", "openvino.tools.ovc"))]
import openvino, types
sys.modules["openvino.tools.ovc"] = types.SimpleNamespace(convert_model=lambda *given, **named: (given, named))
assert openvino.convert_model("model.onnx", verbose=True) == (("model.onnx",), {"verbose": True})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_available_lists_every_artifact_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "torch")
    found = {entry.runtime: entry for entry in Predictor.available()}
    assert found.keys() == set(CPU_RUNTIMES)
    assert found["onnxruntime"].available
    assert not found["pytorch"].available
    assert "pip install 'msa2net-edge[pytorch]'" in found["pytorch"].reason


def _predict_in_child(predictor: Predictor, queue: Any) -> None:
    try:
        predictor.predict(FRAME)
        queue.put("predicted")
    except RuntimeUnavailableError as error:
        queue.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_an_error_and_does_not_hang(predictors: dict[str, Predictor]) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_predict_in_child, args=(predictors["onnxruntime"], queue))
    child.start()
    assert queue.get(timeout=60).startswith("predictor: was loaded before a fork")
    child.join()
