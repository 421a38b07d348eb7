"""Trains the demo model on procedural phantoms: `python -m msa2net.core.train --output DIR`.

One command from nothing to `DIR/demo.safetensors`; run again after an interruption it goes on where it was.
`--evaluate FILE` scores a checkpoint on phantoms of seeds that no training or validation saw.

The phantoms are drawn, not photographed: the model demonstrates the path and has no clinical use.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from msa2net.core.checkpoint import load_model, read_checkpoint, save_checkpoint, used_state
from msa2net.core.config import IMAGE_SIZE, VARIANTS
from msa2net.core.maxvit import LayerScale
from msa2net.core.network import MSA2Net, is_unused
from msa2net.core.phantoms import KINDS, otsu_largest_component, phantom
from msa2net.errors import CheckpointError, Msa2NetError
from msa2net.runtimes.measure import dice

# Seeds of the three parts never meet.
TRAIN_SEED, VALIDATION_SEED, TEST_SEED = 0, 900_000, 1_000_000
MEAN, STD = 0.5, 0.5  # of pixels / 255: the released pipeline's
FALSE_PIXELS = 50  # a lesion-free frame with more is counted as a false alarm
METADATA = {
    "model": "demo",
    "classes": json.dumps(["background", "lesion"]),
    "mean": json.dumps([MEAN] * 3),
    "std": json.dumps([STD] * 3),
    "notice": "Trained on synthetic phantoms. Not for clinical use.",
}
Frames = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def _draw(task: tuple[str, int]) -> Frames:
    drawn = phantom(*task)
    return drawn.image, drawn.mask


def draw_frames(first_seed: int, per_kind: int, label: str) -> Frames:
    """Images (N, 224, 224, 3) and masks (N, 224, 224), uint8; the kinds alternate."""
    tasks = [(kind, first_seed + i) for i in range(per_kind) for kind in KINDS]
    images = np.empty((len(tasks), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    masks = np.empty((len(tasks), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    # One process a core, each with one BLAS thread: read when numpy is first imported, so the children start afresh.
    variable = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
            drawn = pool.map(_draw, tasks, chunksize=16)
            for i, (image, mask) in enumerate(tqdm(drawn, label, len(tasks), unit="frame")):
                images[i], masks[i] = image, mask
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
    return images, masks


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """(B, 224, 224, 3) uint8 -> normalised (B, 3, 224, 224) float32."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - MEAN) / STD


