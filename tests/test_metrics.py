"""Scores against arithmetic on paper, all pairs of pixels and MONAI; the resize against scipy and a clamped spline."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.ndimage import binary_erosion, distance_transform_edt, zoom

from msa2net.benchmarks.metrics import Scores, score
from msa2net.errors import Msa2NetError
from msa2net.runtimes.postprocess import aligned_index
from msa2net.runtimes.preprocess import resize

Mask = NDArray[np.uint8]
NAN = math.nan
BOTH = pytest.mark.parametrize("protocol", ["public", "standard"])


def mask(shape: tuple[int, ...], *pixels: tuple[int, ...]) -> Mask:
    drawn = np.zeros(shape, np.uint8)
    for pixel in pixels:
        drawn[pixel] = 1
    return drawn


def row(*columns: int, width: int = 50) -> Mask:
    """An image of one row: each of its pixels is surface, and distances can be read off."""
    return mask((1, width), *((0, column) for column in columns))


def cube(shape: tuple[int, ...], start: int, side: int) -> Mask:
    """From `start` along the first axis, from 2 along the others."""
    drawn = np.zeros(shape, np.uint8)
    drawn[(slice(start, start + side),) + (slice(2, 2 + side),) * (len(shape) - 1)] = 1
    return drawn


# Worked out on paper ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [((1, 1), (4, 5), 5), ((0, 0, 0), (2, 3, 6), 7), ((7, 0), (0, 0), 7)],
    ids=["3-4-5", "2-3-6-7", "corners"],
)
def test_two_single_pixels_are_as_far_as_pythagoras_says(
    protocol: Any, a: tuple[int, ...], b: tuple[int, ...], distance: float
) -> None:
    shape = (8,) * len(a)
    got = score(mask(shape, a), mask(shape, b), 1, protocol=protocol, tolerance=distance)
    assert (got.dice, got.hd95, got.nsd) == (0, distance, 1)
    assert score(mask(shape, a), mask(shape, b), 1, protocol=protocol, tolerance=distance - 0.01).nsd == 0


@BOTH
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("side", "shift"), [(5, 1), (10, 2), (10, 5), (6, 6), (4, 9)])
def test_two_shifted_cubes(protocol: Any, dimensions: int, side: int, shift: int) -> None:
    # The overlap is (side - shift) / side of each. No surface pixel is further than the shift from the other surface,
    # and the rear face, at least a sixth of the surface, is just that far: more than 5 % are at the maximum.
    shape = (22,) * dimensions
    got = score(cube(shape, 3, side), cube(shape, 3 + shift, side), 1, protocol=protocol)
    assert got.dice == pytest.approx(max(side - shift, 0) / side, abs=1e-15)
    assert got.hd95 == shift


@BOTH
def test_normalised_surface_dice_of_two_shifted_squares(protocol: Any) -> None:
    # Side 10, shift 2: 36 surface pixels each. Of the first: 16 on the sides from row 2 on lie on the other's surface;
    # row 0 is 2 away (10), row 1's two are 1 away; of row 9, inside the other, columns 1 and 8 are 1 away, 6 are 2.
    a, b = cube((20, 20), 3, 10), cube((20, 20), 5, 10)
    for tolerance, within in ((0.0, 16), (1.0, 20), (1.99, 20), (2.0, 36)):
        assert score(a, b, 1, protocol=protocol, tolerance=tolerance).nsd == pytest.approx(within / 36, abs=1e-15)


def test_public_pools_both_directions_before_the_percentile() -> None:
    # Prediction to truth: 0, 0, 0, 0, 37; rank 0.95 · 4 = 3.8, so 0.8 · 37 = 29.6. Truth to prediction: 0, 0, 0, 0.
    # Pooled: eight 0 and 37; rank 0.95 · 8 = 7.6, so 0.6 · 37 = 22.2.
    prediction, truth = row(0, 1, 2, 3, 40), row(0, 1, 2, 3)
    public = score(prediction, truth, 1, protocol="public")
    standard = score(prediction, truth, 1, protocol="standard")
    assert public.hd95 == pytest.approx(22.2, abs=1e-12)
    assert standard.hd95 == pytest.approx(29.6, abs=1e-12)
    for got in (public, standard):  # TP 4, FP 1, FN 0, TN 45; 8 of 9 distances within 1
        assert (got.dice, got.nsd) == (8 / 9, 8 / 9)
        assert (got.sensitivity, got.specificity, got.accuracy) == (1, 45 / 46, 49 / 50)


def test_the_larger_direction_is_standard_whichever_it_is() -> None:
    # One pixel against 21 from it on: 0 to 20 in one direction, rank 19; 0 in the other. Pooled: 0, 0, 1, ..., 20;
    # rank 0.95 · 21 = 19.95, which is 18.95.
    for pair in ((row(0), row(*range(21))), (row(*range(21)), row(0))):
        assert score(*pair, 1, protocol="standard").hd95 == pytest.approx(19, abs=1e-12)
        assert score(*pair, 1, protocol="public").hd95 == pytest.approx(18.95, abs=1e-12)


@BOTH
def test_what_is_outside_the_image_is_background(protocol: Any) -> None:
    # All of 5 × 5 against its middle. The border is surface: 4 pixels at 2, 8 at √5, 4 at √8, and 2 back.
    # Pooled: five 2, eight √5, four √8; rank 0.95 · 16 = 15.2 is √8, as 0.95 · 15 = 14.25 is in one direction.
    got = score(np.ones((5, 5), np.uint8), mask((5, 5), (2, 2)), 1, protocol=protocol)
    assert got.hd95 == pytest.approx(math.sqrt(8), abs=1e-15)
    assert got.dice == 2 / 26
    assert (got.sensitivity, got.specificity, got.accuracy) == (1, 0, 1 / 25)


EMPTY, THERE = mask((4, 5)), mask((4, 5), (1, 1), (1, 2))


@pytest.mark.parametrize(
    ("protocol", "prediction", "truth", "expected"),
    [
        ("public", THERE, EMPTY, Scores(1, 0, 0, NAN, 0.9, 0.9)),
        ("public", EMPTY, THERE, Scores(0, 0, 0, 0, 1, 0.9)),
        ("public", EMPTY, EMPTY, Scores(0, 0, NAN, NAN, 1, 1)),
        ("standard", THERE, EMPTY, Scores(NAN, NAN, 0, NAN, 0.9, 0.9)),
        ("standard", EMPTY, THERE, Scores(0, NAN, 0, 0, 1, 0.9)),
        ("standard", EMPTY, EMPTY, Scores(NAN, NAN, NAN, NAN, 1, 1)),
    ],
    ids=[f"{p} {e}" for p in ("public", "standard") for e in ("no truth", "no prediction", "neither")],
)
def test_empty_sets(protocol: Any, prediction: Mask, truth: Mask, expected: Scores) -> None:
    got = score(prediction, truth, 1, protocol=protocol)
    np.testing.assert_array_equal(list(asdict(got).values()), list(asdict(expected).values()))


@BOTH
def test_a_truth_everywhere_leaves_specificity_undefined(protocol: Any) -> None:
    full = np.ones((3, 4), np.uint8)
    got = score(full, full, 1, protocol=protocol)
    assert math.isnan(got.specificity)
    assert (got.dice, got.hd95, got.nsd, got.sensitivity, got.accuracy) == (1, 0, 1, 1, 1)


@BOTH
def test_spacing_is_millimetres_except_in_the_public_percentile(protocol: Any) -> None:
    a, b = mask((6, 6), (1, 1)), mask((6, 6), (2, 3))  # 1 row of 3 mm and 2 columns of 2 mm: 5 mm, √5 pixels
    spacing = (3.0, 2.0)
    far = {"public": math.sqrt(5), "standard": 5}[protocol]
    assert score(a, b, 1, protocol=protocol, spacing=spacing).hd95 == pytest.approx(far, abs=1e-15)
    for tolerance, nsd in ((4.9, 0), (5.0, 1)):
        assert score(a, b, 1, protocol=protocol, spacing=spacing, tolerance=tolerance).nsd == nsd


def test_a_distance_equal_to_the_tolerance_is_within_despite_rounding() -> None:
    assert 3 * 0.1 > 0.3
    assert score(row(0), row(3), 1, protocol="standard", spacing=(0.1, 0.1), tolerance=0.3).nsd == 1


@BOTH
@pytest.mark.parametrize("spacing", [None, (9.0, 0.7, 1.3)], ids=["pixels", "spacing"])
def test_one_slice_is_scored_as_an_image(protocol: Any, spacing: Any) -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.random((2, 20, 20)) < 0.8).astype(np.uint8)
    volume = score(a[None], b[None], 1, protocol=protocol, spacing=spacing)
    image = score(a, b, 1, protocol=protocol, spacing=spacing and spacing[1:])
    assert volume == image
    assert image.hd95 > 0
    stacked = score(np.stack([a] * 2), np.stack([b] * 2), 1, protocol=protocol, spacing=spacing)
    assert stacked.nsd != image.nsd  # two slices are a volume: each pixel touches the outside


@BOTH
def test_only_the_class_asked_for_counts(protocol: Any) -> None:
    a, b = cube((20, 20), 3, 8), cube((20, 20), 5, 8)
    noise = np.random.default_rng(0).choice(np.array([0, 2, 255], np.uint8), (2, 20, 20))
    mixed_a, mixed_b = np.where(a, np.uint8(7), noise[0]), np.where(b, np.uint8(7), noise[1])
    assert score(mixed_a, mixed_b, 7, protocol=protocol) == score(a, b, 1, protocol=protocol)


@BOTH
def test_empty_space_around_changes_no_distance(protocol: Any) -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.random((2, 5, 6, 7)) < 0.6).astype(np.uint8)
    tight = score(a, b, 1, protocol=protocol)
    wide = score(np.pad(a, ((3, 1), (0, 9), (4, 0))), np.pad(b, ((3, 1), (0, 9), (4, 0))), 1, protocol=protocol)
    assert (wide.dice, wide.hd95, wide.nsd, wide.sensitivity) == (tight.dice, tight.hd95, tight.nsd, tight.sensitivity)
    assert wide.specificity > tight.specificity


# Against independent computations ---------------------------------------------------------------------------------


def random_pair(seed: int) -> tuple[Mask, Mask]:
    """2-D or 3-D; noise or boxes, at any place and often at the border; from empty to full; sometimes alike."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 26, 2)) if seed % 2 else tuple(rng.integers(2, 10, 3))
    drawn = []
    for _ in range(2):
        kind = rng.integers(6)
        image = rng.random(shape) < rng.choice([0.01, 0.1, 0.5, 0.9, 0.99])
        if kind < 3:
            corners = [np.sort(rng.integers(0, n + 1, 2)) for n in shape]
            image = np.zeros(shape, bool)
            image[tuple(slice(lo, hi) for lo, hi in corners)] = True
        if kind == 2:
            image ^= rng.random(shape) < 0.05
        if kind == 3:
            image[...] = rng.integers(2)
        drawn.append(image.astype(np.uint8))
    if seed % 7 == 0:
        drawn[1] = drawn[0] ^ (rng.random(shape) < 0.03)
    return drawn[0], drawn[1]


