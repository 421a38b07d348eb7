"""Image files to frames: PNG, JPEG, TIFF, numpy and DICOM, told apart by their content.

Pillow and pydicom are imported on use. No message names a path or an attribute of the file: both can name a patient.
The libraries' own errors do, so they are cut off (`from None`).
"""

from __future__ import annotations

import errno
import io
import os
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
PHOTOMETRIC = (
    "MONOCHROME1",
    "MONOCHROME2",
    "PALETTE COLOR",
    "RGB",
    "YBR_FULL",
    "YBR_FULL_422",
    "YBR_ICT",
    "YBR_RCT",
)
_NPY = b"\x93NUMPY"
_TIFF_PHOTOMETRIC = 262  # the tag PhotometricInterpretation; 0: the smallest value is white
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
    pixels, said = first
    if bits is not None and said not in (None, bits):
        raise FrameError("bits", f"got {bits} for a source that says {said}", "expected the same", "Leave it out.")
    return pixels, said if bits is None else bits


def read_frames(source: Any) -> Iterator[Frame]:
    """The frames of a path, PIL image or pydicom Dataset, one at a time. Raises FrameError for what cannot be read."""
    if isinstance(source, str | os.PathLike):
        yield from _from_file(Path(source))
    elif hasattr(source, "PixelData") or hasattr(source, "file_meta"):
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
    try:
        if not path.exists():
            raise FrameError("image", "no such file", f"expected a {_KINDS} file", "Check the path.")
        if not path.is_file():
            raise FrameError("image", "not a regular file", f"expected a {_KINDS} file", "Give the files one by one.")
        with path.open("rb") as file:
            start = file.read(132)
        content = path.read_bytes() if start.startswith(_NPY) else b""
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise FrameError(
            "image", f"cannot be opened ({reason})", f"expected a {_KINDS} file", "Check the path and its permissions."
        ) from None
    if not start:
        raise FrameError("image", "an empty file", f"expected a {_KINDS} file", "Copy it anew.")
    if content:
        array = read_npy(content)
        stacked = array.ndim == 4 and array.shape[-1] == 3
        yield from ((frame, None) for frame in (array if stacked else [array]))
    elif start[128:] == b"DICM":
        yield from _from_dicom(path)
    else:
        yield from _from_image(path)


def read_npy(content: bytes) -> NDArray[Any]:
    """The array of a `.npy` file's bytes. Raises FrameError if it is damaged or would need unpickling."""
    try:
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception:  # the header is Python's syntax: damaged, it raises nearly anything
        raise FrameError(
            "image", "a damaged .npy file, or one of objects", "expected a whole array of numbers", "Save it anew."
        ) from None
    return array


# Pillow ---------------------------------------------------------------------------------------------------------


def _from_image(path: Path) -> Iterator[Frame]:
    from PIL import Image

    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels("too many") from None
    except Exception:  # Pillow's plugins raise many kinds for a damaged header
        raise FrameError(
            "image", "not a readable image", f"expected a {_KINDS} file", "Is it whole, and of one of these formats?"
        ) from None
    with image:
        yield from _from_pillow(image)


def _too_many_pixels(found: object) -> FrameError:
    return FrameError("image", f"got {found} pixels", f"expected at most {MAX_PIXELS}", "Downscale it.")


def _from_pillow(image: Image.Image) -> Iterator[Frame]:
    """The pages of an image. Of a JPEG that carries more pictures (a preview, a gain map) the first is the image."""
    index = 0
    while True:
        try:
            count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if index == count:
                return
            pixels = _page(image, index if count > 1 else None)
        except FrameError:
            raise
        except Exception:  # a truncated file raises OSError, SyntaxError, struct.error and more
            raise FrameError(
                "image",
                f"{image.format or 'image'} data is truncated or damaged",
                "expected a whole file",
                "Copy it anew.",
            ) from None
        yield pixels, None
        index += 1


def _page(image: Image.Image, index: int | None) -> NDArray[Any]:
    from PIL import Image, ImageOps

    try:
        if index is not None:
            image.seek(index)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels("too many") from None
    if image.width * image.height > MAX_PIXELS:
        raise _too_many_pixels(image.width * image.height)
    if image.mode == "RGB" and any(";16" in _raw_mode(tile.args) for tile in getattr(image, "tile", ())):
        raise FrameError(
            "image",
            "got 16-bit colour, which Pillow cuts to 8",
            "expected 8-bit colour or 16-bit grey",
            "Save the array as .npy.",
        )
    _load(image)
    pixels = _pixels(ImageOps.exif_transpose(image))
    white_is_zero = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0
    # Pillow inverts such a file's 8 bits, but not its 16.
    return np.invert(pixels) if white_is_zero and pixels.dtype == np.uint16 else pixels


def _raw_mode(arguments: Any) -> str:
    """How the file stores pixels, from the arguments of Pillow's decoder: the first of them, or the only one."""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return str(first)


def _load(image: Image.Image) -> None:
    """Decodes the pixels, with the file's name out of Pillow's sight.

    Knowing it, Pillow maps an uncompressed TIFF into memory, and scrambles one stored on its side (orientation 5 to 8).
    """
    attributes = vars(image)
    name = attributes.get("filename")
    if name:
        attributes["filename"] = ""
    try:
        image.load()
    finally:
        if name:
            attributes["filename"] = name


