"""Pixels to tensor: the only definition of it on a device. Export, benchmarks and every runtime call this.

A frame is (H, W) grey or (H, W, 3) RGB; H W are its rows and columns, h w the network's, C the network's channels.
Values are scaled by dtype, never by content: uint8 / 255, uint16 / 65535 (or by the bits stored), float32 in [0, 1].
Resizing is separable: one weight table per axis, so that the same tables can sit inside a graph or in C++.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import FrameError
from msa2net.runtimes.bundle import MOST_SIDE, InputContract

MAX_PIXELS = 2**26  # rows x columns: a little over 8k x 8k; a bigger claim is an attack or a mistake
MAX_SIDE = MOST_SIDE  # rows or columns: a weight table is as wide as its side
# By the rule "bilinear-fixed", weights are multiples of the first, and a uint8 frame's values are rounded to multiples
# of the second along each axis. Then no sum needs more than the 24 bits of a float32: in any order, in numpy or in a
# graph, and on any CPU, it is exact, and the network's input the same to the last bit.
WEIGHT_STEP, GREY_STEP = 2.0**-11, 2.0**-5
# Added to it, a float32 from 0 to 255 has no bits left below a `GREY_STEP`: taken off again, the sum is the value
# rounded, halves to the even multiple.
ROUNDING = np.float32(1.5 * 2**23 * GREY_STEP)
_BAND = 7  # output rows resized at once, from the input rows that they need
# Multiply-adds up to which OpenBLAS, numpy's matrix library, works on the calling thread alone. For more it wakes
# others, which then spin for 30 ms: on two cores the inference that follows took up to five times as long.
_ONE_THREAD = 2**18


@dataclass(frozen=True)
class Placement:
    """Where the frame lies inside the network's h x w input: first row, first column, rows, columns."""

    top: int
    left: int
    height: int
    width: int


def check_frame(frame: Any, bits: int | None = None) -> NDArray[Any]:
    """`frame` as a native-endian array if it can be segmented. Raises FrameError saying what is wrong.

    bits   for uint16: how many of the 16 bits the device stores (1 to 16); values beyond are refused
    """
    if not isinstance(frame, np.ndarray):
        raise FrameError("frame", f"got {type(frame).__name__}", "expected a numpy array", "Use numpy.asarray(frame).")
    frame = np.asarray(frame)  # a masked array's values count, masked or not
    found = f"got {frame.dtype} {frame.shape}"
    if frame.dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.float32):
        advice = "Use frame.astype(numpy.float32)." if frame.dtype.kind == "f" else "Convert it without losing values."
        raise FrameError("frame", found, "expected uint8, uint16 or float32 (H, W) or (H, W, 3)", advice)
    if frame.ndim not in (2, 3) or (frame.ndim == 3 and frame.shape[2] != 3):
        advice = {
            (3, 4): "Drop the alpha channel: frame[..., :3].",
            (3, 1): "Drop the last axis: frame[..., 0].",
        }.get((frame.ndim, frame.shape[-1] if frame.ndim else 0), "Give one frame, channels last.")
        raise FrameError("frame", found, f"expected {frame.dtype} (H, W) or (H, W, 3)", advice)
    rows, columns = frame.shape[:2]
    if not rows * columns:
        raise FrameError("frame", f"{found}: no pixels", "expected at least 1 x 1", "Check the crop or the capture.")
    if rows * columns > MAX_PIXELS:
        raise FrameError(
            "frame", f"{found}: {rows * columns} pixels", f"expected at most {MAX_PIXELS}", "Downscale it."
        )
    if max(rows, columns) > MAX_SIDE:
        raise FrameError("frame", found, f"expected at most {MAX_SIDE} rows and columns", "Downscale or tile it.")
    frame = frame.astype(frame.dtype.newbyteorder("="), copy=False)
    if frame.dtype == np.float32:
        _check_values(frame)
    if bits is not None:
        _check_bits(frame, bits)
    return frame


def cut(frame: NDArray[Any], region: tuple[int, ...]) -> tuple[NDArray[Any], tuple[int, int, int, int]]:
    """The region (top, left, rows, columns) of a frame, and its four as ints. Raises FrameError unless it is within."""
    whole = isinstance(region, tuple | list) and all(isinstance(value, int | np.integer) for value in region)
    if whole and len(region) == 4 and frame.ndim in (2, 3):
        top, left, rows, columns = map(int, region)
        if 0 <= top < top + rows <= frame.shape[0] and 0 <= left < left + columns <= frame.shape[1]:
            return frame[top : top + rows, left : left + columns], (top, left, rows, columns)
    raise FrameError(
        "region",
        f"got {region} of a frame {frame.shape}",
        "expected (top, left, rows, columns) within it",
        "Check it.",
    )


