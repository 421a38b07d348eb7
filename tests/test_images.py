"""Image files to frames: real pixel values, and every file that is refused, without a word of whose it is."""

from __future__ import annotations

import builtins
import io
import os
import struct
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset as PydicomDataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, convert_color_space, pixel_array
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from msa2net.errors import FrameError
from msa2net.runtimes import images
from msa2net.runtimes.images import read_frames, read_npy, single
from msa2net.runtimes.preprocess import MAX_PIXELS, check_frame

PATIENT = "DOE^JANE"  # of every file and folder here, and of every DICOM file made here
ANY = "expected a PNG, JPEG, TIFF, .npy or DICOM file"
WHOLE = "expected a whole file"
COPY = "Copy it anew."
ALPHA = "expected grey or RGB", "Drop the alpha channel."
NPY = ("a damaged .npy file, or one of objects", "expected a whole array of numbers", "Save it anew.")
DAMAGED_DICOM = ("DICOM data is truncated or damaged", WHOLE, COPY)
GREY = np.random.default_rng(1).integers(0, 256, (11, 7), dtype=np.uint8)
RGB = np.random.default_rng(2).integers(0, 256, (11, 7, 3), dtype=np.uint8)
GREY16 = np.random.default_rng(3).integers(0, 65536, (11, 7), dtype=np.uint16)
RAMP = np.kron(np.arange(0, 256, 32, dtype=np.uint8).reshape(2, 4), np.ones((16, 16), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder named after a patient."""
    found = tmp_path / PATIENT
    found.mkdir()
    return found


def keep(folder: Path, content: bytes, suffix: str = "") -> Path:
    """A file named after a patient."""
    path = folder / f"{PATIENT}{suffix}"
    path.write_bytes(content)
    return path


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def frames(source: Any) -> list[tuple[NDArray[Any], int | None]]:
    return list(read_frames(source))


def only(source: Any) -> NDArray[Any]:
    """The pixels of a source of one frame that is no uint16 of fewer bits."""
    [(pixels, bits)] = frames(source)
    assert bits is None
    return pixels


def anonymous(error: FrameError) -> FrameError:
    """Checks that neither the message nor a logged traceback tells whose image it was, and the message's form."""
    told = str(error) + "".join(traceback.format_exception(error))
    assert PATIENT not in told
    assert os.sep not in str(error).replace(": got", "")
    assert str(error) == f"{error.place}: {error.found}, {error.expected}. {error.advice}"
    assert str(error).isprintable()
    return error


def refused(source: Any) -> tuple[str, str, str]:
    """What is said of a source that cannot be read: found, expected, advice."""
    with pytest.raises(FrameError) as caught:
        frames(source)
    error = anonymous(caught.value)
    assert error.place == "image"
    return error.found, error.expected, error.advice


# Pillow's formats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    "pixels", [GREY, RGB, GREY16, GREY[:1, :1], RGB[:1]], ids=["L", "RGB", "I;16", "one pixel", "one row"]
)
def test_a_lossless_image_keeps_every_pixel(folder: Path, kind: str, pixels: NDArray[Any]) -> None:
    found = only(keep(folder, encoded(Image.fromarray(pixels), kind)))
    assert found.dtype == pixels.dtype
    assert np.array_equal(found, pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_one_bit_becomes_black_and_white(folder: Path, kind: str) -> None:
    bits = GREY > 127
    found = only(keep(folder, encoded(Image.fromarray(bits), kind)))
    assert np.array_equal(found, np.where(bits, 255, 0))
    assert found.dtype == np.uint8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_palette_is_looked_up(folder: Path, kind: str) -> None:
    colours = np.random.default_rng(4).integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(GREY).convert("P")
    image.putdata(GREY.ravel().tolist())
    image.putpalette(colours.tobytes())
    assert np.array_equal(only(keep(folder, encoded(image, kind))), colours[GREY])


def test_the_file_s_name_does_not_matter(folder: Path) -> None:
    assert np.array_equal(only(keep(folder, encoded(Image.fromarray(RGB), "PNG"), ".dcm")), RGB)
    assert np.array_equal(only(str(keep(folder, encoded(Image.fromarray(GREY), "TIFF"), ".txt"))), GREY)


def test_a_jpeg_is_close_to_what_was_saved(folder: Path) -> None:
    grey = only(keep(folder, encoded(Image.fromarray(RAMP), "JPEG", quality=95)))
    assert grey.shape == RAMP.shape
    assert np.abs(grey.astype(int) - RAMP).max() <= 3
    colour = np.zeros((16, 16, 3), np.uint8) + np.array([200, 50, 10], np.uint8)
    found = only(keep(folder, encoded(Image.fromarray(colour), "JPEG", quality=95)))
    assert np.abs(found.astype(int) - colour).max() <= 3


UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_an_image_is_turned_upright_by_its_exif_orientation(folder: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(RAMP), kind, exif=exif)
    found = only(keep(folder, content))
    expected = UPRIGHT[orientation](RAMP)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (16 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_pillow_image_is_turned_upright_and_keeps_its_name(folder: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(keep(folder, encoded(Image.fromarray(RAMP), "TIFF", exif=exif))) as image:
        name = image.filename
        assert np.array_equal(only(image), UPRIGHT[orientation](RAMP))
        assert image.filename == name


def test_every_page_of_a_tiff_is_a_frame(folder: Path) -> None:
    pages = [Image.fromarray(GREY), Image.fromarray(RGB[:5]), Image.fromarray(GREY16[:3, :2])]
    found = frames(keep(folder, encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])))
    assert len(found) == 3
    for (pixels, bits), page in zip(found, pages, strict=True):
        assert bits is None
        assert np.array_equal(pixels, np.asarray(page))
        assert pixels.dtype == np.asarray(page).dtype


def test_an_animated_png_gives_its_frames_and_is_no_single_image(folder: Path) -> None:
    pages = [Image.fromarray(page) for page in (RGB, 255 - RGB, RGB[::-1])]
    path = keep(folder, encoded(pages[0], "PNG", save_all=True, append_images=pages[1:]))
    found = [pixels for pixels, _ in frames(path)]
    assert np.array_equal(np.stack(found), np.stack([np.asarray(page) for page in pages]))
    with pytest.raises(FrameError, match=r"^image: holds several frames, expected one"):
        single(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (4320, 7680)], ids=str)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "DICOM"])