def augment(x: Tensor, masks: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Per frame: mirrored, gain and offset changed, a little noise. Geometry and contrast come from the generator."""
    for i in range(len(x)):
        if rng.random() < 0.5:
            x[i], masks[i] = x[i].flip(-1), masks[i].flip(-1)
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (len(x), 1, 1, 1))).float()
    offset = torch.from_numpy(rng.uniform(-0.15, 0.15, (len(x), 1, 1, 1))).float()
    return (x * gain + offset).clamp(-1, 1), masks


def loss_of(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy plus 1 - soft Dice of the lesion, per frame. Logits (B, 2, H, W), masks (B, H, W) int64."""
    lesion, truth = logits.softmax(1)[:, 1].flatten(1), masks.flatten(1).float()
    overlap = 2 * (lesion * truth).sum(1) + 100  # smoothing: a lesion-free frame is judged by its false pixels
    soft_dice = overlap / (lesion.sum(1) + truth.sum(1) + 100)
    return F.cross_entropy(logits, masks) + (1 - soft_dice).mean()


def initialise(model: MSA2Net) -> None:
    """The public code's initialisation, but for the layer scales: at 1e-6 a short training never uses the blocks."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, 0.1)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("backbone."):
            nn.init.xavier_uniform_(module.weight)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.constant_(parameter, 0.1)
        if is_unused(name, model.config):
            nn.init.zeros_(parameter).requires_grad_(False)


@torch.inference_mode()
def predict_masks(model: nn.Module, images: NDArray[np.uint8], batch: int = 16) -> NDArray[np.uint8]:
    """Argmax masks (N, 224, 224) of the model in evaluation mode."""
    model.eval()
    parts = [model(to_input(images[i : i + batch])).argmax(1).to(torch.uint8) for i in range(0, len(images), batch)]
    return torch.cat(parts).numpy()


def scores(predictions: NDArray[np.uint8], masks: NDArray[np.uint8]) -> dict[str, dict[str, float]]:
    """Per kind, which alternate: mean Dice of those with a lesion, share of the others with a false alarm."""
    result = {}
    for k, kind in enumerate(KINDS):
        pairs = list(zip(predictions[k :: len(KINDS)], masks[k :: len(KINDS)], strict=True))
        with_lesion = [dice(predicted, true) for predicted, true in pairs if true.any()]
        alarms = [int(predicted.sum()) > FALSE_PIXELS for predicted, true in pairs if not true.any()]
        result[kind] = {
            "lesion_frames": len(with_lesion),
            "dice": float(np.mean(with_lesion)),
            "free_frames": len(alarms),
            "false_alarms": float(np.mean(alarms)) if alarms else 0.0,
        }
    return result


def evaluate(checkpoint: Path, per_kind: int) -> dict[str, dict[str, float]]:
    """Scores of the checkpoint and of Otsu's threshold on `per_kind` unseen phantoms of each kind."""
    images, masks = draw_frames(TEST_SEED, per_kind, "test phantoms")
    result = scores(predict_masks(load_model(read_checkpoint(checkpoint)), images), masks)
    baseline = scores(np.stack([otsu_largest_component(image) for image in images]), masks)
    for kind in KINDS:
        result[kind]["otsu_dice"] = baseline[kind]["dice"]
    return result


def batch_at(step: int, count: int, batch: int, seed: int) -> NDArray[np.int64]:
    """Which of `count` frames step `step` trains on: shuffled epochs that depend on seed and step alone."""
    epoch, position = divmod(step, count // batch)
    return np.random.default_rng([seed, epoch]).permutation(count)[position * batch : (position + 1) * batch]


def rate_at(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Training:
    """Model, optimizer and step count, saved and restored together."""

    def __init__(self, settings: dict[str, Any], file: Path) -> None:
        self.settings, self.file, self.step = settings, file, 0
        torch.manual_seed(settings["seed"])
        self.model = MSA2Net(replace(VARIANTS[settings["variant"]], num_classes=2))
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        initialise(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.02},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
        )

    def restore(self) -> None:
        """Goes on from the file if there is one. Raises CheckpointError if it was written with other settings."""
        if not self.file.exists():
            return
        state = torch.load(self.file, weights_only=True)
        if state["settings"] != self.settings:
            raise CheckpointError(
                self.file, f"got settings {state['settings']}", f"expected {self.settings}", "Use another --output."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]

    def save(self) -> None:
        partial = self.file.with_suffix(".partial")
        state = {
            "settings": self.settings,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, partial)
        partial.replace(self.file)

    def advance(self, x: Tensor, masks: Tensor, rate: float) -> float:
        """One step; returns its loss. Raises Msa2NetError if that is not finite."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(self.model(x.contiguous(memory_format=torch.channels_last)), masks)
        if not math.isfinite(loss.item()):
            raise Msa2NetError(f"step {self.step}", f"loss is {loss.item()}", "expected a finite loss", "Lower --rate.")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()


def train(arguments: argparse.Namespace) -> Path:
    """Runs or resumes the training; returns the path of the finished checkpoint."""
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    names = ("variant", "steps", "batch", "frames", "rate", "seed")
    if arguments.frames // len(KINDS) * len(KINDS) < arguments.batch:
        raise Msa2NetError(
            "--frames", f"got {arguments.frames}", f"expected --batch ({arguments.batch}) or more", "Draw more."
        )
    training = Training({name: getattr(arguments, name) for name in names}, output / "state.pt")
    training.restore()
    validation = draw_frames(VALIDATION_SEED, arguments.validation, "validation phantoms")
    images, masks = draw_frames(TRAIN_SEED, arguments.frames // len(KINDS), "training phantoms")
    with (
        (output / "log.csv").open("a" if training.step else "w", newline="") as log,
        tqdm(total=arguments.steps, initial=training.step, unit="step") as bar,
    ):
        writer = csv.writer(log)
        if not training.step:
            columns = [f"{kind}_{name}" for kind in KINDS for name in ("dice", "alarms")]
            writer.writerow(["step", "loss", "rate", *columns])
        losses: list[float] = []
        while training.step < arguments.steps:
            step = training.step
            chosen = batch_at(step, len(images), arguments.batch, arguments.seed)
            rng = np.random.default_rng([arguments.seed, step])
            x, y = augment(to_input(images[chosen]), torch.from_numpy(masks[chosen]).long(), rng)
            rate = rate_at(step, arguments.steps, arguments.rate)
            losses.append(training.advance(x, y, rate))
            bar.update()
            if training.step % arguments.every and training.step < arguments.steps:
                continue
            found = scores(predict_masks(training.model, validation[0]), validation[1])
            figures = [found[kind][name] for kind in KINDS for name in ("dice", "false_alarms")]
            writer.writerow([step + 1, f"{np.mean(losses):.4f}", f"{rate:.2e}", *(f"{f:.4f}" for f in figures)])
            log.flush()
            bar.set_postfix_str(f"loss {np.mean(losses):.3f} Dice {figures[0]:.3f} {figures[2]:.3f}")
            losses = []
            training.save()
    result = output / "demo.safetensors"
    save_checkpoint(result, used_state(training.model), METADATA)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m msa2net.core.train", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/training"), help="folder of state, log and result")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="tiny")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=8000, help="training phantoms, both kinds together")
    parser.add_argument("--validation", type=int, default=60, help="validation phantoms of each kind")
    parser.add_argument("--every", type=int, default=100, help="steps between two validations and saves")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="only score this checkpoint")
    parser.add_argument("--test", type=int, default=400, help="phantoms of each kind for --evaluate")
    arguments = parser.parse_args(argv)
    try:
        if arguments.evaluate:
            print(json.dumps(evaluate(arguments.evaluate, arguments.test), indent=2))
        else:
            print(train(arguments))
    except Msa2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
