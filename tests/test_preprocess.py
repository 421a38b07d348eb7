"""Pixels to tensor and logits to mask: against Pillow, against the rules spelt out, and every frame that is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from msa2net.errors import FrameError, OutputError
from msa2net.runtimes.bundle import ClassInfo, InputContract
from msa2net.runtimes.overlay import draw, outline, to_rgb
from msa2net.runtimes.postprocess import aligned_index, check_logits, nearest_index, softmax, to_mask, to_probabilities
from msa2net.runtimes.preprocess import (
    GREY_STEP,
    MAX_PIXELS,
    MAX_SIDE,
    WEIGHT_STEP,
    Placement,
    bilinear_table,
    check_frame,
    fixed_table,
    place,
    resize,
    resize_table,
    spline_table,
    to_tensor,
)

MANY = settings(max_examples=120, deadline=None)
SIDES = st.one_of(st.integers(1, 8), st.integers(1, 300))


def contract(
    height: int = 4,
    width: int = 6,
    channels: int = 3,
    fit: str = "stretch",
    mean: float = 0.0,
    std: float = 1.0,
    resize: str = "bilinear",
) -> InputContract:
    return InputContract(
        height=height,
        width=width,
        channels=channels,
        mean=(mean,) * channels,
        std=(std,) * channels,
        fit=fit,
        resize=resize,
    )


def noise(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def parts(error: FrameError | OutputError) -> tuple[str, str, str, str]:
    return error.place, error.found, error.expected, error.advice


# Resizing ---------------------------------------------------------------------------------------------------------


@MANY
@given(SIDES, SIDES)
@example(1, 1)
@example(1, 300)
@example(300, 1)
@example(MAX_SIDE, 3)
def test_each_row_of_a_resize_table_is_a_mean(source: int, target: int) -> None:
    table = bilinear_table(source, target)
    assert table.shape == (target, source)
    assert table.dtype == np.float32
    assert (table >= 0).all()
    np.testing.assert_allclose(table.sum(1, dtype=np.float64), 1, atol=1e-6)


@MANY
@given(SIDES, SIDES)
def test_a_resize_table_is_symmetric(source: int, target: int) -> None:
    table = bilinear_table(source, target)
    np.testing.assert_allclose(table, table[::-1, ::-1], atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 7, 224])
def test_the_table_of_equal_sizes_is_the_identity(size: int) -> None:
    assert np.array_equal(bilinear_table(size, size), np.eye(size, dtype=np.float32))


@pytest.mark.parametrize(
    ("source", "target", "rows"),
    [
        pytest.param(2, 4, [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], id="up"),
        # Output 0 lies at 1: inputs at 0.5 and 1.5 are 1/4 of the filter away, those at 2.5 and 3.5 3/4 and more.
        pytest.param(4, 2, [[3 / 7, 3 / 7, 1 / 7, 0], [0, 1 / 7, 3 / 7, 3 / 7]], id="down"),
        pytest.param(1, 3, [[1], [1], [1]], id="one pixel"),
        pytest.param(3, 1, [[2 / 7, 3 / 7, 2 / 7]], id="to one pixel"),
    ],
)
def test_a_resize_table_holds_these_weights(source: int, target: int, rows: list[list[float]]) -> None:
    np.testing.assert_allclose(bilinear_table(source, target), rows, atol=1e-7)


@MANY
@given(SIDES, SIDES)
@example(MAX_SIDE, 3)
@example(3, MAX_SIDE)
@example(1080, 224)
def test_a_fixed_table_is_the_bilinear_one_in_whole_steps(source: int, target: int) -> None:
    table = fixed_table(source, target)
    assert np.array_equal(table, table[::-1, ::-1])
    assert (table >= 0).all()
    steps = table / WEIGHT_STEP
    assert np.array_equal(steps, np.rint(steps))
    assert (steps.sum(1, dtype=np.float64) == 1 / WEIGHT_STEP).all()
    assert np.abs(table - bilinear_table(source, target)).max() <= 1.001 * WEIGHT_STEP


@pytest.mark.parametrize(
    ("source", "target", "steps"),
    [
        pytest.param(2, 4, [[2048, 0], [1536, 512], [512, 1536], [0, 2048]], id="up"),
        # 3/7, 6/7 and 1 of 2048 are 877.7, 1755.4 and 2048.
        pytest.param(4, 2, [[878, 877, 293, 0], [0, 293, 877, 878]], id="down"),
        pytest.param(3, 1, [[585, 878, 585]], id="to one pixel"),
    ],
)
def test_a_fixed_table_holds_these_weights(source: int, target: int, steps: list[list[int]]) -> None:
    assert (fixed_table(source, target) * 2048).tolist() == steps


@MANY
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 99))
@example(1080, 1920, 224, 224, 0)
@example(1, 300, 224, 224, 0)
def test_fixed_resizing_is_what_whole_numbers_give(rows: int, columns: int, height: int, width: int, seed: int) -> None:
    """Weights in 2048ths, values in 32nds, halves to the even one: BUNDLE.md, section 6, in integers of 64 bits."""

    def along(values: NDArray[np.int64], source: int, target: int) -> NDArray[np.int64]:
        if source == target:
            return values
        sums = (fixed_table(source, target) * 2048).astype(np.int64) @ values
        return (sums + 1023 + (sums >> 11 & 1)) >> 11

    image = noise((rows, columns, 1), seed)
    upright = along(32 * image[..., 0].astype(np.int64), rows, height)
    expected = along(upright.T, columns, width).T
    found = resize(image, "bilinear-fixed", height, width)
    assert np.array_equal(found[0], expected / np.float32(32))
    flipped = resize(image[::-1, ::-1], "bilinear-fixed", height, width)
    assert np.array_equal(flipped[:, ::-1, ::-1], found)
    axes = (rows, height), (columns, width)
    off = [np.abs(fixed_table(*axis) - bilinear_table(*axis)).sum(1).max() for axis in axes]
    assert np.abs(found - resize(image, "bilinear", height, width)).max() <= 255 * sum(off) + GREY_STEP + 1e-4


def test_a_shared_resize_table_cannot_be_written() -> None:
    table = resize_table("bilinear", 5, 3)
    assert table is resize_table("bilinear", 5, 3)
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1


@MANY
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from([1, 3]), st.integers(0, 99))
@example(1, 1, 224, 224, 3, 0)
@example(300, 200, 1, 1, 3, 0)
@example(1, 300, 224, 224, 1, 0)
@example(300, 1, 224, 224, 1, 0)
@example(480, 640, 224, 224, 3, 0)
@example(97, 101, 224, 224, 3, 0)
@example(225, 223, 224, 224, 3, 0)
def test_resizing_equals_pillow_to_one_grey_level(
    rows: int, columns: int, height: int, width: int, channels: int, seed: int
) -> None:
    image = noise((rows, columns, channels), seed)
    found = resize(image, "bilinear", height, width)
    bands = [
        np.asarray(Image.fromarray(image[..., c]).resize((width, height), Image.Resampling.BILINEAR))
        for c in range(channels)
    ]
    assert found.shape == (channels, height, width)
    assert found.dtype == np.float32
    # Pillow rounds to whole levels after each axis: by half a level at most, twice.
    assert np.abs(np.rint(found) - np.stack(bands)).max() <= 1


@MANY
@given(SIDES, SIDES, SIDES, SIDES)
@example(3, 1000, 224, 224)
def test_resizing_equals_pillow_in_float(rows: int, columns: int, height: int, width: int) -> None:
    image = np.random.default_rng(0).random((rows, columns), dtype=np.float32)
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(resize(image[..., None], "bilinear", height, width)[0], expected, atol=5e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_resizing_to_the_same_size_keeps_every_value(dtype: type) -> None:
    image = noise((5, 7, 3)).astype(dtype)
    assert np.array_equal(resize(image, "bilinear", 5, 7), image.transpose(2, 0, 1))


def test_resizing_works_on_views_that_are_not_contiguous() -> None:
    image = noise((40, 60, 3))
    view = image[::-2, 1::3]
    expected = resize(np.ascontiguousarray(view), "bilinear", 9, 11)
    assert np.array_equal(resize(view, "bilinear", 9, 11), expected)


def test_a_long_thin_frame_is_resized_whole() -> None:
    ramp = np.linspace(0, 1, MAX_SIDE, dtype=np.float32)[None]
    found = to_tensor(check_frame(ramp), contract(height=2, width=8, channels=1))[0, 0]
    expected = np.asarray(Image.fromarray(ramp).resize((8, 2), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found[:, 1:-1], np.tile((np.arange(1, 7) + 0.5) / 8, (2, 1)), atol=1e-4)


# The spline -------------------------------------------------------------------------------------------------------

LENGTHS = [1, 2, 3, 4, 5, 7, 31, 97, 150, 223, 224, 225, 300, 480, 512, 513, 640]


def zoomed(samples: NDArray[np.float64], target: int) -> tuple[NDArray[np.float64], slice]:
    """`samples` by scipy's zoom, and which of its outputs count: at some lengths it takes the last to lie outside, and
    gives 0 for it (512 to 224).
    """
    from scipy.ndimage import zoom

    found = zoom(samples, target / len(samples), order=3)
    assert found.shape == (target,)
    return found, slice(0, target - 1 if found[-1] == 0 else target)


@pytest.mark.parametrize("target", [1, 2, 3, 7, 97, 224, 225, 512])
@pytest.mark.parametrize("source", LENGTHS)
def test_the_spline_is_scipys_zoom(source: int, target: int) -> None:
    samples = np.random.default_rng(source).uniform(0.1, 1, source)
    expected, counted = zoomed(samples, target)
    found = spline_table(source, target).astype(np.float64) @ samples
    np.testing.assert_allclose(found[counted], expected[counted], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("source", "lost"), [(512, True), (480, True), (300, False), (256, False)])
def test_the_end_that_scipy_loses_is_kept(source: int, lost: bool) -> None:
    samples = np.linspace(0.2, 0.9, source)
    expected, counted = zoomed(samples, 224)
    assert (counted.stop == 223) == lost
    assert expected[-1] == (0 if lost else pytest.approx(0.9, abs=1e-6))
    assert (spline_table(source, 224) @ samples)[-1] == pytest.approx(0.9, abs=1e-6)


def test_an_image_by_the_spline_is_scipys_zoom() -> None:
    from scipy.ndimage import zoom

    image = np.random.default_rng(3).random((150, 97, 3))
    expected = np.stack([zoom(image[..., c], (224 / 150, 224 / 97), order=3) for c in range(3)])
    found = resize(image, "spline", 224, 224)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=3e-6, rtol=0)


@MANY
@given(SIDES, SIDES, st.integers(0, 99))
@example(1, 1, 0)
@example(1, 224, 0)
@example(224, 1, 0)
@example(2, 224, 0)
@example(512, 224, 0)
@example(480, 224, 0)
def test_a_spline_keeps_constants_and_ends_and_has_no_direction(source: int, target: int, seed: int) -> None:
    table = spline_table(source, target)
    assert table.shape == (target, source)
    assert table.dtype == np.float32
    assert np.isfinite(table).all()
    np.testing.assert_allclose(table.sum(1, dtype=np.float64), 1, atol=1e-6)
    np.testing.assert_allclose(table @ np.full(source, 0.7), 0.7, atol=1e-6)
    samples = np.random.default_rng(seed).random(source)
    found = table @ samples
    assert found[0] == pytest.approx(samples[0], abs=2e-6)
    if target > 1:
        assert found[-1] == pytest.approx(samples[-1], abs=2e-6)
        np.testing.assert_allclose(table, table[::-1, ::-1], atol=1e-6)


@pytest.mark.parametrize(
    ("source", "target", "rows"),
    [
        pytest.param(1, 1, [[1]], id="one to one"),
        pytest.param(1, 3, [[1], [1], [1]], id="one sample"),
        pytest.param(5, 1, [[1, 0, 0, 0, 0]], id="to one sample"),
        pytest.param(3, 2, [[1, 0, 0], [0, 0, 1]], id="only the ends"),
        pytest.param(5, 3, [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]], id="every second"),
        # Mirrored, 0 and 1 have the coefficients -1 and 2: at 1/3 the spline is 7/27, no straight line.
        pytest.param(2, 4, [[1, 0], [20 / 27, 7 / 27], [7 / 27, 20 / 27], [0, 1]], id="two samples"),
    ],
)
def test_a_spline_table_holds_these_weights(source: int, target: int, rows: list[list[float]]) -> None:
    np.testing.assert_allclose(spline_table(source, target), rows, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 7, 224])
def test_the_spline_of_equal_sizes_is_the_identity(size: int) -> None:
    np.testing.assert_allclose(spline_table(size, size), np.eye(size), atol=1e-6)


def test_a_spline_overshoots_and_is_not_clipped() -> None:
    frame = np.zeros((8, 8), np.uint8)
    frame[:, 4:] = 255
    tensor = to_tensor(frame, contract(40, 40, resize="spline"))
    assert tensor.min() < -0.05
    assert tensor.max() > 1.05
    assert to_tensor(frame, contract(40, 40)).min() == 0


def test_the_contracts_rule_is_the_one_that_resizes() -> None:
    frame = noise((30, 50))
    for rule in ("bilinear", "spline"):
        expected = resize(frame[..., None], rule, 4, 6)[0] / 255
        np.testing.assert_allclose(to_tensor(frame, contract(channels=1, resize=rule))[0, 0], expected, atol=1e-6)
    assert np.abs(resize(frame[..., None], "spline", 4, 6) - resize(frame[..., None], "bilinear", 4, 6)).max() > 10


def test_both_rules_have_tables_of_their_own() -> None:
    assert np.array_equal(resize_table("spline", 9, 4), spline_table(9, 4))
    assert np.array_equal(resize_table("bilinear", 9, 4), bilinear_table(9, 4))


# Tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits", "value", "expected"),
    [
        pytest.param(np.uint8, None, 51, 0.2, id="uint8"),
        pytest.param(np.uint8, None, 255, 1.0, id="uint8 white"),
        pytest.param(np.uint8, None, 1, 1 / 255, id="uint8 is not scaled by its content"),
        pytest.param(np.uint16, None, 13107, 0.2, id="uint16"),
        pytest.param(np.uint16, None, 255, 255 / 65535, id="uint16 is not scaled by its content"),
        pytest.param(np.uint16, 16, 65535, 1.0, id="16 bits stored"),
        pytest.param(np.uint16, 12, 819, 0.2, id="12 bits stored"),
        pytest.param(np.uint16, 10, 1023, 1.0, id="10 bits stored"),
        pytest.param(np.uint16, 1, 1, 1.0, id="1 bit stored"),
        pytest.param(np.float32, None, 0.2, 0.2, id="float32"),
        pytest.param(np.float32, None, 1.0, 1.0, id="float32 white"),
        pytest.param(">u2", None, 13107, 0.2, id="big-endian uint16"),
        pytest.param(">u2", 12, 819, 0.2, id="big-endian uint16, 12 bits stored"),
        pytest.param(">f4", None, 0.2, 0.2, id="big-endian float32"),
    ],
)
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (9, 5), (9, 5, 3)], ids=str)
def test_values_are_scaled_by_dtype(
    dtype: Any, bits: int | None, value: float, expected: float, shape: tuple[int, ...]
) -> None:
    frame = np.full(shape, value, dtype)
    tensor = to_tensor(check_frame(frame, bits), contract(), bits)
    assert tensor.shape == (1, 3, 4, 6)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    np.testing.assert_allclose(tensor, expected, rtol=1e-6)


def test_mean_and_deviation_are_taken_channel_by_channel() -> None:
    channels = InputContract(height=1, width=1, channels=3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    frame = np.array([[[0.1, 0.6, 1.0]]], np.float32)
    np.testing.assert_allclose(to_tensor(frame, channels).ravel(), [0, 0.2, 0.175], atol=1e-7)


def test_grey_is_repeated() -> None:
    grey = noise((10, 12))
    expected = to_tensor(np.repeat(grey[..., None], 3, axis=2), contract())
    found = to_tensor(grey, contract())
    assert np.array_equal(found[0, 0], found[0, 1])
    assert np.array_equal(found[0, 0], found[0, 2])
    np.testing.assert_allclose(found, expected, atol=1e-6)  # a product of another shape may round otherwise


def test_channels_keep_their_order_and_axes_their_direction() -> None:
    frame = noise((4, 6, 3))
    np.testing.assert_allclose(to_tensor(frame, contract())[0], frame.transpose(2, 0, 1) / 255, rtol=1e-6)


def test_the_callers_frame_is_left_as_it_is() -> None:
    for frame in (noise((4, 6)), noise((4, 6)).astype(np.uint16), noise((4, 6)).astype(np.float32) / 255):
        kept = frame.copy()
        frame.setflags(write=False)
        tensor = to_tensor(check_frame(frame), contract(channels=1, mean=0.5, std=0.5))
        assert np.array_equal(frame, kept)
        assert not np.shares_memory(frame, tensor)


def test_a_network_of_one_channel_takes_grey() -> None:
    grey = noise((4, 6))
    np.testing.assert_allclose(to_tensor(grey, contract(channels=1))[0, 0], grey / 255, rtol=1e-6)


def test_a_network_of_one_channel_refuses_colour() -> None:
    with pytest.raises(FrameError) as caught:
        to_tensor(noise((4, 6, 3)), contract(channels=1))
    assert parts(caught.value) == (
        "frame",
        "got (4, 6, 3)",
        "expected (H, W): the network takes grey",
        "Convert it to grey.",
    )


# Letterbox --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        pytest.param(100, 100, Placement(0, 0, 224, 224), id="square"),
        pytest.param(480, 640, Placement(28, 0, 168, 224), id="wide"),
        pytest.param(640, 480, Placement(0, 28, 224, 168), id="high"),
        pytest.param(10, 20, Placement(56, 0, 112, 224), id="small"),
        pytest.param(1, 1000, Placement(111, 0, 1, 224), id="a line keeps one row"),
        pytest.param(MAX_SIDE, 1, Placement(0, 111, 224, 1), id="a column keeps one column"),
        pytest.param(301, 300, Placement(0, 0, 224, 223), id="an odd rest goes after"),
    ],
)
def test_a_letterboxed_frame_lies_in_the_middle(rows: int, columns: int, expected: Placement) -> None:
    assert place(contract(224, 224, fit="letterbox"), rows, columns) == expected


def test_a_stretched_frame_lies_everywhere() -> None:
    assert place(contract(224, 160), 480, 640) == Placement(0, 0, 224, 160)


@MANY
@given(SIDES, SIDES, st.integers(1, 2000), st.integers(1, 2000))
def test_a_letterboxed_frame_lies_inside_and_touches_two_edges(
    height: int, width: int, rows: int, columns: int
) -> None:
    found = place(contract(height, width, fit="letterbox"), rows, columns)
    assert 1 <= found.height <= height
    assert 1 <= found.width <= width
    assert found.height == height or found.width == width
    for start, used, whole in ((found.top, found.height, height), (found.left, found.width, width)):
        assert 0 <= whole - used - 2 * start <= 1


def test_what_a_letterboxed_frame_does_not_cover_is_black_before_normalisation() -> None:
    letterbox = contract(8, 8, fit="letterbox", mean=0.5, std=0.25)
    tensor = to_tensor(np.full((4, 8, 3), 255, np.uint8), letterbox)
    assert np.array_equal(tensor[0, :, 2:6], np.full((3, 4, 8), 2, np.float32))
    assert (np.delete(tensor, slice(2, 6), axis=2) == -2).all()


def test_the_mask_of_a_letterboxed_frame_leaves_the_padding_out() -> None:
    logits = np.zeros((2, 8, 8), np.float32)
    logits[1, :2] = 9  # the padding
    logits[1, 2:4, :4] = 9  # the upper left quarter of the frame
    placement = place(contract(8, 8, fit="letterbox"), 8, 16)
    expected = np.zeros((8, 16), np.uint8)
    expected[:4, :8] = 1
    assert np.array_equal(to_mask(logits, placement, (8, 16), "nearest"), expected)


# Frames that are refused ------------------------------------------------------------------------------------------

KINDS = "expected uint8, uint16 or float32 (H, W) or (H, W, 3)"
CONVERT, CAST = "Convert it without losing values.", "Use frame.astype(numpy.float32)."
UNIT = "expected values in [0, 1]"
FINITE = "expected finite float32 in [0, 1]"
DIVIDE, CHECK = "Divide by the type's largest value.", "Check the source."
ALPHA, LAST, ONE = (
    "Drop the alpha channel: frame[..., :3].",
    "Drop the last axis: frame[..., 0].",
    "Give one frame, channels last.",
)
ASARRAY = "Use numpy.asarray(frame)."


def holding(value: float, dtype: Any = np.float32) -> NDArray[Any]:
    frame = np.full((4, 6), 0.5, dtype)
    frame[2, 3] = value
    return frame


BAD: dict[str, tuple[Any, int | None, tuple[str, str, str, str]]] = {
    "float64": (np.zeros((4, 6)), None, ("frame", "got float64 (4, 6)", KINDS, CAST)),
    "float16": (np.zeros((4, 6, 3), np.float16), None, ("frame", "got float16 (4, 6, 3)", KINDS, CAST)),
    "int8": (np.zeros((4, 6), np.int8), None, ("frame", "got int8 (4, 6)", KINDS, CONVERT)),
    "int32": (np.zeros((4, 6), np.int32), None, ("frame", "got int32 (4, 6)", KINDS, CONVERT)),
    "int64": (np.zeros((4, 6), np.int64), None, ("frame", "got int64 (4, 6)", KINDS, CONVERT)),
    "bool": (np.zeros((4, 6), bool), None, ("frame", "got bool (4, 6)", KINDS, CONVERT)),
    "complex": (np.zeros((4, 6), np.complex64), None, ("frame", "got complex64 (4, 6)", KINDS, CONVERT)),
    "objects": (np.zeros((4, 6), object), None, ("frame", "got object (4, 6)", KINDS, CONVERT)),
    "text": (np.zeros((4, 6), "U3"), None, ("frame", "got <U3 (4, 6)", KINDS, CONVERT)),
    "dates": (np.zeros((4, 6), "M8[s]"), None, ("frame", "got datetime64[s] (4, 6)", KINDS, CONVERT)),
    "no axis": (np.zeros((), np.uint8), None, ("frame", "got uint8 ()", "expected uint8 (H, W) or (H, W, 3)", ONE)),
    "one axis": (np.zeros(6, np.uint8), None, ("frame", "got uint8 (6,)", "expected uint8 (H, W) or (H, W, 3)", ONE)),
    "four axes": (
        np.zeros((1, 4, 6, 3), np.uint16),
        None,
        ("frame", "got uint16 (1, 4, 6, 3)", "expected uint16 (H, W) or (H, W, 3)", ONE),
    ),
    "channels first": (
        np.zeros((3, 4, 6), np.uint8),
        None,
        ("frame", "got uint8 (3, 4, 6)", "expected uint8 (H, W) or (H, W, 3)", ONE),
    ),
    "one channel": (
        np.zeros((4, 6, 1), np.uint8),
        None,
        ("frame", "got uint8 (4, 6, 1)", "expected uint8 (H, W) or (H, W, 3)", LAST),
    ),
    "two channels": (
        np.zeros((4, 6, 2), np.uint8),
        None,
        ("frame", "got uint8 (4, 6, 2)", "expected uint8 (H, W) or (H, W, 3)", ONE),
    ),
    "four channels": (
        np.zeros((4, 6, 4), np.float32),
        None,
        ("frame", "got float32 (4, 6, 4)", "expected float32 (H, W) or (H, W, 3)", ALPHA),
    ),
    "no rows": (
        np.zeros((0, 6), np.uint8),
        None,
        ("frame", "got uint8 (0, 6): no pixels", "expected at least 1 x 1", "Check the crop or the capture."),
    ),
    "no columns": (
        np.zeros((4, 0, 3), np.float32),
        None,
        ("frame", "got float32 (4, 0, 3): no pixels", "expected at least 1 x 1", "Check the crop or the capture."),
    ),
    "too many pixels": (
        np.broadcast_to(np.uint8(0), (2**13, 2**13 + 1)),
        None,
        ("frame", "got uint8 (8192, 8193): 67117056 pixels", f"expected at most {MAX_PIXELS}", "Downscale it."),
    ),
    "too long": (
        np.broadcast_to(np.uint8(0), (1, MAX_SIDE + 1)),
        None,
        ("frame", "got uint8 (1, 32769)", f"expected at most {MAX_SIDE} rows and columns", "Downscale or tile it."),
    ),
    "NaN": (holding(math.nan), None, ("frame", "got NaN among its values", FINITE, CHECK)),
    "infinity": (holding(math.inf), None, ("frame", "got infinity among its values", FINITE, CHECK)),
    "minus infinity": (holding(-math.inf), None, ("frame", "got infinity among its values", FINITE, CHECK)),
    "below 0": (holding(-0.25), None, ("frame", "got float32 from -0.25 to 0.5", UNIT, DIVIDE)),
    "above 1": (holding(255), None, ("frame", "got float32 from 0.5 to 255", UNIT, DIVIDE)),
    "just above 1": (holding(1.0001), None, ("frame", "got float32 from 0.5 to 1.0001", UNIT, DIVIDE)),
    "big-endian NaN": (holding(math.nan, ">f4"), None, ("frame", "got NaN among its values", FINITE, CHECK)),
    "masked NaN": (
        np.ma.masked_invalid(holding(math.nan)),
        None,
        ("frame", "got NaN among its values", FINITE, CHECK),
    ),
    "a list": ([[0, 1], [2, 3]], None, ("frame", "got list", "expected a numpy array", ASARRAY)),
    "None": (None, None, ("frame", "got NoneType", "expected a numpy array", ASARRAY)),
    "bytes": (b"frame", None, ("frame", "got bytes", "expected a numpy array", ASARRAY)),
    "a number": (np.float32(0.5), None, ("frame", "got float32", "expected a numpy array", ASARRAY)),
    "beyond the bits stored": (
        np.full((4, 6), 4096, np.uint16),
        12,
        ("frame", "got the value 4096", "expected less than 2**12", "Give the bits stored."),
    ),
    "beyond the bits stored, big-endian": (
        np.full((4, 6), 1024, ">u2"),
        10,
        ("frame", "got the value 1024", "expected less than 2**10", "Give the bits stored."),
    ),
}
for _bits, _dtype in ((12, np.uint8), (8, np.float32), (0, np.uint16), (17, np.uint16), (-1, np.uint16)):
    BAD[f"{_bits} bits of {np.dtype(_dtype)}"] = (
        np.zeros((4, 6), _dtype),
        _bits,
        ("bits", f"got {_bits} for {np.dtype(_dtype)}", "expected 1 to 16, and only for uint16", "Leave it out."),
    )
for _odd in (12.0, "12", True):
    BAD[f"bits {_odd!r}"] = (
        np.zeros((4, 6), np.uint16),
        _odd,  # type: ignore[assignment]
        ("bits", f"got {_odd!r} for uint16", "expected 1 to 16, and only for uint16", "Leave it out."),
    )


@pytest.mark.parametrize("name", BAD)
def test_a_bad_frame_is_refused_with_what_to_do(name: str) -> None:
    frame, bits, expected = BAD[name]
    with pytest.raises(FrameError) as caught:
        check_frame(frame, bits)
    assert parts(caught.value) == expected
    assert str(caught.value) == f"{expected[0]}: {expected[1]}, {expected[2]}. {expected[3]}"


@pytest.mark.parametrize("name", BAD)
def test_after_a_refused_frame_the_next_good_one_gives_what_it_always_gave(name: str) -> None:
    good = noise((5, 7, 3))
    before = to_tensor(check_frame(good), contract())
    with pytest.raises(FrameError):
        check_frame(*BAD[name][:2])
    assert np.array_equal(to_tensor(check_frame(good), contract()), before)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, ">u2", ">f4"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 3), (3, 3), (4, 6, 3)], ids=str)
def test_a_good_frame_comes_back_with_its_values(dtype: Any, shape: tuple[int, ...]) -> None:
    frame = (np.arange(math.prod(shape)) % 2).reshape(shape).astype(dtype)
    found = check_frame(frame)
    assert np.array_equal(found, frame)
    assert found.dtype.isnative


def test_float_frames_may_hold_both_ends_and_minus_zero() -> None:
    frame = np.array([[0, 1, -0.0, np.nextafter(np.float32(1), np.float32(0))]], np.float32)
    assert np.array_equal(check_frame(frame), frame)


# Logits to mask ---------------------------------------------------------------------------------------------------

WHOLE = Placement(0, 0, 4, 6)


def some_logits(classes: int, height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, (classes, height, width)).astype(np.float32)


@pytest.mark.parametrize("classes", [2, 3, 9, 256])
def test_the_mask_is_the_class_with_the_largest_logit(classes: int) -> None:
    logits = some_logits(classes, 4, 6)
    mask = to_mask(logits, WHOLE, (4, 6), "nearest")
    assert mask.dtype == np.uint8
    for i in range(4):
        for j in range(6):
            assert logits[mask[i, j], i, j] == max(logits[:, i, j])


@pytest.mark.parametrize("enlarge", ["nearest", "aligned", "bilinear"])
@pytest.mark.parametrize("classes", [2, 3, 9])
@pytest.mark.parametrize("size", [(4, 6), (9, 5)], ids=str)
def test_the_first_class_wins_a_tie(classes: int, enlarge: str, size: tuple[int, int]) -> None:
    logits = np.full((classes, 4, 6), 1.5, np.float32)
    assert not to_mask(logits, WHOLE, size, enlarge).any()
    logits[0] = -1  # now the others are equal
    assert (to_mask(logits, WHOLE, size, enlarge) == 1).all()


@MANY
@given(st.integers(1, 300), st.integers(1, 300))
def test_nearest_takes_the_sample_that_holds_the_middle_of_the_pixel(source: int, target: int) -> None:
    found = nearest_index(source, target)
    assert found.tolist() == [math.floor((2 * i + 1) * source / (2 * target)) for i in range(target)]
    assert found.min() >= 0
    assert found.max() < source
    # In whole numbers: the sample's interval holds the middle, exactly.
    i = np.arange(target)
    assert (2 * target * found <= (2 * i + 1) * source).all()
    assert ((2 * i + 1) * source < 2 * target * (found + 1)).all()


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [(2, 4, [0, 0, 1, 1]), (4, 2, [1, 3]), (3, 5, [0, 0, 1, 2, 2]), (1, 3, [0, 0, 0]), (5, 5, [0, 1, 2, 3, 4])],
)
def test_nearest_takes_these_samples(source: int, target: int, expected: list[int]) -> None:
    assert nearest_index(source, target).tolist() == expected


def test_aligned_enlarging_puts_the_ends_on_the_ends() -> None:
    assert aligned_index(3, 5).tolist() == [0, 1, 1, 2, 2]  # ties go up
    assert aligned_index(4, 4).tolist() == [0, 1, 2, 3]
    assert aligned_index(5, 3).tolist() == [0, 2, 4]
    assert aligned_index(5, 1).tolist() == [0]
    assert aligned_index(1, 3).tolist() == [0, 0, 0]
    for source, target in ((224, 512), (224, 480), (7, 301)):
        exact = np.arange(target) * (source - 1) / (target - 1)
        assert (np.abs(aligned_index(source, target) - exact) <= 0.5 + 1e-9).all()


def test_a_mask_is_enlarged_pixel_by_pixel() -> None:
    logits = np.zeros((2, 2, 3), np.float32)
    logits[1, 0, 2] = logits[1, 1, 0] = 1
    expected = np.kron(np.array([[0, 0, 1], [1, 0, 0]], np.uint8), np.ones((2, 2), np.uint8))
    assert np.array_equal(to_mask(logits, Placement(0, 0, 2, 3), (4, 6), "nearest"), expected)


def test_enlarged_probabilities_are_interpolated_before_the_class_is_chosen() -> None:
    logits = np.array([[[0, 0]], [[2, -1]]], np.float32)  # P(1) = 0.88 and 0.27
    p = 1 / (1 + np.exp(-logits[1, 0]))
    expected = [p[0], 0.75 * p[0] + 0.25 * p[1], 0.25 * p[0] + 0.75 * p[1], p[1]]
    placement = Placement(0, 0, 1, 2)
    np.testing.assert_allclose(to_probabilities(logits, placement, (1, 4), "bilinear")[1, 0], expected, rtol=1e-6)
    assert to_mask(logits, placement, (1, 4), "bilinear").tolist() == [[1, 1, 0, 0]]


LOGITS = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.floats(-(2.0**-20), 2.0**-20, width=32),
    st.sampled_from([0.0, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), 3e38, -3e38]),
)


@MANY
@given(
    st.data(),
    st.integers(2, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["nearest", "aligned", "bilinear"]),
)
def test_the_argmax_of_the_probabilities_is_the_mask(
    data: st.DataObject, classes: int, height: int, width: int, rows: int, columns: int, enlarge: str
) -> None:
    count = classes * height * width
    values = data.draw(st.lists(LOGITS, min_size=count, max_size=count))
    logits = np.array(values, np.float32).reshape(classes, height, width)
    assume(np.ptp(logits.astype(np.float64)) < np.finfo(np.float32).max)
    placement = Placement(0, 0, height, width)
    probabilities = to_probabilities(logits, placement, (rows, columns), enlarge)
    assert probabilities.shape == (classes, rows, columns)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    assert np.array_equal(probabilities.argmax(0), to_mask(logits, placement, (rows, columns), enlarge))


@pytest.mark.parametrize("size", [(1, 1), (3, 2)], ids=str)
def test_logits_too_close_for_their_probabilities_still_agree_with_the_mask(size: tuple[int, int]) -> None:
    logits = np.array([0, 1e-12, 1e-12], np.float32).reshape(3, 1, 1)
    assert len(set(softmax(logits).ravel().tolist())) == 1  # told apart no more
    placement = Placement(0, 0, 1, 1)
    assert (to_mask(logits, placement, size, "nearest") == 1).all()
    assert (to_probabilities(logits, placement, size, "nearest").argmax(0) == 1).all()


@pytest.mark.parametrize("enlarge", ["nearest", "aligned", "bilinear"])
@pytest.mark.parametrize("size", [(8, 8), (5, 30), (224, 300), (1, 1)], ids=str)
def test_letterboxed_probabilities_agree_with_the_mask(enlarge: str, size: tuple[int, int]) -> None:
    logits = some_logits(3, 8, 8)
    placement = place(contract(8, 8, fit="letterbox"), *size)
    probabilities = to_probabilities(logits, placement, size, enlarge)
    assert probabilities.shape == (3, *size)
    assert np.array_equal(probabilities.argmax(0), to_mask(logits, placement, size, enlarge))


def test_softmax_neither_overflows_nor_vanishes() -> None:
    found = softmax(np.array([1e30, 1e30, -1e30], np.float32).reshape(3, 1, 1)).ravel()
    assert found.tolist() == [0.5, 0.5, 0.0]


def test_good_logits_lose_their_first_axis() -> None:
    logits = some_logits(2, 4, 6)[None]
    assert np.array_equal(check_logits(logits, 2, 4, 6), logits[0])


BROKEN = "expected finite values", "The runtime or the model is broken: verify the bundle."
PROMISED = "expected float32 (1, 2, 4, 6)", "Verify the bundle."


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        pytest.param(np.zeros((2, 4, 6), np.float32), ("got float32 (2, 4, 6)", *PROMISED), id="no batch axis"),
        pytest.param(np.zeros((2, 2, 4, 6), np.float32), ("got float32 (2, 2, 4, 6)", *PROMISED), id="two frames"),
        pytest.param(np.zeros((1, 3, 4, 6), np.float32), ("got float32 (1, 3, 4, 6)", *PROMISED), id="other classes"),
        pytest.param(np.zeros((1, 2, 6, 4), np.float32), ("got float32 (1, 2, 6, 4)", *PROMISED), id="turned"),
        pytest.param(np.zeros((1, 4, 6, 2), np.float32), ("got float32 (1, 4, 6, 2)", *PROMISED), id="channels last"),
        pytest.param(np.zeros((1, 2, 4, 6)), ("got float64 (1, 2, 4, 6)", *PROMISED), id="float64"),
        pytest.param(np.zeros((1, 2, 4, 6), np.float16), ("got float16 (1, 2, 4, 6)", *PROMISED), id="float16"),
        pytest.param(np.zeros((1, 2, 4, 6), np.int64), ("got int64 (1, 2, 4, 6)", *PROMISED), id="whole numbers"),
        pytest.param(np.full((1, 2, 4, 6), math.nan, np.float32), ("got NaN or infinity", *BROKEN), id="NaN"),
        pytest.param(np.full((1, 2, 4, 6), math.inf, np.float32), ("got NaN or infinity", *BROKEN), id="infinity"),
        pytest.param(np.full((1, 2, 4, 6), -math.inf, np.float32), ("got NaN or infinity", *BROKEN), id="-infinity"),
    ],
)
def test_logits_that_are_not_as_promised_are_refused(logits: NDArray[Any], expected: tuple[str, str, str]) -> None:
    with pytest.raises(OutputError) as caught:
        check_logits(logits, 2, 4, 6)
    assert parts(caught.value) == ("logits", *expected)


@pytest.mark.parametrize("index", [(0, 0, 0, 0), (0, 1, 3, 5), (0, 1, 2, 1)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_broken_logit_is_enough_to_refuse_all(index: tuple[int, ...], value: float) -> None:
    logits = some_logits(2, 4, 6)[None]
    logits[index] = value
    with pytest.raises(OutputError, match=r"^logits: got NaN or infinity, expected finite values"):
        check_logits(logits, 2, 4, 6)


# Pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "bits"),
    [
        pytest.param(np.full((2, 3), 51, np.uint8), None, id="uint8"),
        pytest.param(np.full((2, 3), 13107, np.uint16), None, id="uint16"),
        pytest.param(np.full((2, 3), 819, np.uint16), 12, id="12 bits"),
        pytest.param(np.full((2, 3), 13107, ">u2"), None, id="big-endian uint16"),
        pytest.param(np.full((2, 3), 0.2, np.float32), None, id="float32"),
        pytest.param(np.full((2, 3, 3), 0.2, ">f4"), None, id="big-endian colour"),
    ],
)
def test_a_frame_of_any_type_is_shown_by_the_pixel_contract(frame: NDArray[Any], bits: int | None) -> None:
    assert np.array_equal(to_rgb(frame, bits), np.full((2, 3, 3), 51, np.uint8))


def test_a_picture_of_a_frame_that_breaks_the_contract_is_refused() -> None:
    with pytest.raises(FrameError, match=r"^frame: got float64"):
        to_rgb(np.zeros((2, 3)))


def test_an_overlay_tints_the_regions_and_outlines_them() -> None:
    classes = [ClassInfo(name="background", color=(9, 9, 9)), ClassInfo(name="lesion", color=(200, 100, 0))]
    mask = np.zeros((9, 9), np.uint8)
    mask[2:7, 2:7] = 1
    picture = np.asarray(draw(np.full((9, 9), 100, np.uint8), mask, classes))
    assert picture.shape == (9, 9, 3)
    assert (picture[mask == 0] == 100).all()
    edge = outline(mask == 1, 1)
    assert edge.sum() == 16
    assert (picture[edge] == (200, 100, 0)).all()
    assert (picture[(mask == 1) & ~edge] == (125, 100, 75)).all()
