"""The training: what is cut short and goes on ends at the very weights of a run that was never interrupted."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from msa2net.core import train
from msa2net.core.augment import AUGMENTATIONS, RandContrastd, _public, augmentation
from msa2net.core.checkpoint import config_of, load_encoder, load_model, model_by_rule, read_checkpoint, save_checkpoint
from msa2net.core.config import VARIANTS
from msa2net.core.data import Case, Dataset, Volume, frames, open_data, phantom
from msa2net.core.losses import CrossEntropyDice, boundary_dou
from msa2net.core.network import MSA2Net, is_unused
from msa2net.core.phantoms import KINDS
from msa2net.errors import CheckpointError, DataError, Msa2NetError
from msa2net.runtimes.measure import dice

SETTINGS = [
    *("--preset", "demo", "--data", "phantoms:16@0", "--validation", "phantoms:4@900000"),
    *("--steps", "6", "--every", "2", "--batch", "4", "--device", "cpu"),
]


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Any:
    """Each phantom is drawn once for all runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "read_phantom", lru_cache(phantom.read_phantom))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("train") / "run"
    assert train.main(["--output", str(output), *SETTINGS]) == 0
    return output


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def interrupt_at(patch: pytest.MonkeyPatch, step: int, method: str = "advance") -> None:
    original = getattr(train.Training, method)

    def stop(self: train.Training, *arguments: Any) -> Any:
        if self.step == step:
            raise KeyboardInterrupt
        return original(self, *arguments)

    patch.setattr(train.Training, method, stop)


# Interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stops",
    [[(0, "advance")], [(3, "advance")], [(2, "advance"), (5, "advance")], [(4, "save")]],
    ids=["before-the-first-save", "once", "twice", "between-the-log-and-the-save"],
)
def test_an_interrupted_run_ends_at_the_same_weights(
    finished: Path, tmp_path: Path, stops: list[tuple[int, str]]
) -> None:
    command = ["--output", str(tmp_path), *SETTINGS]
    for step, method in stops:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step, method)
            with pytest.raises(KeyboardInterrupt):
                train.main(command)
    assert train.main(command) == 0
    for name in ("model.safetensors", "log.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    assert not list(tmp_path.glob("*.partial"))


def test_a_finished_run_is_not_trained_further(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6)
        assert train.main(["--output", str(finished), *SETTINGS]) == 0
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    assert capsys.readouterr().out == f"{finished / 'model.safetensors'}\n"


def test_other_settings_do_not_go_on_from_a_saved_state(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert train.main(["--output", str(finished), *SETTINGS, "--seed", "1"]) == 2
    text = capsys.readouterr().err
    assert text.endswith(f"error: {finished / 'state.pt'}: was begun with seed 0, expected 1. Use another --output.\n")
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_damaged_state_is_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.pt").write_bytes((finished / "state.pt").read_bytes()[:1000])
    assert train.main(["--output", str(tmp_path), *SETTINGS]) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith(f"error: {tmp_path / 'state.pt'}: cannot be read (")
    assert text.endswith("), expected a saved state. Delete it to begin anew.")


def test_a_validation_without_lesions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = phantom.read_phantom

    def without(kind: str, seed: int) -> Volume:
        drawn = read(kind, seed)
        return drawn if seed < 900_000 else replace(drawn, labels=np.zeros((1, 224, 224), np.uint8))

    monkeypatch.setattr(phantom, "read_phantom", without)
    assert train.main(["--output", str(tmp_path), *SETTINGS]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --validation: 8 frames without a lesion, expected some to score. Add cases."
    )


def test_a_loss_that_is_not_finite_changes_no_weight(tmp_path: Path) -> None:
    settings = train.Settings(data="phantoms:4", variant="tiny", classes=("background", "lesion"))
    training = train.Training(settings, 10, tmp_path)
    before = {key: value.clone() for key, value in training.model.state_dict().items() if "running" not in key}
    x = torch.full((1, 3, 224, 224), math.nan)
    with pytest.raises(Msa2NetError) as caught:
        training.advance(x, torch.zeros(1, 224, 224, dtype=torch.int64))
    assert str(caught.value) == (
        "step 0: loss is nan, its gradient's norm nan, expected finite ones. Lower --rate, and use another --output."
    )
    after = training.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if value.is_floating_point())


# What comes out -------------------------------------------------------------------------------------------------


def test_the_log_has_a_row_for_every_validation(finished: Path) -> None:
    rows = rows_of(finished)
    assert list(rows[0]) == [
        *("step", "loss", "rate"),
        *("dermoscopy_dice", "dermoscopy_alarms", "ultrasound_dice", "ultrasound_alarms"),
    ]
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    for row in rows:
        assert 0 < float(row["loss"]) < 10
        assert all(0 <= float(row[f"{kind}_dice"]) <= 1 for kind in KINDS)
    assert float(rows[1]["rate"]) == pytest.approx(4 * 2e-3 / 100)


def test_the_result_is_a_tiny_checkpoint_that_says_what_it_is(finished: Path) -> None:
    read = read_checkpoint(finished / "model.safetensors")
    config = config_of(read)
    assert (config.num_classes, config.width, config.deep_decoder) == (2, VARIANTS["tiny"].width, "dual_attention")
    assert read.metadata["model"] == "demo"
    assert json.loads(read.metadata["classes"]) == ["background", "lesion"]
    assert json.loads(read.metadata["mean"]) == json.loads(read.metadata["std"]) == [0.5, 0.5, 0.5]
    assert read.metadata["resize"] == "bilinear"
    assert read.metadata["notice"] == "Trained on synthetic phantoms. Not for clinical use."
    assert read.metadata["trained"] in [f"phantoms, {step} steps of 4 frames" for step in (2, 4, 6)]
    parameters = dict(load_model(read).named_parameters())
    assert not any(parameters[name].any() for name in parameters if is_unused(name, config))


def test_the_checkpoint_is_that_of_the_best_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dices = iter([0.3, 0.5, 0.4])
    monkeypatch.setattr(
        train, "scores", lambda *_: {kind: {"dice": d, "alarms": 0.0} for d in [next(dices)] for kind in KINDS}
    )
    assert train.main(["--output", str(tmp_path), *SETTINGS]) == 0
    assert read_checkpoint(tmp_path / "model.safetensors").metadata["trained"] == "phantoms, 4 steps of 4 frames"


def test_it_stops_early_when_nothing_improves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dices = iter([0.3, 0.5, 0.4, 0.5, 0.9])
    monkeypatch.setattr(
        train, "scores", lambda *_: {kind: {"dice": d, "alarms": 0.0} for d in [next(dices)] for kind in KINDS}
    )
    command = ["--output", str(tmp_path), *SETTINGS, "--steps", "9", "--every", "1", "--patience", "2"]
    assert train.main(command) == 0
    assert [row["step"] for row in rows_of(tmp_path)] == ["1", "2", "3", "4"]
    assert train.main(command) == 0  # and stays stopped
    assert [row["step"] for row in rows_of(tmp_path)] == ["1", "2", "3", "4"]


# Fine-tuning ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lka(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another form, with mean and std of its own."""
    path = tmp_path_factory.mktemp("lka") / "lka.safetensors"
    config = replace(VARIANTS["tiny"], num_classes=2, deep_decoder="lka")
    save_checkpoint(path, model_by_rule(config).state_dict(), {"mean": "[0.4, 0.5, 0.6]", "std": "[0.2, 0.2, 0.3]"})
    return path


def test_a_fine_tune_takes_form_mean_and_std_over_and_scores_its_start(lka: Path, tmp_path: Path) -> None:
    command = ["--data", "phantoms:4@0", "--validation", "phantoms:2@900000", "--start", str(lka), "--steps", "2"]
    command += ["--batch", "2", "--every", "2", "--augment", "light", "--device", "cpu", "--output", str(tmp_path)]
    assert train.main(command) == 0
    assert [row["step"] for row in rows_of(tmp_path)] == ["0", "2"]
    read = read_checkpoint(tmp_path / "model.safetensors")
    assert config_of(read).deep_decoder == "lka"
    assert json.loads(read.metadata["mean"]) == [0.4, 0.5, 0.6]
    assert json.loads(read.metadata["std"]) == [0.2, 0.2, 0.3]
    assert read.metadata["notice"] == "Trained on synthetic phantoms. Not for clinical use."


def test_a_fine_tune_that_is_killed_at_once_does_not_count_its_start_twice(lka: Path, tmp_path: Path) -> None:
    command = ["--data", "phantoms:4@0", "--validation", "phantoms:2@900000", "--start", str(lka), "--steps", "2"]
    command += ["--batch", "2", "--every", "1", "--patience", "1", "--device", "cpu", "--output", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            train.main(command)
    assert [row["step"] for row in rows_of(tmp_path)] == ["0"]
    assert train.main(command) == 0
    assert [row["step"] for row in rows_of(tmp_path)][:2] == ["0", "1"]


def test_what_metadata_says_of_pixels_must_be_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.safetensors"
    state = model_by_rule(replace(VARIANTS["tiny"], num_classes=2)).state_dict()
    save_checkpoint(path, state, {"mean": "half"})
    assert train.main(["--data", "phantoms:4", "--start", str(path), "--output", str(tmp_path / "run")]) == 2
    expected = f"error: {path}: its metadata 'mean' is 'half', expected a JSON list. Give --mean instead.\n"
    assert capsys.readouterr().err == expected
    save_checkpoint(path, state, {"resize": "lanczos"})
    assert train.main(["--data", "phantoms:4", "--start", str(path), "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "error: --resize: got lanczos, expected one of bilinear, bilinear-fixed, spline\n"


def test_a_fine_tune_resizes_as_its_start_did_whatever_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    state = model_by_rule(replace(VARIANTS["tiny"], num_classes=2)).state_dict()
    for rule in ("bilinear", "spline"):
        save_checkpoint(path, state, {"resize": rule})
        for preset in ("public", "default"):
            assert settings_from("--preset", preset, "--data", "x:y", "--start", str(path)).resize == rule
    assert settings_from("--data", "x:y", "--start", str(path), "--resize", "bilinear").resize == "bilinear"


def test_a_fine_tune_to_other_classes_keeps_all_but_the_last_layer(lka: Path) -> None:
    settings = train.Settings(data="", start=str(lka), classes=("background", "one", "two"))
    built, old = train.build(settings).state_dict(), read_checkpoint(lka).state
    last = "decoder_0.last_layer."
    assert built[f"{last}weight"].shape[0] == 3
    unused = {key for key in built if is_unused(key, config_of(read_checkpoint(lka)))}
    assert all(torch.equal(built[key], old[key]) for key in built if not key.startswith(last) and key not in unused)


@pytest.mark.parametrize("option", [("--variant", "tiny"), ("--form", "lka"), ("--encoder", "x.safetensors")])
def test_what_a_checkpoint_says_cannot_be_said_otherwise(
    lka: Path, tmp_path: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--data", "phantoms:4", "--start", str(lka), *option, "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {option[0]}: given with --start, expected the checkpoint's own. Leave it out.\n"
    )


def timm_file(folder: Path, **changed: Tensor | None) -> Path:
    """A file as timm writes it: the encoder's keys without their prefix, and a classifier. None leaves a key out."""
    prefix = "backbone.backbone."
    state = model_by_rule(replace(VARIANTS["tiny"], num_classes=5)).state_dict()
    found: dict[str, Tensor | None] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    found |= {"head.fc.weight": torch.zeros(10, 4), "head.norm.weight": torch.zeros(4)} | changed
    path = folder / "maxvit.safetensors"
    save_file({key: value.clone() for key, value in found.items() if value is not None}, path)
    return path


def test_an_imagenet_encoder_is_loaded_by_its_keys(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MSA2Net(replace(VARIANTS["tiny"], num_classes=2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_encoder(model, read_checkpoint(timm_file(tmp_path)))
    expected = model_by_rule(replace(VARIANTS["tiny"], num_classes=5)).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key] if key.startswith("backbone.backbone.") else before[key]), key


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("stem.conv1.weight", None, "1 missing: backbone.backbone.stem.conv1.weight"),
        ("stages.9.weight", torch.zeros(1), "1 unexpected: backbone.backbone.stages.9.weight"),
        (
            "stem.conv1.weight",
            torch.zeros(2, 3, 3, 3),
            "1 mis-shaped: backbone.backbone.stem.conv1.weight (2, 3, 3, 3) instead of (16, 3, 3, 3)",
        ),
    ],
    ids=["missing", "unexpected", "mis-shaped"],
)
def test_another_networks_encoder_is_refused_by_key(tmp_path: Path, key: str, value: Tensor | None, found: str) -> None:
    path = timm_file(tmp_path, **{key: value})
    model = MSA2Net(replace(VARIANTS["tiny"], num_classes=2))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_encoder(model, read_checkpoint(path))
    count = sum(name.startswith("backbone.backbone.") for name in before)
    assert str(caught.value) == f"{path}: {found}, expected exactly the {count} keys of this network's MaxViT encoder"
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


# Presets and options --------------------------------------------------------------------------------------------


def settings_from(*options: str) -> train.Settings:
    return train.settings_of(train._parser().parse_args(["--output", "x", *options]))


def test_the_public_preset_is_the_public_codes() -> None:
    found = settings_from("--preset", "public", "--data", "synapse:x", "--epochs", "700", "--batch", "20")
    assert (found.optimizer, found.rate, found.weight_decay, found.loss) == ("sgd", 0.05, 1e-4, "boundary-dou")
    assert (found.epochs, found.batch, found.augment, found.resize, found.warmup) == (700, 20, "full", "spline", 0)
    assert (found.mean, found.std) == ((0.5,), (0.5,))
    assert train.rate_at(0, 1000, found) == 0.05
    assert train.rate_at(250, 1000, found) == pytest.approx(0.05 * 0.75**0.9)


def test_its_optimizer_has_momentum_and_decays_every_weight(tmp_path: Path) -> None:
    settings = replace(settings_from("--preset", "public", "--data", "x:y"), variant="tiny", classes=("a", "b"))
    [group] = train.Training(settings, 10, tmp_path).optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)


def test_by_default_it_is_adamw_with_a_cosine() -> None:
    found = settings_from("--data", "folder:x")
    assert (found.optimizer, found.loss, found.variant, found.form) == ("adamw", "ce+dice", "small", "dual_attention")
    rates = [train.rate_at(step, 1000, replace(found, rate=0.1)) for step in range(1000)]
    assert rates[0] == pytest.approx(0.001)
    assert int(np.argmax(rates)) in (99, 100)
    assert max(rates) == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[100:]))
    assert rates[-1] < 1e-6


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([], "--data: not given, expected KIND:PATH. Or use --preset demo."),
        (
            ["--data", "x:y", "--steps", "3", "--epochs", "2"],
            "--steps: given with --epochs, expected one of them. Leave one out.",
        ),
        (["--data", "x:y", "--batch", "0"], "--batch: got 0, expected more than 0"),
        (["--data", "x:y", "--rate", "nan"], "--rate: got nan, expected more than 0"),
        (["--data", "x:y", "--epochs", "0"], "--epochs: got 0, expected more than 0"),
        (["--data", "x:y", "--steps", "-5"], "--steps: got -5, expected more than 0"),
        (["--data", "x:y", "--patience", "-1"], "--patience: got -1, expected 0 or more"),
        (["--data", "x:y", "--weight-decay", "-1"], "--weight-decay: got -1.0, expected 0 or more"),
        (["--data", "x:y", "--mean", "0.5,0.5"], "--mean: got (0.5, 0.5), expected one or three finite numbers"),
        (["--data", "x:y", "--std", "0"], "--std: got (0.0,), expected one or three finite numbers above 0"),
    ],
    ids=[
        *("no-data", "steps-and-epochs", "no-batch", "no-rate", "no-epochs", "no-steps", "patience", "decay"),
        *("two-means", "no-std"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    tmp_path: Path, options: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--output", str(tmp_path / "run"), *options]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"
    assert not (tmp_path / "run").exists()


def test_the_phantoms_of_training_validation_and_test_never_meet() -> None:
    demo = settings_from("--preset", "demo")
    seeds = [
        {int(case.name.rpartition(" ")[2]) for case in open_data(spec).cases}
        for spec in (demo.data, demo.validation, "phantoms:100000")
    ]
    assert [len(each) for each in seeds] == [4000, 60, 100_000]
    assert not seeds[0] & seeds[1]
    assert not (seeds[0] | seeds[1]) & seeds[2]


def test_the_public_preset_trains_the_lka_form_in_mixed_precision(tmp_path: Path) -> None:
    options = ["--preset", "public", "--variant", "tiny", "--form", "lka", "--data", "phantoms:4@0", "--mixed"]
    options += ["--validation", "phantoms:2@900000", "--steps", "2", "--batch", "2", "--every", "2", "--device", "cpu"]
    assert train.main(["--output", str(tmp_path), *options]) == 0
    read = read_checkpoint(tmp_path / "model.safetensors")
    assert config_of(read).deep_decoder == "lka"
    assert read.metadata["resize"] == "spline"
    assert 0 < float(rows_of(tmp_path)[0]["loss"]) < 1


def test_a_folder_of_images_and_masks_is_trained_on_with_a_share_held_out(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i, case in enumerate(open_data("phantoms:4@0").cases):
        volume = case.read()
        assert volume.labels is not None
        Image.fromarray(volume.frames[0]).save(tmp_path / f"data/images/{i}.png")
        Image.fromarray(volume.labels[0] * 255).save(tmp_path / f"data/masks/{i}.png")
    options = ["--data", f"folder:{tmp_path / 'data'}", "--validation", "0.25", "--variant", "tiny", "--steps", "2"]
    options += ["--classes", "skin,mole", "--batch", "3", "--every", "2", "--device", "cpu", "--name", "moles"]
    assert train.main(["--output", str(tmp_path / "run"), *options]) == 0
    read = read_checkpoint(tmp_path / "run" / "model.safetensors")
    assert json.loads(read.metadata["classes"]) == ["skin", "mole"]
    assert read.metadata["model"] == "moles"
    assert read.metadata["notice"] == "Not a medical device. Validate before any clinical use."
    assert str(tmp_path) not in json.dumps(read.metadata)
    assert list(rows_of(tmp_path / "run")[0]) == ["step", "loss", "rate", "dice", "alarms"]


# Frames ---------------------------------------------------------------------------------------------------------


def test_slices_of_one_patient_are_never_on_both_sides() -> None:
    cases = tuple(
        Case(f"slice {5 * i + j}", lambda: Volume(()), patient=f"case{i}") for i in range(10) for j in range(5)
    )
    training, held = frames.split(Dataset("synapse", ("a", "b"), cases), 0.2, seed=3)
    patients = [{case.patient for case in side} for side in (training, held)]
    assert [len(each) for each in patients] == [8, 2]
    assert not patients[0] & patients[1]
    assert len(training) + len(held) == 50
    with pytest.raises(
        DataError, match=r"^--validation: got a share of 0\.01 of 10 cases, expected some on both sides"
    ):
        frames.split(Dataset("synapse", ("a", "b"), cases), 0.01, seed=3)


def test_frames_read_by_several_processes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cases = open_data("phantoms:2@77").cases
    cases = tuple(replace(case, read=case.read) for case in cases)
    here = frames.load_frames(cases, "bilinear", "test")
    monkeypatch.setattr(phantom, "read_phantom", getattr(phantom.read_phantom, "__wrapped__", phantom.read_phantom))
    monkeypatch.setattr(frames, "_FEW", 0)
    there = frames.load_frames(open_data("phantoms:2@77").cases, "bilinear", "test")
    assert here.groups == there.groups == KINDS * 2
    # One grey level at a few pixels: the children draw with one BLAS thread, whose sums round differently.
    difference = np.abs(here.images.astype(np.float32) - there.images)
    assert difference.max() <= 1.5 / 255
    assert np.mean(difference > 0) < 1e-3
    assert np.mean(here.labels != there.labels) < 1e-3


def a_case(frame: Any, labels: Any) -> Case:
    return Case("image 1", lambda: Volume((frame,), labels))


def test_grey_frames_stay_grey_unless_there_are_others_in_colour() -> None:
    grey = a_case(np.full((30, 40), 51, np.uint8), np.ones((1, 30, 40), np.uint8))
    colour = a_case(np.full((30, 40, 3), (51, 102, 255), np.uint8), np.zeros((1, 30, 40), np.uint8))
    alone = frames.load_frames([grey], "bilinear", "test")
    assert alone.images.shape == (1, 1, 224, 224)
    both = frames.load_frames([grey, colour], "spline", "test")
    assert both.images.shape == (2, 3, 224, 224)
    assert both.images[0].max() - both.images[0].min() < 1e-3
    assert both.images[:, :, 5, 5] == pytest.approx(np.array([[0.2, 0.2, 0.2], [0.2, 0.4, 1.0]]), abs=1e-3)
    assert [each.max() for each in both.labels] == [1, 0]


@pytest.mark.parametrize("rule", ["bilinear", "spline"])
def test_labels_are_resized_on_the_grid_of_their_image(rule: str) -> None:
    rows, columns = np.ogrid[:512, :512]
    disc = ((rows - 60) ** 2 + (columns - 60) ** 2 <= 24**2).astype(np.uint8)
    found = frames.load_frames([a_case(disc * 255, disc[None])], rule, "test")
    image = (found.images[0, 0] > 0.5).astype(np.uint8)
    assert dice(image, found.labels[0]) > 0.97  # 0.95 and less on the other grid


def test_cases_without_labels_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        frames.load_frames([a_case(np.zeros((30, 40), np.uint8), None)], "bilinear", "test")
    assert str(caught.value) == "image 1: has no labels, expected some to train on. Add masks, or use another kind."


def test_an_epoch_takes_every_frame_once_and_the_next_in_another_order() -> None:
    epochs = [np.concatenate([train.batch_at(8 * e + i, 32, 4, seed=3) for i in range(8)]) for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(32))] * 2
    assert not np.array_equal(*epochs)
    assert not np.array_equal(epochs[0][:4], train.batch_at(0, 32, 4, seed=4))


def test_scores_count_lesions_and_false_alarms_apart() -> None:
    masks = np.zeros((4, 10, 10), np.uint8)
    masks[0, :5] = masks[1, :5] = 1
    predictions = masks.copy()
    predictions[0, :, 5:] = 0  # half of the lesion
    predictions[2, :6] = 1  # 60 false pixels
    predictions[3, :4] = 1  # 40
    held = train.Frames(np.zeros((4, 1, 1, 1), np.float16), masks, ("a", "b", "a", "b"))
    found = train.scores(predictions, held, 2)
    assert found == {"a": {"dice": pytest.approx(2 / 3), "alarms": 1.0}, "b": {"dice": 1.0, "alarms": 0.0}}


# Augmentation ---------------------------------------------------------------------------------------------------


def sample() -> dict[str, Tensor]:
    """A frame whose grey tells its label: 0.8 inside, 0.2 outside."""
    label = torch.zeros(1, 64, 64)
    label[:, 20:50, 10:30] = 1
    return {"image": (0.2 + 0.6 * label).repeat(3, 1, 1), "label": label}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_keeps_image_and_label_together(name: str) -> None:
    augment = augmentation(name, 64)
    changed = 0
    for seed in range(40):
        augment.set_random_state(seed)
        out = augment(sample())
        assert out["image"].shape == (3, 64, 64)
        assert set(out["label"].unique().tolist()) <= {0.0, 1.0}
        image, label = out["image"].mean(0), out["label"][0] > 0
        if label.sum() > 50:
            assert image[label].mean() > image[~label].mean() + 0.05
            # Nearest and bilinear sampling differ at the edge of the lesion only.
            bright = image > (image[label].median() + image[~label].median()) / 2
            assert (bright != label).float().mean() < 0.08
        changed += not torch.equal(out["image"], sample()["image"])
    assert (changed == 0) if name == "none" else (changed > 20)


def test_augmentation_is_the_same_for_the_same_state() -> None:
    augment = augmentation("full", 64)
    outs = []
    for seed in (5, 6, 5):
        augment.set_random_state(seed)
        outs.append(augment(sample())["image"])
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])


