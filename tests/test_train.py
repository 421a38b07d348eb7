"""The training: what is cut short and goes on ends at the very weights of a run that was never interrupted."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msa2net.core import train
from msa2net.core.checkpoint import config_of, load_model, read_checkpoint
from msa2net.core.config import VARIANTS
from msa2net.core.network import MSA2Net, is_unused
from msa2net.core.phantoms import KINDS, phantom
from msa2net.errors import Msa2NetError

SETTINGS = ["--frames", "32", "--steps", "6", "--every", "2", "--validation", "4", "--batch", "4"]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Any:
    """Phantoms are drawn here and kept: starting processes for each run would take longer than the run."""
    kept: dict[tuple[object, ...], train.Frames] = {}

    def draw(first_seed: int, per_kind: int, _label: str) -> train.Frames:
        if (first_seed, per_kind) not in kept:
            tasks = [(kind, first_seed + i) for i in range(per_kind) for kind in KINDS]
            drawn = [phantom(*task) for task in tasks]
            kept[first_seed, per_kind] = np.stack([d.image for d in drawn]), np.stack([d.mask for d in drawn])
        images, masks = kept[first_seed, per_kind]
        return images.copy(), masks.copy()

    with pytest.MonkeyPatch.context() as patch:
        original = train.draw_frames
        patch.setattr(train, "draw_frames", draw)
        yield original


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("train") / "run"
    assert train.main(["--output", str(output), *SETTINGS]) == 0
    return output


def interrupt_at(patch: pytest.MonkeyPatch, step: int) -> None:
    advance = train.Training.advance

    def stop(self: train.Training, *arguments: Any) -> float:
        if self.step == step:
            raise KeyboardInterrupt
        return advance(self, *arguments)

    patch.setattr(train.Training, "advance", stop)


@pytest.mark.parametrize("steps", [(0,), (3,), (2, 5)], ids=["before-the-first-save", "once", "twice"])
def test_an_interrupted_run_ends_at_the_same_weights(finished: Path, tmp_path: Path, steps: tuple[int, ...]) -> None:
    command = ["--output", str(tmp_path), *SETTINGS]
    for step in steps:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train.main(command)
        assert not (tmp_path / "demo.safetensors").exists()
    assert train.main(command) == 0
    assert (tmp_path / "demo.safetensors").read_bytes() == (finished / "demo.safetensors").read_bytes()
    assert (tmp_path / "log.csv").read_bytes() == (finished / "log.csv").read_bytes()


def test_the_log_has_a_row_for_every_validation(finished: Path) -> None:
    with (finished / "log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("step", "loss", "rate"),
        *("dermoscopy_dice", "dermoscopy_alarms", "ultrasound_dice", "ultrasound_alarms"),
    ]
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    for row in rows:
        assert 0 < float(row["loss"]) < 10
        assert all(0 <= float(row[f"{kind}_{name}"]) <= 1 for kind in KINDS for name in ("dice", "alarms"))
    assert float(rows[1]["rate"]) == pytest.approx(4 * 2e-3 / 100)
    assert float(rows[2]["rate"]) == pytest.approx(6 * 2e-3 / 100)


def test_the_result_is_a_tiny_checkpoint_that_says_what_it_is(finished: Path) -> None:
    read = read_checkpoint(finished / "demo.safetensors")
    config = config_of(read)
    assert (config.num_classes, config.width, config.deep_decoder) == (2, VARIANTS["tiny"].width, "dual_attention")
    assert json.loads(read.metadata["classes"]) == ["background", "lesion"]
    assert json.loads(read.metadata["mean"]) == json.loads(read.metadata["std"]) == [0.5, 0.5, 0.5]
    assert read.metadata["notice"] == "Trained on synthetic phantoms. Not for clinical use."
    parameters = dict(load_model(read).named_parameters())
    assert not any(parameters[name].any() for name in parameters if is_unused(name, config))


def test_a_finished_run_is_not_trained_further(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "demo.safetensors").read_bytes(), (finished / "log.csv").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6)
        assert train.main(["--output", str(finished), *SETTINGS]) == 0
    assert ((finished / "demo.safetensors").read_bytes(), (finished / "log.csv").read_bytes()) == before
    assert capsys.readouterr().out == f"{finished / 'demo.safetensors'}\n"


def test_other_settings_do_not_go_on_from_a_saved_state(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert train.main(["--output", str(finished), *SETTINGS, "--seed", "1"]) == 2
    text = capsys.readouterr().err
    assert f"error: {finished / 'state.pt'}: got settings " in text
    assert "'seed': 0}, expected {" in text
    assert text.endswith("'seed': 1}. Use another --output.\n")
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    training = train.Training({"seed": 0, "variant": "tiny"}, Path("unused"))
    x = torch.full((1, 3, 224, 224), math.nan)
    with pytest.raises(Msa2NetError) as caught:
        training.advance(x, torch.zeros(1, 224, 224, dtype=torch.int64), 1e-3)
    assert str(caught.value) == "step 0: loss is nan, expected a finite loss. Lower --rate."


# Parts ----------------------------------------------------------------------------------------------------------


def test_frames_drawn_by_several_processes_are_the_phantoms_in_turn(one_process: Callable[..., train.Frames]) -> None:
    images, masks = one_process(77, 2, "test")
    expected = [("dermoscopy", 77), ("ultrasound", 77), ("dermoscopy", 78), ("ultrasound", 78)]
    assert len(images) == len(masks) == len(expected)
    for image, mask, task in zip(images, masks, expected, strict=True):
        drawn = phantom(*task)
        # One grey level at a few pixels: the children draw with one BLAS thread, whose sums round differently.
        difference = np.abs(image.astype(int) - drawn.image)
        assert difference.max() <= 1
        assert np.mean(difference > 0) < 1e-3
        assert np.mean(mask != drawn.mask) < 1e-3


def test_the_phantoms_of_training_validation_and_test_never_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the default numbers of frames: the seeds that the command would draw, of each kind."""
    drawn: list[range] = []

    def note(first_seed: int, per_kind: int, _label: str) -> train.Frames:
        drawn.append(range(first_seed, first_seed + per_kind))
        if len(drawn) % 2 == 0:
            raise Msa2NetError("test", "seen enough")
        return np.zeros((0, 224, 224, 3), np.uint8), np.zeros((0, 224, 224), np.uint8)

    monkeypatch.setattr(train, "draw_frames", note)
    monkeypatch.setattr(train, "Training", lambda *_: argparse.Namespace(restore=lambda: None, step=0))
    assert train.main(["--output", str(tmp_path)]) == 2
    validation, training = drawn
    test = range(train.TEST_SEED, train.TEST_SEED + 100_000)
    assert (len(validation), len(training)) == (60, 4000)
    assert training.stop <= validation.start
    assert validation.stop <= test.start


