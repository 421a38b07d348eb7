"""Image files to frames: PNG, JPEG, TIFF, numpy and DICOM, told apart by their content.

Pillow and pydicom are imported on use. No message names a path or an attribute of the file: both can name a patient.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import FrameError
from msa2net.runtimes.preprocess import MAX_PIXELS

if TYPE_CHECKING:
    from PIL import Image
    from pydicom.dataset import Dataset

Frame = tuple[NDArray[Any], int | None]  # pixels, and for uint16 how many bits are stored
FORMATS = ("PNG", "JPEG", "TIFF")
_KINDS = "PNG, JPEG, TIFF, .npy or DICOM"
_DECODERS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg pylibjpeg-rle"


def single(source: Any, bits: int | None = None) -> Frame:
    """The only frame of a path, PIL image or pydicom Dataset. Raises FrameError if there are several or none."""
    frames = read_frames(source)
    first = next(frames, None)
    if first is None:
        raise FrameError("image", "holds no frame", "expected one", "Check the source.")
    if next(frames, None) is not None:
        raise FrameError(
            "image", "holds several frames", "expected one", "Use msa2net.runtimes.images.read_frames and predict each."
        )
    return (first[0], bits) if bits is not None else first


def read_frames(source: Any) -> Iterator[Frame]:
    """The frames of a path, PIL image or pydicom Dataset, one at a time. Raises FrameError for what cannot be read."""
    if isinstance(source, str | Path):
        yield from _from_file(Path(source))
    elif hasattr(source, "file_meta"):
        yield from _from_dataset(source)
    elif hasattr(source, "getbands"):
        yield from _from_pillow(source)
    else:
        raise FrameError(
            "frame",
            f"got {type(source).__name__}",
            "expected a numpy array, a path, a PIL image or a pydicom Dataset",
            "Use numpy.asarray(frame).",
        )


def _from_file(path: Path) -> Iterator[Frame]:
    if not path.exists():
        raise FrameError("image", "no such file", f"expected a {_KINDS} file", "Check the path.")
    if not path.is_file():
        raise FrameError("image", "not a regular file", f"expected a {_KINDS} file", "Give the files one by one.")
    with path.open("rb") as file:
        start = file.read(132)
    if not start:
        raise FrameError("image", "an empty file", f"expected a {_KINDS} file", "Copy it anew.")
    if start.startswith(b"\x93NUMPY"):
        array = read_npy(path.read_bytes())
        stacked = array.ndim == 4 and array.shape[-1] == 3
        yield from ((frame, None) for frame in (array if stacked else [array]))
    elif start[128:] == b"DICM":
        yield from _from_dicom(path)
    else:
        yield from _from_image(path)


def read_npy(content: bytes) -> NDArray[Any]:
    """The array of a `.npy` file's bytes. Raises FrameError if it is damaged or would need unpickling."""
    try:
        array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise FrameError(
            "image", "a damaged .npy file, or one of objects", "expected a whole array of numbers", "Save it anew."
        ) from error
    return array


# Pillow ---------------------------------------------------------------------------------------------------------


def _from_image(path: Path) -> Iterator[Frame]:
    from PIL import Image

    try:
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_many_pixels("more than Pillow's limit") from error
    except Exception as error:  # Pillow's plugins raise many kinds for a damaged header
        raise FrameError(
            "image", "not a readable image", f"expected a {_KINDS} file", "Is it whole, and of one of these formats?"
        ) from error
    with image:
        yield from _from_pillow(image)


def _too_many_pixels(found: object) -> FrameError:
    return FrameError("image", f"got {found} pixels", f"expected at most {MAX_PIXELS}", "Downscale it.")


def _from_pillow(image: Image.Image) -> Iterator[Frame]:
    from PIL import ImageOps

    for index in range(getattr(image, "n_frames", 1)):
        if image.width * image.height > MAX_PIXELS:
            raise _too_many_pixels(image.width * image.height)
        try:
            if index or getattr(image, "n_frames", 1) > 1:
                image.seek(index)
            image.load()
            upright = ImageOps.exif_transpose(image)
        except Exception as error:  # a truncated file raises OSError, SyntaxError, struct.error and more
            raise FrameError(
                "image",
                f"{image.format or 'image'} data is truncated or damaged",
                "expected a whole file",
                "Copy it anew.",
            ) from error
        yield _pixels(upright), None


def _pixels(image: Image.Image) -> NDArray[Any]:
    mode = image.mode
    if mode == "P" and "transparency" not in image.info:
        image = image.convert("RGB")
    elif mode == "1":
        image = image.convert("L")
    elif mode in ("LA", "RGBA", "PA", "P", "La", "RGBa"):
        raise FrameError(
            "image", f"got mode {mode}, with transparency", "expected grey or RGB", "Drop the alpha channel."
        )
    elif mode not in ("L", "RGB", "F", "I;16", "I;16L", "I;16B", "I;16N"):
        raise FrameError("image", f"got mode {mode}", "expected grey or RGB", "Convert it: image.convert('RGB').")
    pixels = np.asarray(image)
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


# DICOM ----------------------------------------------------------------------------------------------------------


def _from_dicom(path: Path) -> Iterator[Frame]:
    try:
        import pydicom
    except ImportError as error:
        raise FrameError(
            "image", "a DICOM file", "expected the package pydicom", "pip install 'msa2net-edge[dicom]'"
        ) from error
    try:
        dataset = pydicom.dcmread(path)
    except Exception as error:  # a damaged file raises whatever its first broken element leads to
        raise FrameError(
            "image", "DICOM data is truncated or damaged", "expected a whole file", "Copy it anew."
        ) from error
    yield from _from_dataset(dataset)


def _from_dataset(dataset: Dataset) -> Iterator[Frame]:
    from pydicom.pixels import apply_color_lut, iter_pixels

    for keyword in ("PixelData", "Rows", "Columns", "BitsStored", "PhotometricInterpretation"):
        if keyword not in dataset:
            raise FrameError("image", f"DICOM without {keyword}", "expected an image", "Is it a report or a waveform?")
    if dataset.Rows * dataset.Columns > MAX_PIXELS:
        raise _too_many_pixels(dataset.Rows * dataset.Columns)
    if dataset.get("PixelRepresentation", 0):
        raise FrameError(
            "image", "DICOM with signed pixels", "expected unsigned", "Apply the rescale and window first."
        )
    bits = int(dataset.BitsStored)
    syntax = dataset.file_meta.TransferSyntaxUID
    decoded = iter_pixels(dataset)
    while True:
        try:
            frame = next(decoded, None)
        except Exception as error:
            needs = "decoder" in str(error) or "plugin" in str(error)
            raise FrameError(
                "image",
                f"DICOM pixels ({syntax.name}) " + ("have no decoder here" if needs else "are truncated or damaged"),
                "expected pixels that can be decoded",
                _DECODERS if needs else "Copy it anew.",
            ) from error
        if frame is None:
            return
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            frame = apply_color_lut(frame, dataset)
            yield frame, None
        elif dataset.PhotometricInterpretation == "MONOCHROME1":
            yield _stored(((1 << bits) - 1) - frame, bits)
        else:
            yield _stored(frame, bits)


def _stored(frame: NDArray[Any], bits: int) -> Frame:
    """Pixels of fewer than 8 bits are widened to uint16, whose number of bits is a parameter of the pixel contract."""
    if frame.dtype == np.uint8 and bits == 8:
        return frame, None
    return frame.astype(np.uint16), bits
