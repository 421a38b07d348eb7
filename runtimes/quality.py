"""Figures beside a mask that say whether to trust it, and the limits that training-like images keep. They inform: no
mask is ever changed or held back by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msa2net.runtimes.bundle import QUALITY
from msa2net.runtimes.postprocess import softmax
from msa2net.runtimes.preprocess import largest_value

SAMPLED = 256  # rows and columns of a frame that are looked at, evenly spread: for its grey values more tell no more

Limits = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Quality:
    """What a frame and its mask look like; all from 0 to 1, each with its limits in the manifest.

    contrast    standard deviation of the frame's values over their range: near 0, it is blank
    saturation  share of values at the top of the range
    margin      mean over pixels of the best class's probability less the second's
    border      share of the pixels at the mask's edge that are foreground: above 0, the mask touches the border
    area        share of pixels that are foreground
    """

    contrast: float
    saturation: float
    margin: float
    border: float
    area: float

    def flags(self, limits: Limits) -> tuple[str, ...]:
        """The names of those beyond their limits."""
        found = ((name, getattr(self, name), *limits[name]) for name in QUALITY)
        return tuple(name for name, value, least, most in found if not least <= value <= most)


# A frame may have any contrast above the least, and so on.
_LEAST, _MOST = ("contrast", "margin", "area"), ("saturation", "border", "area")


def sample(frame: NDArray[np.generic]) -> NDArray[np.generic]:
    """A copy of at most `SAMPLED` rows and columns of a frame (H, W) or (H, W, 3)."""
    rows, columns = (-(-length // SAMPLED) for length in frame.shape[:2])
    return frame[::rows, ::columns].copy()


def assess(
    sampled: NDArray[np.generic], bits: int | None, logits: NDArray[np.float32], mask: NDArray[np.uint8]
) -> Quality:
    """sampled   of the frame, of which `bits` as in `Predictor.predict`
    logits    (K, h, w), where the frame was placed
    """
    top = largest_value(sampled.dtype, bits)
    second, best = np.sort(softmax(logits), axis=0)[-2:]
    edge = np.ones(mask.shape, bool)
    edge[1:-1, 1:-1] = False
    return Quality(
        contrast=float(sampled.std(dtype=np.float64)) / top,
        saturation=float(np.mean(sampled == top)),
        margin=float(np.mean(best - second)),
        border=float(np.mean(mask[edge] != 0)),
        area=float(np.mean(mask != 0)),
    )


def limits_of(seen: Sequence[Quality]) -> dict[str, tuple[float, float]]:
    """The limits that 99 in 100 of the images keep, of each measure and side; all of them, where there are fewer."""
    found = {}
    for name in QUALITY:
        values = sorted(getattr(each, name) for each in seen)
        beyond = len(values) // 100
        least = values[beyond] if name in _LEAST else 0.0
        most = values[-1 - beyond] if name in _MOST else 1.0
        found[name] = (least, most)
    return found
