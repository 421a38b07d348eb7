"""Segments phantom and real frames into overlay pictures: `python -m benchmarks.demo --output DIR`.

The real ones are ultrasound DICOM files from pydicom's wheel. What the demo model, trained on phantoms, draws on them
need not be right; that every runtime draws the same is checked.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from msa2net.core.data.phantom import TEST_SEED
from msa2net.core.phantoms import KINDS, phantom
from msa2net.errors import Msa2NetError
from msa2net.runtimes import DemoModelWarning, Predictor, Segmentation
from msa2net.runtimes.images import read_frames
from msa2net.runtimes.measure import dice, pixel_agreement
from msa2net.runtimes.overlay import draw, to_rgb
from msa2net.runtimes.predictor import DEMO_BUNDLE

EXAMPLES = ("rgb_color", "ybr_color", "jpeg2k", "palette_color")
AGREEMENT = 0.9999  # of pixels, between runtimes
_TILE = (300, 225)  # width and height of a picture in the contact sheet
_CAPTION = 18


def frames(per_kind: int, clip_frames: int) -> Iterator[tuple[str, NDArray[Any], NDArray[np.uint8] | None]]:
    """(name, pixels, true mask if known): unseen phantoms, then the frames of the real files."""
    for kind in KINDS:
        for index in range(per_kind):
            drawn = phantom(kind, TEST_SEED + index)
            yield f"phantom {kind} {index}", drawn.image, drawn.mask
    from pydicom.examples import get_path

    for name in EXAMPLES:
        for index, (pixels, _) in enumerate(islice(read_frames(get_path(name)), clip_frames)):
            yield f"real {name} {index}", pixels, None


def tile(name: str, pixels: NDArray[Any], seg: Segmentation) -> Image.Image:
    """The frame and its overlay side by side, under a caption."""
    sheet = Image.new("RGB", (2 * _TILE[0], _TILE[1] + _CAPTION), "white")
    ImageDraw.Draw(sheet).text((4, 3), name, fill="black")
    for i, picture in enumerate((Image.fromarray(to_rgb(pixels)), draw(pixels, seg.mask, seg.classes))):
        picture.thumbnail(_TILE)
        sheet.paste(picture, (i * _TILE[0] + (_TILE[0] - picture.width) // 2, _CAPTION))
    return sheet


def contact_sheet(tiles: list[Image.Image], columns: int = 2) -> Image.Image:
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, each in enumerate(tiles):
        sheet.paste(each, (i % columns * width, i // columns * height))
    return sheet


def run(bundle: Path, output: Path, per_kind: int, clip_frames: int) -> None:
    """Writes one overlay a frame and `overview.png`; prints each frame's figures.

    Raises Msa2NetError if two runtimes draw different masks.
    """
    output.mkdir(parents=True, exist_ok=True)
    loaded = {
        entry.runtime: Predictor.load(bundle, runtime=entry.runtime)
        for entry in Predictor.available(bundle)
        if entry.available and entry.precision == "fp32"
    }
    if not loaded:
        raise Msa2NetError(str(bundle), "nothing of it can run here", "expected a runtime", "See msa2net info.")
    tiles, lines = [], []
    for name, pixels, truth in tqdm(list(frames(per_kind, clip_frames)), "segment", unit="frame", disable=None):
        results = {runtime: predictor.predict(pixels) for runtime, predictor in loaded.items()}
        first, *others = results.values()
        agreement = min((pixel_agreement(first.mask, other.mask) for other in others), default=1.0)
        if agreement < AGREEMENT:
            raise Msa2NetError(
                name, f"equal pixels {agreement:.4%}", f"expected {AGREEMENT:.2%}", "Run msa2net verify."
            )
        score = f"{dice(first.mask, truth):.3f}" if truth is not None and truth.any() else "-"
        lines.append(f"{name:<28} {np.mean(first.mask != 0):>8.2%} {score:>6} {agreement:>9.3%}")
        draw(pixels, first.mask, first.classes).save(output / f"{name.replace(' ', '_')}.png")
        if name.endswith(" 0") or (truth is not None and name.endswith(" 1")):
            tiles.append(tile(name, pixels, first))
    contact_sheet(tiles).save(output / "overview.png")
    print(f"{'frame':<28} {'lesion':>8} {'Dice':>6} {'equal px':>9}   on {', '.join(loaded)}")
    print("\n".join(lines))
    print(f"{len(lines)} overlays and overview.png are in {output}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=DEMO_BUNDLE)
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--phantoms", type=int, default=4, help="of each kind")
    parser.add_argument("--clip-frames", type=int, default=30, help="at most, of each real file")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore", DemoModelWarning)
    try:
        run(arguments.bundle, arguments.output, arguments.phantoms, arguments.clip_frames)
    except Msa2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