def test_the_smallest_and_the_largest_frames_keep_every_pixel(folder: Path, size: tuple[int, int], kind: str) -> None:
    pixels = np.resize(np.random.default_rng(4).integers(0, 256, 9973, dtype=np.uint8), size)
    content = saved(dicom(pixels)) if kind == "DICOM" else encoded(Image.fromarray(pixels), kind)
    assert np.array_equal(only(keep(folder, content)), pixels)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_a_compressed_tiff_keeps_every_pixel(folder: Path, compression: str) -> None:
    assert np.array_equal(only(keep(folder, encoded(Image.fromarray(RGB), "TIFF", compression=compression))), RGB)


def test_a_float_tiff_keeps_its_values(folder: Path) -> None:
    values = np.random.default_rng(5).random((11, 7), dtype=np.float32)
    found = only(keep(folder, encoded(Image.fromarray(values), "TIFF")))
    assert found.dtype == np.float32
    assert np.array_equal(found, values)


def test_a_big_endian_tiff_keeps_its_values(folder: Path) -> None:
    # Header, one strip of 2 x 3 samples, and the eight tags that a grey image needs, all most significant byte first.
    pixels = np.array([[0, 1, 256], [4095, 40000, 65535]], ">u2")
    found = only(keep(folder, tiff(">", pixels, photometric=1)))
    assert found.dtype == np.uint16
    assert found.dtype.isnative
    assert found.tolist() == pixels.tolist()


@pytest.mark.parametrize("dtype", ["u1", "<u2"])
def test_a_tiff_whose_zero_is_white_is_inverted(folder: Path, dtype: str) -> None:
    pixels = np.array([[0, 1, 200], [3, 90, 255]], dtype)
    found = only(keep(folder, tiff("<", pixels, photometric=0)))
    assert np.array_equal(found, np.iinfo(pixels.dtype).max - pixels.astype(int))


def tiff(order: str, pixels: NDArray[Any], photometric: int) -> bytes:
    """An uncompressed grey TIFF of one strip, byte by byte."""
    rows, columns = pixels.shape
    data = pixels.tobytes()
    header = 8
    tags = [
        (256, columns),
        (257, rows),
        (258, 8 * pixels.itemsize),
        (259, 1),  # no compression
        (262, photometric),
        (273, header),
        (278, rows),
        (279, len(data)),
    ]
    short, long = np.dtype(f"{order}u2"), np.dtype(f"{order}u4")
    mark = (b"MM\x00\x2a" if order == ">" else b"II\x2a\x00") + np.array(header + len(data), long).tobytes()
    entries = [np.array([tag, 4], short).tobytes() + np.array([1, value], long).tobytes() for tag, value in tags]
    return mark + data + np.array(len(tags), short).tobytes() + b"".join(entries) + bytes(4)


def test_a_picture_behind_a_jpeg_is_not_taken_for_a_frame(folder: Path) -> None:
    first, preview = Image.fromarray(RAMP), Image.fromarray(RAMP[:8, :8])
    content = encoded(first, "MPO", save_all=True, append_images=[preview])
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 2
    assert only(keep(folder, content)).shape == RAMP.shape


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "I;16", "F"])
def test_a_pillow_image_is_read_like_its_file(folder: Path, mode: str) -> None:
    image = Image.fromarray(GREY16) if mode == "I;16" else Image.fromarray(RGB).convert(mode)
    kept = image.copy()
    found = only(image)
    assert np.array_equal(found, only(keep(folder, encoded(image, "TIFF"))))
    assert image.tobytes() == kept.tobytes()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("RGBA", ("got mode RGBA, with transparency", *ALPHA)),
        ("LA", ("got mode LA, with transparency", *ALPHA)),
        ("CMYK", ("got mode CMYK", "expected grey or RGB", "Convert it: image.convert('RGB').")),
        ("YCbCr", ("got mode YCbCr", "expected grey or RGB", "Convert it: image.convert('RGB').")),
        ("HSV", ("got mode HSV", "expected grey or RGB", "Convert it: image.convert('RGB').")),
        ("I", ("got 32-bit or signed whole numbers", "expected grey or RGB", "Save it as 16 bits.")),
    ],
)
def test_an_image_of_another_mode_is_refused(mode: str, expected: tuple[str, str, str]) -> None:
    assert refused(Image.fromarray(RGB).convert("L" if mode == "I" else "RGB").convert(mode)) == expected


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_png_with_an_alpha_channel_is_refused(folder: Path, mode: str) -> None:
    content = encoded(Image.fromarray(RGB).convert(mode), "PNG")
    assert refused(keep(folder, content)) == (f"got mode {mode}, with transparency", *ALPHA)