def test_an_epoch_takes_every_frame_once_and_the_next_in_another_order() -> None:
    epochs = [np.concatenate([train.batch_at(8 * e + i, 32, 4, seed=3) for i in range(8)]) for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(32))] * 2
    assert not np.array_equal(*epochs)
    assert not np.array_equal(epochs[0][:4], train.batch_at(0, 32, 4, seed=4))


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [train.rate_at(step, 1000, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(0.001)
    assert int(np.argmax(rates)) in (99, 100)
    assert max(rates) == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[100:]))
    assert rates[-1] < 1e-6


def test_augmentation_keeps_image_and_mask_together() -> None:
    masks = torch.zeros(16, 8, 8, dtype=torch.int64)
    masks[:, :, :3] = 1
    x = (masks[:, None].float() - 0.5).repeat(1, 3, 1, 1)
    out, changed = train.augment(x.clone(), masks.clone(), np.random.default_rng(0))
    assert torch.equal((out.mean(1) > 0).long(), changed)  # gain and offset do not swap light and dark
    mirrored = [bool(mask[0, -1]) for mask in changed]
    assert 2 <= sum(mirrored) <= 14
    assert out.abs().max() <= 1


def test_the_loss_falls_as_the_lesion_is_found() -> None:
    masks = torch.zeros(1, 16, 16, dtype=torch.int64)
    masks[:, 4:12, 4:12] = 1

    def loss(lesion: Tensor, sureness: float) -> float:
        return train.loss_of(torch.stack([-lesion, lesion], 1) * sureness, masks).item()

    right = masks.float() * 2 - 1
    assert loss(right, 20) < 1e-3
    assert loss(right, 20) < loss(right, 1) < loss(right, 0) < loss(-right, 1)
    empty = torch.zeros_like(masks)
    logits = torch.stack([torch.ones(1, 16, 16), -torch.ones(1, 16, 16)], 1) * 20
    assert train.loss_of(logits, empty).item() < 1e-3  # a frame without a lesion, found to be without


def test_scores_count_lesions_and_false_alarms_apart() -> None:
    masks = np.zeros((4, 10, 10), np.uint8)  # dermoscopy, ultrasound, in turn
    masks[0, :5] = masks[1, :5] = 1
    predictions = masks.copy()
    predictions[0, :, 5:] = 0  # half of the lesion
    predictions[2, :6] = 1  # 60 false pixels
    predictions[3, :4] = 1  # 40
    found = train.scores(predictions, masks)
    assert found["dermoscopy"] == {
        "lesion_frames": 1,
        "dice": pytest.approx(2 / 3),
        "free_frames": 1,
        "false_alarms": 1.0,
    }
    assert found["ultrasound"] == {"lesion_frames": 1, "dice": 1.0, "free_frames": 1, "false_alarms": 0.0}


def test_evaluation_scores_the_checkpoint_beside_otsu(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--evaluate", str(finished / "demo.safetensors"), "--test", "4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == list(KINDS)
    for scores in printed.values():
        assert scores["lesion_frames"] + scores["free_frames"] == 4
        assert 0 <= scores["otsu_dice"] <= 1


def test_a_missing_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--evaluate", str(tmp_path / "none.safetensors"), "--test", "4"]) == 2
    expected = f"error: {tmp_path / 'none.safetensors'}: no such file, expected a checkpoint. Check the path.\n"
    assert capsys.readouterr().err == expected


def test_unused_parameters_start_at_zero_and_are_not_trained() -> None:
    model = MSA2Net(VARIANTS["tiny"])
    train.initialise(model)
    for name, parameter in model.named_parameters():
        unused = is_unused(name, model.config)
        assert parameter.requires_grad != unused, name
        if unused:
            assert not parameter.any(), name
