"""Figures that export, benchmarks and the self-test share: agreement of masks, Dice, percentiles, and the judgement
whether an artifact still does what the fp32 reference does. numpy only.

Dimension key: H W rows and columns, K classes (0 is the background, the rest is foreground), N images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]
T = TypeVar("T")

LESION_PIXELS = 500  # an image is judged by Dice if it has at least so many pixels of foreground
FALSE_PIXELS = 50  # more added foreground than this in a clean frame is a false alarm
CLEAN_PER_ALARM = 100  # one alarm is allowed in so many clean frames
LEAST_CASES = 10  # fewer give no bound worth the name: resampling one case gives its own figure back
LEAST_DICE = 0.05  # below this mean Dice the reference finds nothing that an artifact could lose
LEVELS = {"high": (0.999, 3), "standard": (0.99, 5)}  # least bound of the ratio, most points that one image may lose
TINY = 1e-12  # a sum of Dice below this is none
RESAMPLES = 10_000
TAIL = 40  # one resample in 40 lies below the bound: one-sided 97.5 %
_SEED = 20_240_811
_BLOCK = 500_000  # indices drawn at a time: 4 MB, and as much again for each figure picked by them


def dice(prediction: Mask, truth: Mask, label: int = 1) -> float:
    """Dice coefficient of one class, 0 to 1: 2 |P and T| / (|P| + |T|). Both empty: 1."""
    predicted, true = prediction == label, truth == label
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else 1.0


def pixel_agreement(a: Mask, b: Mask) -> float:
    """Share of equal pixels, 0 to 1."""
    return float(np.mean(a == b))


def percentile(samples: Sequence[float], p: float) -> float | None:
    """The p-th percentile (0 to 100) by nearest rank; None where fewer than 5 samples lie beyond it.

    A p99 of 50 samples is their maximum under another name, so it is left out.
    """
    if round(len(samples) * min(p, 100 - p) / 100, 6) < 5 and p != 50:
        return None
    return float(np.percentile(samples, p, method="inverted_cdf" if p != 50 else "linear"))


def timed(call: Callable[[], object]) -> float:
    """Milliseconds that one call takes."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def interleaved(
    calls: Mapping[str, Callable[[], T]],
    rounds: Iterable[int],
    *,
    every: Mapping[str, int] | None = None,
    pause: float = 0,
) -> dict[str, list[T]]:
    """Runs every call once a round, in an order that rotates, so that a drifting machine hits all alike.

    Returns what each call returned (wrap it in `timed` for milliseconds), in order.
    rounds   their numbers, such as range(100), or a progress bar over that
    every    calls that run in each n-th round only
    pause    seconds before each call, for the threads of the call before to stop spinning
    """
    names = list(calls)
    samples: dict[str, list[T]] = {name: [] for name in names}
    for i in rounds:
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            if every and i % every.get(name, 1):
                continue
            time.sleep(pause)
            samples[name].append(calls[name]())
    return samples


def milliseconds(calls: Mapping[str, Callable[[], object]], rounds: int, pause: float) -> dict[str, list[float]]:
    """Milliseconds of each call in `interleaved` rounds, after two that are left out."""
    timers = {name: partial(timed, call) for name, call in calls.items()}
    return {name: samples[2:] for name, samples in interleaved(timers, range(rounds + 2), pause=pause).items()}


