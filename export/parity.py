"""The evidence: an artifact's outputs against the reference network's, frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from msa2net.core.network import MSA2Net
from msa2net.core.phantoms import KINDS, phantom
from msa2net.errors import ExportError, FrameError
from msa2net.runtimes import postprocess, preprocess
from msa2net.runtimes.bundle import Manifest
from msa2net.runtimes.images import read_frames
from msa2net.runtimes.measure import dice, pixel_agreement

PHANTOM_SEED = 2_000_000  # apart from training, validation and test
# Sizes of the phantoms (H, W): the network's own, then smaller, larger, wide and odd ones.
_SIZES = ((224, 224), (168, 224), (480, 640), (301, 227))
# fp32 differs between runtimes only by rounding: measured 1e-6 to 1e-5 of the largest logit.
LOGIT_LIMIT, PIXEL_LIMIT = 1e-4, 0.9999


@dataclass(frozen=True)
class Case:
    """A frame, how many bits a uint16 one stores, and a name that tells nothing of a patient."""

    name: str
    frame: NDArray[Any]
    bits: int | None = None


@dataclass(frozen=True)
class Result:
    """Logits (K, h, w) float32 and mask (H, W) uint8 for one case."""

    logits: NDArray[np.float32]
    mask: NDArray[np.uint8]


def phantom_cases(grey: bool, count: int = 16) -> list[Case]:
    """Phantoms of both kinds in several sizes. Ultrasound comes in grey, dermoscopy too if the network takes grey."""
    cases = []
    for i in range(count):
        kind, seed = KINDS[i % len(KINDS)], PHANTOM_SEED + i
        image = phantom(kind, seed, _SIZES[(i // 2) % len(_SIZES)]).image
        frame = np.ascontiguousarray(image[..., 1]) if grey or kind == "ultrasound" else image
        cases.append(Case(f"phantom {kind} {seed}", frame))
    return cases


def folder_cases(folder: Path, limit: int = 200) -> list[Case]:
    """The first `limit` frames of a folder of images. Raises ExportError if it holds none or one cannot be read."""
    files = sorted(file for file in folder.glob("*") if file.is_file() and not file.name.startswith("."))
    cases: list[Case] = []
    for number, file in enumerate(files, 1):
        try:
            for index, (pixels, bits) in enumerate(read_frames(file), 1):
                cases.append(Case(f"image {number} frame {index}", preprocess.check_frame(pixels, bits), bits))
                if len(cases) == limit:
                    return cases
        except FrameError as error:
            raise ExportError(
                f"image {number} of {len(files)}", str(error), "", "Remove it from the folder."
            ) from error
    if not cases:
        raise ExportError("--images", "a folder without images", "expected some for the parity check", "Name another.")
    return cases


def run_case(case: Case, manifest: Manifest, infer: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Result:
    """One case through the pixel contract and `infer`."""
    contract = manifest.input
    try:
        tensor = preprocess.to_tensor(case.frame, contract, case.bits)
    except FrameError as error:
        raise ExportError(case.name, str(error), "", "Remove it from the parity check's images.") from error
    raw = infer(tensor)
    logits = postprocess.check_logits(raw, len(manifest.classes), contract.height, contract.width)
    size = (case.frame.shape[0], case.frame.shape[1])
    placement = preprocess.place(contract, *size)
    return Result(logits, postprocess.to_mask(logits, placement, size, manifest.enlarge))


def reference(model: MSA2Net) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The reference network as a function of arrays."""

    def infer(x: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = model(torch.from_numpy(x)).numpy()
        return logits

    return infer


def compare(
    cases: Sequence[Case], expected: Sequence[Result], found: Sequence[Result], classes: Sequence[str]
) -> dict[str, Any]:
    """The manifest's parity entry: largest logit difference, equal pixels, Dice per class against the reference."""
    differences = [float(np.abs(a.logits - b.logits).max()) for a, b in zip(expected, found, strict=True)]
    agreements = [pixel_agreement(a.mask, b.mask) for a, b in zip(expected, found, strict=True)]
    worst = min(range(len(cases)), key=lambda i: (agreements[i], -differences[i]))
    return {
        "images": len(cases),
        "logit_difference": max(differences),
        "largest_logit": max(float(np.abs(result.logits).max()) for result in expected),
        "pixel_agreement": float(np.mean(agreements)),
        "dice": {
            name: float(np.mean([dice(b.mask, a.mask, label) for a, b in zip(expected, found, strict=True)]))
            for label, name in enumerate(classes)
        },
        "worst": {"image": cases[worst].name, "pixel_agreement": agreements[worst]},
    }


def require(artifact: str, figures: dict[str, Any]) -> None:
    """Raises ExportError with the figures if an fp32 artifact is further from the reference than rounding explains."""
    limit = LOGIT_LIMIT * max(1.0, figures["largest_logit"])
    # Asked this way round, NaN does not pass.
    if not (figures["logit_difference"] <= limit and figures["pixel_agreement"] >= PIXEL_LIMIT):
        raise ExportError(
            f"parity of {artifact}",
            f"largest logit difference {figures['logit_difference']:.2e}, equal pixels "
            f"{figures['pixel_agreement']:.4%} (worst: {figures['worst']['image']})",
            f"expected at most {limit:.2e} and at least {PIXEL_LIMIT:.2%} over {figures['images']} images",
            "Nothing was written.",
        )
