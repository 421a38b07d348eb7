"""The accuracy benchmark: the public pipeline against scipy, means and pooled figures by hand, and what it writes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import zoom

from msa2net.benchmarks import accuracy
from msa2net.benchmarks.metrics import score
from msa2net.core.data import Case, Dataset, Volume, open_data
from msa2net.core.data.synapse import CLASSES
from msa2net.runtimes.bundle import ClassInfo, InputContract

Mask = NDArray[np.uint8]


class FakePredictor:
    """Stands in for a loaded artifact: `network` makes logits (K, 224, 224) of a tensor (1, C, 224, 224)."""

    def __init__(self, name: str, classes: tuple[str, ...], network: Callable[[Any], Any], channels: int = 1) -> None:
        runtime, precision = name.split()
        self.artifact = SimpleNamespace(name=name, runtime=runtime, precision=precision)
        contract = InputContract(
            height=224, width=224, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels
        )
        infos = tuple(ClassInfo(name=each, color=(10 * i, 0, 0)) for i, each in enumerate(classes))
        self.bundle = SimpleNamespace(
            manifest=SimpleNamespace(classes=infos, input=contract, model_name="fake"), digest="0" * 64
        )
        self.execution = SimpleNamespace(to_json=lambda: {"runtime": runtime})
        self.logits = lambda tensor: network(tensor)
        self.closed = False

    def predict(self, frame: NDArray[Any], bits: int | None = None) -> Any:
        return SimpleNamespace(mask=(frame[..., 0] if frame.ndim == 3 else frame).astype(np.uint8))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the benchmark find these predictors in any bundle."""

    def put(*predictors: FakePredictor) -> None:
        found = {predictor.artifact.name: predictor for predictor in predictors}
        monkeypatch.setattr(accuracy, "_load", lambda *_: (found, []))

    return put


def dataset(*volumes: Volume, classes: tuple[str, ...] = ("background", "lesion"), groups: str = "") -> Dataset:
    cases = tuple(
        Case(f"case {i}", lambda volume=volume: volume, groups[i] if groups else "") for i, volume in enumerate(volumes)
    )
    return Dataset("fake", classes, cases)


def volume(found: Any, truth: Any) -> Volume:
    """A volume whose frames the fake's `predict` gives back as its mask."""
    labels = np.asarray(truth, np.uint8)
    return Volume(tuple(np.asarray(found, np.uint8)), labels)


def square(start: int, side: int = 30, size: int = 64, label: int = 1) -> Mask:
    mask = np.zeros((1, size, size), np.uint8)
    mask[:, start : start + side, 10 : 10 + side] = label
    return mask


# The public pipeline ----------------------------------------------------------------------------------------------


