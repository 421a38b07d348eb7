"""Logits to mask: the only definition of it.

K classes, h w the network's rows and columns, H W the frame's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import OutputError
from msa2net.runtimes.bundle import ClassInfo, Manifest
from msa2net.runtimes.preprocess import Placement, place, resize


def check_logits(logits: NDArray[np.float32], classes: int, height: int, width: int) -> NDArray[np.float32]:
    """(1, K, h, w) -> (K, h, w). Raises OutputError unless shape and dtype are as promised and all values finite."""
    expected = (1, classes, height, width)
    if logits.shape != expected or logits.dtype != np.float32:
        raise OutputError(
            "logits", f"got {logits.dtype} {logits.shape}", f"expected float32 {expected}", "Verify the bundle."
        )
    if not np.isfinite(logits).all():
        raise OutputError(
            "logits",
            "got NaN or infinity",
            "expected finite values",
            "The runtime or the model is broken: verify the bundle.",
        )
    return logits[0]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the first axis, (K, ...) -> (K, ...)."""
    shifted = np.exp(logits - logits.max(0))
    return shifted / shifted.sum(0)


def nearest_index(source: int, target: int) -> NDArray[np.intp]:
    """For each of `target` samples, the nearest of `source`: floor((i + 1/2) source / target), in whole numbers."""
    return (2 * np.arange(target) + 1) * source // (2 * target)


def aligned_index(source: int, target: int) -> NDArray[np.intp]:
    """The nearest sample where first lies on first and last on last: the grid of the resize rule "spline".

    floor(i (source - 1) / (target - 1) + 1/2), in whole numbers: `scipy.ndimage.zoom(order=0)`, but for the end samples
    that scipy loses at some lengths, and for exact ties, which it rounds either way.
    """
    steps = max(1, target - 1)
    return (2 * np.arange(target) * (source - 1) + steps) // (2 * steps)


def crop(maps: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """(K, h, w) -> the part of it that the frame was placed on."""
    rows = slice(placement.top, placement.top + placement.height)
    return maps[:, rows, placement.left : placement.left + placement.width]


def to_mask(
    logits: NDArray[np.float32], placement: Placement, size: tuple[int, int], enlarge: str
) -> NDArray[np.uint8]:
    """(K, h, w) logits -> (H, W) uint8 class indices; the first class wins a tie.

    enlarge   "nearest": argmax at the network's size, then the nearest pixel; "aligned": the same on the grid of the
              spline, as the released pipeline does; "bilinear": probabilities first
    """
    if enlarge == "bilinear":
        return to_probabilities(logits, placement, size, enlarge).argmax(0).astype(np.uint8)
    inside = crop(logits, placement)
    # For two classes a comparison is argmax, and several times faster.
    small = (inside[1] > inside[0]).astype(np.uint8) if len(inside) == 2 else inside.argmax(0).astype(np.uint8)
    return _enlarged(small, size, enlarge)


def to_confidence(
    logits: NDArray[np.float32], placement: Placement, size: tuple[int, int], enlarge: str
) -> NDArray[np.uint8]:
    """(K, h, w) logits -> (H, W) uint8: 255 times the probability of the mask's class, rounded."""
    if enlarge == "bilinear":  # at the frame's size already
        best = to_probabilities(logits, placement, size, enlarge).max(0)
    else:
        best = softmax(crop(logits, placement)).max(0)
    return _enlarged(np.floor(best * 255 + np.float32(0.5)).astype(np.uint8), size, enlarge)


def to_colors(mask: NDArray[np.uint8], classes: Sequence[ClassInfo]) -> NDArray[np.uint8]:
    """(H, W) class indices -> (H, W, 3) uint8, the colour of each one's class."""
    return np.array([info.color for info in classes], np.uint8)[mask]


def _enlarged(small: NDArray[np.uint8], size: tuple[int, int], enlarge: str) -> NDArray[np.uint8]:
    if small.shape == size:
        return small
    rows, columns = nearest_grid(small.shape, size, enlarge)
    return small[:, columns][rows]  # whole rows are copied, which is ten times faster than pixel by pixel


def nearest_grid(
    source: tuple[int, ...], size: tuple[int, int], enlarge: str
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of `source` for each row and column of `size`."""
    index = aligned_index if enlarge == "aligned" else nearest_index
    return index(source[0], size[0]), index(source[1], size[1])


def finish(
    raw: NDArray[np.float32], manifest: Manifest, rows: int, columns: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8], Placement]:
    """What a runtime returned for a frame of rows x columns -> logits (K, h, w), mask (H, W), and where the frame was
    placed. Raises OutputError as `check_logits` does.
    """
    contract = manifest.input
    logits = check_logits(raw, len(manifest.classes), contract.height, contract.width)
    placement = place(contract, rows, columns)
    return logits, to_mask(logits, placement, (rows, columns), manifest.enlarge), placement


def check_baked(
    outputs: Mapping[str, NDArray[Any]], manifest: Manifest, rows: int, columns: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8], Placement]:
    """As `finish`, of what a baked graph returned: the mask is there already."""
    contract = manifest.input
    logits = check_logits(outputs["logits"], len(manifest.classes), contract.height, contract.width)
    for name, found in outputs.items():
        expected = (rows, columns, 3) if name == "colors" else (rows, columns)
        if name != "logits" and (found.dtype != np.uint8 or found.shape != expected):
            raise OutputError(
                name, f"got {found.dtype} {found.shape}", f"expected uint8 {expected}", "Verify the bundle."
            )
    if (largest := int(outputs["mask"].max())) >= len(manifest.classes):
        expected_classes = f"expected less than {len(manifest.classes)}"
        raise OutputError("mask", f"got the class {largest}", expected_classes, "Verify the bundle.")
    return logits, outputs["mask"], place(contract, rows, columns)


def rightly_made(
    outputs: Mapping[str, NDArray[Any]],
    logits: NDArray[np.float32],
    placement: Placement,
    enlarge: str,
    classes: Sequence[ClassInfo],
) -> NDArray[np.bool_]:
    """(H, W) bool: where the confidence (within 1) and the colours of a baked graph, if it gives them, are what its
    logits (K, h, w) and its mask ask for.
    """
    mask = outputs["mask"]
    right = np.ones(mask.shape, np.bool_)
    if "confidence" in outputs:
        expected = to_confidence(logits, placement, (mask.shape[0], mask.shape[1]), enlarge)
        right &= np.abs(outputs["confidence"].astype(np.int16) - expected) <= 1
    if "colors" in outputs:
        right &= (outputs["colors"] == to_colors(mask, classes)).all(-1)
    return right


def to_probabilities(
    logits: NDArray[np.float32], placement: Placement, size: tuple[int, int], enlarge: str
) -> NDArray[np.float32]:
    """(K, h, w) logits -> (K, H, W) float32 probabilities, enlarged as the mask is: their argmax is the mask."""
    inside = crop(logits, placement)
    probabilities = softmax(inside)
    # Two logits may be closer than their probabilities can tell: there the mask's class is put ahead by one step.
    winner = inside.argmax(0)[None]
    highest = np.take_along_axis(probabilities, winner, 0)
    behind = probabilities.argmax(0) != winner
    np.put_along_axis(probabilities, winner, np.where(behind, np.nextafter(highest, np.float32(2)), highest), 0)
    if probabilities.shape[1:] == size:
        return probabilities
    if enlarge == "bilinear":
        return resize(probabilities.transpose(1, 2, 0), "bilinear", *size)
    rows, columns = nearest_grid(probabilities.shape[1:], size, enlarge)
    return probabilities[:, rows[:, None], columns]
