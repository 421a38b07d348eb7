"""What the readers share: a request and its errors, what a folder holds, images and masks to arrays.

A file's name can be a patient's. So no message has one: they show the layout's own folders, counts and usual endings.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import DataError, FrameError
from msa2net.runtimes.images import read_frames
from msa2net.runtimes.preprocess import MAX_PIXELS, check_frame

LESION = ("background", "lesion")
MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
IMAGE_ENDINGS = (*MASK_ENDINGS, ".npy", ".dcm")
NOTE_ENDINGS = (".txt", ".md", ".csv", ".json", ".html", ".pdf", ".xlsx", ".ini", ".db")  # passed over
_SHOWN = (*IMAGE_ENDINGS, *NOTE_ENDINGS, ".npz", ".h5", ".gif", ".webp", ".nii", ".gz", ".zip")
_MASK_FORMATS = ("PNG", "BMP", "TIFF", "JPEG")
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Request:
    """What `open_data` was asked for, and how the kind's layout is described."""

    kind: str
    target: str
    split: str
    classes: tuple[str, ...] | None
    layout: str

    def wrong(self, found: str, advice: str = "Check the path and the names.") -> DataError:
        """The one error of a wrong layout: what was found beside what was expected."""
        return DataError(f"{self.kind} data", f"found {found}", f"expected {self.layout}", advice)

    def root(self) -> Path:
        """The folder that PATH names."""
        path = Path(self.target).expanduser()
        if not self.target or not path.is_dir():
            raise self.wrong("no such folder" if not path.is_file() else "a file in place of a folder")
        return path

    def own(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """The classes of a kind that knows them. Others that were asked for are refused."""
        if self.classes not in (None, classes):
            raise DataError(
                f"{self.kind} data", "got other class names", f"expected {', '.join(classes)}", "Leave them out."
            )
        return classes

    def place(self, what: str, number: int, count: int) -> str:
        return f"{self.kind} data, {what} {number} of {count}"


def package(name: str) -> Any:
    """A module that is imported on use."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = {"PIL": "pillow"}.get(name.partition(".")[0], name)
        raise DataError("data", f"needs the package {top}", advice="pip install 'msa2net-edge[data]'") from error


# What a folder holds --------------------------------------------------------------------------------------------


def by_name(path: Path) -> tuple[list[Any], str]:
    """Sorts names, numbers in them by value: "2.png" before "10.png", as slices are meant."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name


def entries(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, by name."""
    try:
        return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=by_name)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise DataError(
            "data", f"a folder cannot be read ({reason})", "expected to list it", "Check permissions."
        ) from None


def contents(paths: Iterable[Path]) -> str:
    """Such as "12 .png, 1 other file, 2 folders": counts, and only endings that are no part of a name."""
    paths = list(paths)
    endings = Counter(path.suffix.lower() for path in paths if not path.is_dir())
    parts = [f"{endings[ending]} {ending}" for ending in sorted(endings) if ending in _SHOWN]
    others = sum(count for ending, count in endings.items() if ending not in _SHOWN)
    folders = sum(path.is_dir() for path in paths)
    parts += [f"{others} other file{'s' * (others > 1)}"] if others else []
    parts += [f"{folders} folder{'s' * (folders > 1)}"] if folders else []
    return ", ".join(parts) or "nothing"


def found(root: Path, *names: str) -> str:
    """What of a layout's folders there is, such as "images/ (12 .png), no masks/", and what else."""
    parts = [
        f"{name}/ ({contents(entries(root / name))})" if (root / name).is_dir() else f"no {name}/" for name in names
    ]
    others = [path for path in entries(root) if path.name not in names]
    return ", ".join(parts) + (f", beside them {contents(others)}" if others else "")


def walk(folder: Path, group: str = "") -> Iterator[tuple[str, Path]]:
    """Every file that is not hidden with its group, the folders it lies in: its own files first, then each folder's."""
    inside = entries(folder)
    yield from ((group, path) for path in inside if path.is_file())
    for path in inside:
        if path.is_dir() and not folder.resolve().is_relative_to(path.resolve()):  # a link can lead back up
            yield from walk(path, f"{group}/{path.name}" if group else path.name)


def files(request: Request, folder: Path, endings: tuple[str, ...]) -> list[tuple[str, Path]]:
    """The files of these endings with their groups. Notes are passed over; any other file is refused, not skipped."""
    kept = [(group, path) for group, path in walk(folder) if path.suffix.lower() not in NOTE_ENDINGS]
    strange = [path for _, path in kept if path.suffix.lower() not in endings]
    if strange:
        raise request.wrong(
            f"{contents(strange)} among {len(kept)} files", f"Use {', '.join(endings)}, and move the others away."
        )
    return kept


# Images and masks to arrays -------------------------------------------------------------------------------------


def read_image(path: Path, place: str) -> tuple[tuple[NDArray[Any], ...], int | None]:
    """A file's frames, of one size and type, and the bits of their uint16 values, or None."""
    try:
        read = [(check_frame(pixels, bits), bits) for pixels, bits in read_frames(_source(path))]
    except FrameError as error:
        raise DataError(place, error.found, error.expected, error.advice) from None
    if not read:
        raise DataError(place, "holds no frame", "expected one or more", "Check the source.")
    shapes = {(frame.shape, frame.dtype.name) for frame, _ in read}
    if len(shapes) > 1:
        raise DataError(
            place, f"{len(read)} frames of {len(shapes)} sizes or types", "expected one", "Make a case of each."
        )
    return tuple(frame for frame, _ in read), read[0][1]


def _source(path: Path) -> Any:
    """What `read_frames` takes: the path, or an opened BMP, since it opens none itself."""
    try:
        with path.open("rb") as file:
            if file.read(2) != b"BM":
                return path
        # From memory, so that Pillow does not know the file's name.
        return package("PIL.Image").open(io.BytesIO(path.read_bytes()), formats=("BMP",))
    except DataError:
        raise
    except FileNotFoundError:
        return path  # refused there
    except Exception:  # Pillow raises many kinds for a damaged header
        raise FrameError("image", "not a readable BMP", "expected a whole file", "Copy it anew.") from None


def read_mask(path: Path, place: str, classes: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A mask image's pages, (D, H, W) class indices below `classes`. `shape` is (H, W, ...) of the frames it marks."""
    image_module, operations = package("PIL.Image"), package("PIL.ImageOps")
    pages = []
    try:
        with image_module.open(io.BytesIO(path.read_bytes()), formats=_MASK_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(place, "got too many pixels", f"expected at most {MAX_PIXELS}", "Is it a mask?")
            for index in range(1 if image.format == "MPO" else getattr(image, "n_frames", 1)):
                image.seek(index)
                pages.append(_indices(operations.exif_transpose(image), place, classes))
    except DataError:
        raise
    except Exception:  # Pillow raises many kinds for a damaged file
        raise DataError(
            place, "not a readable image", f"expected a whole {', '.join(_MASK_FORMATS)} file", "Copy it anew."
        ) from None
    for page in pages:
        if page.shape != shape[:2]:
            raise DataError(
                place,
                f"got {page.shape[0]} rows x {page.shape[1]} columns",
                f"expected {shape[0]} x {shape[1]} as the image",
                "Is it the mask of another image?",
            )
    return np.stack(pages)


def _indices(image: Any, place: str, classes: int) -> NDArray[np.uint8]:
    """(H, W) class indices of one page; with two classes white is 1, too."""
    values = _values(image, place, classes)
    if classes > 2:
        allowed: tuple[int, ...] = tuple(range(classes))
    else:
        allowed = (0, 255) if values.max(initial=0) > 1 else (0, 1)
    wrong = values[~np.isin(values, allowed)]
    if wrong.size:
        which, counts = np.unique(wrong, return_counts=True)
        pixels = f"{wrong.size} pixel{'s' * (wrong.size > 1)}"
        raise DataError(
            place,
            f"got {pixels} of other values, most often {which[counts.argmax()]:g}",
            f"expected class indices 0 to {classes - 1}" if classes > 2 else "expected only 0 and 1, or 0 and 255",
            "Give every class a name, or correct the mask." if classes > 2 else "Save masks without loss, as PNG.",
        )
    return (values if classes > 2 else values > 0).astype(np.uint8)


def _values(image: Any, place: str, classes: int) -> NDArray[Any]:
    """The (H, W) values of a mask, whatever it is stored as. A palette gives its indices, not its colours."""
    pixels = np.asarray(image)
    if image.mode in ("LA", "RGBA"):
        if pixels[..., -1].min(initial=255) < 255:
            raise DataError(place, "got a mask with transparent pixels", "expected none", "Drop the alpha channel.")
        pixels = pixels[..., 0] if image.mode == "LA" else pixels[..., :3]
    elif image.mode == "P" and classes == 2:
        _check_palette(image, pixels, place)
    elif image.mode not in ("1", "P", "L", "RGB", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"):
        raise DataError(place, f"got mode {image.mode}", "expected a grey mask", "Save it as grey PNG.")
    if pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise DataError(place, "got a mask in colours", "expected class indices", "Save it as grey PNG.")
        pixels = pixels[..., 0]
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def _check_palette(image: Any, indices: NDArray[Any], place: str) -> None:
    """Refuses a palette whose black and white contradict its indices 0 and 1."""
    palette = image.getpalette() or []
    colours = {int(index): tuple(palette[3 * index : 3 * index + 3]) for index in np.unique(indices).astype(int)}
    if set(colours.values()) <= {_BLACK, _WHITE} and any(
        (colours[index] == _WHITE) != (index > 0) for index in colours
    ):
        raise DataError(
            place, "got a palette in which 0 is white or another is black", "expected 0 black", "Save it as grey PNG."
        )
