"""The judgement of an artifact: regions against scipy, the bound against theory, every rule at both its sides."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage, stats
from scipy.spatial.distance import pdist

from msa2net.runtimes import measure
from msa2net.runtimes.measure import (
    ImageParity,
    bootstrap_bound,
    diameter,
    dice,
    image_parity,
    judge,
    largest_component,
    pixel_agreement,
)

COUNTER = itertools.count()
MANY = settings(max_examples=150, deadline=None)
BINARY = ("background", "lesion")
SIDES = st.integers(1, 18)
LEAST_CASES = measure.LEAST_CASES
DENSITIES = st.sampled_from([0.05, 0.2, 0.35, 0.45, 0.6, 0.9, 1.0])


@pytest.fixture(autouse=True)
def few_cases_suffice() -> Iterator[None]:
    """So that a rule can be seen on two or three images; the number itself has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "LEAST_CASES", 1)
        yield


def picture(*rows: str) -> NDArray[np.bool_]:
    return np.array([[c == "#" for c in row] for row in rows])


def labels(*rows: str) -> NDArray[np.uint8]:
    return np.array([[int(c) for c in row] for row in rows], np.uint8)


def noise(height: int, width: int, density: float, seed: int) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random((height, width)) < density


def slow_component(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    numbered, count = ndimage.label(region, np.ones((3, 3)))
    parts = [numbered == i for i in range(1, count + 1)]
    return min(parts, key=lambda part: (-part.sum(), np.flatnonzero(part)[0]), default=region)


def corners(region: NDArray[np.bool_]) -> NDArray[np.int64]:
    pixels = np.argwhere(region)
    return np.concatenate([pixels + shift for shift in ((0, 0), (0, 1), (1, 0), (1, 1))])


# Regions ----------------------------------------------------------------------------------------------------------


@MANY
@given(SIDES, SIDES, DENSITIES, st.integers(0, 10_000))
def test_the_largest_component_is_the_one_that_scipy_finds(height: int, width: int, density: float, seed: int) -> None:
    region = noise(height, width, density, seed)
    before = region.copy()
    found = largest_component(region)
    assert found.dtype == bool
    assert np.array_equal(found, slow_component(region))
    assert np.array_equal(region, before)


@pytest.mark.parametrize("density", [0.25, 0.38, 0.41, 0.5])
def test_the_largest_component_of_a_large_noisy_region(density: float) -> None:
    region = noise(240, 320, density, 3)
    assert np.array_equal(largest_component(region), slow_component(region))


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        pytest.param(("#..#", "....", "####"), ("....", "....", "####"), id="larger"),
        pytest.param(("#..", ".#.", "..#"), ("#..", ".#.", "..#"), id="diagonal down"),
        pytest.param(("..#", ".#.", "#.."), ("..#", ".#.", "#.."), id="diagonal up"),
        pytest.param(("..##", "....", "##.."), ("..##", "....", "...."), id="tie: upper one"),
        pytest.param(("##.##",), ("##...",), id="tie: left one"),
        pytest.param(("...#.", "##...", "...#."), (".....", "##...", "....."), id="one pixel apart"),
        pytest.param(("..#", "#.#"), ("..#", "..#"), id="a column"),
        pytest.param(
            ("...##", "#....", "#...."), ("...##", ".....", "....."), id="end of a row does not touch the next"
        ),
        pytest.param(("#.#", "#.#", "###"), ("#.#", "#.#", "###"), id="joined below"),
        pytest.param(("#.#.#", "#.#.#", "#####"), ("#.#.#", "#.#.#", "#####"), id="comb"),
    ],
)
def test_the_largest_component_of_these(region: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert np.array_equal(largest_component(picture(*region)), picture(*expected))


def spiral(side: int) -> NDArray[np.bool_]:
    """One winding line, a pixel wide, a pixel from itself."""
    region = np.zeros((side, side), bool)
    y, x, step, length = 0, 0, (0, 1), side - 1
    turns = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    region[0, 0] = True
    for turn in range(2 * side):
        step = turns[turn % 4]
        if turn > 2 and turn % 2:
            length -= 2
        if length <= 0:
            break
        for _ in range(length):
            y, x = y + step[0], x + step[1]
            region[y, x] = True
    return region


@pytest.mark.parametrize("turn", range(4))
def test_a_spiral_is_one_component(turn: int) -> None:
    region = np.rot90(spiral(101), turn)
    assert ndimage.label(region, np.ones((3, 3)))[1] == 1
    assert np.array_equal(largest_component(region), region)


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 4), (4, 0)], ids=str)
def test_an_empty_region_has_no_component_and_no_diameter(shape: tuple[int, int]) -> None:
    region = np.zeros(shape, bool)
    found = largest_component(region)
    assert found.shape == shape
    assert found.dtype == bool
    assert not found.any()
    assert diameter(region) == 0.0


