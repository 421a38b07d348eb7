"""Procedural, seeded phantoms of two imaging modalities, each with its exact lesion mask.

The pictures imitate what makes segmentation hard in dermoscopy (hairs, vignette, rulers, uneven light) and
in B-mode ultrasound (speckle, depth gain, shadows, fan geometry). They are synthetic, were compared with no
patient data and have NO CLINICAL MEANING: they exist to train and exercise the demo network only.

A scene is drawn from ``PCG64([seed, index of kind])``; pixel-sized noise comes from a second generator
spawned from it, so the same seed in another size shows about the same scene. On one machine and number of BLAS
threads a phantom is the same to the bit; elsewhere a pixel may differ by a grey level where a sum rounds otherwise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

KINDS = ("dermoscopy", "ultrasound")
SIZE = 224
MIN_SIZE = 32

Float = NDArray[np.float32]
Points = NDArray[np.float64]  # (n, 2), px
Mask = NDArray[np.bool_]
Rng = np.random.Generator

LESION_FREE = {"dermoscopy": 0.08, "ultrasound": 0.12}  # share of frames without a lesion
AREA_SHARE = {"dermoscopy": (0.022, 0.34), "ultrasound": (0.024, 0.30)}  # drawn lesion area / frame area

# Skin reflectance (RGB) from very fair to dark; a frame mixes two neighbours.
SKIN_TONES = np.array(
    [
        [0.93, 0.77, 0.71],
        [0.89, 0.70, 0.61],
        [0.86, 0.65, 0.54],
        [0.78, 0.57, 0.45],
        [0.65, 0.46, 0.36],
        [0.52, 0.37, 0.29],
    ]
)
# Absorption per RGB channel (Beer-Lambert): melanin is brown, blood red, deep (Tyndall) pigment grey-blue.
MELANIN = np.array([0.60, 1.00, 1.25], np.float32)
BLOOD = np.array([0.12, 0.90, 0.75], np.float32)
DEEP_PIGMENT = np.array([1.25, 0.95, 0.60], np.float32)
BSPLINE_POWER = 0.479  # mean sum of squared cubic B-spline weights: rescales enlarged noise to unit variance


@dataclass(frozen=True)
class Phantom:
    """One synthetic frame and the region that was drawn as lesion."""

    kind: str
    seed: int
    image: NDArray[np.uint8]  # (H, W, 3), RGB
    mask: NDArray[np.uint8]  # (H, W), 0 background, 1 lesion


def phantom(kind: str, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Phantom:
    """The phantom of one kind and seed at ``size`` = (height, width)."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    if seed < 0:
        raise ValueError(f"seed {seed} is negative: expected 0 or more")
    if min(size) < MIN_SIZE:
        raise ValueError(f"size {size[0]}x{size[1]} is too small: expected at least {MIN_SIZE}x{MIN_SIZE}")
    rng = np.random.Generator(np.random.PCG64([seed, KINDS.index(kind)]))
    noise = rng.spawn(1)[0]
    draw = _dermoscopy if kind == "dermoscopy" else _ultrasound
    image, mask = draw(rng, noise, (int(size[0]), int(size[1])))
    pixels = (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return Phantom(kind, seed, pixels, mask.astype(np.uint8))


# -------------------------------------------------------------------------------------------- building blocks


@lru_cache(maxsize=64)
def frames(shape: tuple[int, ...], count: int, seed: int) -> list[NDArray[np.uint8]]:
    """Phantoms of both kinds in turn as (H, W, 3) or (H, W) frames, contiguous; their seeds count from `seed`."""
    images = (phantom(KINDS[i % len(KINDS)], seed + i, (shape[0], shape[1])).image for i in range(count))
    return [np.ascontiguousarray(image if len(shape) == 3 else image[..., 1]) for image in images]


def _bspline_matrix(length: int, cells: int) -> Float:
    """(length, cells + 3) cubic B-spline weights that enlarge a row of knots to ``length`` samples."""
    position = (np.arange(length) + 0.5) / length * cells
    knot = np.minimum(position.astype(int), cells - 1)
    t = position - knot
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    matrix = np.zeros((length, cells + 3), np.float32)
    for offset, weight in enumerate(weights):
        matrix[np.arange(length), knot + offset] = weight / 6
    return matrix


@lru_cache(maxsize=256)
def _gauss_matrix(length: int, sigma_px: float) -> Float:
    """(length, length) Gaussian blur along one axis; a dense product is fast at these sizes."""
    index = np.arange(length)
    kernel = np.exp(-0.5 * ((index[:, None] - index[None, :]) / sigma_px) ** 2)
    return np.asarray(kernel / kernel.sum(axis=1, keepdims=True), np.float32)


def _blur(image: Float, sigma_y: float, sigma_x: float) -> Float:
    """Separable Gaussian blur of (..., H, W); sigmas in px, rounded to 0.1 so that matrices are reused."""
    rows, columns = image.shape[-2:]
    sigma_y, sigma_x = round(float(sigma_y), 1), round(float(sigma_x), 1)
    if sigma_y > 0:
        image = np.asarray(_gauss_matrix(rows, sigma_y) @ image, np.float32)
    return np.asarray(image @ _gauss_matrix(columns, sigma_x).T if sigma_x > 0 else image, np.float32)


def _sample(image: Float, row: Float, column: Float) -> Float:
    """Bilinear look-up at fractional positions; outside, the edge value is repeated."""
    rows, columns = image.shape
    row, column = np.clip(row, 0, rows - 1.001), np.clip(column, 0, columns - 1.001)
    r, c = row.astype(np.int32), column.astype(np.int32)
    fr, fc = row - r.astype(np.float32), column - c.astype(np.float32)
    flat, at = image.ravel(), r * columns + c
    upper = flat.take(at) * (1 - fc) + flat.take(at + 1) * fc
    lower = flat.take(at + columns) * (1 - fc) + flat.take(at + columns + 1) * fc
    return np.asarray(upper + (lower - upper) * fr, np.float32)


def _smooth_noise(rng: Rng, shape: tuple[int, int], rows: int, columns: int | None = None) -> Float:
    """Unit-variance smooth noise with that many knots; the random draw does not depend on ``shape``."""
    columns = rows if columns is None else columns
    knots = rng.standard_normal((rows + 3, columns + 3), dtype=np.float32) / np.float32(BSPLINE_POWER)
    return np.asarray(_bspline_matrix(shape[0], rows) @ knots @ _bspline_matrix(shape[1], columns).T)


def _step(distance: NDArray[np.floating[Any]], width: float) -> Float:
    """Smooth 1 (negative distance) to 0 (positive distance) over about ``width``."""
    ramp = np.clip(0.5 - distance / np.float32(width), 0.0, 1.0)
    return np.asarray(ramp * ramp * (3.0 - 2.0 * ramp), np.float32)


def _strokes(shape: tuple[int, int], curves: Sequence[Points], widths_px: Sequence[float]) -> Float:
    """Anti-aliased coverage (0..1) of polylines of (y, x) px points, each with its own width."""
    spacing = 0.5  # px between splats along a line; bilinear splats of the right area sum to full coverage
    splats = [np.empty((3, 0))]
    for curve, width in zip(curves, widths_px, strict=True):
        along = np.concatenate(([0.0], np.cumsum(np.hypot(*np.diff(curve, axis=0).T))))
        s = np.arange(0.0, along[-1], spacing)
        if s.size < 2:
            continue
        centre = np.stack([np.interp(s, along, curve[:, axis]) for axis in (0, 1)])
        tangent = np.gradient(centre, axis=1)
        normal = np.stack([tangent[1], -tangent[0]]) / np.maximum(np.hypot(*tangent), 1e-6)
        lanes = max(1, round(width / spacing))
        across = (np.arange(lanes) - (lanes - 1) / 2) * width / lanes
        points = (centre[:, :, None] + normal[:, :, None] * across).reshape(2, -1)
        splats.append(np.vstack([points, np.full((1, points.shape[1]), spacing * width / lanes)]))
    y, x, area = np.concatenate(splats, axis=1)
    inside = (y >= 0) & (y < shape[0] - 1) & (x >= 0) & (x < shape[1] - 1)
    y, x, area = y[inside], x[inside], area[inside]
    row, column = y.astype(np.int64), x.astype(np.int64)
    fy, fx = y - row, x - column
    cover = np.zeros(shape[0] * shape[1])
    for down, weight_y in ((0, 1 - fy), (1, fy)):
        for right, weight_x in ((0, 1 - fx), (1, fx)):
            at = (row + down) * shape[1] + column + right
            cover += np.bincount(at, weight_y * weight_x * area, cover.size)
    return np.minimum(cover, 1.0).reshape(shape).astype(np.float32)


def _bezier(rng: Rng, shape: tuple[int, int], length: float, bend: float) -> Points:
    """A curved line of (y, x) px points at a random place and angle; length as a share of the short side."""
    middle, angle = rng.uniform(0.0, 1.0, 2) * shape, rng.uniform(0.0, math.pi)
    along = np.array([math.sin(angle), math.cos(angle)]) * length * min(shape) / 2
    control = middle + np.array([along[1], -along[0]]) * rng.normal(0.0, bend)
    t = np.linspace(0.0, 1.0, 24)[:, None]
    return np.asarray((1 - t) ** 2 * (middle - along) + 2 * t * (1 - t) * control + t**2 * (middle + along))


def _pixels(shape: tuple[int, int]) -> tuple[Float, Float]:
    """Row and column index of every pixel."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    return y, x


def _contour_field(
    rng: Rng, shape: tuple[int, int], centre: tuple[float, float], radius: float, roughness: float, lobes: int
) -> Float:
    """Signed field (px, negative inside) of a star-shaped Fourier contour on a warped domain."""
    y, x = _pixels(shape)
    warp = radius * roughness * 0.22
    dy = y - centre[0] + warp * _smooth_noise(rng, shape, 9)
    dx = x - centre[1] + warp * _smooth_noise(rng, shape, 9)
    tilt, stretch = rng.uniform(0.0, math.pi), math.exp(rng.uniform(0.0, 0.21))
    u = (dx * math.cos(tilt) + dy * math.sin(tilt)) / stretch
    v = (dy * math.cos(tilt) - dx * math.sin(tilt)) * stretch
    angle = np.linspace(-math.pi, math.pi, 721)
    outline = np.ones_like(angle)
    for k in range(2, 9):
        outline += roughness * rng.normal(0.0, 0.32) / k * np.cos(k * angle + rng.uniform(0.0, 2 * math.pi))
    if lobes:  # rounded bulges between sharp notches; 0.64 is the mean of |sin|
        outline += 0.22 * (np.abs(np.sin(lobes * angle / 2 + rng.uniform(0.0, math.pi))) - 0.64)
    table = (radius * outline / np.sqrt(np.mean(outline**2))).astype(np.float32)  # area stays pi * radius**2
    index = ((np.arctan2(v, u) + math.pi) * (720 / (2 * math.pi))).astype(np.int32)
    field = np.hypot(u, v) - table[np.clip(index, 0, 720)]
    return np.asarray(field + 0.035 * radius * roughness * _smooth_noise(rng, shape, 40), np.float32)


def _single_lesion(
    rng: Rng, visible: Mask, centre: tuple[float, float], radius: float, roughness: float, lobes: int = 0
) -> tuple[Float, Mask]:
    """Field and visible region of one lesion; smoother contours are tried until no piece stands apart."""
    shape = (visible.shape[0], visible.shape[1])
    for smoother in range(5):
        field = _contour_field(rng, shape, centre, radius, roughness * 0.6**smoother, lobes)
        region = (field < 0) & visible
        largest = _largest_component(region)
        if region.sum() <= 1.002 * largest.sum():  # what remains apart is a speck nobody sees
            break
    return field, largest


def _largest_component(mask: Mask) -> Mask:
    """The largest 4-connected component, from row runs joined by minimum-label propagation."""
    height, width = mask.shape
    padded = np.zeros((height, width + 1), np.int8)
    padded[:, :width] = mask
    edges = np.diff(padded.ravel(), prepend=np.int8(0))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if starts.size == 0:
        return np.zeros_like(mask)
    first = np.searchsorted(ends, starts + width + 1, side="right")  # next-row runs that touch
    last = np.searchsorted(starts, ends + width + 1, side="left")
    count = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(starts.size), count)
    lower = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    label = np.arange(starts.size)
    while True:
        joined = np.minimum(label[upper], label[lower])
        if np.array_equal(label[upper], label[lower]):
            break
        np.minimum.at(label, label[upper], joined)
        np.minimum.at(label, label[lower], joined)
        while not np.array_equal(label, label[label]):
            label = label[label]
    largest = np.bincount(label, weights=ends - starts).argmax()
    signs = np.zeros(padded.size, np.int8)
    keep = label == largest
    signs[starts[keep]] += 1
    signs[ends[keep]] -= 1
    return np.asarray(np.cumsum(signs, dtype=np.int8).reshape(padded.shape)[:, :width] == 1)


def otsu_largest_component(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Baseline: Otsu threshold of the grey level, dark side, largest 4-connected component, as 0/1 mask."""
    pixels = np.asarray(image, np.float32)
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32) if pixels.ndim == 3 else pixels
    level = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    share = np.bincount(level.ravel(), minlength=256) / level.size
    below = np.cumsum(share)
    moment = np.cumsum(share * np.arange(256))
    spread = np.maximum(below * (1.0 - below), 1e-12)
    between = (moment[-1] * below - moment) ** 2 / spread  # between-class variance at every threshold
    return _largest_component(level <= between.argmax()).astype(np.uint8)