def moved_by(name: str, draws: int = 60, size: int = 128) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """For each draw of a transform: where pixels come from, as an affine map about the centre fitted to a picture of
    coordinates, (2, 3), and the largest distance from it, both in shares of the size.
    """
    line = torch.arange(size).float()
    picture = torch.stack([line[:, None].expand(size, size), line.expand(size, size), torch.ones(size, size)])
    transform = _public(size)[name]
    centre, found = (size - 1) / 2, []
    for seed in range(draws):
        transform.set_random_state(seed)
        out = np.asarray(transform({"image": picture.clone(), "label": torch.ones(1, size, size)})["image"])
        rows, columns = np.nonzero(out[2] > 0.999)  # not padded
        here = np.stack([rows - centre, columns - centre, np.full(len(rows), size)], 1)
        source = np.stack([out[0][rows, columns], out[1][rows, columns]], 1) - centre
        fitted = np.linalg.lstsq(here, source, rcond=None)[0]
        moved = np.abs(source - here[:, :2]).max(0) / size
        found.append((fitted.T, moved))
    return found


def test_the_public_augmentation_has_the_public_ranges() -> None:
    zooms = np.array([1 / fitted[0, 0] for fitted, _ in moved_by("scale")])
    assert 0.5 <= zooms.min() < 0.65
    assert 1.8 < zooms.max() <= 2
    assert 1.1 < zooms.mean() < 1.4  # evenly spread over 0.5 to 2, not its inverse
    angles = np.array([np.degrees(np.arctan2(fitted[1, 0], fitted[0, 0])) for fitted, _ in moved_by("rotation")])
    assert -40 <= angles.min() < -30
    assert 30 < angles.max() <= 40
    shears = np.array([np.degrees(np.arctan(fitted[0, 1])) for fitted, _ in moved_by("shear")])
    assert -16.1 <= shears.min() < -12
    assert 12 < shears.max() <= 16.1
    assert max(abs(fitted[1, 0]) for fitted, _ in moved_by("shear")) < 1e-3
    shifts = np.array([fitted[:, 2] for fitted, _ in moved_by("shift")])
    assert (np.abs(shifts) <= 0.2).all()
    assert (np.ptp(shifts, axis=0) > 0.3).all()
    warps = np.array([moved.max() for _, moved in moved_by("piecewise")])
    assert warps.min() > 0.002
    assert 0.02 < warps.max() <= 0.035