def test_components_are_found_in_views_that_are_not_contiguous() -> None:
    region = noise(60, 50, 0.5, 5)[::-2, 1::3]
    assert np.array_equal(largest_component(region), slow_component(region.copy()))
    assert diameter(region) == diameter(region.copy())


@MANY
@given(SIDES, SIDES, DENSITIES, st.integers(0, 10_000))
@example(1, 1, 1.0, 0)
@example(18, 1, 1.0, 0)
@example(1, 18, 1.0, 0)
def test_the_diameter_is_the_largest_of_all_distances_between_corners(
    height: int, width: int, density: float, seed: int
) -> None:
    region = noise(height, width, density, seed)
    component = slow_component(region)
    expected = pdist(corners(component)).max() if component.any() else 0.0
    assert diameter(region) == pytest.approx(expected, rel=1e-12)


@MANY
@given(st.integers(5, 40), st.integers(5, 40), st.floats(0, math.pi), st.floats(1, 20), st.floats(1, 6))
def test_the_diameter_of_a_turned_ellipse(height: int, width: int, angle: float, a: float, b: float) -> None:
    y, x = np.mgrid[:height, :width] - np.array([height / 2, width / 2])[:, None, None]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    region = slow_component((along / a) ** 2 + (across / b) ** 2 <= 1)
    expected = pdist(corners(region)).max() if region.any() else 0.0
    assert diameter(region) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        pytest.param(("#",), math.sqrt(2), id="one pixel"),
        pytest.param(("###.", "####"), math.sqrt(20), id="two rows"),
        pytest.param(("#...", ".#..", "..##"), 5, id="3, 4, 5"),
        pytest.param(("...#", "..#.", "##.."), 5, id="3, 4, 5 mirrored"),
        pytest.param(("####", "...#", "####"), 5, id="open to the left"),
        pytest.param(("#....#", "#.....", "#....."), math.sqrt(10), id="the largest component alone"),
    ],
)
def test_these_diameters(region: tuple[str, ...], expected: float) -> None:
    assert diameter(picture(*region)) == expected


def test_regions_of_a_frame_are_measured_in_milliseconds() -> None:
    y, x = np.mgrid[:480, :640]
    region = (y - 240.0) ** 2 + (x - 320.0) ** 2 <= 200.0**2
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        found = diameter(region)
        samples.append(time.perf_counter() - start)
    assert found == pytest.approx(401, abs=1)
    assert min(samples) < 0.05  # measured: 0.0008


# One image --------------------------------------------------------------------------------------------------------

REFERENCE = labels("110000", "110022", "000022", "000000")
ARTIFACT = labels("110000", "111022", "000020", "200000")
TRUTH = labels("111000", "111000", "000022", "000000")


def test_an_image_with_truth() -> None:
    assert image_parity("image 1", REFERENCE, ARTIFACT, 4, TRUTH) == ImageParity(
        name="image 1",
        case="image 1",
        against_truth=True,
        pixel_agreement=21 / 24,
        pixels=(16, 6, 2, 0),
        reference_dice=(28 / 32, 8 / 10, 4 / 6, 1.0),  # the reference has 14 of the truth's 16 pixels of background
        dice=(26 / 31, 10 / 11, 2 / 6, 1.0),
        reference_area=(16, 4, 4, 0),
        area=(15, 5, 4, 0),
        reference_diameter=(0.0, math.sqrt(8), math.sqrt(8), 0.0),
        diameter=(0.0, math.sqrt(13), math.sqrt(8), 0.0),
        added=2,
    )