# ------------------------------------------------------------------------------------------------- dermoscopy


def _dermoscopy(rng: Rng, noise: Rng, shape: tuple[int, int]) -> tuple[Float, Mask]:
    """A contact-dermoscopy frame: skin and lesion as absorbance, things lying on the skin, optics, camera."""
    absorbance = _skin(rng, noise, shape)
    light, visible = _optics(rng, shape)
    mask = np.zeros(shape, bool)
    if rng.random() >= LESION_FREE["dermoscopy"]:
        mask = _pigmented_lesion(rng, absorbance, visible)
    if rng.random() < 0.22:
        _ink(rng, absorbance)
    skin = np.exp(-absorbance)
    for artefact, chance in ((_bubbles, 0.3), (_ruler, 0.3), (_hairs, 0.65)):
        if rng.random() < chance:
            artefact(rng, skin)
    return _camera(rng, noise, skin * light[..., None]), mask


def _skin(rng: Rng, noise: Rng, shape: tuple[int, int]) -> Float:
    """Absorbance of skin: one tone with slow colour drift, mottling, fine relief and freckles."""
    tone = rng.beta(1.2, 1.8) * (len(SKIN_TONES) - 1)
    low = min(int(tone), len(SKIN_TONES) - 2)
    base = SKIN_TONES[low] + (tone - low) * (SKIN_TONES[low + 1] - SKIN_TONES[low])
    base = base + rng.normal(0.0, 0.015, 3)
    redness = 0.07 * _smooth_noise(rng, shape, 3) + 0.03 * _smooth_noise(rng, shape, 14)
    pigment = 0.05 * _smooth_noise(rng, shape, 2) + rng.uniform(0.01, 0.03) * _smooth_noise(rng, shape, 30)
    pigment += _freckles(rng, shape)
    pigment += _blur(noise.standard_normal(shape, dtype=np.float32), 1.0, 1.0) * rng.uniform(0.02, 0.08)
    amount = np.stack([redness, pigment], axis=-1) @ np.stack([BLOOD, MELANIN])
    return np.asarray(amount - np.log(base).astype(np.float32), np.float32)