@pytest.mark.parametrize(("name", "expected"), [("noise", 0.005), ("blur", 0.0), ("contrast", 0.0)])
def test_the_others_leave_the_label_and_the_place_alone(name: str, expected: float) -> None:
    transform = _public(64)[name].set_random_state(1)
    flat = {"image": torch.full((1, 64, 64), 0.5), "label": torch.ones(1, 64, 64)}
    out = transform({key: value.clone() for key, value in flat.items()})
    assert torch.equal(torch.as_tensor(out["label"]), flat["label"])
    inner = torch.as_tensor(out["image"])[:, 8:-8, 8:-8]
    assert inner.std().item() == pytest.approx(expected, abs=5e-4)
    assert inner.mean().item() == pytest.approx(0.5, abs=1e-3)


def test_contrast_changes_about_mid_grey() -> None:
    contrast = RandContrastd((1.5, 1.5))
    out = contrast({"image": torch.tensor([[[0.5, 0.7, 0.1]]]), "label": torch.ones(1)})
    assert out["image"].flatten().tolist() == pytest.approx([0.5, 0.8, -0.1])
    assert torch.equal(out["label"], torch.ones(1))


# Losses ---------------------------------------------------------------------------------------------------------


def test_cross_entropy_and_dice_by_hand() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 16, 16), torch.randint(0, 3, (3, 16, 16))  # nothing of class 3
    p = logits.softmax(1)
    dices = []
    for b in range(3):
        for k in range(1, 4):
            t = (labels[b] == k).float()
            dices.append((2 * (p[b, k] * t).sum() + 100) / (p[b, k].sum() + t.sum() + 100))
    entropy = -p.gather(1, labels[:, None]).log().mean()
    expected = entropy + 1 - torch.stack(dices).mean()
    assert CrossEntropyDice()(logits, labels).item() == pytest.approx(expected.item(), abs=1e-5)


