"""Trains or fine-tunes MSA2Net: `python -m msa2net.core.train --data KIND:PATH --output DIR`.

`DIR/model.safetensors` is the best checkpoint so far by the mean Dice of the validation, `DIR/log.csv` has a row for
every validation. Run again after an interruption the command goes on where it was, to the same weights.

`--preset demo` makes the demo's weights from nothing. Its phantoms are drawn, not photographed: the model
demonstrates the path and has no clinical use.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import set_track_meta
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from msa2net.core.augment import AUGMENTATIONS, augmentation
from msa2net.core.checkpoint import config_of, load_encoder, load_model, read_checkpoint, save_checkpoint, used_state
from msa2net.core.config import DEEP_DECODERS, IMAGE_SIZE, VARIANTS, ModelConfig
from msa2net.core.data import open_data
from msa2net.core.data.frames import Frames, load_frames, split
from msa2net.core.fakequant import freeze_batch_norm, simulate_int8
from msa2net.core.losses import LOSSES
from msa2net.core.maxvit import LayerScale
from msa2net.core.network import MSA2Net, is_unused
from msa2net.errors import CheckpointError, DataError, Msa2NetError
from msa2net.runtimes.bundle import RESIZE_RULES
from msa2net.runtimes.measure import FALSE_PIXELS, dice

NOTICE = "Not a medical device. Validate before any clinical use."
PHANTOM_NOTICE = "Trained on synthetic phantoms. Not for clinical use."
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training depends on. A run goes on only with the settings that it was begun with.

    data, validation  "KIND:PATH"; validation can be a share of data's cases, such as "0.1"
    start             a checkpoint to fine-tune: its sizes, form, resize, mean and std are taken over; "" to begin anew
    encoder           an ImageNet MaxViT file for the encoder of a network begun anew; ""
    steps             of `batch` frames; 0: `epochs` times the frames
    patience          validations without a better Dice until the training ends early; 0: never
    mixed             encoder in bfloat16; the decoder's attention overflows there and stays in float32
    int8              every layer rounds as in int8, in the validation, too; BatchNorm keeps its statistics
    """

    data: str
    validation: str = "0.1"
    variant: str = "small"
    form: str = "dual_attention"
    start: str = ""
    encoder: str = ""
    classes: tuple[str, ...] = ()
    loss: str = "ce+dice"
    optimizer: str = "adamw"
    rate: float = 1e-3
    weight_decay: float = 0.02
    warmup: int = 100
    batch: int = 16
    steps: int = 0
    epochs: int = 100
    every: int = 100
    patience: int = 0
    augment: str = "full"
    mixed: bool = False
    int8: bool = False
    resize: str = "bilinear"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    seed: int = 0


# What a preset sets; the options of the command line go before it.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The public code's: 400 to 700 epochs, batches of 20 to 24, an ImageNet encoder (--encoder). Its layer scales start
    # at 1e-6, ours at 0.1 (see `initialise`).
    "public": {
        "loss": "boundary-dou",
        "optimizer": "sgd",
        "rate": 0.05,
        "weight_decay": 1e-4,
        "warmup": 0,
        "batch": 24,
        "epochs": 400,
        "resize": "spline",
    },
    "demo": {
        "data": "phantoms:4000@0",
        "validation": "phantoms:60@900000",
        "variant": "tiny",
        "rate": 2e-3,
        "steps": 2000,
        "augment": "light",
    },
}


# Network and steps ------------------------------------------------------------------------------------------------


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


def build(settings: Settings) -> MSA2Net:
    """The network that the training begins with. Parameters that no output depends on are zero and stay so."""
    if settings.start:
        checkpoint = read_checkpoint(settings.start)
        config = config_of(checkpoint)
        model = load_model(checkpoint)
        if config.num_classes != len(settings.classes):  # another task: all but the last layer is kept
            old = model.state_dict()
            model = MSA2Net(replace(config, num_classes=len(settings.classes)))
            initialise(model)
            last = "decoder_0.last_layer."
            model.load_state_dict({k: v for k, v in old.items() if not k.startswith(last)}, strict=False)
    else:
        model = MSA2Net(
            replace(VARIANTS[settings.variant], num_classes=len(settings.classes), deep_decoder=settings.form)
        )
        initialise(model)
        if settings.encoder:
            load_encoder(model, read_checkpoint(settings.encoder))
    for name, parameter in model.named_parameters():
        if is_unused(name, model.config):
            nn.init.zeros_(parameter).requires_grad_(False)
    return model


