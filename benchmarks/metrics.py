"""Scores of one class of one case against the truth. numpy and scipy only.

Two protocols, never mixed in one table:

public     what the code released with the paper computes for Synapse (it calls medpy), odd empty sets included
standard   what MONAI computes with its usual settings, so that another group can reproduce it with one call

They share the surface of a mask: its pixels with a background neighbour across a face (4 neighbours in 2-D, 6 in 3-D),
all that is outside the image being background. A surface distance is the Euclidean distance from one surface pixel to
the nearest pixel of the other mask's surface. Means over classes and cases are the caller's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from msa2net.errors import Msa2NetError

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Protocol = Literal["public", "standard"]

NAN = math.nan


@dataclass(frozen=True)
class Scores:
    """Of one class of one case; nan is undefined, and has no place in a mean.

    dice          2 |P and T| / (|P| + |T|), 0 to 1
    hd95          95th percentile of the surface distances: pixels, or the unit of `spacing` (standard)
    nsd           normalised surface Dice: share of the surface pixels of both masks within the tolerance, 0 to 1
    sensitivity   TP / (TP + FN), nan if the truth is empty
    specificity   TN / (TN + FP), nan if the truth is everywhere
    accuracy      (TP + TN) / all pixels
    """

    dice: float
    hd95: float
    nsd: float
    sensitivity: float
    specificity: float
    accuracy: float


def score(
    prediction: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    label: int,
    *,
    protocol: Protocol,
    spacing: tuple[float, ...] | None = None,
    tolerance: float = 1.0,
) -> Scores:
    """Scores one class of one image or volume.

    prediction, truth   (H, W) or (D, H, W) uint8 class indices of one shape. One slice, D = 1, is scored as 2-D: in 3-D
                        each of its pixels would touch the outside and be surface.
    spacing             millimetres between neighbours along each axis of the arrays; None for 1
    tolerance           of `nsd`, in the same unit. A distance that equals it in float32 is within, as in MONAI: three
                        steps of 0.1, which are 0.30000000000000004, are within 0.3.

    public: `hd95` is the percentile of the distances of both directions pooled, in pixels whatever the spacing.
        Prediction empty: Dice 0, HD95 0, even if the truth is empty too. Truth alone empty: Dice 1, HD95 0.
        The public code has no other metrics of a volume; the other four are as in standard here.
    standard: `hd95` is the larger of the two directions' percentiles. As MONAI 1.6 has it: truth empty, Dice nan
        (DiceMetric's ignore_empty); prediction alone empty, Dice 0; either empty, HD95 nan (the distances are infinite,
        and the interpolation between two of them is undefined); one empty, NSD 0; both empty, NSD nan. MONAI takes the
        percentile's rank in float32, which at n surface pixels shifts it by about n · 1e-7 of the step between two
        distances; here it is float64.

    Raises Msa2NetError for arrays, spacing or a tolerance other than these.
    """
    _check(prediction, truth, protocol, spacing, tolerance)
    if prediction.ndim == 3 and len(prediction) == 1:
        prediction, truth = prediction[0], truth[0]
        spacing = spacing and spacing[1:]
    predicted, true = _crop(prediction == label, truth == label)

    n_predicted, n_true = _count(predicted), _count(true)
    tp = _count(predicted & true)
    tn = prediction.size - (n_predicted + n_true - tp)
    counts = {
        "sensitivity": _ratio(tp, n_true),
        "specificity": _ratio(tn, prediction.size - n_true),
        "accuracy": _ratio(tp + tn, prediction.size),
    }
    if not n_predicted or not n_true:
        nsd = 0.0 if n_predicted or n_true else NAN
        if protocol == "public":
            return Scores(dice=float(n_predicted > 0), hd95=0.0, nsd=nsd, **counts)
        return Scores(dice=0.0 if n_true else NAN, hd95=NAN, nsd=nsd, **counts)

    surfaces = _surface(predicted), _surface(true)
    there, back = _distances(*surfaces, spacing), _distances(*surfaces[::-1], spacing)
    within = sum(_count(d.astype(np.float32) <= np.float32(tolerance)) for d in (there, back))
    nsd = within / (there.size + back.size)
    if protocol == "public":
        if spacing is not None:
            there, back = _distances(*surfaces, None), _distances(*surfaces[::-1], None)
        hd95 = _percentile95(np.concatenate([there, back]))
    else:
        hd95 = max(_percentile95(there), _percentile95(back))
    return Scores(dice=2 * tp / (n_predicted + n_true), hd95=hd95, nsd=nsd, **counts)


def _check(prediction: Any, truth: Any, protocol: str, spacing: Any, tolerance: float) -> None:
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype != np.uint8 or mask.ndim not in (2, 3) or not mask.size:
            raise Msa2NetError(
                name, f"got {mask.dtype} {mask.shape}", "expected uint8 (H, W) or (D, H, W)", "Give class indices."
            )
    if prediction.shape != truth.shape:
        raise Msa2NetError(
            "prediction", f"got {prediction.shape}", f"expected {truth.shape} as the truth", "Resize it first."
        )
    if protocol not in ("public", "standard"):
        raise Msa2NetError("protocol", f"got {protocol!r}", "expected public or standard", "Choose one.")
    positive = spacing is None or all(math.isfinite(step) and step > 0 for step in spacing)
    if not positive or (spacing is not None and len(spacing) != truth.ndim):
        raise Msa2NetError(
            "spacing", f"got {spacing}", f"expected {truth.ndim} positive numbers, one an axis", "Leave it out for 1."
        )
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise Msa2NetError("tolerance", f"got {tolerance}", "expected a finite number, 0 or more", "1 is usual.")


def _count(mask: Bools) -> int:
    return int(np.count_nonzero(mask))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else NAN


def _percentile95(distances: Floats) -> float:
    return float(np.percentile(distances, 95))


def _crop(a: Bools, b: Bools) -> tuple[Bools, Bools]:
    """Both masks inside the bounding box of their union, which holds all that a surface or a distance depends on."""
    for axis in range(a.ndim):  # the first axis first: it leaves less to look through for the next
        others = tuple(i for i in range(a.ndim) if i != axis)
        occupied = np.flatnonzero(a.any(others) | b.any(others))
        box = slice(occupied[0], occupied[-1] + 1) if occupied.size else slice(0)
        index = (slice(None),) * axis + (box,)
        a, b = a[index], b[index]
    return a, b


def _surface(mask: Bools) -> Bools:
    """The mask without its erosion by the cross of 4 or 6 neighbours."""
    padded = np.pad(mask, 1)
    core = (slice(1, -1),) * mask.ndim
    inside = mask.copy()
    for axis in range(mask.ndim):
        for neighbour in (slice(None, -2), slice(2, None)):
            inside &= padded[(*core[:axis], neighbour, *core[axis + 1 :])]
    return mask & ~inside


def _distances(surface: Bools, other: Bools, spacing: tuple[float, ...] | None) -> Floats:
    """From each pixel of `surface` to the nearest of `other`, both non-empty; in no order.

    A search tree over surface pixels gives what a distance transform of the volume gives, and touches only them.
    """
    apart = np.argwhere(surface & ~other)
    distances = np.zeros(_count(surface))  # a pixel of both surfaces is at 0
    if len(apart):
        scale = np.ones(surface.ndim) if spacing is None else np.asarray(spacing, np.float64)
        tree = KDTree(np.argwhere(other) * scale, leafsize=32, balanced_tree=False)
        distances[: len(apart)] = tree.query(apart * scale)[0]
    return distances