def bands(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """A "network" whose class k is a band of the normalised grey level: it shows every step of the pipeline."""
    level = np.clip(((tensor[0, 0] + 1) / 2 * 9).astype(int), 0, 8)
    return np.eye(9, dtype=np.float32)[level].transpose(2, 0, 1)


def test_the_public_protocol_is_the_released_pipeline_on_volumes_in_its_own_layout(
    tmp_path: Path, loaded: Callable[..., None]
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "test_vol_h5").mkdir()
    (tmp_path / "lists" / "lists_Synapse").mkdir(parents=True)
    (tmp_path / "lists" / "lists_Synapse" / "test_vol.txt").write_text("case0001\ncase0002\n")
    expected: list[tuple[float, float]] = []
    for case in ("case0001", "case0002"):
        image = zoom(rng.random((2, 8, 8)), (1, 64, 64), order=1).astype(np.float32)
        label = np.clip(zoom(image, (1, 1, 1), order=0) * 9 + rng.normal(0, 0.2, image.shape), 0, 8).astype(np.uint8)
        label[label == 4] = 3  # a class that the truth lacks
        with h5py.File(tmp_path / "test_vol_h5" / f"{case}.npy.h5", "w") as file:
            file["image"], file["label"] = image, label
        masks = []
        for slice_ in image:
            small = zoom(slice_, (224 / 512, 224 / 512), order=3)
            # scipy loses the last row and column at this length; the package does not copy that.
            mirrored = zoom(slice_, (224 / 512, 224 / 512), order=3, mode="mirror")
            small[-1], small[:, -1] = mirrored[-1], mirrored[:, -1]
            logits = bands(((small - 0.5) / 0.5)[None, None])
            masks.append(zoom(logits.argmax(0), (512 / 224, 512 / 224), order=0))
        prediction = np.stack(masks).astype(np.uint8)
        scores = [score(prediction, label, k, protocol="public") for k in range(1, 9)]
        expected.append((float(np.mean([s.dice for s in scores])), float(np.mean([s.hd95 for s in scores]))))
    loaded(FakePredictor("pytorch fp32", CLASSES, bands))
    found = accuracy.measure(Path("any"), open_data(f"synapse:{tmp_path}"), "public")
    [artifact] = found["artifacts"]
    mean = artifact["summary"][-1]
    assert (mean["class"], mean["cases"]) == ("mean", 2)
    # A few pixels lie so near the edge of a band that float32 and float64 splines part there.
    assert mean["dice"] == pytest.approx(np.mean([dice for dice, _ in expected]), abs=2e-4)
    assert mean["hd95"] == pytest.approx(np.mean([hd95 for _, hd95 in expected]), abs=0.02)
    assert 0.5 < mean["dice"] < 0.999
    assert [line["class"] for line in artifact["summary"]] == [*CLASSES[1:], "mean"]
    absent = artifact["summary"][3]
    assert (absent["class"], absent["dice"], absent["hd95"]) == ("right kidney", 1.0, 0.0)  # found where there is none
    assert (found["cases"], found["frames"], found["protocol"]) == (2, 4, "public")


def test_empty_sets_enter_the_public_mean_and_not_the_standard_one(loaded: Callable[..., None]) -> None:
    nothing = np.zeros((1, 64, 64), np.uint8)
    data = dataset(
        volume(square(5), square(5)),  # right
        volume(square(5), nothing),  # found where there is none
        volume(nothing, square(5)),  # missed
        volume(nothing, nothing),  # rightly nothing
    )
    figures = {}
    for protocol in ("public", "standard"):
        loaded(FakePredictor("pytorch fp32", data.classes, lambda t: t))
        if protocol == "public":  # the frames themselves are the masks here, whatever the pipeline
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(accuracy, "segmenter", lambda p, _: lambda frame, bits: p.predict(frame, bits).mask)
                [artifact] = accuracy.measure(Path("any"), data, "public")["artifacts"]
        else:
            [artifact] = accuracy.measure(Path("any"), data, "standard")["artifacts"]
        [figures[protocol]] = artifact["summary"]
    assert figures["public"]["dice"] == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert figures["public"]["hd95"] == 0
    assert figures["standard"]["dice"] == pytest.approx((1 + 0) / 2)
    assert figures["standard"]["hd95"] == 0  # of the one case where it is defined
    assert figures["standard"]["defined"] == 2
    assert figures["standard"]["missed"] == 1
    assert (figures["standard"]["free_frames"], figures["standard"]["false_alarms"]) == (2, 1)


# Figures ----------------------------------------------------------------------------------------------------------


def test_means_are_over_cases_and_pooled_figures_over_pixels(loaded: Callable[..., None]) -> None:
    data = dataset(volume(square(5), square(5)), volume(square(5, 4), square(7, 4)), groups="ab")
    predictor = FakePredictor("pytorch fp32", data.classes, lambda t: t)
    loaded(predictor)
    result = accuracy.measure(Path("any"), data)
    [artifact] = result["artifacts"]
    a, b, both = artifact["summary"]
    assert [line["group"] for line in (a, b, both)] == ["a", "b", "all"]
    assert (a["dice"], b["dice"], both["dice"]) == pytest.approx((1.0, 0.5, 0.75))
    assert both["pooled"]["dice"] == pytest.approx(2 * (900 + 8) / (1800 + 32))
    assert both["pooled"]["sensitivity"] == pytest.approx(908 / 916)
    assert both["pooled"]["specificity"] == pytest.approx(1 - 8 / (2 * 64 * 64 - 916))
    assert both["pooled"]["accuracy"] == pytest.approx(1 - 16 / (2 * 64 * 64))
    assert [row["case"] for row in artifact["each"]] == ["case 0", "case 1"]
    assert predictor.closed


def test_the_mean_over_classes_is_taken_in_each_case_first(loaded: Callable[..., None]) -> None:
    both = np.maximum(square(5, 10), square(30, 10, label=2))
    one = square(5, 10)
    classes = ("background", "one", "two")
    # Dice 1 and undefined (the truth lacks the second class) in the first case, 0 and 0 in the other.
    data = dataset(volume(one, one), volume(np.zeros_like(both), both), classes=classes)
    loaded(FakePredictor("pytorch fp32", classes, lambda t: t))
    [artifact] = accuracy.measure(Path("any"), data)["artifacts"]
    assert [line["dice"] for line in artifact["summary"]] == [0.5, 0.0, 0.5]


def test_millimetres_and_pixels_do_not_enter_one_mean(loaded: Callable[..., None]) -> None:
    known = Volume((square(5)[0],), square(7), spacing=(1.0, 0.5, 0.5))
    unknown = Volume((square(5)[0],), square(15))
    for volumes, unit, distance in (((known, unknown), "mm", 1.0), ((unknown,), "px", 10.0)):
        data = dataset(*volumes)
        loaded(FakePredictor("pytorch fp32", data.classes, lambda t: t))
        result = accuracy.measure(Path("any"), data)
        assert result["unit"] == unit
        assert result["artifacts"][0]["summary"][0]["hd95"] == pytest.approx(distance)
        assert f"HD95 {unit}" in accuracy.table(result)


def test_volumes_are_scored_whole_and_judged_frame_by_frame(loaded: Callable[..., None]) -> None:
    found = np.concatenate([square(5), square(5), square(5)])
    truth = np.concatenate([square(5), square(5), np.zeros_like(square(5))])
    data = dataset(volume(found, truth), classes=("background", "lesion"))
    loaded(FakePredictor("pytorch fp32", data.classes, lambda t: t))
    [artifact] = accuracy.measure(Path("any"), data)["artifacts"]
    [row] = artifact["each"]
    assert row["dice"] == pytest.approx(2 * 1800 / (2700 + 1800))
    assert artifact["parity"]["images"] == 3
    assert artifact["summary"][0]["false_alarms"] == artifact["summary"][0]["free_frames"] == 1


def test_an_artifact_that_differs_from_the_reference_is_judged(loaded: Callable[..., None]) -> None:
    data = dataset(*[volume(square(5), square(5)) for _ in range(12)])
    wrong = FakePredictor("onnxruntime int8", data.classes, lambda t: t)
    right = FakePredictor("pytorch fp32", data.classes, lambda t: t)
    right_mask = wrong.predict

    def shifted(frame: NDArray[Any], bits: int | None = None) -> Any:
        return SimpleNamespace(mask=np.roll(right_mask(frame, bits).mask, 6, 0))

    wrong.predict = shifted  # type: ignore[method-assign]
    loaded(wrong, right)
    result = accuracy.measure(Path("any"), data)
    assert result["reference"] == "pytorch fp32"
    bad, good = (artifact["parity"] for artifact in result["artifacts"])
    assert (bad["verdict"], good["verdict"]) == ("failed", "high")
    assert bad["ratio_bound"] == pytest.approx(0.8)
    text = accuracy.table(result)
    assert [line.split()[-2:] for line in text.splitlines()[-2:]] == [["0.8000", "failed"], ["1.0000", "high"]]


def test_nan_is_null_in_json_and_a_dash_in_the_table(loaded: Callable[..., None], tmp_path: Path) -> None:
    nothing = np.zeros((1, 64, 64), np.uint8)
    data = dataset(volume(nothing, nothing))
    loaded(FakePredictor("pytorch fp32", data.classes, lambda t: t))
    result = accuracy.measure(Path("any"), data)
    assert math.isnan(result["artifacts"][0]["summary"][0]["dice"])
    accuracy.write(result, tmp_path)
    written = json.loads((tmp_path / "accuracy.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert written["artifacts"][0]["summary"][0]["dice"] is None
    line = accuracy.table(result).splitlines()[-1].split()
    assert line[:5] == ["pytorch", "fp32", "lesion", "0/1", "-"]


# The command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_table_csv_json_and_the_worst_cases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", "phantoms:3", "--runtimes", "onnxruntime", "--otsu", "--threads", "1"]
    assert accuracy.main([*options, "--output", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].startswith("demo (")
    widths = {len(line) for line in table[2:]}
    assert len(widths) == 1  # aligned
    assert sum(line.startswith("onnxruntime fp32") for line in table) == 3  # two groups and all
    assert sum(line.startswith("otsu") for line in table) == 3
    with (tmp_path / "out" / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6
    result = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert result["reference"] == "onnxruntime fp32"
    assert result["artifacts"][0]["execution"]["runtime"] == "onnxruntime"
    assert len(result["digest"]) == 64
    of_network = [row for row in rows if row["artifact"] == "onnxruntime fp32" and row["dice"] != "nan"]
    mean = result["artifacts"][0]["summary"][-1]
    assert mean["dice"] == pytest.approx(np.mean([float(row["dice"]) for row in of_network]))
    assert mean["dice"] > 0.5
    assert result["artifacts"][1]["summary"][-1]["dice"] < mean["dice"]  # Otsu
    assert str(tmp_path) not in json.dumps(result)
    pictures = sorted((tmp_path / "out").glob("worst_*.png"))
    assert len(pictures) == 4
    with Image.open(pictures[0]) as picture:
        assert picture.width >= 3 * 320


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr(accuracy, "measure", lambda *_: pytest.fail("scored"))
    assert accuracy.main(["--data", "phantoms:1", "--output", str(tmp_path / "taken")]) == 2
    assert capsys.readouterr().err == "error: --output: cannot be written (File exists). Name another folder.\n"


def test_the_report_says_which_phantoms_and_which_split_but_no_path() -> None:
    name = accuracy._named
    assert name("phantoms:3@7", dataset(), "test") == "fake"
    assert name("phantoms:3@7", Dataset("phantoms", ("a", "b"), ()), "test") == "phantoms:3@7"
    assert name("isic2018:/home/x", Dataset("isic2018", ("a", "b"), ()), "train") == "isic2018 train"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            ["--data", "phantoms:1", "--runtimes", "abacus"],
            "--runtimes: got 'abacus', expected some that the bundle has. See msa2net info.",
        ),
        (["--data", "phantom:1"], "data: got a name of an unknown kind, expected KIND:PATH with KIND one of "),
        (["--data", "synapse:{}"], "synapse data: found "),
        (["--data", "images:{}"], "image 1: has no labels, expected masks to score against. Use another kind."),
        (["--bundle", "{}/none", "--data", "phantoms:1"], "{}/none: no such folder, expected a bundle. "),
    ],
    ids=["runtime", "kind", "layout", "no-labels", "bundle"],
)
def test_mistakes_are_one_line(
    tmp_path: Path, options: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "a.png")
    options = [option.replace("{}", str(tmp_path)) for option in options]
    if "--runtimes" not in options:
        options += ["--runtimes", "onnxruntime"]
    assert accuracy.main(options) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith(f"error: {error.replace('{}', str(tmp_path))}")
    assert not (tmp_path / "out").exists()