def _freckles(rng: Rng, shape: tuple[int, int]) -> Float:
    """Melanin of small round spots, far below the smallest lesion, that are not lesion."""
    count = int(rng.integers(1, 9)) if rng.random() < 0.6 else 0
    spread = rng.uniform(0.006, 0.016, count) * min(shape)
    depth = rng.uniform(0.15, 0.5, count)
    rows, columns = (
        np.exp(-0.5 * ((np.arange(side)[:, None] - rng.uniform(0.0, 1.0, count) * side) / spread) ** 2)
        for side in shape
    )
    return np.asarray((rows * depth) @ columns.T, np.float32)


def _pigmented_lesion(rng: Rng, absorbance: Float, visible: Mask) -> Mask:
    """Adds the pigment of a lesion to ``absorbance`` and returns its visible region."""
    shape = (visible.shape[0], visible.shape[1])
    area = math.exp(rng.uniform(*np.log(AREA_SHARE["dermoscopy"])))
    radius = math.sqrt(area * shape[0] * shape[1] / math.pi)
    reach = [max(0.04, 0.36 - 0.75 * radius / side) for side in shape]  # large lesions stay nearer the middle
    cy, cx = (side * float(0.5 + rng.uniform(-r, r)) for side, r in zip(shape, reach, strict=True))
    field, region = _single_lesion(rng, visible, (cy, cx), radius, rng.uniform(0.25, 1.0))
    cover = _step(field, min(shape) * rng.uniform(0.008, 0.05))
    inner = _step(field + radius * 0.35, radius * 0.5)  # 1 in the core, 0 at the border

    strength = 0.30 + 1.1 * rng.beta(1.0, 2.6)  # optical density in green; most lesions are of low contrast
    amount = 1.0 + 0.22 * _smooth_noise(rng, shape, 5) + 0.10 * _smooth_noise(rng, shape, 24)
    amount += inner * rng.uniform(-0.25, 0.7) + _pigment_structure(rng, shape)
    if rng.random() < 0.35:  # regression: a pale scar-like patch that never reaches the border
        amount -= 0.7 * inner * _step(0.4 - _smooth_noise(rng, shape, 5), 0.6)
    amount = np.maximum(amount, 0.65 - 0.3 * inner) * strength * cover  # the border keeps its contrast

    veil = inner * _step(0.3 - _smooth_noise(rng, shape, 4), 0.8) * (0.8 if rng.random() < 0.35 else 0.0)
    redness = float(rng.choice([0.1, 0.35, 0.8], p=[0.5, 0.3, 0.2]))
    red = np.clip(redness * (1.0 + 0.5 * _smooth_noise(rng, shape, 6)), 0.0, 1.0) * (1.0 - veil)
    brown = np.clip(1.0 - veil - 0.8 * red, 0.0, 1.0)
    shares = np.stack([brown, red, veil], axis=-1) * amount[..., None]
    absorbance += shares.astype(np.float32) @ np.stack([MELANIN, BLOOD, DEEP_PIGMENT])
    return region