def brute_pooled(a: Mask, b: Mask) -> float:
    """Loops alone: neighbours pixel by pixel, distances between all pairs, the percentile by its definition."""

    def surface(m: Mask) -> list[tuple[int, ...]]:
        inside = {p for p in itertools.product(*map(range, m.shape)) if m[p]}
        steps = [tuple(s if i == axis else 0 for i in range(m.ndim)) for axis in range(m.ndim) for s in (-1, 1)]
        return [p for p in inside if any(tuple(map(sum, zip(p, s, strict=True))) not in inside for s in steps)]

    one, other = surface(a), surface(b)
    pooled = sorted(
        [min(math.dist(p, q) for q in other) for p in one] + [min(math.dist(p, q) for q in one) for p in other]
    )
    rank = 0.95 * (len(pooled) - 1)
    low = math.floor(rank)
    return pooled[low] + (rank - low) * (pooled[min(low + 1, len(pooled) - 1)] - pooled[low])


def test_the_public_percentile_against_all_pairs_of_pixels() -> None:
    tried = 0
    for seed in range(120):
        a, b = random_pair(seed)
        a, b = a[:9, :9], b[:9, :9]
        if a.any() and b.any():
            tried += 1
            assert score(a, b, 1, protocol="public").hd95 == pytest.approx(brute_pooled(a, b), abs=1e-12), seed
    assert tried > 60