def slow_boundary_dou(logits: Tensor, labels: Tensor) -> float:
    """The formula pixel by pixel, in float64."""
    epsilon, p, total = 1e-5, logits.double().softmax(1), 0.0
    batch, classes, height, width = logits.shape
    for k in range(classes):
        size = boundary = 0
        overlap = y = z = 0.0
        for b in range(batch):
            for i in range(height):
                for j in range(width):
                    inside = bool(labels[b, i, j] == k)
                    around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
                    same = [0 <= r < height and 0 <= c < width and bool(labels[b, r, c] == k) for r, c in around]
                    size += inside
                    boundary += inside and not all(same)
                    value = p[b, k, i, j].item()
                    overlap, y, z = overlap + value * inside, y + inside, z + value**2
        alpha = min(2 * (1 - (boundary + epsilon) / (size + epsilon)) - 1, 0.8)
        total += (z + y - 2 * overlap + epsilon) / (z + y - (1 + alpha) * overlap + epsilon)
    return total / classes


def test_boundary_dou_is_the_formula() -> None:
    torch.manual_seed(1)
    labels = torch.zeros(2, 12, 14, dtype=torch.int64)
    labels[0, 2:10, 3:12] = 1  # mostly inside: alpha above 0
    labels[1, 5, 5] = 2  # all boundary: alpha -1
    logits = torch.randn(2, 4, 12, 14)  # nothing of class 3
    assert boundary_dou(logits, labels).item() == pytest.approx(slow_boundary_dou(logits, labels), abs=1e-6)
    right = torch.nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2) * 60.0
    assert boundary_dou(right[:, :3], labels).item() < 1e-5
    assert boundary_dou(right, labels).item() == pytest.approx(1 / 4, abs=1e-4)  # a class that is nowhere costs 1


