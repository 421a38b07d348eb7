"""The synthetic phantoms: the same for one seed, never the same for two, and hard enough to be worth a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from msa2net.core.phantoms import AREA_SHARE, KINDS, LESION_FREE, Phantom, main, otsu_largest_component, phantom
from msa2net.runtimes.measure import dice

every_kind = pytest.mark.parametrize("kind", KINDS)
FRAMES = 60


@pytest.fixture(scope="module")
def phantoms() -> dict[str, list[Phantom]]:
    return {kind: [phantom(kind, seed) for seed in range(500_000, 500_000 + FRAMES)] for kind in KINDS}


@every_kind
def test_one_seed_gives_the_same_bits_every_time(kind: str, phantoms: dict[str, list[Phantom]]) -> None:
    first = phantoms[kind][7]
    again = phantom(kind, first.seed)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.mask, again.mask)
    assert (first.kind, first.seed) == (kind, 500_007)


def test_no_two_seeds_or_kinds_give_the_same_picture(phantoms: dict[str, list[Phantom]]) -> None:
    pictures = {drawn.image.tobytes() for kind in KINDS for drawn in phantoms[kind]}
    assert len(pictures) == len(KINDS) * FRAMES


@every_kind
def test_images_are_rgb_bytes_and_masks_hold_only_0_and_1(kind: str, phantoms: dict[str, list[Phantom]]) -> None:
    for drawn in phantoms[kind]:
        assert (drawn.image.shape, drawn.image.dtype) == ((224, 224, 3), np.uint8)
        assert (drawn.mask.shape, drawn.mask.dtype) == ((224, 224), np.uint8)
        assert set(np.unique(drawn.mask)) <= {0, 1}
        assert drawn.image.std() > 5  # never an empty picture


def test_ultrasound_is_grey_and_dermoscopy_is_not(phantoms: dict[str, list[Phantom]]) -> None:
    def colour(image: NDArray[np.uint8]) -> int:
        return int(np.ptp(image.astype(np.int16), axis=-1).max())

    assert max(colour(drawn.image) for drawn in phantoms["ultrasound"]) == 0
    assert min(colour(drawn.image) for drawn in phantoms["dermoscopy"]) > 10


@every_kind
def test_the_visible_lesion_is_one_piece_of_a_plausible_size(kind: str, phantoms: dict[str, list[Phantom]]) -> None:
    areas = np.array([drawn.mask.mean() for drawn in phantoms[kind] if drawn.mask.any()])
    assert areas.max() <= AREA_SHARE[kind][1] * 1.15  # drawn area; its outline is wavy
    assert np.median(areas) >= AREA_SHARE[kind][0]
    assert areas.std() > 0.02
    for drawn in phantoms[kind]:
        inside = drawn.mask.astype(bool)
        # Otsu's helper keeps the largest dark piece: of a picture that is dark exactly in the mask, all of it.
        picture = np.where(inside, 10, 200).astype(np.uint8)
        if inside.any():
            assert np.array_equal(otsu_largest_component(picture), drawn.mask)


@every_kind
def test_the_share_of_frames_without_a_lesion_is_the_one_stated(kind: str) -> None:
    count = 400
    free = sum(not phantom(kind, seed, (48, 48)).mask.any() for seed in range(count))
    expected = LESION_FREE[kind] * count
    assert abs(free - expected) <= 3 * np.sqrt(expected * (1 - LESION_FREE[kind]))


@every_kind
def test_another_size_shows_about_the_same_scene(kind: str) -> None:
    scores = []
    for seed in range(12):
        small, large = phantom(kind, seed, (112, 112)), phantom(kind, seed, (224, 224))
        assert small.mask.any() == large.mask.any()
        scores.append(dice(large.mask[1::2, 1::2], small.mask))
    assert np.median(scores) > 0.9


@every_kind
@pytest.mark.parametrize("size", [(32, 32), (61, 97), (300, 40)], ids=str)
def test_any_size_from_the_smallest_on_can_be_drawn(kind: str, size: tuple[int, int]) -> None:
    drawn = phantom(kind, 3, size)
    assert drawn.image.shape == (*size, 3)
    assert drawn.mask.shape == size


@every_kind
def test_otsus_threshold_does_not_solve_them(kind: str, phantoms: dict[str, list[Phantom]]) -> None:
    scores = [dice(otsu_largest_component(d.image), d.mask) for d in phantoms[kind] if d.mask.any()]
    assert len(scores) > 0.7 * FRAMES
    assert np.mean(scores) <= 0.60


def test_otsu_finds_the_largest_dark_piece() -> None:
    image = np.full((20, 30), 200, np.uint8)
    image[2:5, 2:5] = 30
    image[8:16, 10:14] = 40
    image[16, 14] = 40  # touches only by a corner
    image[15, 14:20] = 40  # touches by a side
    expected = np.zeros((20, 30), np.uint8)
    expected[8:16, 10:14] = 1
    expected[15, 14:20] = 1
    expected[16, 14] = 1
    assert np.array_equal(otsu_largest_component(image), expected)
    corner = image.copy()
    corner[15, 14:20] = 200
    assert otsu_largest_component(corner)[16, 14] == 0
    assert np.array_equal(otsu_largest_component(np.repeat(image[..., None], 3, axis=2)), expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("mri", 0), "unknown kind 'mri': expected one of dermoscopy, ultrasound"),
        (("dermoscopy", -1), "seed -1 is negative: expected 0 or more"),
        (("ultrasound", 0, (31, 224)), "size 31x224 is too small: expected at least 32x32"),
        (("ultrasound", 0, (224, 0)), "size 224x0 is too small: expected at least 32x32"),
    ],
    ids=["kind", "seed", "height", "width"],
)
def test_what_cannot_be_drawn_is_refused(arguments: tuple[object, ...], text: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        phantom(*arguments)  # type: ignore[arg-type]
    assert str(caught.value) == text


# The command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_each_image_with_its_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path), "--count", "2", "--first-seed", "4", "--size", "64x80"]) == 0
    names = {f"{kind}_{seed}{part}.png" for kind in KINDS for seed in (4, 5) for part in ("", "_mask")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert capsys.readouterr().out.startswith("4 phantoms (dermoscopy, ultrasound; ")
    drawn = phantom("dermoscopy", 4, (64, 80))
    with Image.open(tmp_path / "dermoscopy_4.png") as image, Image.open(tmp_path / "dermoscopy_4_mask.png") as mask:
        assert np.array_equal(np.asarray(image), drawn.image)
        assert np.array_equal(np.asarray(mask), drawn.mask * 255)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--count", "0"], "count 0: expected 1 or more"),
        (["--size", "64"], "argument --size: size '64': expected HEIGHTxWIDTH, for example 224x224"),
        (["--size", "8x8"], "size 8x8 is too small: expected at least 32x32"),
        (["--first-seed", "-3"], "seed -3 is negative: expected 0 or more"),
    ],
    ids=["count", "size", "small", "seed"],
)
def test_the_command_refuses_in_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path / "out"), *options])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"msa2net.core.phantoms: error: {text}\n"