def test_an_image_without_truth_is_held_against_the_reference() -> None:
    assert image_parity("image 1", REFERENCE, ARTIFACT, 3) == ImageParity(
        name="image 1",
        case="image 1",
        against_truth=False,
        pixel_agreement=21 / 24,
        pixels=(16, 4, 4),
        reference_dice=(1.0, 1.0, 1.0),
        dice=(28 / 31, 8 / 9, 6 / 8),
        reference_area=(16, 4, 4),
        area=(15, 5, 4),
        reference_diameter=(0.0, math.sqrt(8), math.sqrt(8)),
        diameter=(0.0, math.sqrt(13), math.sqrt(8)),
        added=2,
    )


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.integers(1, 5), st.integers(0, 10_000))
def test_figures_of_an_image_are_those_of_the_single_functions(h: int, w: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, mask, truth = rng.integers(0, classes, (3, h, w)).astype(np.uint8)
    found = image_parity("x", reference, mask, classes, truth)
    assert found.pixel_agreement == pixel_agreement(reference, mask)
    assert found.reference_dice == tuple(dice(reference, truth, k) for k in range(classes))
    assert found.dice == tuple(dice(mask, truth, k) for k in range(classes))
    assert found.pixels == tuple(int((truth == k).sum()) for k in range(classes))
    assert found.reference_area == tuple(int((reference == k).sum()) for k in range(classes))
    assert found.area == tuple(int((mask == k).sum()) for k in range(classes))
    assert found.reference_diameter[1:] == tuple(diameter(reference == k) for k in range(1, classes))
    assert found.diameter[1:] == tuple(diameter(mask == k) for k in range(1, classes))
    assert found.added == int(((mask > 0) & (reference == 0)).sum())


def test_figures_of_256_classes_do_not_wrap() -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = image_parity("x", mask, mask, 256)
    assert found.pixel_agreement == 1
    assert found.area == (1,) * 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.zeros((3, 6), np.uint8)}, r"^mask of image 3: got uint8 \(3, 6\), expected uint8 \(4, 6\)$"),
        (
            {"truth": np.zeros((4, 6, 1), np.uint8)},
            r"^truth of image 3: got uint8 \(4, 6, 1\), expected uint8 \(4, 6\)$",
        ),
        ({"mask": np.zeros((4, 6))}, r"^mask of image 3: got float64 \(4, 6\), expected uint8 \(4, 6\)$"),
        (
            {"reference": np.zeros((0, 6), np.uint8)},
            r"^reference of image 3: got uint8 \(0, 6\), expected uint8 \(H, W\)$",
        ),
        ({"reference": np.zeros(6, np.uint8)}, r"^reference of image 3: got uint8 \(6,\), expected uint8 \(H, W\)$"),
        ({"truth": np.full((4, 6), 255, np.uint8)}, r"^truth of image 3: got label 255, expected labels 0 to 2$"),
        ({"mask": np.full((4, 6), 3, np.uint8)}, r"^mask of image 3: got label 3, expected labels 0 to 2$"),
    ],
    ids=["shape", "axes", "dtype", "no pixel", "flat", "ignored label", "label"],
)
def test_masks_that_do_not_fit_together_are_refused(change: dict[str, Any], message: str) -> None:
    given = {"reference": REFERENCE, "mask": ARTIFACT, "truth": TRUTH} | change
    with pytest.raises(ValueError, match=message):
        image_parity("image 3", classes=3, **given)


# The bound --------------------------------------------------------------------------------------------------------