def ratio(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile of the ratios of interleaved rounds."""
    ratios = [value / other for value, other in zip(samples, base, strict=True)]
    return [round(float(np.percentile(ratios, p)), 4) for p in (25, 50, 75)]


# Regions ----------------------------------------------------------------------------------------------------------


def largest_component(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest 8-connected part of a region (H, W); of equal ones the first met row by row. Empty if that is.

    Runs of pixels within a row are joined to the runs that they touch in the row above: each round hooks a tree of
    runs to the smallest root beside it, so that a component's root becomes its first run.
    """
    height, width = region.shape
    pitch = width + 1  # a gap after each row keeps runs of neighbouring rows apart
    flat = np.zeros(height * pitch + 1, bool)
    flat[1:].reshape(height, pitch)[:, :width] = region
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    starts, ends = edges[::2], edges[1::2]  # run i holds [starts[i], ends[i])
    if not len(starts):
        return np.zeros_like(region, bool)

    # The runs above run i that touch it, corners included, are those from first[i] to last[i] - 1.
    first = np.searchsorted(ends + pitch, starts, "left")
    last = np.searchsorted(starts + pitch, ends, "right")
    touching = last - first
    lower = np.repeat(np.arange(len(starts)), touching)
    upper = np.arange(len(lower)) - np.repeat(np.cumsum(touching) - touching - first, touching)

    root = np.arange(len(starts))
    while len(lower):
        a, b = root[lower], root[upper]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, root[root]):
            root = root[root]
        apart = root[lower] != root[upper]
        lower, upper = lower[apart], upper[apart]

    lengths = ends - starts
    largest = np.argmax(np.bincount(root, weights=lengths))
    component = np.zeros_like(region, bool)
    component[region] = np.repeat(root == largest, lengths)  # the pixels of a mask come in the order of its runs
    return component


def _outer_left(edge: Sequence[int]) -> NDArray[np.int64]:
    """Convex chain (n, 2) of (x, y) around the points (edge[y], y) on their left side."""
    chain: list[tuple[int, int]] = []
    for y, x in enumerate(edge):
        while len(chain) > 1:
            (x0, y0), (x1, y1) = chain[-2:]
            if (x1 - x0) * (y - y0) < (x - x0) * (y1 - y0):
                break
            chain.pop()
        chain.append((x, y))
    return np.array(chain, np.int64)


def diameter(region: NDArray[np.bool_]) -> float:
    """Largest distance in pixels between two corners of the pixels of the region's largest component; empty: 0.

    One pixel measures sqrt(2). The two corners lie on the convex hull, one on its left side, the other on its right.
    """
    component = largest_component(region)
    rows = np.flatnonzero(component.any(1))  # without gaps: it is connected
    if not len(rows):
        return 0.0
    component = component[rows]
    left = component.argmax(1)
    right = component.shape[1] - component[:, ::-1].argmax(1)
    # A line between two rows of pixels holds the corners of both.
    left = np.minimum(np.append(left, left[-1]), np.append(left[0], left))
    right = np.maximum(np.append(right, right[-1]), np.append(right[0], right))
    a = _outer_left(left.tolist())
    b = _outer_left((-right).tolist()) * (-1, 1)
    return math.sqrt(int(((a[:, None] - b[None]) ** 2).sum(2).max()))


# Parity -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageParity:
    """What an artifact made of one image, beside what the fp32 reference made of it. Tuples have one entry a class."""

    name: str
    case: str  # the patient or image that it is of: images of one case are resampled together
    against_truth: bool  # whether there is a truth; without one the reference's mask stands in its place
    pixel_agreement: float  # share of pixels on which artifact and reference agree
    pixels: tuple[int, ...]  # of the truth
    reference_dice: tuple[float, ...]  # against the truth; all 1 where there is none
    dice: tuple[float, ...]
    reference_area: tuple[int, ...]  # pixels
    area: tuple[int, ...]
    reference_diameter: tuple[float, ...]  # pixels; the background's is 0
    diameter: tuple[float, ...]
    added: int  # pixels that are foreground in the artifact's mask and background in the reference's

    @property
    def counted(self) -> tuple[int, ...]:
        """The foreground classes in the image; none if they are too small to be judged by Dice."""
        judged = sum(self.pixels[1:]) >= LESION_PIXELS
        return tuple(k for k in range(1, len(self.pixels)) if judged and self.pixels[k])