def _check_values(frame: NDArray[np.float32]) -> None:
    low, high = float(frame.min()), float(frame.max())  # NaN if any value is
    if low >= 0 and high <= 1:
        return
    if not np.isfinite([low, high]).all():
        kind = "NaN" if np.isnan(low) else "infinity"
        raise FrameError(
            "frame", f"got {kind} among its values", "expected finite float32 in [0, 1]", "Check the source."
        )
    raise FrameError(
        "frame",
        f"got float32 from {low:g} to {high:g}",
        "expected values in [0, 1]",
        "Divide by the type's largest value.",
    )


def _check_bits(frame: NDArray[Any], bits: int) -> None:
    whole = isinstance(bits, int | np.integer) and not isinstance(bits, bool)
    if frame.dtype != np.uint16 or not whole or not 1 <= bits <= 16:
        raise FrameError(
            "bits", f"got {bits!r} for {frame.dtype}", "expected 1 to 16, and only for uint16", "Leave it out."
        )
    if (largest := int(frame.max())) >= 2 ** int(bits):
        raise FrameError("frame", f"got the value {largest}", f"expected less than 2**{bits}", "Give the bits stored.")


def bilinear_table(source: int, target: int) -> NDArray[np.float32]:
    """(target, source) weights of antialiased bilinear resizing along one axis; each row sums to 1.

    Output i lies at (i + 1/2) source / target of the input; input j weighs 1 - |j + 1/2 - that| / s, not below 0, with
    s = max(1, source / target): Pillow's BILINEAR filter.
    """
    return _triangles(source, target).astype(np.float32)


def _triangles(source: int, target: int) -> NDArray[np.float64]:
    scale = source / target
    centre = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(source) + 0.5 - centre[:, None]) / max(1.0, scale)
    weights = np.clip(1 - distance, 0, None)
    normalised: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
    return normalised


def fixed_table(source: int, target: int) -> NDArray[np.float32]:
    """`bilinear_table` in multiples of `WEIGHT_STEP`: the running sums of a row are rounded, so that it still sums to 1
    and the table is still its own mirror image.
    """
    running = np.cumsum(_triangles(source, target), axis=1) / WEIGHT_STEP
    # What a half becomes must not hang on a last bit, in which a row differs from its mirror image.
    return (np.diff(np.rint(running.round(6)), prepend=0) * WEIGHT_STEP).astype(np.float32)


def spline_table(source: int, target: int) -> NDArray[np.float32]:
    """(target, source) weights of the released pipeline's resizing along one axis: an interpolating cubic spline.

    Output i lies at i (source - 1) / (target - 1), so that the ends meet; beyond them the input is mirrored about its
    end samples. Equal to `scipy.ndimage.zoom(order=3)`, but for the end samples that scipy loses at some lengths.
    Nothing is blurred before it is reduced, and values can overshoot those of the input.
    """
    position = np.arange(target) * ((source - 1) / max(1, target - 1))
    # The interpolating spline as a kernel: the B-spline's inverse filter is sqrt(3) z^|k|, which has faded to 1e-12.
    z, reach = math.sqrt(3) - 2, 21
    near = np.floor(position).astype(np.intp)
    knots = np.arange(-reach, reach + 1)
    filtered = math.sqrt(3) * z ** np.abs(knots)
    weights = np.zeros((target, source))
    rows = np.arange(target)[:, None]
    for offset in (-1, 0, 1, 2):
        distance = np.abs(position - near - offset)
        spline = np.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6)
        index = near[:, None] + offset + knots
        if source > 1:
            index = np.abs(index) % (2 * (source - 1))
            index = np.minimum(index, 2 * (source - 1) - index)
        else:
            index = np.zeros_like(index)
        np.add.at(weights, (rows, index), spline[:, None] * filtered)
    return weights.astype(np.float32)


_TABLES = {"bilinear": bilinear_table, "bilinear-fixed": fixed_table, "spline": spline_table}