@pytest.mark.parametrize(("mode", "key"), [("P", 3), ("L", 3), ("RGB", (1, 2, 3))])
def test_a_png_with_a_transparent_colour_is_refused(folder: Path, mode: str, key: Any) -> None:
    content = encoded(Image.fromarray(RGB).convert(mode), "PNG", transparency=key)
    assert refused(keep(folder, content)) == (f"got mode {mode}, with transparency", *ALPHA)


def test_a_cmyk_jpeg_is_refused(folder: Path) -> None:
    content = encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG")
    assert refused(keep(folder, content))[0] == "got mode CMYK"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "WEBP", "PPM", "ICO"])
def test_another_format_is_refused(folder: Path, kind: str) -> None:
    content = encoded(Image.fromarray(RAMP).convert("RGB"), kind)
    assert refused(keep(folder, content)) == (
        "not a readable image",
        ANY,
        "Is it whole, and of one of these formats?",
    )


def lossless(pixels: NDArray[Any], kind: str, **options: Any) -> bytes:
    return encoded(Image.fromarray(pixels), kind, **options)


NOISE = np.random.default_rng(6).integers(0, 256, (48, 40, 3), dtype=np.uint8)
CUT = {
    "PNG": lossless(NOISE, "PNG"),
    "PNG of 16 bits": lossless(np.kron(GREY16, np.ones((4, 4), np.uint16)), "PNG"),
    "JPEG": lossless(NOISE, "JPEG"),
    "JPEG in passes": lossless(NOISE, "JPEG", progressive=True),
    "TIFF": lossless(NOISE, "TIFF"),
    "TIFF with LZW": lossless(NOISE, "TIFF", compression="tiff_lzw"),
    "TIFF of two pages": lossless(NOISE, "TIFF", save_all=True, append_images=[Image.fromarray(GREY)]),
    "npy": npy(NOISE),
}