def test_the_public_percentile_against_erosion_and_distance_transforms() -> None:
    tried = 0
    for seed in range(300):
        a, b = (m.astype(bool) for m in random_pair(seed))
        if a.any() and b.any():
            tried += 1
            edges = [m ^ binary_erosion(m) for m in (a, b)]
            pooled = np.hstack(
                [distance_transform_edt(~edges[1])[edges[0]], distance_transform_edt(~edges[0])[edges[1]]]
            )
            got = score(a.astype(np.uint8), b.astype(np.uint8), 1, protocol="public")
            assert got.hd95 == pytest.approx(np.percentile(pooled, 95), abs=1e-12), seed
            assert got.nsd == np.mean(pooled <= 1), seed
    assert tried > 150


Reference = Callable[[Mask, Mask, tuple[float, ...] | None, float], Scores]


@pytest.fixture(scope="module")
def monai() -> Reference:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from monai.metrics import (
            compute_confusion_matrix_metric,
            compute_dice,
            compute_hausdorff_distance,
            compute_surface_dice,
            get_confusion_matrix,
        )
        from monai.metrics.utils import get_edge_surface_distance

    def hausdorff(pair: list[Any], spacing: tuple[float, ...] | None) -> float:
        whole = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing).item()
        if math.isnan(whole):
            return NAN
        # It takes the rank, up to some hundreds here, in float32: 1e-5 of a step between distances. Its distances with
        # the percentile in float64 are the sharper reference; the two are held together here.
        directed = get_edge_surface_distance(*(p[0, 0] for p in pair), spacing=spacing, symmetric=True)[1]
        exact = max(float(np.percentile(d.double().numpy(), 95)) for d in directed)
        assert whole == pytest.approx(exact, rel=1e-5, abs=1e-5)
        return exact

    def reference(a: Mask, b: Mask, spacing: tuple[float, ...] | None, tolerance: float) -> Scores:
        pair = [torch.from_numpy(m.astype(np.float32))[None, None] for m in (a, b)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of each empty set
            confusion = get_confusion_matrix(*pair)
            return Scores(
                dice=compute_dice(*pair, include_background=True, ignore_empty=True).item(),
                hd95=hausdorff(pair, spacing),
                nsd=compute_surface_dice(
                    *pair, class_thresholds=[tolerance], include_background=True, spacing=spacing, use_subvoxels=False
                ).item(),
                **{
                    name: compute_confusion_matrix_metric(name, confusion).item()
                    for name in ("sensitivity", "specificity", "accuracy")
                },
            )

    return reference


def difference(got: Scores, expected: Scores) -> float:
    """The largest, relative above 1; infinite where only one is nan. MONAI's are float32."""
    largest = 0.0
    for mine, theirs in zip(asdict(got).values(), asdict(expected).values(), strict=True):
        if math.isnan(mine) and math.isnan(theirs):
            continue
        gap = abs(mine - theirs) / max(1, abs(theirs))
        largest = max(largest, math.inf if math.isnan(gap) else gap)
    return largest


SPACINGS = (None, (1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (0.1, 0.25, 3.3))
TOLERANCES = (0.0, 0.7, 1.0, 2.1, 5.0)


def test_standard_is_monai_on_random_masks(monai: Reference) -> None:
    seen: set[tuple[int, bool, bool]] = set()
    for seed in range(300):
        a, b = random_pair(seed)
        spacing, tolerance = SPACINGS[seed % 4], TOLERANCES[seed % 5]
        spacing = spacing and spacing[-a.ndim :]
        got = score(a, b, 1, protocol="standard", spacing=spacing, tolerance=tolerance)
        expected = monai(a, b, spacing, tolerance)
        assert difference(got, expected) <= 1e-6, (seed, got, expected)
        seen.add((a.ndim, bool(a.any()), bool(b.any())))
    assert len(seen) == 8  # every combination of empty and not, in 2-D and in 3-D


@pytest.mark.parametrize("shape", [(1, 1), (6, 7), (3, 4, 5)], ids=["pixel", "image", "volume"])
def test_standard_is_monai_on_empty_full_and_single_pixels(monai: Reference, shape: tuple[int, ...]) -> None:
    corner = tuple(n - 1 for n in shape)
    masks = [mask(shape), mask(shape, corner), np.ones(shape, np.uint8)]
    for a, b in itertools.product(masks, repeat=2):
        got, expected = score(a, b, 1, protocol="standard"), monai(a, b, None, 1.0)
        assert difference(got, expected) <= 1e-6, (got, expected)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=8),
    st.sampled_from([None, (0.5, 0.5), (2.0, 0.3)]),
    st.sampled_from([0.0, 0.3, 1.0, 1.5]),
)
@example([[3, 3, 3, 3, 3]], None, 1.0)
@example([[2, 1, 2, 1, 2], [1, 2, 1, 2, 1]], (2.0, 0.3), 0.3)
def test_standard_is_monai_on_drawn_masks(
    monai: Reference, rows: list[list[int]], spacing: tuple[float, ...] | None, tolerance: float
) -> None:
    both = np.array(rows, np.uint8)  # bit 0 is the prediction, bit 1 the truth
    a, b = both & 1, both >> 1
    got = score(a, b, 1, protocol="standard", spacing=spacing, tolerance=tolerance)
    assert difference(got, monai(a, b, spacing, tolerance)) <= 1e-6