@lru_cache(maxsize=32)
def resize_table(rule: str, source: int, target: int) -> NDArray[np.float32]:
    """The (target, source) weight table of a resize rule; read-only, since it is shared."""
    table = _TABLES[rule](source, target)
    table.setflags(write=False)
    return table


def place(contract: InputContract, rows: int, columns: int) -> Placement:
    """Where a rows x columns frame goes: everywhere for "stretch"; for "letterbox" centred, its aspect kept."""
    if contract.fit == "stretch":
        return Placement(0, 0, contract.height, contract.width)
    scale = min(contract.height / rows, contract.width / columns)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    return Placement((contract.height - height) // 2, (contract.width - width) // 2, height, width)


def resize(image: NDArray[Any], rule: str, height: int, width: int) -> NDArray[np.float32]:
    """(H, W, C) of any real dtype -> (C, height, width) float32, in the values' own scale; of uint8 by the rule
    "bilinear-fixed", multiples of `GREY_STEP`.
    """
    rows, columns, channels = image.shape
    exact = image.dtype == np.uint8 and rule == "bilinear-fixed"
    if rows == height:
        narrowed = image.astype(np.float32)
    else:
        narrowed = _apply(rule, height, image.reshape(rows, columns * channels), exact)
        narrowed = narrowed.reshape(height, columns, channels)
    planes = np.ascontiguousarray(narrowed.transpose(2, 0, 1))
    if columns == width:
        return planes
    narrowed = _apply(rule, width, planes.reshape(channels * height, columns).T, exact)
    return np.ascontiguousarray(narrowed.T).reshape(channels, height, width)


def reserve_memory() -> None:
    """OpenBLAS takes its memory at the first product, for good, and ends the process where there is none: done when a
    predictor is loaded, it is not done with a frame in hand.
    """
    resize(np.zeros((300, 400, 3), np.uint8), "bilinear", 224, 224)


def _apply(rule: str, target: int, pixels: NDArray[Any], exact: bool) -> NDArray[np.float32]:
    """Resizes the first axis: (source, N) of any real dtype -> (target, N) float32, in products of `_ONE_THREAD`.

    exact   round the results to multiples of `GREY_STEP`
    """
    source, count = pixels.shape
    table = resize_table(rule, source, target)
    out = np.empty((target, count), np.float32)
    for start in range(0, target, _BAND):
        band = table[start : start + _BAND]
        used = np.flatnonzero(band.any(0))
        first, last = used[0], used[-1] + 1
        wide = max(1, _ONE_THREAD // (len(band) * (last - first)))
        for at in range(0, count, wide):
            part = band[:, first:last] @ pixels[first:last, at : at + wide].astype(np.float32, copy=False)
            if exact:
                part += ROUNDING
                part -= ROUNDING
            out[start : start + _BAND, at : at + wide] = part
    return out


def check_channels(frame: NDArray[Any], contract: InputContract) -> None:
    """Raises FrameError if the frame is in colour and the network takes grey only."""
    if frame.ndim == 3 and contract.channels == 1:
        raise FrameError(
            "frame", f"got {frame.shape}", "expected (H, W): the network takes grey", "Convert it to grey."
        )


def largest_value(dtype: np.dtype[Any], bits: int | None) -> int:
    """That a checked frame can hold; `bits` as in `check_frame`."""
    return 1 if dtype == np.float32 else (1 << int(bits or 8 * dtype.itemsize)) - 1


def to_tensor(frame: NDArray[Any], contract: InputContract, bits: int | None = None) -> NDArray[np.float32]:
    """A checked frame (see `check_frame`) -> the network's input, (1, C, h, w) float32, contiguous.

    Raises FrameError as `check_channels`.
    """
    check_channels(frame, contract)
    colour = frame.ndim == 3
    placement = place(contract, *frame.shape[:2])
    image = frame if colour else frame[:, :, None]
    planes = resize(image, contract.resize, placement.height, placement.width)
    if frame.dtype != np.float32:
        planes /= largest_value(frame.dtype, bits)
    tensor = np.zeros((1, contract.channels, contract.height, contract.width), np.float32)
    rows = slice(placement.top, placement.top + placement.height)
    columns = slice(placement.left, placement.left + placement.width)
    tensor[0, :, rows, columns] = planes  # grey is repeated by broadcasting
    mean = np.asarray(contract.mean, np.float32)[:, None, None]
    std = np.asarray(contract.std, np.float32)[:, None, None]
    return (tensor - mean) / std