def slow_bound(reference: list[float], artifact: list[float], seed: int, resamples: int = 4000) -> float:
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(resamples):
        chosen = [int(rng.random() * len(reference)) for _ in reference]
        ratios.append(sum(artifact[i] for i in chosen) / sum(reference[i] for i in chosen))
    return sorted(ratios)[resamples * 25 // 1000 - 1]


@pytest.mark.parametrize("count", [1, 2, 7, 100, 2000])
def test_equal_figures_have_a_bound_of_exactly_1(count: int) -> None:
    figures = np.random.default_rng(count).random(count)
    assert bootstrap_bound(figures, figures.copy()) == 1.0


@pytest.mark.parametrize("count", [4, 30])
def test_the_bound_is_close_to_that_of_a_slow_bootstrap(count: int) -> None:
    rng = np.random.default_rng(count)
    reference = rng.uniform(0.3, 1, count)
    artifact = reference - rng.exponential(0.03, count)
    slow = [slow_bound(reference.tolist(), artifact.tolist(), seed) for seed in range(3)]
    found = bootstrap_bound(reference, artifact)
    assert found == pytest.approx(np.mean(slow), abs=0.05 * (artifact.mean() / reference.mean() - np.mean(slow)) + 1e-4)


@pytest.mark.parametrize(("count", "lost"), [(10, 1), (10, 2), (50, 1), (50, 4), (400, 3), (3000, 20)])
def test_the_bound_is_the_binomial_quantile_where_images_are_lost_whole(count: int, lost: int) -> None:
    artifact = np.ones(count)
    artifact[:lost] = 0
    drawn = stats.binom(count, lost / count)
    expected = int(drawn.ppf(0.975))  # P(more than this many lost) <= 2.5 %
    assert abs(drawn.sf(expected) - 0.025) > 0.003  # the test's own: not so near that chance decides
    assert abs(drawn.sf(expected - 1) - 0.025) > 0.003
    assert bootstrap_bound(np.ones(count), artifact) == pytest.approx(1 - expected / count, abs=1e-12)


@pytest.mark.parametrize("count", [200, 2000])
def test_the_bound_of_many_images_is_that_of_the_normal_approximation(count: int) -> None:
    rng = np.random.default_rng(count)
    reference = rng.uniform(0.5, 1, count)
    artifact = 0.98 * reference + rng.normal(0, 0.05, count)
    ratio = artifact.mean() / reference.mean()
    error = np.std(artifact - ratio * reference) / reference.mean() / math.sqrt(count)
    assert (ratio - bootstrap_bound(reference, artifact)) / error == pytest.approx(1.96, abs=0.08)


def test_images_stay_paired() -> None:
    reference = np.random.default_rng(0).uniform(0.01, 1, 40)
    assert bootstrap_bound(reference, 0.99 * reference) == pytest.approx(0.99, abs=1e-12)


def test_the_bound_is_the_same_every_time_and_draws_from_no_shared_state() -> None:
    reference = np.random.default_rng(0).uniform(0.5, 1, 300)
    artifact = reference * np.random.default_rng(1).uniform(0.8, 1.1, 300)
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    assert bootstrap_bound(reference, artifact) == bootstrap_bound(reference, artifact)
    assert np.random.get_state()[1].tolist() == state


def test_resamples_without_any_reference_dice_have_no_ratio() -> None:
    assert bootstrap_bound(np.array([0, 0, 1.0]), np.array([0, 0, 0.9])) == pytest.approx(0.9, abs=1e-12)
    assert math.isnan(bootstrap_bound(np.zeros(3), np.ones(3)))


@pytest.mark.parametrize(
    ("reference", "artifact"),
    [([], []), ([1, math.nan], [1, 1]), ([1, 1], [1, math.nan]), ([math.inf, 1], [1, 1]), ([1, 1], [1, math.inf])],
    ids=["none", "NaN", "NaN of the artifact", "infinity", "infinity of the artifact"],
)
def test_figures_that_are_not_finite_have_no_bound(reference: list[float], artifact: list[float]) -> None:
    assert math.isnan(bootstrap_bound(np.array(reference, float), np.array(artifact, float)))


# The judgement ----------------------------------------------------------------------------------------------------


def image(
    name: str = "image", reference: float = 1.0, found: float = 1.0, pixels: int = 900, **more: Any
) -> ImageParity:
    """An image of 10,000 pixels with one lesion of `pixels`; Dice of it for the reference and the artifact."""
    settings = {
        "name": name,
        "case": f"case {next(COUNTER)}",
        "against_truth": True,
        "pixel_agreement": 0.99,
        "pixels": (10_000 - pixels, pixels),
        "reference_dice": (0.95, reference),
        "dice": (0.95, found),
        "reference_area": (9000, 1000),
        "area": (9000, 1000),
        "reference_diameter": (0.0, 40.0),
        "diameter": (0.0, 40.0),
        "added": 0,
    }
    return ImageParity(**(settings | more))


def empty_frame(name: str = "frame", reference: int = 0, added: int = 0, **more: Any) -> ImageParity:
    """A lesion-free frame with so many false pixels of the reference, and so many more of the artifact."""
    area = reference + added
    areas = {"reference_area": (10_000 - reference, reference), "area": (10_000 - area, area)}
    return image(name, pixels=0, added=added, **(areas | more))


GOOD = [image(f"good {i}") for i in range(400)]


def verdict(images: list[ImageParity]) -> tuple[str, list[str]]:
    found = judge(images, BINARY)
    json.dumps(found, allow_nan=False)
    return found["verdict"], found["reasons"]


def test_an_artifact_equal_to_the_reference_is_high() -> None:
    found = judge(GOOD[:3], BINARY)
    assert found == {
        "images": 3,
        "judged": 3,
        "cases": 3,
        "against": "truth",
        "pixel_agreement": pytest.approx(0.99),
        "dice": {
            "background": {"fp32": pytest.approx(0.95), "artifact": pytest.approx(0.95), "change": 0.0},
            "lesion": {"fp32": 1.0, "artifact": 1.0, "change": 0.0},
        },
        "ratio": 1.0,
        "ratio_bound": 1.0,
        "largest_loss": {"points": 0.0, "image": "good 0", "class": "lesion"},
        "area": {"lesion": {"mean_change": 0.0, "largest_change": 0.0, "image": "good 0"}},
        "diameter": {"lesion": {"mean_change": 0.0, "largest_change": 0.0, "image": "good 0"}},
        "lesion_free": {"frames": 0, "clean": 0, "alarms": 0},
        "worst": {"image": "good 0", "pixel_agreement": 0.99},
        "verdict": "high",
        "reason": None,
        "reasons": [],
    }


@pytest.mark.parametrize(
    ("reference", "found", "expected", "reasons"),
    [
        (1.0, 0.999, "high", []),
        (0.8, 0.7992, "high", []),
        (0.55, 0.54945, "high", []),  # 1 + (0.54945 - 0.55) / 0.55 is a little less than 0.999
        (1.0, 0.99899, "standard", ["bound 0.9989 of the reference's mean Dice, high needs 0.999"]),
        (1.0, 0.99, "standard", ["bound 0.99 of the reference's mean Dice, high needs 0.999"]),
        (0.7, 0.693, "standard", ["bound 0.99 of the reference's mean Dice, high needs 0.999"]),
        (1.0, 0.98999, "failed", ["bound 0.9899 of the reference's mean Dice, standard needs 0.99"]),
        (1.0, 0.9712, "failed", ["bound 0.9712 of the reference's mean Dice, standard needs 0.99"]),
        (0.9, 0.95, "high", []),
    ],
)
def test_the_bound_of_each_level(reference: float, found: float, expected: str, reasons: list[str]) -> None:
    assert verdict([image(reference=reference, found=found)] * 20) == (expected, reasons)


@pytest.mark.parametrize(
    ("reference", "found", "expected", "reasons"),
    [
        (0.9, 0.87, "high", []),  # 100 * (0.9 - 0.87) is a little more than 3
        (0.93, 0.90, "high", []),
        (0.9, 0.8699, "standard", ["image 7 loses 3.01 points of lesion, high allows 3"]),
        (0.9, 0.869999, "standard", ["image 7 loses 3.01 points of lesion, high allows 3"]),
        (0.9, 0.85, "standard", ["image 7 loses 5 points of lesion, high allows 3"]),
        (0.65, 0.60, "standard", ["image 7 loses 5 points of lesion, high allows 3"]),
        (0.9, 0.8499, "failed", ["image 7 loses 5.01 points of lesion, standard allows 5"]),
        (0.9, 0.819, "failed", ["image 7 loses 8.1 points of lesion, standard allows 5"]),
    ],
)
def test_the_loss_of_each_level(reference: float, found: float, expected: str, reasons: list[str]) -> None:
    assert verdict([*GOOD, image("image 7", reference, found)]) == (expected, reasons)


def test_the_bound_and_not_the_ratio_is_compared() -> None:
    images = [*GOOD[:36], *[image(f"weak {i}", 1.0, 0.96) for i in range(4)]]
    found = judge(images, BINARY)
    assert found["ratio"] == pytest.approx(0.996)
    assert found["ratio_bound"] == pytest.approx(1 - 0.04 * stats.binom(40, 0.1).ppf(0.975) / 40, abs=1e-9)  # 0.992
    assert found["verdict"] == "standard"
    assert judge([*GOOD[:10], image("weak", 1.0, 0.96)], BINARY)["verdict"] == "failed"  # ratio 0.9964, bound 0.9891


def test_a_weak_artifact_fails_for_all_that_it_misses() -> None:
    images = [image(f"image {i}", 0.9, 0.9 - 0.004 * i) for i in range(20)]
    found, reasons = verdict([*images, *[empty_frame(added=51)] * 3])
    assert found == "failed"
    assert len(reasons) == 3
    assert "3 of 3 clean frames raise a false alarm, 1 in 100 is allowed" in reasons
    assert "image 19 loses 7.6 points of lesion, standard allows 5" in reasons
    assert any(reason.startswith("bound 0.94") and reason.endswith("standard needs 0.99") for reason in reasons)


@pytest.mark.parametrize(("pixels", "judged", "expected"), [(500, 401, "failed"), (499, 400, "high")])
def test_an_image_counts_from_500_pixels(pixels: int, judged: int, expected: str) -> None:
    found = judge([*GOOD, image("small", 1.0, 0.0, pixels)], BINARY)
    assert found["judged"] == judged
    assert found["verdict"] == expected
    assert found["dice"]["lesion"]["artifact"] == pytest.approx(400 / 401)  # told, if not judged


@pytest.mark.parametrize(("side", "judged"), [(25, 1), (24, 0)])
def test_masks_with_500_pixels_of_a_class_are_judged(side: int, judged: int) -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[:20, :side] = 1
    found = judge([image_parity("x", truth, truth, 2)], BINARY)
    assert found["judged"] == judged
    assert found["against"] == "fp32 mask"
    assert found["verdict"] == ("high" if judged else "unjudged")


def test_the_background_is_never_judged() -> None:
    assert verdict([image(dice=(0.1, 1.0))] * 5) == ("high", [])


@pytest.mark.parametrize(
    ("alarms", "frames", "expected"), [(0, 1, True), (1, 100, True), (1, 99, False), (2, 200, True), (2, 199, False)]
)
def test_one_false_alarm_in_100_clean_frames_is_allowed(alarms: int, frames: int, expected: bool) -> None:
    images = [*GOOD, *[empty_frame(added=51)] * alarms, *[empty_frame()] * (frames - alarms)]
    found = judge(images, BINARY)
    assert found["lesion_free"] == {"frames": frames, "clean": frames, "alarms": alarms}
    assert found["verdict"] == ("high" if expected else "failed")
    said = f"{alarms} of {frames} clean frames raise a false alarm, 1 in 100 is allowed"
    assert found["reasons"] == ([] if expected else [said])


@pytest.mark.parametrize(
    ("frame", "counts"),
    [
        pytest.param(empty_frame(added=50), (1, 1, 0), id="50 added"),
        pytest.param(empty_frame(added=51), (1, 1, 1), id="51 added"),
        pytest.param(empty_frame(reference=50, added=50), (1, 1, 0), id="50 added to 50"),
        pytest.param(empty_frame(reference=50, added=51), (1, 1, 1), id="51 added to 50"),
        pytest.param(empty_frame(reference=51, added=900), (1, 0, 0), id="not clean"),
        pytest.param(image(pixels=1, added=900), (0, 0, 0), id="a lesion of a pixel"),
        pytest.param(
            empty_frame(reference=40, added=51, reference_area=(9960, 40), area=(9949, 51)), (1, 1, 1), id="moved"
        ),
    ],
)
def test_clean_frames_and_alarms(frame: ImageParity, counts: tuple[int, int, int]) -> None:
    found = judge([*GOOD, frame], BINARY)["lesion_free"]
    assert (found["frames"], found["clean"], found["alarms"]) == counts


def test_without_truth_a_frame_is_lesion_free_where_the_reference_is_empty() -> None:
    empty, one, some, lesion = np.zeros((4, 30, 30), np.uint8)
    one[0, 0], some[:2, 3:], lesion[:] = 1, 1, 1  # some: 54 pixels
    masks = [("a", empty, some), ("b", one, some), ("c", lesion, lesion)]
    without = [image_parity(*entry, 2) for entry in masks]
    assert judge(without, BINARY)["lesion_free"] == {"frames": 1, "clean": 1, "alarms": 1}
    # An empty truth makes all three lesion-free. c is not clean: there the reference is all false.
    with_truth = [image_parity(*entry, 2, empty) for entry in masks]
    assert judge(with_truth, BINARY)["lesion_free"] == {"frames": 3, "clean": 2, "alarms": 2}


@pytest.mark.parametrize("field", ["dice", "reference_dice"])
@pytest.mark.parametrize("place", [0, 250, 400], ids=["first", "middle", "last"])
def test_a_nan_fails_and_is_none_in_json(field: str, place: int) -> None:
    images = list(GOOD)
    images.insert(place, image("broken", **{field: (0.95, math.nan)}))
    found = judge(images, BINARY)
    json.dumps(found, allow_nan=False)
    assert found["verdict"] == "failed"
    assert found["ratio"] is None
    assert found["ratio_bound"] is None
    assert found["largest_loss"] == {"points": None, "image": "broken", "class": "lesion"}
    assert found["reasons"] == [
        "broken loses nan points of lesion, standard allows 5",
        "bound nan of the reference's mean Dice, standard needs 0.99",
    ]


def three(
    name: str, pixels: tuple[int, int], reference: tuple[float, float], found: tuple[float, float]
) -> ImageParity:
    return replace(
        image(name),
        pixels=(10_000 - sum(pixels), *pixels),
        reference_dice=(0.9, *reference),
        dice=(0.9, *found),
        reference_area=(8000, 1000, 1000),
        area=(8000, 1000, 1000),
        reference_diameter=(0.0, 40.0, 40.0),
        diameter=(0.0, 40.0, 40.0),
    )


def test_images_are_judged_by_their_foreground_and_by_every_class_in_it() -> None:
    images = [
        three("both", (600, 700), (0.8, 0.6), (0.79, 0.64)),  # 0.7 to 0.715, loses 1 point of the first class
        three("one", (499, 500), (0.9, 0.5), (0.8, 0.48)),  # 0.7 to 0.64, loses 6 points, most of the small class
        three("none", (499, 0), (0.9, 1.0), (0.3, 0.0)),
    ]
    found = judge(images, ("background", "nodule", "cyst"))
    assert found["judged"] == 2
    assert found["ratio"] == pytest.approx((0.715 + 0.64) / (0.7 + 0.7))
    assert found["ratio_bound"] == pytest.approx(0.64 / 0.7)  # a resample in four is the second image twice
    assert found["largest_loss"] == {"points": pytest.approx(6), "image": "one", "class": "nodule"}
    assert found["dice"]["nodule"] == {
        "fp32": pytest.approx(2.6 / 3),
        "artifact": pytest.approx(1.89 / 3),
        "change": pytest.approx((1.89 - 2.6) / 3),
    }
    assert found["dice"]["cyst"] == {  # the third image does not hold it
        "fp32": pytest.approx(0.55),
        "artifact": pytest.approx(0.56),
        "change": pytest.approx(0.01),
    }
    assert list(found["area"]) == list(found["diameter"]) == ["nodule", "cyst"]
    assert found["verdict"] == "failed"


def test_a_small_class_that_is_lost_whole_fails() -> None:
    images = [three(f"slice {i}", (6400, 361), (0.9, 0.8), (0.9, 0.0)) for i in range(12)]
    found = judge(images, ("background", "liver", "gallbladder"))
    assert found["verdict"] == "failed"
    assert found["largest_loss"] == {"points": pytest.approx(40), "image": "slice 0", "class": "gallbladder"}
    assert found["ratio_bound"] == pytest.approx(0.45 / 0.85)


def test_a_few_pixels_of_a_small_class_do_not_fail_alone() -> None:
    images = [three(f"slice {i}", (6400, 9), (0.9, 0.8), (0.9, 0.72)) for i in range(12)]  # 8 points of it, 4 of all
    assert judge(images, ("background", "liver", "gallbladder"))["largest_loss"]["points"] == pytest.approx(4)


def test_the_largest_loss_is_over_classes_and_not_of_their_mean() -> None:
    images = [three("a", (600, 600), (0.8, 0.8), (0.8 + 0.06, 0.8 - 0.06))] * 4
    found = judge(images, ("background", "nodule", "cyst"))
    assert found["ratio_bound"] == pytest.approx(1)
    assert found["largest_loss"] == {"points": pytest.approx(6), "image": "a", "class": "cyst"}
    assert found["reasons"] == ["a loses 6 points of cyst, standard allows 5"]


def test_a_gain_is_a_negative_loss() -> None:
    found = judge([image("a", 0.8, 0.9), image("b", 0.8, 0.83)], BINARY)
    assert found["largest_loss"] == {"points": pytest.approx(-3), "image": "b", "class": "lesion"}
    assert found["verdict"] == "high"


def test_a_class_that_no_image_holds_has_no_figures() -> None:
    found = judge([three("a", (600, 0), (0.9, 1.0), (0.9, 1.0))], ("background", "nodule", "cyst"))
    assert found["dice"]["cyst"] == {"fp32": None, "artifact": None, "change": None}
    found = judge([image(reference_area=(9501, 499))], BINARY)
    nothing = {"mean_change": None, "largest_change": None, "image": None}
    assert found["area"] == found["diameter"] == {"lesion": nothing}


def test_changes_of_area_and_diameter_are_relative_to_the_reference() -> None:
    images = [
        image("a", reference_area=(9000, 1000), area=(8900, 1100), reference_diameter=(0, 50.0), diameter=(0, 49.0)),
        image("b", reference_area=(9500, 500), area=(9600, 400), reference_diameter=(0, 20.0), diameter=(0, 21.0)),
        image("c", reference_area=(9501, 499), area=(10_000, 0), reference_diameter=(0, 20.0), diameter=(0, 0.0)),
    ]
    found = judge(images, BINARY)
    assert found["area"]["lesion"] == {
        "mean_change": pytest.approx((0.1 - 0.2) / 2),
        "largest_change": pytest.approx(-0.2),
        "image": "b",
    }
    assert found["diameter"]["lesion"] == {
        "mean_change": pytest.approx((-0.02 + 0.05) / 2),
        "largest_change": pytest.approx(0.05),
        "image": "b",
    }


def test_of_equal_losses_the_lowest_agreement_is_the_worst() -> None:
    images = [
        image("a", 0.9, 0.88, pixel_agreement=0.97),
        image("b", 0.9, 0.88, pixel_agreement=0.96),
        image("c", 0.9, 0.89, pixel_agreement=0.5),
        empty_frame("d", pixel_agreement=0.1),
    ]
    found = judge(images, BINARY)
    assert found["worst"] == {"image": "b", "pixel_agreement": 0.96}
    assert found["largest_loss"]["image"] == "b"
    assert found["pixel_agreement"] == pytest.approx((0.97 + 0.96 + 0.5 + 0.1) / 4)


@pytest.mark.parametrize("truth", [True, False])
@pytest.mark.parametrize("added", [50, 51])
def test_images_without_lesions_are_unjudged_unless_they_raise_alarms(truth: bool, added: int) -> None:
    images = [
        empty_frame("a", pixel_agreement=0.9, against_truth=truth),
        empty_frame("b", added=added, pixel_agreement=0.8, against_truth=truth),
    ]
    found = judge(images, BINARY)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    where = "truth" if truth else "reference mask"
    if added == 50:
        assert (found["verdict"], found["reasons"]) == ("unjudged", [])
        assert found["reason"] == (
            f"no image has 500 pixels of foreground in the {where}: "
            "give images of the model's own domain that show lesions"
        )
    else:
        assert (found["verdict"], found["reason"]) == ("failed", None)
        assert found["reasons"] == ["1 of 2 clean frames raise a false alarm, 1 in 100 is allowed"]
    assert found["worst"] == {"image": "b", "pixel_agreement": 0.8}
    assert found["largest_loss"] == {"points": None, "image": None, "class": None}
    assert (found["judged"], found["ratio"], found["ratio_bound"]) == (0, None, None)


def test_too_few_cases_that_lose_their_lesions_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LEAST_CASES", LEAST_CASES)
    found = judge([image(f"{i}", 1.0, 0.0) for i in range(9)], BINARY)
    assert (found["verdict"], found["reason"]) == ("failed", None)
    assert found["reasons"] == ["0 loses 100 points of lesion, standard allows 5"]


@pytest.mark.parametrize(("reference", "expected"), [(0.0, "unjudged"), (0.0499, "unjudged"), (0.05, "high")])
def test_a_reference_that_finds_nothing_is_not_a_measure(reference: float, expected: str) -> None:
    images = [image(reference=2 * reference, found=2 * reference), image(reference=0.0, found=0.0)]
    found = judge(images, BINARY)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["verdict"] == expected
    assert found["reason"] == (
        None
        if expected == "high"
        else f"the reference's mean Dice is {reference:.4f}, below 0.05, it finds nothing here: "
        "give images of the model's own domain"
    )


@pytest.mark.parametrize(("cases", "expected"), [(10, "high"), (9, "unjudged")])
def test_ten_cases_are_needed(monkeypatch: pytest.MonkeyPatch, cases: int, expected: str) -> None:
    monkeypatch.setattr(measure, "LEAST_CASES", LEAST_CASES)
    images = [image(f"{case} {i}", case=str(case)) for case in range(cases) for i in range(3)]
    found = judge(images, BINARY)
    assert (found["judged"], found["cases"], found["verdict"]) == (3 * cases, cases, expected)
    if expected == "unjudged":
        assert found["reason"] == "images of 9 cases can be judged, 10 are needed: give more"


def test_images_of_one_case_are_averaged_before_cases_are() -> None:
    images = [image("a", 1.0, 0.9, case="1"), image("b", 1.0, 0.9, case="1"), image("c", 1.0, 0.5, case="2")]
    found = judge(images, BINARY)
    assert found["ratio"] == pytest.approx((0.9 + 0.5) / 2)
    assert found["ratio_bound"] == pytest.approx(0.5)  # both resampled cases are the second: 1 time in 4


def test_no_images_are_unjudged() -> None:
    found = judge([], BINARY)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["verdict"] == "unjudged"
    assert (found["images"], found["against"], found["pixel_agreement"]) == (0, None, None)
    assert found["worst"] == {"image": None, "pixel_agreement": None}


def test_images_with_and_without_truth_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"^images: got 2 of 3 with a truth, expected all or none$"):
        judge([*GOOD[:2], replace(GOOD[2], against_truth=False)], BINARY)