def _pixels(image: Image.Image) -> NDArray[Any]:
    mode = image.mode
    if mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
        raise FrameError(
            "image", f"got mode {mode}, with transparency", "expected grey or RGB", "Drop the alpha channel."
        )
    if mode == "P":
        image = image.convert("RGB")
    elif mode == "1":
        image = image.convert("L")
    elif mode == "I":
        raise FrameError("image", "got 32-bit or signed whole numbers", "expected grey or RGB", "Save it as 16 bits.")
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
    except Exception:  # a damaged file raises whatever its first broken element leads to
        raise _damaged_dicom() from None
    yield from _from_dataset(dataset)


def _damaged_dicom(part: str = "data is") -> FrameError:
    return FrameError("image", f"DICOM {part} truncated or damaged", "expected a whole file", "Copy it anew.")


def _from_dataset(dataset: Dataset) -> Iterator[Frame]:
    from pydicom.pixels import apply_color_lut, iter_pixels

    bits, photometric, syntax = _check_dataset(dataset)
    decoded = None
    while True:
        try:
            decoded = iter_pixels(dataset) if decoded is None else decoded
            frame = next(decoded, None)
            if frame is not None and photometric == "PALETTE COLOR":
                frame = apply_color_lut(frame, dataset)
        except Exception as error:
            reasons = ("missing dependencies", "not support", "No pixel data decoders")
            if not any(reason in str(error) for reason in reasons):
                raise _damaged_dicom(f"pixels ({syntax}) are") from None
            raise FrameError(
                "image", f"DICOM pixels ({syntax}) have no decoder here", "expected one that is installed", _DECODERS
            ) from None
        if frame is None:
            return
        if photometric == "PALETTE COLOR":
            yield frame, None
        elif photometric == "MONOCHROME1":
            yield _stored(((1 << bits) - 1) - frame, bits)
        else:
            yield _stored(frame, bits)


def _check_dataset(dataset: Dataset) -> tuple[int, str, str]:
    """Bits stored, photometric interpretation and the transfer syntax's name of a dataset that can be segmented."""
    try:
        keywords = ("PixelData", "Rows", "Columns", "BitsStored", "PhotometricInterpretation")
        missing = [keyword for keyword in keywords if not dataset.get(keyword)]
        uid: Any = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
        if not uid:
            missing.append("TransferSyntaxUID")
        if missing:
            raise FrameError(
                "image", f"DICOM without {missing[0]}", "expected an image", "Is it a report or a waveform?"
            )
        pixels, bits = int(dataset.Rows) * int(dataset.Columns), int(dataset.BitsStored)
        signed = bool(dataset.get("PixelRepresentation", 0))
        photometric = str(dataset.PhotometricInterpretation)
        rescaled = photometric.startswith("MONOCHROME") and any(map(_rescales, _transformations(dataset)))
        syntax = "unknown transfer syntax" if uid.name == str(uid) else str(uid.name)
    except FrameError:
        raise
    except Exception:  # an attribute of the wrong kind, parsed only when it is asked for
        raise _damaged_dicom() from None
    if pixels > MAX_PIXELS:
        raise _too_many_pixels(pixels)
    if signed:
        raise FrameError(
            "image", "DICOM with signed pixels", "expected unsigned", "Apply the rescale and window first."
        )
    if bits > 16:
        raise FrameError("image", f"DICOM with {bits} bits stored", "expected at most 16", "Rescale it to 16 bits.")
    if photometric not in PHOTOMETRIC:
        raise FrameError(
            "image",
            "DICOM of another photometric interpretation",
            f"expected one of {', '.join(PHOTOMETRIC)}",
            "Convert it to RGB.",
        )
    if rescaled:
        raise FrameError(
            "image",
            "DICOM with a rescale that changes its values",
            "expected stored values as they are",
            "Apply pydicom.pixels.apply_modality_lut, bring the result to [0, 1] as in training, and give float32.",
        )
    return bits, photometric, syntax


def _transformations(dataset: Dataset) -> Iterator[Any]:
    """Where a rescale can stand: in the image itself, for all of its frames, for each."""
    yield dataset
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in dataset.get(groups) or ():
            yield from group.get("PixelValueTransformationSequence") or ()


def _rescales(about: Any) -> bool:
    slope, intercept = about.get("RescaleSlope"), about.get("RescaleIntercept")
    identity = float(1 if slope is None else slope) == 1 and float(0 if intercept is None else intercept) == 0
    return bool(about.get("ModalityLUTSequence")) or not identity


def _stored(frame: NDArray[Any], bits: int) -> Frame:
    """Pixels of fewer than 8 bits are widened to uint16, whose number of bits is a parameter of the pixel contract."""
    if frame.dtype == np.uint8 and bits == 8:
        return frame, None
    if frame.dtype.itemsize > 2 and frame.max() >> 16:
        raise FrameError("image", "DICOM values beyond 16 bits", "expected 16 at most", "Rescale it to 16 bits.")
    return frame.astype(np.uint16), bits