def _pigment_structure(rng: Rng, shape: tuple[int, int]) -> Float:
    """Relative pigment of a network (warped hexagonal mesh), of globules, or of neither."""
    pattern, depth = rng.random(), rng.uniform(0.12, 0.4)
    if pattern < 0.4:
        pitch = rng.uniform(0.028, 0.05) * min(shape)
        y, x = (axis + 0.5 * pitch * _smooth_noise(rng, shape, 12) for axis in _pixels(shape))
        mesh = np.full(shape, -0.3, np.float32)
        for angle in (0.0, math.pi / 3, 2 * math.pi / 3):
            mesh += np.cos((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / pitch))
        return np.asarray(-0.7 * depth * mesh)
    if pattern < 0.7:
        return np.asarray(2.2 * depth * _step(1.0 - _smooth_noise(rng, shape, 30), 0.6))
    return np.zeros(shape, np.float32)


def _ink(rng: Rng, absorbance: Float) -> None:
    """Surgical-marker strokes in violet or blue, broad and partly transparent."""
    shape = (absorbance.shape[0], absorbance.shape[1])
    curves = [_bezier(rng, shape, rng.uniform(0.3, 1.1), 0.5) for _ in range(int(rng.integers(1, 4)))]
    cover = _strokes(shape, curves, [rng.uniform(2.5, 8.0) * min(shape) / SIZE for _ in curves])
    cover *= np.clip(0.8 + 0.15 * _smooth_noise(rng, shape, 40), 0.3, 1.0) * rng.uniform(0.5, 1.0)
    violet, blue = [1.5, 1.7, 0.6], [1.9, 1.2, 0.4]
    absorbance += cover[..., None] * np.array(violet if rng.random() < 0.5 else blue, np.float32)


def _bubbles(rng: Rng, skin: Float) -> None:
    """Gel bubbles: thin bright rings with a highlight."""
    shape = (skin.shape[0], skin.shape[1])
    curves, widths = [], []
    for _ in range(int(rng.integers(2, 12))):
        centre, radius = rng.uniform(0.0, 1.0, 2) * shape, rng.uniform(0.008, 0.05) * min(shape)
        angle = np.linspace(0.0, rng.uniform(4.0, 6.3), 40) + rng.uniform(0.0, 6.0)
        curves += [centre + radius * np.stack([np.sin(angle), np.cos(angle)], axis=1)]
        curves += [centre - radius * 0.45 + np.array([[0.0, 0.0], [0.0, 0.25 * radius + 1.0]])]
        widths += [rng.uniform(0.6, 1.4) * min(shape) / SIZE, rng.uniform(1.0, 2.5) * min(shape) / SIZE]
    skin += _strokes(shape, curves, widths)[..., None] * rng.uniform(0.3, 0.8) * (1.0 - skin)


