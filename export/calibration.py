"""The images that int8's ranges are taken from: enough, with something to see, and like those it is judged on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from msa2net.core.data import open_for
from msa2net.core.network import MSA2Net
from msa2net.core.phantoms import KINDS, phantom
from msa2net.errors import ExportError
from msa2net.export import parity
from msa2net.runtimes import preprocess
from msa2net.runtimes.bundle import InputContract

LEAST, MOST = 16, 72
HELD = 8  # of them, no ranges are taken from: methods are compared and places are ranked on these
PHANTOM_SEED = 3_000_000  # apart from training, validation, test and the parity check
# The factor by which what the network's layers read of the judged images may differ from what they read of these, on
# average. Of two draws of the demo's phantoms it is 1.04 to 1.06, of dermoscopy against ultrasound 1.11.
MOST_APART = 1.08
COMPARED = 16  # images of each
Tensors = Sequence[NDArray[np.float32]]


class CalibrationWarning(UserWarning):
    """The calibration images are unlike those that the artifact is judged on."""


def frames(data: str | None, classes: Sequence[str], channels: int, most: int = MOST) -> list[parity.Case]:
    """The calibration images: at most `most` of "KIND:PATH", evenly spread, or phantoms of both kinds if None.

    Raises ExportError for fewer than `LEAST`, and for an image of one value, and DataError for what cannot be read.
    """
    if data is None:
        grey = channels == 1
        cases = []
        for i in range(most):
            image = phantom(KINDS[i % len(KINDS)], PHANTOM_SEED + i).image
            cases.append(parity.Case(f"phantom {i}", np.ascontiguousarray(image[..., 1]) if grey else image))
        return cases
    cases = parity.data_cases(open_for(classes, data), len(classes), most)
    if len(cases) < LEAST:
        raise ExportError(
            "--calibration", f"{len(cases)} images", f"expected at least {LEAST}", "Ranges of so few hold for no other."
        )
    for case in cases:
        if case.frame.min() == case.frame.max():
            raise ExportError(
                f"--calibration, image {case.name}",
                f"has the one value {case.frame.min()}",
                "expected something to see",
                "Remove it.",
            )
    # In turns of chance, so that the first of them, which are held back, are of every kind.
    return [cases[i] for i in np.random.default_rng(0).permutation(len(cases))]


def tensors(cases: Sequence[parity.Case], contract: InputContract) -> list[NDArray[np.float32]]:
    """The network's inputs (1, C, h, w)."""
    return [preprocess.to_tensor(case.frame, contract, case.bits) for case in cases]


@torch.inference_mode()
def reach(model: MSA2Net, inputs: Tensors) -> dict[str, float]:
    """By convolution and linear layer, the largest |value| that it reads: the mean over the inputs."""
    sums: dict[str, float] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: sums.__setitem__(name, sums.get(name, 0.0) + float(given[0].abs().max()))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        for each in inputs:
            model(torch.from_numpy(each))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / len(inputs) for name, total in sums.items()}


def describe(data: str | None, inputs: Tensors, model: MSA2Net, judged: Tensors) -> dict[str, Any]:
    """For the manifest: what the ranges were taken from, and `compare` of it with what is judged."""
    factor = compare(model, inputs[:COMPARED], judged[:COMPARED])
    return {"data": data.partition(":")[0] if data else "phantoms", "images": len(inputs), "apart": factor}


def compare(model: MSA2Net, inputs: Tensors, judged: Tensors) -> float:
    """The factor by which the largest value that a layer reads differs between the two: geometric mean over the layers.

    Far from 1 they are of different kinds, and a CalibrationWarning says so: larger values would be cut off at the end
    of the range, smaller ones fall onto few of its 256 steps.
    """
    ours, theirs = reach(model, inputs), reach(model, judged)
    apart = [abs(math.log(max(theirs[name], 1e-12) / max(value, 1e-12))) for name, value in ours.items()]
    factor = math.exp(float(np.mean(apart)))
    if factor > MOST_APART:
        warnings.warn(
            f"what the network's layers read of the calibration images and of the images of the accuracy check differ "
            f"by a factor of {factor:.2f}, expected at most {MOST_APART}: are both of one kind? Give --calibration "
            "images as the device sees them.",
            CalibrationWarning,
            stacklevel=2,
        )
    return factor