@pytest.mark.parametrize("loss", [CrossEntropyDice(), boundary_dou], ids=["ce+dice", "boundary-dou"])
def test_the_loss_falls_as_the_lesion_is_found_and_its_gradient_is_finite(loss: Callable[..., Tensor]) -> None:
    masks = torch.zeros(1, 32, 32, dtype=torch.int64)
    masks[:, 4:28, 4:28] = 1

    def at(lesion: Tensor, sureness: float) -> float:
        return loss(torch.stack([-lesion, lesion], 1) * sureness, masks).item()

    right = masks.float() * 2 - 1
    assert at(right, 20) < 1e-3
    assert at(right, 20) < at(right, 1) < at(right, 0) < at(-right, 1)
    logits = torch.zeros(1, 2, 32, 32, requires_grad=True)
    loss(logits, torch.zeros_like(masks)).backward()  # a frame without a lesion
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


# Mixed precision ------------------------------------------------------------------------------------------------


def test_mixed_precision_runs_the_encoder_in_bfloat16_and_the_decoder_in_float32() -> None:
    torch.manual_seed(0)
    model = train.build(train.Settings(data="", variant="tiny", classes=("a", "b")))
    seen: dict[str, set[torch.dtype]] = {"encoder": set(), "decoder": set()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            part = "encoder" if name.startswith("backbone.") else "decoder"
            module.register_forward_hook(lambda _m, _i, out, part=part: seen[part].add(out.dtype))
    x = torch.rand(2, 3, 224, 224)
    mixed = train.logits_of(model, x, mixed=True)
    assert seen == {"encoder": {torch.bfloat16}, "decoder": {torch.float32}}
    assert mixed.dtype == torch.float32
    plain = train.logits_of(model, x, mixed=False)
    assert not torch.equal(mixed, plain)
    assert (mixed - plain).abs().max() < 0.1 * plain.abs().max()


def test_mixed_precision_trains_as_float32_does(tmp_path: Path) -> None:
    held = frames.load_frames(open_data("phantoms:8@0").cases, "bilinear", "test")
    losses: dict[bool, list[float]] = {}
    for mixed in (False, True):
        settings = train.Settings(
            data="", variant="tiny", classes=("a", "b"), batch=2, mixed=mixed, augment="none", warmup=2, rate=1e-3
        )
        training = train.Training(settings, 10, tmp_path)
        losses[mixed] = [training.advance(*training.batch(held)) for _ in range(10)]
    assert np.allclose(losses[True], losses[False], rtol=0.05)
    assert np.mean(losses[True][-3:]) < np.mean(losses[True][:3])


def test_a_fine_tune_for_int8_keeps_batch_norms_statistics_and_goes_on_where_it_was(tmp_path: Path) -> None:
    demo = Path(train.__file__).with_name("demo.safetensors")
    command = [
        *("--data", "phantoms:4@0", "--validation", "phantoms:2@900000", "--start", str(demo), "--int8"),
        *("--steps", "2", "--every", "1", "--batch", "4", "--rate", "1e-5", "--device", "cpu"),
    ]
    assert train.main([*command, "--output", str(tmp_path / "whole")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train.main([*command, "--output", str(tmp_path / "parts")])
    assert train.main([*command, "--output", str(tmp_path / "parts")]) == 0
    before, whole, parts = (
        torch.load(tmp_path / name / "state.pt", weights_only=True)["model"]
        if name
        else load_model(read_checkpoint(demo)).state_dict()
        for name in ("", "whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    statistics = [key for key in before if "running_" in key]
    assert statistics
    assert all(torch.equal(whole[key], before[key]) for key in statistics)
    assert not torch.equal(whole["decoder_0.x1_linear.weight"], before["decoder_0.x1_linear.weight"])