def _ruler(rng: Rng, skin: Float) -> None:
    """Tick marks along one edge, dark or bright, sometimes with a scale bar."""
    height, width = skin.shape[:2]
    unit, edge = min(height, width), int(rng.integers(4))
    pitch, inset = rng.uniform(0.03, 0.07) * unit, rng.uniform(0.01, 0.05) * unit
    marks = [  # (distance from the edge, position along it)
        np.array([[inset, at], [inset + (0.07 if index % 5 == 0 else 0.04) * unit, at]])
        for index, at in enumerate(np.arange(rng.uniform(0.0, pitch), height if edge >= 2 else width, pitch))
    ]
    if rng.random() < 0.5:
        start = np.array([inset + 0.1 * unit, rng.uniform(0.05, 0.6) * unit])
        marks.append(np.stack([start, start + np.array([0.0, 0.25 * unit])]))
    if edge % 2:
        far = (width if edge == 3 else height) - 1
        marks = [np.array([far, 0.0]) + mark * np.array([-1.0, 1.0]) for mark in marks]
    curves = [mark[:, ::-1] if edge >= 2 else mark for mark in marks]
    cover = _strokes((height, width), curves, [1.3 * unit / SIZE] * len(curves))[..., None]
    skin += cover * rng.uniform(0.5, 0.9) * (float(rng.choice([0.08, 0.95])) - skin)


def _hairs(rng: Rng, skin: Float) -> None:
    """Curved hairs, dark mostly, else light; many cross the frame and the lesion."""
    shape = (skin.shape[0], skin.shape[1])
    count = min(1 + int(rng.exponential(7.0)), 28)
    curves = [_bezier(rng, shape, rng.uniform(0.3, 1.4), 0.35) for _ in range(count)]
    widths = [max(0.5, rng.normal(1.2, 0.4)) * min(shape) / SIZE for _ in curves]
    dark = rng.random() < 0.8
    colour = np.array([0.13, 0.09, 0.07] if dark else [0.92, 0.86, 0.74], np.float32)
    opacity = rng.uniform(0.55, 0.95) if dark else rng.uniform(0.4, 0.7)
    skin += _strokes(shape, curves, widths)[..., None] * opacity * (colour - skin)


def _optics(rng: Rng, shape: tuple[int, int]) -> tuple[Float, Mask]:
    """Uneven lighting, vignette and in part a black field stop; also the region that stays visible."""
    y, x = ((axis / side - 0.5) for axis, side in zip(_pixels(shape), shape, strict=True))
    cy, cx = (float(offset) for offset in rng.normal(0.0, 0.03, 2))
    radius = np.hypot((y - cy) * shape[0], (x - cx) * shape[1]) * (2.0 / min(shape))  # 1 at the nearer edges
    light = 1.0 + rng.normal(0.0, 0.14) * y + rng.normal(0.0, 0.14) * x
    light -= rng.uniform(0.05, 0.5) * np.clip(radius / 1.41, 0.0, 1.2) ** rng.uniform(2.0, 4.0)
    visible = np.ones(shape, bool)
    stop = rng.random()
    if stop < 0.40:  # field stop of the contact plate: corners or a whole rim go black
        edge = radius - rng.uniform(0.92, 1.25)
        light *= 0.04 + 0.96 * _step(edge, rng.uniform(0.02, 0.15))
        visible = edge < 0
    elif stop < 0.70:  # corners shaded by the hood
        light *= 1.0 - rng.uniform(0.4, 0.85) * _step(rng.uniform(1.0, 1.3) - radius, rng.uniform(0.25, 0.6))
    return np.asarray(np.clip(light, 0.0, 1.5), np.float32), np.asarray(visible)


def _camera(rng: Rng, noise: Rng, scene: Float) -> Float:
    """White balance, exposure, focus blur, sensor noise and block-transform (JPEG-like) quantisation."""
    gains = np.exp(rng.normal(0.0, 0.05, 3) + rng.normal(0.0, 0.12)).astype(np.float32)
    sigma = rng.uniform(0.3, 0.9) * min(scene.shape[:2]) / SIZE
    channels = _blur(np.ascontiguousarray(np.moveaxis(scene * gains, -1, 0)), sigma, sigma)
    channels **= rng.uniform(0.85, 1.2)
    grain = noise.standard_normal(scene.shape[:2], dtype=np.float32) * rng.uniform(0.004, 0.018)
    if rng.random() < 0.5:
        grain += _block_quantisation_error(channels.mean(axis=0), rng.uniform(0.01, 0.05))
    return np.moveaxis(channels + grain, 0, -1)


def _block_quantisation_error(grey: Float, step: float) -> Float:
    """What rounding the 8x8 cosine coefficients, coarser at higher frequency, adds to a picture."""
    k = np.arange(8)
    scale = np.sqrt(np.where(k == 0, 0.125, 0.25))[:, None]
    basis = (np.cos(math.pi * (k[None, :] + 0.5) * k[:, None] / 8) * scale).astype(np.float32)
    table = (step * (1.0 + k[:, None] + k[None, :])).astype(np.float32)
    rows, columns = grey.shape[0] // 8, grey.shape[1] // 8
    blocks = grey[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8).swapaxes(1, 2)
    coefficients = basis @ blocks @ basis.T
    change = basis.T @ (np.rint(coefficients / table) * table - coefficients) @ basis
    error = np.zeros_like(grey)
    error[: rows * 8, : columns * 8] = change.swapaxes(1, 2).reshape(rows * 8, columns * 8)
    return error


# ------------------------------------------------------------------------------------------------- ultrasound


@dataclass(frozen=True)
class _Scan:
    """Where beam samples (depth rows, beam columns) lie on the screen, and the way back."""

    y: Float  # screen px of every beam sample
    x: Float
    row: Float  # beam-grid position of every screen pixel
    column: Float
    visible: Mask