def logits_of(model: MSA2Net, x: Tensor, mixed: bool) -> Tensor:
    """Float32 logits; `mixed` runs the encoder in bfloat16.

    The decoder stays in float32: under autocast as a whole the network went to NaN within 50 steps.
    """
    if not mixed:
        return model(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        maps = model.backbone(x)
    return model.decode([each.float() for each in maps])


def batch_at(step: int, count: int, batch: int, seed: int) -> NDArray[np.int64]:
    """Which of `count` frames step `step` trains on: shuffled epochs that depend on seed and step alone."""
    epoch, position = divmod(step, count // batch)
    return np.random.default_rng([seed, epoch]).permutation(count)[position * batch : (position + 1) * batch]


def rate_at(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up; then half a cosine down to zero (adamw), or rate (1 - step / steps)^0.9 (sgd)."""
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    if settings.optimizer == "sgd":
        return settings.rate * (1 - step / steps) ** 0.9
    progress = (step - settings.warmup) / max(1, steps - settings.warmup)
    return settings.rate * 0.5 * (1 + math.cos(math.pi * progress))


def scores(predictions: NDArray[np.uint8], frames: Frames, classes: int) -> dict[str, dict[str, float]]:
    """By the Dice that the device's figures use, per group: `dice`, the mean over frames of the mean over the classes
    in them; `alarms`, the share of the frames
    without any in which more than 50 pixels were found. NaN where there is no such frame.
    """
    result = {}
    for group in dict.fromkeys(frames.groups):
        found: list[float] = []
        alarms: list[bool] = []
        for prediction, truth, each in zip(predictions, frames.labels, frames.groups, strict=True):
            if each != group:
                continue
            there = [label for label in range(1, classes) if (truth == label).any()]
            if there:
                found.append(float(np.mean([dice(prediction, truth, label) for label in there])))
            else:
                alarms.append(int((prediction > 0).sum()) > FALSE_PIXELS)
        result[group] = {
            "dice": float(np.mean(found)) if found else math.nan,
            "alarms": float(np.mean(alarms)) if alarms else math.nan,
        }
    return result


class Training:
    """Model, optimizer, step count and best Dice, saved and restored together."""

    def __init__(self, settings: Settings, steps: int, folder: Path, device: str = "cpu") -> None:
        self.settings, self.steps, self.device = settings, steps, torch.device(device)
        self.file, self.log, self.result = folder / "state.pt", folder / "log.csv", folder / "model.safetensors"
        self.step, self.best, self.since_best = 0, -1.0, 0
        torch.manual_seed(settings.seed)
        self.model = build(settings).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.int8:
            simulate_int8(self.model)
        self.loss = LOSSES[settings.loss]()
        set_track_meta(False)  # of MONAI: no transform is undone here, and the bookkeeping costs more than they do
        self.augment = augmentation(settings.augment, IMAGE_SIZE)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if settings.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                trained, settings.rate, momentum=0.9, weight_decay=settings.weight_decay
            )
        else:
            groups = [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(groups, settings.rate)

    def restore(self) -> None:
        """Goes on from the state file if there is one. Raises CheckpointError if it was begun with other settings."""
        if not self.file.exists():
            return
        try:
            state = torch.load(self.file, weights_only=True, map_location=self.device)
        except Exception as error:  # a damaged file raises whatever its first broken part leads to
            raise CheckpointError(
                self.file,
                f"cannot be read ({type(error).__name__})",
                "expected a saved state",
                "Delete it to begin anew.",
            ) from error
        mine = json.loads(json.dumps(asdict(self.settings)))
        begun = {"int8": False} | state["settings"]  # a state of an older version
        if different := sorted(key for key in mine if begun.get(key) != mine[key]):
            key = different[0]
            found, expected = begun.get(key), mine[key]
            raise CheckpointError(
                self.file, f"was begun with {key} {found!r}", f"expected {expected!r}", "Use another --output."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())  # dropout draws from it
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
        self.step, self.best, self.since_best = state["step"], state["best"], state["since_best"]

    def save(self) -> None:
        partial_file = self.file.with_suffix(".partial")
        state = {
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "step": self.step,
            "best": self.best,
            "since_best": self.since_best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        torch.save(state, partial_file)
        partial_file.replace(self.file)

    @property
    def finished(self) -> bool:
        patience = self.settings.patience
        return self.step >= self.steps or bool(patience and self.since_best >= patience)

    def batch(self, frames: Frames) -> tuple[Tensor, Tensor]:
        """The step's augmented images (B, C, 224, 224), normalised, and labels (B, 224, 224) int64."""
        settings = self.settings
        images, labels = [], []
        for i, index in enumerate(batch_at(self.step, len(frames.images), settings.batch, settings.seed)):
            self.augment.set_random_state(np.random.SeedSequence([settings.seed, self.step, i]).generate_state(1)[0])
            image = torch.from_numpy(frames.images[index]).float()
            label = torch.from_numpy(frames.labels[index])[None].float()
            changed = self.augment({"image": image, "label": label})
            images.append(changed["image"])
            labels.append(changed["label"][0])
        return self.normalise(torch.stack(images)), torch.stack(labels).long()

    def normalise(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.settings.mean, self.settings.std))
        return (x - mean) / std

    def advance(self, x: Tensor, labels: Tensor) -> float:
        """One step; returns its loss. Raises Msa2NetError, before any weight is changed, if that is not finite."""
        self.model.train()
        if self.settings.int8:
            freeze_batch_norm(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.step, self.steps, self.settings)
        x, labels = x.to(self.device, memory_format=torch.channels_last), labels.to(self.device)
        loss = self.loss(logits_of(self.model, x, self.settings.mixed), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        # The public code, which trains with SGD, does not clip.
        limit = math.inf if self.settings.optimizer == "sgd" else 1.0
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise Msa2NetError(
                f"step {self.step}",
                f"loss is {loss.item()}, its gradient's norm {norm.item()}",
                "expected finite ones",
                "Lower --rate, and use another --output.",
            )
        self.optimizer.step()
        self.step += 1
        return loss.item()

    @torch.inference_mode()
    def predict(self, images: NDArray[np.float16]) -> NDArray[np.uint8]:
        """Argmax masks (N, 224, 224) in evaluation mode, float32."""
        self.model.eval()
        parts = []
        for i in range(0, len(images), self.settings.batch):
            x = self.normalise(torch.from_numpy(images[i : i + self.settings.batch]).float()).to(self.device)
            parts.append(self.model(x).argmax(1).to(torch.uint8).cpu())
        return torch.cat(parts).numpy()


def train(settings: Settings, output: Path, name: str = "model", device: str = "cpu") -> Path:
    """Runs or resumes a training; returns the path of its best checkpoint.

    Raises DataError, CheckpointError, and Msa2NetError if the loss diverges; the files in `output` stay as they were
    at the last validation.
    """
    dataset = open_data(settings.data, "train", settings.classes or None)
    settings = replace(settings, classes=dataset.classes)
    try:
        share = float(settings.validation)
    except ValueError:
        held = open_data(settings.validation, "validation", settings.classes)
        if held.classes != dataset.classes:
            raise DataError(
                "--validation", f"has the classes {held.classes}", f"expected {dataset.classes}", "Use one data set."
            ) from None
        cases, held_cases = dataset.cases, held.cases
    else:
        cases, held_cases = split(dataset, share, settings.seed)
    output.mkdir(parents=True, exist_ok=True)
    validation = load_frames(held_cases, settings.resize, "validation frames")
    if not validation.labels.any():
        raise DataError(
            "--validation", f"{len(validation.labels)} frames without a lesion", "expected some to score", "Add cases."
        )
    frames = load_frames(cases, settings.resize, "training frames")
    if len(frames.images) < settings.batch:
        raise DataError(
            settings.data.partition(":")[0], f"{len(frames.images)} frames", f"expected a batch of {settings.batch}"
        )
    steps = settings.steps or settings.epochs * (len(frames.images) // settings.batch)
    training = Training(settings, steps, output, device)
    training.restore()
    groups = list(dict.fromkeys(validation.groups))
    columns = [f"{group}_{figure}".strip("_") for group in groups for figure in ("dice", "alarms")]
    _cut_log(training.log, ["step", "loss", "rate", *columns], training.step if training.file.exists() else -1)
    with tqdm(total=steps, initial=training.step, unit="step", disable=None) as bar:
        losses: list[float] = []

        def validate(rate: float) -> None:
            """A row of the log; the checkpoint, if it is the best so far; then the state."""
            found = scores(training.predict(validation.images), validation, len(settings.classes))
            figures = [found[group][figure] for group in groups for figure in ("dice", "alarms")]
            mean = float(np.nanmean([found[group]["dice"] for group in groups]))
            training.since_best = 0 if mean > training.best else training.since_best + 1
            if mean > training.best:
                training.best = mean
                save_checkpoint(training.result, used_state(training.model), _metadata(settings, name, training))
            loss = float(np.mean(losses)) if losses else math.nan
            row = [training.step, f"{loss:.4f}", f"{rate:.2e}", *(f"{figure:.4f}" for figure in figures)]
            with training.log.open("a", newline="") as log:
                csv.writer(log).writerow(row)
            training.save()
            bar.set_postfix_str(f"loss {loss:.3f} Dice {mean:.3f} best {training.best:.3f}")
            losses.clear()

        if settings.start and training.best < 0:
            validate(0.0)  # so that the result is never worse than what it was begun with
        while not training.finished:
            rate = rate_at(training.step, steps, settings)
            losses.append(training.advance(*training.batch(frames)))
            bar.update()
            if training.step % settings.every == 0 or training.step == steps:
                validate(rate)
    return training.result


def _cut_log(file: Path, columns: list[str], step: int) -> None:
    """The log up to `step`: rows that a killed run wrote after its last save are written again by this one."""
    rows = []
    if file.exists():
        with file.open(newline="") as log:
            rows = [row for row in list(csv.reader(log))[1:] if int(row[0]) <= step]
    partial_file = file.with_suffix(".partial")
    with partial_file.open("w", newline="") as log:
        csv.writer(log).writerows([columns, *rows])
    partial_file.replace(file)


def _metadata(settings: Settings, name: str, training: Training) -> dict[str, str]:
    """What export reads from the checkpoint, and where it comes from."""
    phantoms = settings.data.startswith("phantoms:")
    return {
        "model": name,
        "classes": json.dumps(settings.classes),
        "mean": json.dumps(settings.mean * (3 if len(settings.mean) == 1 else 1)),
        "std": json.dumps(settings.std * (3 if len(settings.std) == 1 else 1)),
        "resize": settings.resize,
        "notice": PHANTOM_NOTICE if phantoms else NOTICE,
        "trained": f"{settings.data.partition(':')[0]}, {training.step} steps of {settings.batch} frames",
    }


# Command line -----------------------------------------------------------------------------------------------------


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


_CHOICES = {
    "variant": tuple(VARIANTS),
    "form": DEEP_DECODERS,
    "loss": tuple(LOSSES),
    "optimizer": OPTIMIZERS,
    "augment": AUGMENTATIONS,
    "resize": RESIZE_RULES,
}
_HELP = {
    "data": "KIND:PATH, such as isic2018:DIR, synapse:DIR, folder:DIR, phantoms:4000@0",
    "validation": "KIND:PATH, or a share of data's cases",
    "start": "checkpoint to fine-tune; its sizes, form, resize, mean and std are taken over",
    "encoder": "ImageNet MaxViT file (timm's maxvit_rmlp_small_rw_224) for the encoder",
    "classes": "names, separated by commas, the background first, where the data does not know them",
    "steps": "training steps, instead of --epochs",
    "every": "steps between two validations and saves",
    "patience": "validations without a better Dice until it stops early; 0: never",
    "mixed": "encoder in bfloat16, decoder in float32",
    "int8": "a fine-tune for int8: every layer rounds as it will on the device",
    "mean": "one or three numbers, of pixels scaled to [0, 1]",
    "std": "one or three numbers",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m msa2net.core.train", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of model.safetensors, log.csv and the state")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="default")
    parser.add_argument("--name", help="the model's name in its metadata; default: the preset's, or 'model'")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    for each in fields(Settings):
        option, default = f"--{each.name.replace('_', '-')}", argparse.SUPPRESS
        text = _HELP.get(each.name, "")
        if each.name != "data":
            text = f"{text} (default: {each.default!r})".strip()
        if each.name in ("mixed", "int8"):
            parser.add_argument(option, action="store_true", default=default, help=_HELP[each.name])
            continue
        kind: Callable[[str], Any] = {"int": int, "float": float}.get(str(each.type), str)
        kind = {"classes": _names, "mean": _numbers, "std": _numbers}.get(each.name, kind)
        parser.add_argument(option, type=kind, default=default, choices=_CHOICES.get(each.name), help=text)
    return parser


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The preset with the command line's options put over it; for a fine-tune its checkpoint's mean and std, too."""
    known = {each.name for each in fields(Settings)}
    given = {key: value for key, value in vars(arguments).items() if key in known}
    chosen = PRESETS[arguments.preset] | given
    if "data" not in chosen:
        raise DataError("--data", "not given", "expected KIND:PATH", "Or use --preset demo.")
    if "steps" in given and "epochs" in given:
        raise Msa2NetError("--steps", "given with --epochs", "expected one of them", "Leave one out.")
    if "epochs" in given:
        chosen["steps"] = 0
    if chosen.get("start"):
        if clash := sorted({"variant", "form", "encoder"} & given.keys()):
            raise Msa2NetError(f"--{clash[0]}", "given with --start", "expected the checkpoint's own", "Leave it out.")
        read = read_checkpoint(chosen["start"])
        config: ModelConfig = config_of(read)
        chosen["form"] = config.deep_decoder
        if "resize" in read.metadata and "resize" not in given:
            chosen["resize"] = read.metadata["resize"]
        for key in {"mean", "std"} & read.metadata.keys() - given.keys():
            chosen[key] = tuple(read.listed(key, []))
    settings = Settings(**chosen)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    """Raises Msa2NetError naming the first option that no training can run with."""

    def refuse(key: str, expected: str) -> Msa2NetError:
        return Msa2NetError(f"--{key.replace('_', '-')}", f"got {getattr(settings, key)}", f"expected {expected}", "")

    for key in ("rate", "batch", "every"):
        if not getattr(settings, key) > 0:
            raise refuse(key, "more than 0")
    if not (settings.steps > 0 or (settings.steps == 0 and settings.epochs > 0)):
        raise refuse("epochs" if settings.steps == 0 else "steps", "more than 0")
    for key in ("patience", "warmup", "weight_decay"):
        if not getattr(settings, key) >= 0:
            raise refuse(key, "0 or more")
    for key in ("mean", "std"):
        values = getattr(settings, key)
        if len(values) not in (1, 3) or not all(map(math.isfinite, values)) or (key == "std" and min(values) <= 0):
            raise refuse(key, "one or three finite numbers" + (" above 0" if key == "std" else ""))
    if settings.resize not in RESIZE_RULES:
        raise refuse("resize", f"one of {', '.join(RESIZE_RULES)}")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        name = arguments.name or (arguments.preset if arguments.preset == "demo" else "model")
        print(train(settings_of(arguments), arguments.output, name, arguments.device))
    except Msa2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