# Refusals ---------------------------------------------------------------------------------------------------------

IMAGE = np.zeros((4, 5), np.uint8)


@pytest.mark.parametrize(
    ("prediction", "truth", "options", "text"),
    [
        (IMAGE.astype(bool), IMAGE, {}, "prediction: got bool (4, 5), expected uint8 (H, W) or (D, H, W). Give class"),
        (IMAGE, IMAGE[0], {}, "truth: got uint8 (5,), expected uint8 (H, W) or (D, H, W). Give class indices."),
        (IMAGE[:0], IMAGE[:0], {}, "prediction: got uint8 (0, 5), expected uint8 (H, W) or (D, H, W)"),
        (IMAGE[:2], IMAGE, {}, "prediction: got (2, 5), expected (4, 5) as the truth. Resize it first."),
        (IMAGE, IMAGE, {"protocol": "monai"}, "protocol: got 'monai', expected public or standard. Choose one."),
        (IMAGE, IMAGE, {"spacing": (1.0,)}, "spacing: got (1.0,), expected 2 positive numbers, one an axis."),
        (IMAGE, IMAGE, {"spacing": (1.0, 0.0)}, "spacing: got (1.0, 0.0), expected 2 positive numbers, one an axis."),
        (IMAGE, IMAGE, {"spacing": (1.0, NAN)}, "spacing: got (1.0, nan), expected 2 positive numbers, one an axis."),
        (IMAGE, IMAGE, {"tolerance": -1.0}, "tolerance: got -1.0, expected a finite number, 0 or more."),
        (IMAGE, IMAGE, {"tolerance": NAN}, "tolerance: got nan, expected a finite number, 0 or more."),
    ],
    ids=[
        "bool",
        "row",
        "nothing",
        "shapes",
        "protocol",
        "one step",
        "step 0",
        "step nan",
        "tolerance",
        "tolerance nan",
    ],
)
def test_what_cannot_be_scored_is_refused(prediction: Any, truth: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(Msa2NetError) as caught:
        score(prediction, truth, 1, **{"protocol": "public", **options})
    assert str(caught.value).startswith(text)


def test_importing_the_metrics_imports_neither_torch_nor_monai() -> None:
    code = "import sys, msa2net.benchmarks.metrics; sys.exit(bool({'torch', 'monai', 'medpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# The public pipeline's resize -------------------------------------------------------------------------------------


def public_input(picture: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """The resize rule "spline" of the pixel contract, which is the public pipeline's way in; channels last."""
    planes = resize(np.atleast_3d(picture), "spline", height, width)
    return planes[0] if picture.ndim == 2 else planes.transpose(1, 2, 0)


def public_output(classes: Mask, height: int, width: int) -> Mask:
    """The enlarge rule "aligned", which is the public pipeline's way back."""
    rows, columns = aligned_index(classes.shape[0], height), aligned_index(classes.shape[1], width)
    return classes[rows[:, None], columns]


ROUNDING = 3e-6  # two float32 products on values of 1 to 2.3
LENGTHS = (2, 3, 17, 32, 63, 100, 223, 224, 225, 231, 256, 300, 401, 457, 480, 495, 511, 512, 513, 600, 768)


def runs_over(source: int, target: int) -> bool:
    """Whether the last coordinate of scipy's grid is rounded to beyond the last sample: its own arithmetic."""
    return target > 1 and (source - 1) / (target - 1) * (target - 1) > source - 1


def picture(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random(shape, np.float32) + 1  # no sample near 0: a zero is a defect


def test_the_lengths_below_include_good_and_bad_ones() -> None:
    assert [n for n in LENGTHS if runs_over(n, 224)] == [32, 63, 231, 457, 480, 495, 512]


@pytest.mark.parametrize("length", LENGTHS)
def test_public_input_is_scipys_zoom_but_for_its_zero_border(length: int) -> None:
    source = picture(length, length + 1)
    plain = zoom(source, (224 / length, 224 / (length + 1)), order=3)
    got = public_input(source, 224, 224)
    assert (got.dtype, got.shape) == (np.float32, (224, 224))
    kept = np.ones((224, 224), bool)
    kept[-1] = not runs_over(length, 224)
    kept[:, -1] &= not runs_over(length + 1, 224)
    np.testing.assert_allclose(got[kept], plain[kept], rtol=0, atol=ROUNDING)
    assert (plain[~kept] == 0).all()
    assert (got[~kept] != 0).all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("target", [1, 7, 224, 320])
def test_public_input_is_the_clamped_cubic_spline_to_its_border(length: int, target: int) -> None:
    source = picture(length, 2, seed=1)
    spline = CubicSpline(np.arange(length), source.astype(np.float64), bc_type="clamped")
    got = public_input(source, target, 2)
    np.testing.assert_allclose(got, spline(np.linspace(0, length - 1, target)), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(got[0], source[0], rtol=0, atol=ROUNDING)
    if target > 1:
        np.testing.assert_allclose(got[-1], source[-1], rtol=0, atol=ROUNDING)


def test_public_input_gives_a_constant_back_at_every_length() -> None:
    for length in range(1, 700):
        resized = public_input(np.ones((length, 1), np.float32), 224, 1)
        assert resized.shape == (224, 1)
        assert abs(resized - 1).max() <= ROUNDING, length


def test_public_input_of_512_is_the_public_codes_but_for_the_last_row_and_column() -> None:
    source = picture(512, 512)
    plain, got = zoom(source, (224 / 512, 224 / 512), order=3), public_input(source, 224, 224)
    np.testing.assert_allclose(got[:-1, :-1], plain[:-1, :-1], rtol=0, atol=ROUNDING)
    assert not plain[-1].any()
    assert not plain[:, -1].any()


def test_public_input_resizes_each_channel_alone() -> None:
    source = picture(30, 41, 3)
    got = public_input(source, 22, 57)
    assert (got.dtype, got.shape) == (np.float32, (22, 57, 3))
    for channel in range(3):
        alone = public_input(source[..., channel].copy(), 22, 57)
        np.testing.assert_allclose(got[..., channel], alone, rtol=0, atol=ROUNDING)


def test_public_output_of_224_to_512_is_scipys_and_the_nearest_by_whole_numbers() -> None:
    classes = np.random.default_rng(2).integers(0, 9, (224, 224), dtype=np.uint8)
    got = public_output(classes, 512, 512)
    assert (got.dtype, got.shape) == (np.uint8, (512, 512))
    np.testing.assert_array_equal(got, zoom(classes, (512 / 224, 512 / 224), order=0))
    nearest = np.array([(2 * i * 223 + 511) // (2 * 511) for i in range(512)])  # 446 i is even, so nothing ties
    np.testing.assert_array_equal(got, classes[np.ix_(nearest, nearest)])


def test_public_output_is_scipys_but_for_its_zero_border_at_every_length() -> None:
    classes = np.random.default_rng(3).integers(1, 9, (224, 1), dtype=np.uint8)
    bad = 0
    for length in range(1, 800):
        plain, got = zoom(classes, (length / 224, 1), order=0), public_output(classes, length, 1)
        assert got.shape == (length, 1)
        tied = (
            2 * np.arange(length) * 223 % (2 * max(1, length - 1)) == length - 1
        )  # half-way: up here, either way there
        np.testing.assert_array_equal(got[:-1][~tied[:-1]], plain[:-1][~tied[:-1]])
        if runs_over(224, length):
            bad += 1
            assert plain[-1] == 0
            assert got[-1] == classes[-1]
        else:
            np.testing.assert_array_equal(got[-1], plain[-1])
    assert bad > 20