def _scan_geometry(rng: Rng, shape: tuple[int, int]) -> _Scan:
    """A linear array (rectangle) or a sector / curvilinear fan with black outside."""
    height, width = shape
    y, x = _pixels(shape)
    depth, lateral = y / (height - 1), x / (width - 1)
    if rng.random() < 0.55:
        inset = rng.uniform(0.0, 0.06, 2) if rng.random() < 0.6 else np.zeros(2)
        top, side = float(inset[0]) * height, float(inset[1]) * width
        tall, wide = height * rng.uniform(0.96, 1.0) - top, width - 2 * side
        beam_y, beam_x = top + depth * tall, side + lateral * wide
        row, column = (y - top) / tall, (x - side) / wide
    else:
        half = math.radians(rng.uniform(28.0, 40.0))
        sector = rng.random() < 0.4
        face = rng.uniform(0.03, 0.08) if sector else rng.uniform(0.22, 0.42)  # probe radius / outer radius
        outer = min(0.53 * width / math.sin(half), 0.97 * height / (1 - face * math.cos(half)))
        apex_y, apex_x = 0.015 * height - face * outer * math.cos(half), width * (0.5 + rng.normal(0.0, 0.01))
        radius, angle = (face + depth * (1 - face)) * outer, (lateral * 2 - 1) * half
        beam_y, beam_x = apex_y + radius * np.cos(angle), apex_x + radius * np.sin(angle)
        row = (np.hypot(y - apex_y, x - apex_x) / outer - face) / (1 - face)
        column = (np.arctan2(x - apex_x, y - apex_y) / half + 1) / 2
    visible = (row >= 0) & (row <= 1) & (column >= 0) & (column <= 1)
    grids = (beam_y, beam_x, row * (height - 1), column * (width - 1))
    to_screen_y, to_screen_x, to_row, to_column = (np.asarray(grid, np.float32) for grid in grids)
    return _Scan(to_screen_y, to_screen_x, to_row, to_column, visible)


def _ultrasound(rng: Rng, noise: Rng, shape: tuple[int, int]) -> tuple[Float, Mask]:
    """A B-mode frame: echo and path levels (dB) on the beam grid, speckle, compression, scan conversion."""
    scan = _scan_geometry(rng, shape)
    echo = _tissue_layers(rng, shape)
    path = _gain_profile(rng, shape)
    mask, lesion = np.zeros(shape, bool), np.zeros(shape, bool)  # on the screen, on the beam grid
    if rng.random() >= LESION_FREE["ultrasound"]:
        field, mask = _place_lesion(rng, scan)
        beam_field = _sample(field, scan.y, scan.x)
        _draw_lesion(rng, beam_field, math.sqrt(float(mask.sum()) / math.pi), echo, path)
        lesion = beam_field < 0
    if rng.random() < 0.4:
        _vessels(rng, scan, echo, lesion)
    if rng.random() < 0.5:
        _bone_or_gas(rng, echo, path, lesion)
    grey = _compress(rng, _speckle(rng, noise, echo + path))
    picture = np.where(scan.visible, _sample(grey, scan.row, scan.column), np.float32(0.0))
    _furniture(rng, picture)
    return np.repeat(picture[..., None], 3, axis=2), mask


def _tissue_layers(rng: Rng, shape: tuple[int, int]) -> Float:
    """Skin, fat with septa, bright fascia lines, gland and striated muscle with wavy boundaries, in dB."""
    depth = np.linspace(0, 1, shape[0], dtype=np.float32)[:, None] + 0.02 * _smooth_noise(rng, shape, 4)
    wave = [rng.uniform(0.005, 0.03) * _smooth_noise(rng, (1, shape[1]), 1, 4) for _ in range(2)]
    skin_end = rng.uniform(0.025, 0.06)
    fat_end = skin_end + rng.uniform(0.07, 0.2) + wave[0]
    gland_end = rng.uniform(0.55, 0.85) + wave[1]
    septa = np.clip(1.0 - 3.0 * np.abs(_smooth_noise(rng, shape, 10, 7)), 0.0, 1.0)
    fat = rng.uniform(-9.0, -4.0) + 7.0 * septa
    gland = 2.0 * _smooth_noise(rng, shape, 6) + 1.2 * _smooth_noise(rng, shape, 18)
    phase = depth * rng.uniform(14.0, 30.0) + 0.5 * _smooth_noise(rng, shape, 5, 4)
    fibres = np.clip(np.cos(2 * math.pi * phase), 0.0, 1.0) ** 4
    muscle = rng.uniform(-7.0, -3.0) + 9.0 * fibres * (0.7 + 0.4 * _smooth_noise(rng, shape, 8, 5))
    below_fat, below_gland = _step(fat_end - depth, 0.02), _step(gland_end - depth, 0.02)
    echo = fat * (1 - below_fat) + gland * (below_fat - below_gland) + muscle * below_gland
    echo += (6.0 - fat) * _step(depth - skin_end, 0.02)
    for boundary in (fat_end, gland_end, gland_end + rng.uniform(0.06, 0.12)):
        line = np.exp(-(((depth - boundary) / rng.uniform(0.006, 0.013)) ** 2))
        echo += rng.uniform(5.0, 11.0) * line * np.clip(0.7 + 0.5 * _smooth_noise(rng, shape, 3, 6), 0.0, 1.3)
    return np.asarray(echo, np.float32)