@pytest.mark.parametrize("name", CUT)
def test_a_truncated_image_is_refused_at_any_length(folder: Path, name: str) -> None:
    whole = CUT[name]
    expected = [pixels for pixels, _ in frames(keep(folder, whole))]
    lengths = {
        *range(1, 64),
        *range(64, len(whole) - 64, max(1, len(whole) // 80)),
        *range(len(whole) - 64, len(whole)),
    }
    told = set()
    for length in sorted(lengths):
        path = keep(folder, whole[:length])
        try:
            found = frames(path)
        except FrameError as error:
            told.add(anonymous(error).found)
            continue
        # What follows the pixels (a checksum, an end mark) may be missing. The pixels may not.
        assert length > 0.9 * len(whole)
        assert len(found) == len(expected)
        assert all(np.array_equal(pixels, kept) for (pixels, _), kept in zip(found, expected, strict=True))
    damaged = NPY[0] if name == "npy" else f"{name.split()[0]} data is truncated or damaged"
    assert told <= {damaged, "not a readable image"}
    # Pillow writes a compressed TIFF's directory last: cut anywhere, the file cannot be read at all.
    assert damaged in told or name == "TIFF with LZW"


def test_a_truncated_image_says_what_to_do(folder: Path) -> None:
    content = CUT["PNG"][: len(CUT["PNG"]) // 2]
    assert refused(keep(folder, content)) == ("PNG data is truncated or damaged", WHOLE, COPY)


def test_a_page_that_is_damaged_is_refused_after_the_good_one(folder: Path) -> None:
    first, second = Image.fromarray(GREY), Image.fromarray(NOISE)
    content = bytearray(encoded(first, "TIFF", save_all=True, append_images=[second], compression="tiff_deflate"))
    content[-2000:-1000] = bytes(1000)
    reader = read_frames(keep(folder, bytes(content)))
    assert np.array_equal(next(reader)[0], GREY)
    with pytest.raises(FrameError, match=r"^image: TIFF data is truncated or damaged, expected a whole file"):
        next(reader)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(CUT)), st.data())
def test_any_damage_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    content = bytearray(CUT[name])
    early = st.integers(0, min(200, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.one_of(early, st.integers(0, len(content) - 1)))
        content[where] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damage") / PATIENT
    folder.mkdir()
    path = keep(folder, bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's and numpy's, about odd headers
        try:
            found = frames(path)
        except FrameError as error:
            anonymous(error)
            return
    assert all(isinstance(pixels, np.ndarray) for pixels, _ in found)


# Files that are no images -----------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(folder: Path) -> None:
    assert refused(folder / "nothing.png") == ("no such file", ANY, "Check the path.")
    assert refused(str(folder / PATIENT)) == ("no such file", ANY, "Check the path.")


def test_a_folder_is_refused(folder: Path) -> None:
    assert refused(folder) == ("not a regular file", ANY, "Give the files one by one.")


def test_a_pipe_is_refused_and_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / PATIENT)
    assert refused(folder / PATIENT)[0] == "not a regular file"


def test_an_empty_file_is_refused(folder: Path) -> None:
    assert refused(keep(folder, b"")) == ("an empty file", ANY, COPY)


@pytest.mark.parametrize(
    "content", [b"name: JANE\n", b"\x00", b"\x7fELF", b"x" * 100_000], ids=["text", "0", "ELF", "x"]
)
def test_a_file_of_something_else_is_refused(folder: Path, content: bytes) -> None:
    expected = ("not a readable image", ANY, "Is it whole, and of one of these formats?")
    assert refused(keep(folder, content)) == expected


def test_a_path_that_the_system_refuses_is_not_repeated(folder: Path) -> None:
    advice = "Check the path and its permissions."
    assert refused(folder / (PATIENT * 100)) == ("cannot be opened (File name too long)", ANY, advice)
    loop = folder / PATIENT
    loop.symlink_to(loop)
    assert PATIENT not in refused(loop)[0]


def test_a_file_that_may_not_be_read_is_not_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = keep(folder, encoded(Image.fromarray(GREY), "PNG"))

    def denied(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    assert refused(path) == ("cannot be opened (Permission denied)", ANY, "Check the path and its permissions.")


@pytest.mark.parametrize("source", [None, 7, b"bytes", [PATIENT], {"name": PATIENT}], ids=lambda s: type(s).__name__)
def test_what_is_no_source_is_refused_by_its_type(source: Any) -> None:
    with pytest.raises(FrameError) as caught:
        frames(source)
    error = anonymous(caught.value)
    assert (error.place, error.found) == ("frame", f"got {type(source).__name__}")
    assert error.expected == "expected a numpy array, a path, a PIL image or a pydicom Dataset"


# numpy files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(GREY, id="grey"),
        pytest.param(RGB, id="colour"),
        pytest.param(GREY16, id="uint16"),
        pytest.param(GREY.astype(np.float32) / 255, id="float32"),
        pytest.param(GREY16.astype(">u2"), id="big-endian"),
        pytest.param(np.asfortranarray(RGB), id="Fortran order"),
        pytest.param(RGB[::-1, ::2], id="not contiguous"),
    ],
)
def test_a_numpy_file_is_its_array(folder: Path, array: NDArray[Any]) -> None:
    found = only(keep(folder, npy(array)))
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


def test_a_numpy_file_of_four_axes_is_a_clip(folder: Path) -> None:
    clip = np.random.default_rng(7).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    found = frames(keep(folder, npy(clip)))
    assert len(found) == 4
    assert all(bits is None for _, bits in found)
    assert np.array_equal(np.stack([pixels for pixels, _ in found]), clip)


@pytest.mark.parametrize("shape", [(4, 5, 6, 4), (2, 4, 5, 6, 3), (7,), ()], ids=str)
def test_a_numpy_file_of_another_shape_is_one_frame_that_the_contract_refuses(
    folder: Path, shape: tuple[int, ...]
) -> None:
    pixels = only(keep(folder, npy(np.zeros(shape, np.uint8))))
    with pytest.raises(FrameError, match=r"^frame: got uint8 \("):
        check_frame(pixels)


class Bomb:
    """Unpickled, it would show that it was."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_a_numpy_file_of_objects_is_refused_and_not_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    content = npy(np.array([[Bomb()]], object), allow_pickle=True)
    assert refused(keep(folder, content)) == NPY
    assert not (folder / "unpickled").exists()


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': %s, }"


def with_header(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(with_header(HEADER % "(2, 3)", bytes(5)), id="a byte short"),
        pytest.param(with_header(HEADER % "(-1, 3)", bytes(6)), id="a negative side"),
        pytest.param(with_header(HEADER % "(1" + "0" * 30 + ", 3)"), id="unfinished"),
        pytest.param(with_header(HEADER % "(10000000000000000000000000, 3)"), id="more than 64 bits"),
        pytest.param(with_header(HEADER % "(4611686018427387904, 4)"), id="wraps to nothing"),
        pytest.param(with_header(HEADER % "('a', 3)"), id="a side of text"),
        pytest.param(with_header(HEADER % ("(" * 300 + ")" * 300)), id="nested"),
        pytest.param(with_header("{'descr': 'nonsense', 'fortran_order': False, 'shape': (1, 1), }"), id="no dtype"),
        pytest.param(with_header("import os"), id="no header"),
        pytest.param(with_header("\x00"), id="a null"),
        pytest.param(b"\x93NUMPY", id="only the mark"),
        pytest.param(b"\x93NUMPY\x09\x00" + bytes(100), id="version 9"),
        pytest.param(b"\x93NUMPY\x01\x00\xff\xff{", id="a long header that is not there"),
    ],
)
def test_a_damaged_numpy_file_is_refused(folder: Path, content: bytes) -> None:
    assert refused(keep(folder, content)) == NPY


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=80).map(lambda b: b"\x93NUMPY\x01\x00" + b)))
def test_any_bytes_as_a_numpy_file_are_refused(content: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about headers of old Pythons
        with pytest.raises(FrameError, match=r"^image: a damaged \.npy file"):
            read_npy(content)


# Too large --------------------------------------------------------------------------------------------------------


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(folder: Path) -> None:
    side = 8193  # one more row than the limit allows, and below Pillow's own
    path = keep(folder, encoded(Image.new("1", (2**13, side)), "PNG"))
    expected = (f"got {2**13 * side} pixels", f"expected at most {MAX_PIXELS}", "Downscale it.")
    assert refused(path) == expected


def test_a_second_page_of_too_many_pixels_is_refused_too(folder: Path) -> None:
    pages = [Image.fromarray(GREY), Image.new("1", (2**13, 8193))]
    content = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:], compression="tiff_deflate")
    reader = read_frames(keep(folder, content))
    assert np.array_equal(next(reader)[0], GREY)
    with pytest.raises(FrameError, match=rf"^image: got {2**13 * 8193} pixels, expected at most {MAX_PIXELS}"):
        next(reader)


@pytest.mark.parametrize("sides", [(10_000, 10_000), (60_000, 60_000)], ids=["Pillow warns", "Pillow refuses"])
def test_a_claim_beyond_pillows_own_limit_is_refused(folder: Path, sides: tuple[int, int]) -> None:
    content = bytearray(encoded(Image.fromarray(GREY), "PNG"))
    content[16:24] = np.array(sides, ">u4").tobytes()
    content[29:33] = crc(bytes(content[12:29]))
    expected = ("got too many pixels", f"expected at most {MAX_PIXELS}", "Downscale it.")
    assert refused(keep(folder, bytes(content))) == expected


def crc(chunk: bytes) -> bytes:
    import zlib

    return zlib.crc32(chunk).to_bytes(4, "big")


# DICOM: real files ------------------------------------------------------------------------------------------------


def test_real_colour_ultrasound_keeps_every_pixel(examples: Callable[[str], Path]) -> None:
    dataset = pydicom.dcmread(examples("rgb_color"))
    found = only(examples("rgb_color"))
    assert found.shape == (240, 320, 3)
    stored = np.frombuffer(dataset.PixelData, np.uint8)
    assert dataset.PlanarConfiguration == 0
    assert np.array_equal(found.ravel(), stored[: found.size])


def test_a_real_clip_gives_its_frames_in_rgb(examples: Callable[[str], Path]) -> None:
    found = frames(examples("ybr_color"))
    assert len(found) == 30
    assert all(bits is None and pixels.shape == (240, 320, 3) and pixels.dtype == np.uint8 for pixels, bits in found)
    for index in (0, 29):
        ybr = pixel_array(examples("ybr_color"), index=index, raw=True)
        expected = convert_color_space(ybr, "YBR_FULL", "RGB")
        assert np.array_equal(found[index][0], expected)
        assert not np.array_equal(found[index][0], ybr)
    # Most of an ultrasound picture is black: in YBR that would be (0, 128, 128).
    assert (np.median(found[0][0], axis=(0, 1)) < 16).all()
    assert not np.array_equal(found[0][0], found[29][0])


def test_a_real_jpeg_2000_image_is_decoded_to_rgb(examples: Callable[[str], Path]) -> None:
    dataset = pydicom.dcmread(examples("jpeg2k"))
    with Image.open(io.BytesIO(next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)))) as image:
        expected = np.asarray(image)
    found = only(examples("jpeg2k"))
    assert found.shape == (480, 640, 3)
    assert np.array_equal(found, expected)


def test_a_real_palette_is_looked_up(examples: Callable[[str], Path]) -> None:
    dataset = pydicom.dcmread(examples("palette_color"))
    found = only(examples("palette_color"))
    expected = apply_color_lut(dataset.pixel_array, dataset)
    assert found.shape == (350, 800, 3)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_real_grey_pixels_of_12_bits_come_with_their_bits(examples: Callable[[str], Path]) -> None:
    [(found, bits)] = frames(examples("overlay"))
    assert bits == 12
    assert found.dtype == np.uint16
    assert np.array_equal(found, pydicom.dcmread(examples("overlay")).pixel_array)
    assert check_frame(found, bits) is not None


@pytest.mark.parametrize("name", ["ct", "mr"])
def test_real_signed_pixels_are_refused(examples: Callable[[str], Path], name: str) -> None:
    expected = ("DICOM with signed pixels", "expected unsigned", "Apply the rescale and window first.")
    assert refused(examples(name)) == expected


def test_a_real_dose_of_32_bits_is_refused(examples: Callable[[str], Path]) -> None:
    expected = ("DICOM with 32 bits stored", "expected at most 16", "Rescale it to 16 bits.")
    assert refused(examples("rt_dose")) == expected


def test_a_real_file_without_an_image_is_refused(examples: Callable[[str], Path]) -> None:
    expected = ("DICOM without PixelData", "expected an image", "Is it a report or a waveform?")
    assert refused(examples("rt_plan")) == expected


def test_a_dataset_is_read_like_its_file(examples: Callable[[str], Path]) -> None:
    path = examples("palette_color")
    assert np.array_equal(only(pydicom.dcmread(path)), only(path))


# DICOM: made here -------------------------------------------------------------------------------------------------


def dicom(pixels: NDArray[Any], photometric: str = "MONOCHROME2", bits: int = 8, **changes: Any) -> FileDataset:
    """A dataset of one frame, or of several if it has four axes; its patient's name is in it."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))  # type: ignore[arg-type]
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.PatientName = PATIENT
    dataset.PatientID = PATIENT
    shape = pixels.shape[1:] if pixels.ndim == 4 else pixels.shape
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = 3 if len(shape) == 3 else 1
    if len(shape) == 3:
        dataset.PlanarConfiguration = 0
    if pixels.ndim == 4:
        dataset.NumberOfFrames = len(pixels)
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = 8 * pixels.itemsize
    dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = 0
    content = pixels.tobytes()
    dataset.PixelData = content + bytes(len(content) % 2)
    for keyword, value in changes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def saved(dataset: FileDataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_grey_of_8_bits_is_read(folder: Path) -> None:
    assert np.array_equal(only(keep(folder, saved(dicom(GREY)))), GREY)


def test_monochrome1_is_inverted(folder: Path) -> None:
    found = only(keep(folder, saved(dicom(GREY, "MONOCHROME1"))))
    assert found.dtype == np.uint8
    assert np.array_equal(found, 255 - GREY)


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_monochrome1_is_inverted_within_the_bits_stored(folder: Path, bits: int) -> None:
    stored = GREY16 >> (16 - bits)
    [(found, told)] = frames(keep(folder, saved(dicom(stored, "MONOCHROME1", bits))))
    assert told == bits
    assert np.array_equal(found, (2**bits - 1) - stored)
    assert found.dtype == np.uint16


@pytest.mark.parametrize("bits", [9, 12, 16])
def test_the_bits_stored_come_with_the_pixels(folder: Path, bits: int) -> None:
    stored = GREY16 >> (16 - bits)
    [(found, told)] = frames(keep(folder, saved(dicom(stored, bits=bits))))
    assert told == bits
    assert np.array_equal(found, stored)


def test_fewer_than_8_bits_are_widened(folder: Path) -> None:
    [(found, bits)] = frames(keep(folder, saved(dicom(GREY >> 2, bits=6))))
    assert bits == 6
    assert found.dtype == np.uint16
    assert np.array_equal(found, GREY >> 2)


def test_several_frames_are_read_in_order(folder: Path) -> None:
    clip = np.random.default_rng(8).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    found = frames(keep(folder, saved(dicom(clip, "RGB"))))
    assert np.array_equal(np.stack([pixels for pixels, _ in found]), clip)


def test_colour_stored_in_planes_is_read(folder: Path) -> None:
    planes = np.ascontiguousarray(RGB.transpose(2, 0, 1))
    dataset = dicom(RGB, "RGB", PlanarConfiguration=1, PixelData=planes.tobytes() + b"\x00")
    assert np.array_equal(only(keep(folder, saved(dataset))), RGB)


def test_uncompressed_ybr_becomes_rgb(folder: Path) -> None:
    ybr = np.zeros((2, 2, 3), np.uint8) + np.array([76, 85, 255], np.uint8)  # red
    found = only(keep(folder, saved(dicom(ybr, "YBR_FULL"))))
    assert np.abs(found.astype(int) - (254, 0, 0)).max() <= 1


MISSING = ("expected an image", "Is it a report or a waveform?")


@pytest.mark.parametrize("keyword", ["PixelData", "Rows", "Columns", "BitsStored", "PhotometricInterpretation"])
def test_a_dataset_without_what_an_image_needs_is_refused(keyword: str) -> None:
    assert refused(dicom(GREY, **{keyword: None})) == (f"DICOM without {keyword}", *MISSING)
    emptied = dicom(GREY)
    emptied[keyword].value = b"" if keyword == "PixelData" else None
    assert refused(emptied) == (f"DICOM without {keyword}", *MISSING)


def test_a_dataset_without_a_transfer_syntax_is_refused() -> None:
    dataset = dicom(GREY)
    del dataset.file_meta.TransferSyntaxUID
    assert refused(dataset) == ("DICOM without TransferSyntaxUID", *MISSING)


def test_signed_pixels_are_refused(folder: Path) -> None:
    dataset = dicom(GREY16, bits=16, PixelRepresentation=1)
    expected = ("DICOM with signed pixels", "expected unsigned", "Apply the rescale and window first.")
    assert refused(keep(folder, saved(dataset))) == expected


RESCALED = (
    "DICOM with a rescale that changes its values",
    "expected stored values as they are",
    "Apply pydicom.pixels.apply_modality_lut, bring the result to [0, 1] as in training, and give float32.",
)


@pytest.mark.parametrize("changes", [{}, {"RescaleSlope": 1, "RescaleIntercept": 0}, {"RescaleSlope": "1.0"}], ids=str)
def test_a_rescale_that_changes_nothing_is_no_matter(folder: Path, changes: dict[str, Any]) -> None:
    assert np.array_equal(only(keep(folder, saved(dicom(GREY, **changes)))), GREY)


@pytest.mark.parametrize(
    "changes", [{"RescaleSlope": 2}, {"RescaleIntercept": -1024}, {"RescaleSlope": "0.5"}], ids=str
)
def test_a_rescale_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    assert refused(keep(folder, saved(dicom(GREY, **changes)))) == RESCALED


@pytest.mark.parametrize("groups", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_a_rescale_of_the_frames_of_a_clip_is_refused(groups: str) -> None:
    transformation, group = PydicomDataset(), PydicomDataset()
    transformation.RescaleSlope, transformation.RescaleIntercept = 1, 3
    group.PixelValueTransformationSequence = [transformation]
    assert refused(dicom(GREY, **{groups: [PydicomDataset(), group]})) == RESCALED


def test_a_modality_lut_is_refused() -> None:
    table = PydicomDataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 16], bytes(512)
    assert refused(dicom(GREY, ModalityLUTSequence=[table])) == RESCALED


def test_colour_has_no_rescale() -> None:
    assert np.array_equal(only(dicom(RGB, "RGB", RescaleSlope=2)), RGB)


def test_a_damaged_rescale_is_refused() -> None:
    dataset = dicom(GREY)
    dataset.add(DataElement("RescaleSlope", "LO", PATIENT))
    assert refused(dataset) == DAMAGED_DICOM


def test_a_window_is_for_displays_and_is_not_applied() -> None:
    assert np.array_equal(only(dicom(GREY, WindowCenter=40, WindowWidth=80)), GREY)


@pytest.mark.parametrize("photometric", ["YBR_PARTIAL_420", "CMYK", "HSV", "DOE^JANE"])
def test_another_photometric_interpretation_is_refused_and_not_repeated(photometric: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about the value
        found = refused(dicom(RGB, photometric))
    assert found == (
        "DICOM of another photometric interpretation",
        f"expected one of {', '.join(images.PHOTOMETRIC)}",
        "Convert it to RGB.",
    )


def test_a_dataset_of_too_many_pixels_is_refused() -> None:
    dataset = dicom(GREY, Rows=60_000, Columns=60_000)
    assert refused(dataset) == (f"got {60_000**2} pixels", f"expected at most {MAX_PIXELS}", "Downscale it.")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"BitsAllocated": 12}, id="12 bits allocated"),
        pytest.param({"BitsStored": 9}, id="more bits stored than allocated"),
        pytest.param({"SamplesPerPixel": 2}, id="two samples"),
        pytest.param({"PixelData": bytes(10)}, id="too few pixels"),
        pytest.param({"PhotometricInterpretation": "PALETTE COLOR"}, id="no palette"),
        pytest.param({"BitsAllocated": None}, id="no bits allocated"),
    ],
)
def test_pixels_that_do_not_fit_their_description_are_refused(changes: dict[str, Any]) -> None:
    assert refused(dicom(GREY, **changes)) == (
        "DICOM pixels (Explicit VR Little Endian) are truncated or damaged",
        WHOLE,
        COPY,
    )


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless], ids=["JPEG 2000", "RLE"])
def test_damaged_compressed_pixels_are_not_mistaken_for_a_missing_decoder(syntax: Any) -> None:
    dataset = dicom(RGB, "RGB")
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([b"\x00" * 100])
    found, _, advice = refused(dataset)
    assert found == f"DICOM pixels ({syntax.name}) are truncated or damaged"
    assert advice == COPY