def image_parity(
    name: str, reference: Mask, mask: Mask, classes: int, truth: Mask | None = None, case: str | None = None
) -> ImageParity:
    """Compares an artifact's mask with the reference's, and both with the truth; all (H, W) uint8 below `classes`.

    `case` is the patient whose image it is; the image is a case of its own if None.

    Raises ValueError for masks of other or unequal shapes, without a pixel, or with other labels.
    """
    masks = {"reference": reference, "mask": mask} | ({} if truth is None else {"truth": truth})
    shape = reference.shape if reference.ndim == 2 and reference.size else "(H, W)"
    for what, array in masks.items():
        if array.dtype != np.uint8 or array.shape != shape:
            raise ValueError(f"{what} of {name}: got {array.dtype} {array.shape}, expected uint8 {shape}")
        if array.max() >= classes:
            raise ValueError(f"{what} of {name}: got label {array.max()}, expected labels 0 to {classes - 1}")
    between = _crosstab(reference, mask, classes)
    against = reference if truth is None else truth
    return ImageParity(
        name=name,
        case=name if case is None else case,
        against_truth=truth is not None,
        pixel_agreement=int(np.trace(between)) / mask.size,
        pixels=tuple(np.bincount(against.ravel(), minlength=classes).tolist()),
        reference_dice=_dices(_crosstab(against, reference, classes)),
        dice=_dices(_crosstab(against, mask, classes)),
        reference_area=tuple(between.sum(1).tolist()),
        area=tuple(between.sum(0).tolist()),
        reference_diameter=_diameters(reference, classes),
        diameter=_diameters(mask, classes),
        added=int(between[0, 1:].sum()),
    )


def _crosstab(a: Mask, b: Mask, classes: int) -> NDArray[np.int64]:
    """Pixels (K, K) by their label in a and in b."""
    pairs = a.ravel().astype(np.intp) * classes + b.ravel()
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def _dices(crosstab: NDArray[np.int64]) -> tuple[float, ...]:
    """`dice` of every class."""
    totals = (crosstab.sum(0) + crosstab.sum(1)).tolist()
    shared = np.diagonal(crosstab).tolist()
    return tuple(2 * both / total if total else 1.0 for both, total in zip(shared, totals, strict=True))


def _diameters(mask: Mask, classes: int) -> tuple[float, ...]:
    return (0.0, *(diameter(mask == k) for k in range(1, classes)))