def _place_lesion(rng: Rng, scan: _Scan) -> tuple[Float, Mask]:
    """Field (screen px) and region of a lesion that lies below the skin, mostly within the scanned field."""
    shape = (scan.y.shape[0], scan.y.shape[1])
    area = math.exp(rng.uniform(*np.log(AREA_SHARE["ultrasound"]))) * scan.y.size
    radius = math.sqrt(min(area, 0.26 * float(scan.visible.sum())) / math.pi)
    middle = shape[1] // 2
    need = radius / float(scan.y[-1, middle] - scan.y[0, middle])  # radius as a share of the depth range
    row = int((0.5 + (0.36 - min(need, 0.32)) * rng.uniform(-0.75, 1.0)) * (shape[0] - 1))
    room = 0.5 - min(0.42, radius / float(scan.x[row, -1] - scan.x[row, 0]))
    column = int((0.5 + room * rng.uniform(-0.9, 0.9)) * (shape[1] - 1))
    centre = (float(scan.y[row, column]), float(scan.x[row, column]))
    lobes = int(rng.choice([0, 3, 4, 5], p=[0.6, 0.15, 0.15, 0.1]))
    return _single_lesion(rng, scan.visible, centre, radius, rng.uniform(0.15, 0.75), lobes)


def _draw_lesion(rng: Rng, field: Float, radius: float, echo: Float, path: Float) -> None:
    """Writes the lesion's echo level and what it does to the beam behind it (enhancement or shadow)."""
    shape = (echo.shape[0], echo.shape[1])
    unit = min(shape)
    around = echo[(field > 0) & (field < 0.3 * radius)]
    low, high = np.percentile(around, [25, 75]) if around.size else (-3.0, 3.0)
    kind = str(rng.choice(["solid", "cyst", "shadowing", "bright"], p=[0.5, 0.18, 0.18, 0.14]))
    level, behind_db = {  # echo level of the lesion, and path level behind it
        "solid": (low - rng.uniform(7.0, 14.0), rng.uniform(0.0, 3.0)),
        "cyst": (low - rng.uniform(20.0, 28.0), rng.uniform(5.0, 9.0)),
        "shadowing": (low - rng.uniform(11.0, 16.0), -rng.uniform(4.0, 6.5)),
        "bright": (high + rng.uniform(2.0, 6.0), 0.0),
    }[kind]
    if kind == "bright":  # a thin dark halo, outside and not part of the lesion, marks the border
        echo -= 9.0 * np.exp(-(((field - 0.03 * unit) / (0.02 * unit)) ** 2))
    texture = 1.2 * _smooth_noise(rng, shape, 9) + 0.8 * _smooth_noise(rng, shape, 20)
    cover = _step(field, unit * rng.uniform(0.006, 0.025))
    echo += cover * (float(level) + texture * (0.3 if kind == "cyst" else 1.0) - echo)
    inside = (field < 0).astype(np.float32)
    through = np.minimum(np.cumsum(inside, axis=0) / (1.2 * radius + 1.0), 1.0) * (1.0 - inside)
    path += behind_db * _blur(through, 1.0 * unit / SIZE, 2.0 * unit / SIZE)


def _vessels(rng: Rng, scan: _Scan, echo: Float, lesion: Mask) -> None:
    """Thin dark tubes with bright walls, clear of the lesion."""
    unit = min(echo.shape)
    for _ in range(int(rng.integers(1, 3))):
        at = (int(rng.uniform(0.2, 0.9) * echo.shape[0]), int(rng.uniform(0.1, 0.9) * echo.shape[1]))
        tilt, half = rng.uniform(-0.5, 0.5), rng.uniform(0.010, 0.022) * unit
        length = rng.uniform(0.08, 0.2) * unit
        dy, dx = scan.y - scan.y[at], scan.x - scan.x[at]
        along = dx * math.cos(tilt) + dy * math.sin(tilt)
        off = dy * math.cos(tilt) - dx * math.sin(tilt) + 0.15 * along**2 / length
        distance = np.hypot(off, np.maximum(np.abs(along) - length, 0.0)) - half
        if not (lesion & (distance < 0.06 * unit)).any():
            echo += 6.0 * np.exp(-((distance / (0.008 * unit)) ** 2)) - 16.0 * _step(distance, 0.01 * unit)


def _bone_or_gas(rng: Rng, echo: Float, path: Float, lesion: Mask) -> None:
    """Bright caps with a clean (bone) or dirty (gas) shadow, where they hide nothing of the lesion."""
    shape = (echo.shape[0], echo.shape[1])
    depth = np.linspace(0, 1, shape[0], dtype=np.float32)[:, None]
    lateral = np.linspace(0, 1, shape[1], dtype=np.float32)[None, :]
    bone = rng.random() < 0.6
    for centre in np.arange(rng.uniform(-0.1, 0.3), 1.1, rng.uniform(0.3, 0.6)).tolist():
        half, top = rng.uniform(0.04, 0.12), rng.uniform(0.25, 0.8)
        off = np.abs(lateral - centre) / half
        surface = top + (0.05 * off**2 if bone else 0.015 * _smooth_noise(rng, (1, shape[1]), 1, 12))
        beam = _step(off - 1.0, rng.uniform(0.2, 0.6))
        if (lesion & (beam > 0.02) & (depth > surface - 0.08)).any():
            continue
        echo += rng.uniform(10.0, 17.0) * beam * np.exp(-(((depth - surface) / 0.014) ** 2))
        below = np.maximum(depth - surface, 0.0)
        ringing = np.exp(below / -0.12) * (1.0 + np.cos(2 * math.pi * 14.0 * below))  # fading reverberation
        loss = 3.0 * ringing + (-24.0 if bone else 1.5 * _smooth_noise(rng, shape, 10, 30) - 12.0)
        path += beam * _step(surface - depth, 0.02) * np.minimum(loss, 0.0)