def test_images_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^good 0: got 2 classes, expected 3$"):
        judge(GOOD[:1], ("background", "nodule", "cyst"))


def test_the_order_of_images_changes_names_alone() -> None:
    images = [image(f"image {i}", 0.9, 0.9 - 0.001 * i) for i in range(12)]
    a, b = judge(images, BINARY), judge(images[::-1], BINARY)
    assert a["ratio"] == pytest.approx(b["ratio"])
    assert a["ratio_bound"] == pytest.approx(b["ratio_bound"], abs=2e-4)
    assert a["largest_loss"] == b["largest_loss"]


FIGURES = st.one_of(st.floats(0, 1), st.floats(0.9, 1), st.sampled_from([0.0, 0.87, 0.9, 1.0, math.nan]))


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(FIGURES, FIGURES, st.sampled_from([0, 1, 499, 500, 4000]), st.integers(0, 120)), max_size=8),
    st.floats(0, 0.01),
)
def test_the_verdict_follows_from_the_figures_in_the_json(
    drawn: list[tuple[float, float, int, int]], spread: float
) -> None:
    images = [image(f"{i}", a, b, n, added=k) for i, (a, b, n, k) in enumerate(drawn)]
    images += [image(f"near {i}", 0.9, 0.9 - spread * i / 3, 800) for i in range(len(drawn) % 4)]
    found = judge(images, BINARY)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    judged = [entry for entry in images if entry.pixels[1] >= 500]
    assert found["judged"] == len(judged)
    bound, loss, free = found["ratio_bound"], found["largest_loss"]["points"], found["lesion_free"]
    alarmed = free["clean"] and free["alarms"] / free["clean"] > 0.01
    unbound = not judged or np.mean([entry.reference_dice[1] for entry in judged]) < 0.05
    if alarmed or (judged and (loss is None or loss > 5)):
        expected = "failed"
    elif unbound:
        expected = "unjudged"
    elif bound is not None and bound >= 0.999 and loss <= 3:
        expected = "high"
    else:
        expected = "standard" if bound is not None and bound >= 0.99 else "failed"
    assert bool(found["reason"]) == (expected == "unjudged")
    assert found["verdict"] == expected
    assert bool(found["reasons"]) == (expected in ("standard", "failed"))