def test_half_of_a_real_jpeg_2000_image_is_refused(examples: Callable[[str], Path], folder: Path) -> None:
    dataset = pydicom.dcmread(examples("jpeg2k"))
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame[: len(frame) // 2]])
    assert refused(keep(folder, saved(dataset)))[0].endswith("are truncated or damaged")


def test_pixels_without_a_decoder_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels.decoders import JPEGLSLosslessDecoder

    monkeypatch.setattr(JPEGLSLosslessDecoder, "_available", {})
    dataset = dicom(GREY)
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.PixelData = encapsulate([b"\x00" * 100])
    assert refused(dataset) == (
        f"DICOM pixels ({JPEGLSLossless.name}) have no decoder here",
        "expected one that is installed",
        "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg pylibjpeg-rle",
    )


def test_an_unknown_transfer_syntax_is_refused_and_not_repeated() -> None:
    dataset = dicom(GREY)
    dataset.file_meta.TransferSyntaxUID = "1.2.3.4.5.6"
    found = refused(dataset)
    assert found[0] == "DICOM pixels (unknown transfer syntax) have no decoder here"


def test_without_pydicom_a_dicom_file_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = keep(folder, saved(dicom(GREY)))
    real = builtins.__import__

    def blocked(name: str, *args: Any, **keywords: Any) -> Any:
        if name == "pydicom":
            raise ImportError("No module named 'pydicom'")
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", blocked)
    found = refused(path)
    assert found == ("a DICOM file", "expected the package pydicom", "pip install 'msa2net-edge[dicom]'")


def test_a_truncated_dicom_file_is_refused_at_any_length(folder: Path) -> None:
    whole = saved(dicom(np.kron(GREY, np.ones((8, 8), np.uint8))))
    assert only(keep(folder, whole)).shape == (88, 56)
    told = set()
    for length in [*range(132, 800, 3), *range(800, len(whole), 97), len(whole) - 1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, about where a file ends
            with pytest.raises(FrameError) as caught:
                frames(keep(folder, whole[:length]))
        told.add(anonymous(caught.value).found)
    assert all(text.startswith("DICOM ") for text in told)


def test_a_damaged_dicom_file_says_what_to_do(folder: Path) -> None:
    whole = saved(dicom(GREY))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert refused(keep(folder, whole[:200])) in (DAMAGED_DICOM, ("DICOM without PixelData", *MISSING))


def test_odd_attributes_of_a_patient_are_neither_read_nor_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = dicom(GREY)
    for keyword, vr in (("PatientSex", "CS"), ("PatientAge", "AS"), ("StudyInstanceUID", "UI")):
        value = f"{PATIENT} is no value of this kind"
        dataset.add(DataElement(keyword, vr, value, validation_mode=pydicom.config.IGNORE))
    path = keep(folder, saved(dataset))
    with pytest.warns(UserWarning, match="Invalid value for VR UI"):  # this is what reading one would tell
        _ = pydicom.dcmread(path).StudyInstanceUID
    caplog.clear()
    assert np.array_equal(only(path), GREY)  # a warning would be an error here
    assert not caplog.records


# One frame --------------------------------------------------------------------------------------------------------


def test_single_gives_the_only_frame_and_its_bits(folder: Path) -> None:
    pixels, bits = single(keep(folder, saved(dicom(GREY16 >> 4, bits=12))))
    assert bits == 12
    assert np.array_equal(pixels, GREY16 >> 4)


def test_single_takes_the_callers_word_for_the_bits(folder: Path) -> None:
    path = keep(folder, encoded(Image.fromarray(GREY16 >> 6), "PNG"))
    assert single(path)[1] is None
    assert single(path, 10)[1] == 10


def test_single_refuses_bits_that_differ_from_the_files_own() -> None:
    dataset = dicom(GREY16 >> 4, bits=12)
    assert single(dataset, 12)[1] == 12
    with pytest.raises(FrameError) as caught:
        single(dataset, 10)
    assert str(caught.value) == "bits: got 10 for a source that says 12, expected the same. Leave it out."


@pytest.mark.parametrize("kind", ["TIFF", "npy", "DICOM"])
def test_single_refuses_a_clip(folder: Path, kind: str) -> None:
    clip = np.stack([RGB, RGB])
    content = {
        "TIFF": encoded(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.fromarray(RGB)]),
        "npy": npy(clip),
        "DICOM": saved(dicom(clip, "RGB")),
    }[kind]
    with pytest.raises(FrameError) as caught:
        single(keep(folder, content))
    error = anonymous(caught.value)
    assert (error.found, error.expected) == ("holds several frames", "expected one")
    assert error.advice == "Use msa2net.runtimes.images.read_frames and predict each."


def test_single_refuses_a_clip_of_no_frames(folder: Path) -> None:
    path = keep(folder, npy(np.zeros((0, 4, 6, 3), np.uint8)))
    with pytest.raises(FrameError) as caught:
        single(path)
    assert str(anonymous(caught.value)) == "image: holds no frame, expected one. Check the source."


def test_16_bit_colour_is_refused_since_pillow_would_cut_it_to_8_bits(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + np.arange(12, dtype=">u2").tobytes() for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    path = tmp_path / "colour.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    with pytest.raises(FrameError) as caught:
        single(path)
    assert str(caught.value) == (
        "image: got 16-bit colour, which Pillow cuts to 8, expected 8-bit colour or 16-bit grey. "
        "Save the array as .npy."
    )


@pytest.mark.parametrize("width", range(20, 60))
def test_8_bit_colour_tiffs_are_not_taken_for_16_bits(folder: Path, width: int) -> None:
    """Pillow's tile arguments hold offsets, too: 1604 has a 16 in it."""
    pixels = np.random.default_rng(width).integers(0, 256, (20, width, 3), np.uint8)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "raw"):
        path = keep(folder, encoded(Image.fromarray(pixels), "TIFF", compression=compression))
        assert np.array_equal(single(path)[0], pixels)