def _gain_profile(rng: Rng, shape: tuple[int, int]) -> Float:
    """Attenuation left after depth gain compensation, slider steps and poor contact at the sides, in dB."""
    depth = np.linspace(0, 1, shape[0], dtype=np.float32)[:, None]
    side = np.abs(np.linspace(-1, 1, shape[1], dtype=np.float32))[None, :]
    slope = rng.normal(-7.0, 6.0) * (depth - 0.4)
    sliders = rng.uniform(0.5, 2.2) * _smooth_noise(rng, (shape[0], 1), 6, 1)
    contact = -rng.uniform(0.0, 14.0) * np.clip((side - 0.7) / 0.3, 0.0, 1.0) ** 2
    return np.asarray(slope + sliders + contact + 1.5 * _smooth_noise(rng, shape, 2, 4), np.float32)


def _speckle(rng: Rng, noise: Rng, level_db: Float) -> Float:
    """Fully developed speckle in dB: complex scatterers under a point spread that widens with depth."""
    rows, columns = level_db.shape
    scale = min(rows, columns) / SIZE
    axial, lateral = rng.uniform(0.7, 1.1) * scale, rng.uniform(1.2, 2.0) * scale
    looks = int(rng.integers(1, 3))  # 2: spatial compounding, which halves the speckle variance
    far = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
    amplitude = np.exp(level_db * (math.log(10.0) / 20))
    scatterers = noise.standard_normal((2 * looks, rows, columns), dtype=np.float32) * amplitude
    near_spread = _blur(scatterers, axial, lateral) * math.sqrt(4 * math.pi * axial * lateral)  # unit power
    far_spread = _blur(near_spread, 0.0, 1.2 * lateral) * 1.2
    power = ((near_spread * np.sqrt(1 - far) + far_spread * np.sqrt(far)) ** 2).mean(axis=0)
    floor = 10 ** (-36 / 10)  # electronic noise keeps fluid from being a perfect black
    return np.asarray(10.0 * np.log10(power + floor), np.float32)


def _compress(rng: Rng, level_db: Float) -> Float:
    """Log compression to grey: a dynamic range of 48 to 62 dB below a white point set by the overall gain."""
    white, span, curve = rng.uniform(17.0, 24.0), rng.uniform(48.0, 62.0), rng.uniform(1.0, 1.35)
    smoothing = 0.5 * min(level_db.shape) / SIZE
    return _blur(np.clip((level_db - white) / span + 1.0, 0.0, 1.0) ** curve, smoothing, smoothing)


def _furniture(rng: Rng, picture: Float) -> None:
    """On-screen furniture of some frames: grey bar, depth ticks, focus mark."""
    shape = (picture.shape[0], picture.shape[1])
    height, width = shape
    if rng.random() < 0.3:
        bar_width = max(2, width // 40)
        ramp = np.linspace(1, 0, height // 3, dtype=np.float32)[:, None]
        picture[height // 12 : height // 12 + ramp.shape[0], 2 : 2 + bar_width] = ramp
    if rng.random() < 0.4:
        rows = np.arange(rng.uniform(0.02, 0.1), 1.0, rng.uniform(0.06, 0.12)) * height
        starts = [width * (0.97 if index % 5 else 0.95) for index in range(rows.size)]
        ticks = [np.array([[row, x], [row, width * 0.99]]) for row, x in zip(rows, starts, strict=True)]
        focus = np.array([[0.5, 0.93], [0.48, 0.96], [0.52, 0.96], [0.5, 0.93]]) * shape
        cover = _strokes(shape, [*ticks, focus], [1.2 * min(shape) / SIZE] * (len(ticks) + 1))
        picture += cover * (np.float32(rng.uniform(0.6, 0.95)) - picture)


# ----------------------------------------------------------------------------------------------- command line


class _OneLineParser(argparse.ArgumentParser):
    """Reports a usage error in one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _parse_size(text: str) -> tuple[int, int]:
    """'224x224' as (height, width)."""
    height, separator, width = text.lower().partition("x")
    if not (separator and height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"size {text!r}: expected HEIGHTxWIDTH, for example {SIZE}x{SIZE}")
    return int(height), int(width)


def _save(item: Phantom, folder: Path) -> None:
    """Writes <kind>_<seed>.png and its 0/255 mask."""
    from PIL import Image  # only saving needs Pillow

    stem = f"{item.kind}_{item.seed}"
    Image.fromarray(item.image).save(folder / f"{stem}.png")
    Image.fromarray(item.mask * np.uint8(255)).save(folder / f"{stem}_mask.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a run of phantoms as PNG files."""
    parser = _OneLineParser(prog="msa2net.core.phantoms", description="Write synthetic phantoms.")
    parser.add_argument("--output", type=Path, required=True, help="folder, created if missing")
    parser.add_argument("--kind", choices=[*KINDS, "both"], default="both")
    parser.add_argument("--count", type=int, default=8, help="frames of each kind")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--size", type=_parse_size, default=(SIZE, SIZE), metavar="HxW")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error(f"count {arguments.count}: expected 1 or more")
    kinds = KINDS if arguments.kind == "both" else (arguments.kind,)
    free = 0
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            for seed in range(arguments.first_seed, arguments.first_seed + arguments.count):
                item = phantom(kind, seed, arguments.size)
                free += not item.mask.any()
                _save(item, arguments.output)
    except (ValueError, OSError, ImportError) as problem:
        parser.error(str(problem))
    total = len(kinds) * arguments.count
    print(f"{total} phantoms ({', '.join(kinds)}; {free} without a lesion) written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