def bootstrap_bound(reference: NDArray[np.float64], artifact: NDArray[np.float64]) -> float:
    """One-sided 97.5 % lower bound of mean(artifact) / mean(reference), two figures (N,) of the same N cases.

    Percentile bootstrap over cases, which stay paired: 10,000 resamples from a fixed seed, rank 250 from below. A
    resample whose reference sums to nothing has no ratio and is left out. NaN if none is left, or for NaN figures.
    """
    count = len(reference)
    if not count or not (np.isfinite(reference).all() and np.isfinite(artifact).all()):
        return math.nan
    change = artifact - reference  # 1 + change / reference is exactly 1 for equal figures
    ratios: list[NDArray[np.float64]] = []
    rng = np.random.default_rng(_SEED)
    rows = max(1, _BLOCK // count)
    for done in range(0, RESAMPLES, rows):
        index = rng.integers(0, count, (min(rows, RESAMPLES - done), count))
        base, shift = reference[index].sum(1), change[index].sum(1)
        there = base > TINY
        ratios.append(1 + shift[there] / base[there])
    resampled = np.sort(np.concatenate(ratios))
    return float(resampled[max(1, len(resampled) // TAIL) - 1]) if len(resampled) else math.nan


def judge(images: Sequence[ImageParity], classes: Sequence[str]) -> dict[str, Any]:
    """Whether the artifact is as good as the reference: figures and "verdict", ready for JSON, None where undefined.

    Dice. An image is judged if it has at least 500 pixels of foreground; its Dice is the mean over the foreground
    classes in it. Its loss in points is 100 times the reference's Dice less the artifact's, or that of one class of at
    least 500 pixels, if it is larger. A case's Dice is the mean over its judged images.
    `ratio` is the artifact's mean Dice over cases by the reference's, `ratio_bound` its bound by `bootstrap_bound`.

    False alarms. A frame is lesion-free if the truth (without truth: the reference's mask) has no foreground, and
    clean if, besides, the reference has at most 50 pixels of it. An alarm is a clean frame in which more than 50
    pixels are foreground to the artifact and not to the reference. Alarms are fine up to 1 in 100 clean frames.

    Verdict. "high": the bound is at least 0.999, no image loses more than 3 points, alarms are fine. "standard": 0.99,
    5 points, alarms are fine. Else "failed". "unjudged", with a `reason`, if nothing fails, but there is no bound: no
    image can be judged by Dice, those that can are of fewer than 10 cases, or the reference's mean Dice over them is
    below 0.05. Points and bound are compared to nine digits; a figure that is NaN fails. `reasons` says what keeps it
    from the next better level.

    Raises ValueError if images with and without truth are mixed, or have another number of classes than `classes`.
    """
    with_truth = sum(image.against_truth for image in images)
    if 0 < with_truth < len(images):
        raise ValueError(f"images: got {with_truth} of {len(images)} with a truth, expected all or none")
    for image in images:
        if len(image.pixels) != len(classes):
            raise ValueError(f"{image.name}: got {len(image.pixels)} classes, expected {len(classes)}")

    judged = [image for image in images if image.counted]
    reference, artifact = (_case_means(judged, figure) for figure in ("reference_dice", "dice"))
    mean = float(reference.mean()) if judged else math.nan
    bound = round(bootstrap_bound(reference, artifact), 9)
    worst, loss, label = _worst(images, judged)
    lost = {
        "points": _finite(loss),
        "image": worst.name if worst and judged else None,
        "class": classes[label] if judged else None,
    }
    free = [image for image in images if not any(image.pixels[1:])]
    clean = [image for image in free if sum(image.reference_area[1:]) <= FALSE_PIXELS]
    alarms = sum(image.added > FALSE_PIXELS for image in clean)
    unjudged = None
    if not judged:
        unjudged = (
            f"no image has {LESION_PIXELS} pixels of foreground in the "
            f"{'truth' if with_truth else 'reference mask'}: give images of the model's own domain that show lesions"
        )
    elif len(reference) < LEAST_CASES:
        unjudged = f"images of {len(reference)} cases can be judged, {LEAST_CASES} are needed: give more"
    elif mean < LEAST_DICE:
        unjudged = (
            f"the reference's mean Dice is {mean:.4f}, below {LEAST_DICE}, it finds nothing here: "
            "give images of the model's own domain"
        )
    verdict, reasons = "failed", list[str]()
    for level, (least, most) in LEVELS.items():
        misses = _alarm_misses(alarms, len(clean))
        if judged and not loss <= most:
            misses.append(
                f"{lost['image']} loses {_shown(loss, 2, math.ceil)} points of {lost['class']}, {level} allows {most}"
            )
        if not unjudged and not bound >= least:
            misses.append(f"bound {_shown(bound, 4, math.floor)} of the reference's mean Dice, {level} needs {least}")
        if not misses:
            verdict = level
            break
        reasons = misses
    if unjudged and verdict != "failed":
        verdict, reasons = "unjudged", []
    return {
        "images": len(images),
        "judged": len(judged),
        "cases": len(reference),
        "against": ("truth" if with_truth else "fp32 mask") if images else None,
        "pixel_agreement": _mean([image.pixel_agreement for image in images]),
        "dice": {name: _dice_figures(images, k) for k, name in enumerate(classes)},
        "ratio": _finite(float(artifact.mean()) / mean) if mean > 0 else None,
        "ratio_bound": _finite(bound),
        "largest_loss": lost,
        "area": {name: _changes(images, k, "area") for k, name in enumerate(classes) if k},
        "diameter": {name: _changes(images, k, "diameter") for k, name in enumerate(classes) if k},
        "lesion_free": {"frames": len(free), "clean": len(clean), "alarms": alarms},
        "worst": {
            "image": worst.name if worst else None,
            "pixel_agreement": _finite(worst.pixel_agreement) if worst else None,
        },
        "verdict": verdict,
        "reason": unjudged if verdict == "unjudged" else None,
        "reasons": reasons,
    }


def _case_means(judged: Sequence[ImageParity], figure: str) -> NDArray[np.float64]:
    """For each case the mean over its images of the mean over their counted classes."""
    by_case: dict[str, list[float]] = {}
    for image in judged:
        values = getattr(image, figure)
        by_case.setdefault(image.case, []).append(float(np.mean([values[k] for k in image.counted])))
    return np.array([np.mean(values) for values in by_case.values()], np.float64)


def _loss(image: ImageParity) -> tuple[float, int]:
    """An image's loss in points and the class that loses most. NaN counts as the largest."""
    losses = [(round(100 * (image.reference_dice[k] - image.dice[k]), 9), k) for k in image.counted]
    label = max(losses, key=lambda pair: _nan_first(pair[0]))[1]
    whole = round(float(np.mean([loss for loss, _ in losses])), 9)
    large = [loss for loss, k in losses if image.pixels[k] >= LESION_PIXELS]
    return max([whole, *large], key=_nan_first), label


def _worst(images: Sequence[ImageParity], judged: Sequence[ImageParity]) -> tuple[ImageParity | None, float, int]:
    """The image that loses most, by how many points and of which class; of equal ones that of the lowest agreement."""
    if not judged:
        return min(images, key=lambda image: image.pixel_agreement, default=None), math.nan, 0
    losses = [(*_loss(image), image) for image in judged]
    loss, label, image = max(losses, key=lambda entry: (_nan_first(entry[0]), -entry[2].pixel_agreement))
    return image, loss, label


def _alarm_misses(alarms: int, clean: int) -> list[str]:
    if alarms * CLEAN_PER_ALARM <= clean:
        return []
    return [f"{alarms} of {clean} clean frames raise a false alarm, 1 in {CLEAN_PER_ALARM} is allowed"]


def _dice_figures(images: Sequence[ImageParity], k: int) -> dict[str, float | None]:
    """Mean Dice of class k over the images that hold it."""
    held = [image for image in images if image.pixels[k]]
    return {
        "fp32": _mean([image.reference_dice[k] for image in held]),
        "artifact": _mean([image.dice[k] for image in held]),
        "change": _mean([image.dice[k] - image.reference_dice[k] for image in held]),
    }


def _changes(images: Sequence[ImageParity], k: int, figure: str) -> dict[str, Any]:
    """Relative change of the area or the diameter of class k, where the reference shows enough of it to measure."""
    changes = [
        (getattr(image, figure)[k] / getattr(image, f"reference_{figure}")[k] - 1, image.name)
        for image in images
        if image.reference_area[k] >= LESION_PIXELS
    ]
    largest, name = max(changes, key=lambda pair: _nan_first(abs(pair[0])), default=(math.nan, None))
    return {"mean_change": _mean([change for change, _ in changes]), "largest_change": _finite(largest), "image": name}


def _nan_first(value: float) -> float:
    """As a key of `max`: NaN is larger than every number."""
    return math.inf if math.isnan(value) else value


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float | None:
    return _finite(float(np.mean(values))) if values else None


def _shown(value: float, digits: int, rounded: Callable[[float], int]) -> str:
    """A figure as text, rounded to the side on which it fails: 0.98999 never reads as 0.99."""
    return f"{rounded(round(value * 10**digits, 6)) / 10**digits:g}" if math.isfinite(value) else str(value)
