"""Pictures of results: the mask's classes over the frame. Needs Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from msa2net.runtimes.bundle import ClassInfo
from msa2net.runtimes.preprocess import check_frame

_PANEL, _CAPTION = 320, 18  # the height of a picture in a row of them, and of the caption above it
_FILL = 0.25  # share of the class's colour inside its region; its outline is opaque


def to_rgb(frame: NDArray[Any], bits: int | None = None) -> NDArray[np.uint8]:
    """A frame of the pixel contract as (H, W, 3) uint8, for looking at. Raises FrameError for any other."""
    frame = check_frame(frame, bits)
    if frame.dtype == np.float32:
        shown = frame * 255
    elif frame.dtype == np.uint16:
        shown = frame * (255 / ((1 << int(bits or 16)) - 1))
    else:
        shown = frame
    shown = np.rint(shown).astype(np.uint8)
    return np.repeat(shown[:, :, None], 3, axis=2) if shown.ndim == 2 else shown


def outline(region: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The pixels of the region within `width` of its edge, by 4-neighbours."""
    inside = region.copy()
    for _ in range(width):
        padded = np.pad(inside, 1)
        inside &= padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return region & ~inside


def draw(
    frame: NDArray[Any], mask: NDArray[np.uint8], classes: Sequence[ClassInfo], bits: int | None = None
) -> Image.Image:
    """The frame with every class but the first (the background) tinted and outlined in its colour; RGB."""
    picture = to_rgb(frame, bits).astype(np.float32)
    width = max(1, round(min(mask.shape) / 150))
    for index, info in enumerate(classes[1:], 1):
        region = mask == index
        color = np.asarray(info.color, np.float32)
        picture[region] = (1 - _FILL) * picture[region] + _FILL * color
        picture[outline(region, width)] = color
    return Image.fromarray(np.rint(picture).astype(np.uint8))


def side_by_side(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """The pictures in a row, at one height, each under its name."""
    scaled = {
        name: picture.resize((max(1, round(picture.width * _PANEL / picture.height)), _PANEL))
        for name, picture in pictures.items()
    }
    sheet = Image.new("RGB", (sum(picture.width for picture in scaled.values()), _PANEL + _CAPTION), "white")
    left = 0
    for name, picture in scaled.items():
        ImageDraw.Draw(sheet).text((left + 4, 3), name, fill="black")
        sheet.paste(picture, (left, _CAPTION))
        left += picture.width
    return sheet
