"""DICOM series, and labels as one mask image per slice or as a DICOM SEG.

Of each file only what places a slice is read, never an attribute of the patient.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msa2net.core.data.cases import Case, Dataset, Volume
from msa2net.core.data.layout import (
    LESION,
    NOTE_ENDINGS,
    Request,
    contents,
    entries,
    found,
    package,
    read_image,
    read_mask,
)
from msa2net.errors import DataError
from msa2net.runtimes.preprocess import MAX_PIXELS

_WHERE = [
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "InstanceNumber",
    "PixelSpacing",
    "SpacingBetweenSlices",
    "SliceThickness",
    "SharedFunctionalGroupsSequence",
]
_SAME = 1e-3  # direction cosines that differ by less are the same; millimetres, too


@dataclass(frozen=True)
class _Header:
    """Where a file's slices lie. None: not said."""

    path: Path
    series: str
    instance_uid: str
    number: int | None
    position: tuple[float, ...] | None  # x y z, mm
    orientation: tuple[float, ...] | None  # direction of a row, then of a column
    pixels: tuple[float, ...] | None  # mm between rows, between columns
    distance: float | None  # mm between slices
    thickness: float | None


@dataclass(frozen=True)
class _Labels:
    """A case's label files: one SEG, or a mask image per slice."""

    files: tuple[Path, ...]
    is_seg: bool


def open_dicom(request: Request) -> Dataset:
    """images/ with a series, or a folder for each; masks/ likewise, if there are labels."""
    root = request.root()
    images, masks = root / "images", root / "masks"
    if not images.is_dir():
        raise request.wrong(found(root, "images"))
    folders = [path for path in entries(images) if path.is_dir()]
    loose = _content(images)
    if bool(folders) == bool(loose):  # neither, or both
        raise request.wrong(found(root, "images"))
    names = [folder.name for folder in folders] or ["."]
    series = [_series(request, images / name) for name in names]
    labels: list[_Labels | None] = [None] * len(names)
    if masks.is_dir():
        marked = {path.name for path in entries(masks) if path.is_dir()}
        marked |= set() if marked and not _content(masks) else {"."}
        if marked != set(names):
            raise request.wrong(
                f"{found(root, 'images', 'masks')}; by their names {len(set(names) - marked)} of {len(names)} cases"
                f" have no labels and {len(marked - set(names))} labels no case"
            )
        labels = [_labels(request, masks / name) for name in names]
    own = _seg_classes(request, labels)
    classes = request.classes or own or LESION
    if own and request.classes and {*own[1:]} & {*classes[1:]} and own[1:] != classes[1 : len(own)]:
        raise DataError(
            f"{request.kind} data",
            f"its segments are {', '.join(own[1:])}",
            f"expected them in the order of the classes {', '.join(classes[1:])}",
            "Renumber the segments.",
        )
    cases = tuple(
        Case(
            f"case {number}",
            partial(read_series, request.place("case", number, len(names)), files, label, len(classes)),
        )
        for number, (files, label) in enumerate(zip(series, labels, strict=True), 1)
    )
    return Dataset(request.kind, classes, cases)


def _content(folder: Path) -> tuple[Path, ...]:
    """A folder's files, without notes."""
    return tuple(path for path in entries(folder) if path.is_file() and path.suffix.lower() not in NOTE_ENDINGS)


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _series(request: Request, folder: Path) -> tuple[Path, ...]:
    files = _content(folder)
    others = [path for path in files if not _is_dicom(path)]
    if not files or others:
        raise request.wrong(
            f"a case's folder of {contents(entries(folder))}, {len(others)} of the files no DICOM",
            "Keep only a series' files in it.",
        )
    return files


def _labels(request: Request, folder: Path) -> _Labels:
    files = _content(folder)
    dicoms = sum(_is_dicom(path) for path in files)
    if not files or (dicoms and len(files) > 1):
        raise request.wrong(
            f"a case's labels of {len(files)} files, {dicoms} of them DICOM", "Give one SEG, or a mask for every slice."
        )
    return _Labels(files, bool(dicoms))


# A series -------------------------------------------------------------------------------------------------------


def read_series(place: str, files: tuple[Path, ...], labels: _Labels | None, classes: int) -> Volume:
    """The slices in order, with their labels."""
    headers = [_header(path, place) for path in files]
    series = Counter(header.series for header in headers)
    if len(series) > 1:
        counts = " and ".join(str(count) for count in sorted(series.values(), reverse=True))
        raise DataError(
            place, f"found {len(series)} series, of {counts} files", "expected one", "Give each a folder of its own."
        )
    headers, positions = _ordered(headers)
    frames: list[NDArray[Any]] = []
    bits = set()
    slices = []  # of each frame: its file's UID and its number in it
    for number, header in enumerate(headers, 1):
        read, stored = read_image(header.path, f"{place}, file {number} of {len(headers)} in order")
        frames += read
        bits.add(stored)
        slices += [(header.instance_uid, index) for index in range(1, len(read) + 1)]
    kinds = {(frame.shape, frame.dtype.name) for frame in frames}
    if len(kinds) > 1 or len(bits) > 1:
        raise DataError(place, "slices of several sizes or types", "expected one", "Give each a folder of its own.")
    marked = None
    if labels is not None and labels.is_seg:
        marked = _read_seg(labels.files[0], f"{place}, its SEG", slices, frames[0].shape, classes)
    elif labels is not None:
        in_order = _mask_order(labels.files, [header.path for header in headers], place, len(frames))
        marked = _read_masks(in_order, place, frames[0].shape, classes)
    return Volume(tuple(frames), marked, bits.pop(), _spacing(headers, positions, len(frames)))


def _attributes(path: Path, place: str, keywords: list[str]) -> Any:
    try:
        return package("pydicom").dcmread(path, specific_tags=keywords, stop_before_pixels=True)
    except DataError:
        raise
    except Exception:  # a damaged file raises whatever its first broken element leads to
        raise _damaged(place) from None


def _damaged(place: str) -> DataError:
    return DataError(place, "a DICOM file is truncated or damaged", "expected whole files", "Copy it anew.")


def _header(path: Path, place: str) -> _Header:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom repeats values that break a rule
        data = _attributes(path, place, _WHERE)
        try:
            shared = data.get("SharedFunctionalGroupsSequence") or [{}]
            measures = (shared[0].get("PixelMeasuresSequence") or [{}])[0]
            number = data.get("InstanceNumber")
            between = _numbers(data, "SpacingBetweenSlices", 1) or _numbers(measures, "SpacingBetweenSlices", 1)
            thickness = _numbers(data, "SliceThickness", 1) or _numbers(measures, "SliceThickness", 1)
            return _Header(
                path,
                str(data.get("SeriesInstanceUID", "")),
                str(data.get("SOPInstanceUID", "")),
                int(number) if number not in (None, "") else None,
                _numbers(data, "ImagePositionPatient", 3),
                _numbers(data, "ImageOrientationPatient", 6),
                _numbers(data, "PixelSpacing", 2) or _numbers(measures, "PixelSpacing", 2),
                abs(between[0]) if between else None,
                thickness[0] if thickness else None,
            )
        except Exception:  # an attribute of the wrong kind, parsed only when it is asked for
            raise _damaged(place) from None


def _numbers(data: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    value = data.get(keyword)
    if value is None or value == "" or (count > 1 and not len(value)):
        return None
    numbers = tuple(float(part) for part in (value if count > 1 else [value]))
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError
    return numbers


def _ordered(headers: list[_Header]) -> tuple[list[_Header], list[float] | None]:
    """Files along the slices' normal, else by instance number, else by name as they are; and places on the normal, mm.

    Files at one place, as the phases of a beating heart are, stay in the order of their numbers.
    """
    if all(header.number is not None for header in headers):
        headers = sorted(headers, key=lambda header: header.number or 0)
    orientations = [header.orientation for header in headers]
    if any(header.position is None for header in headers) or None in orientations:
        return headers, None
    directions = np.array(orientations)
    if np.ptp(directions, axis=0).max() > _SAME:
        return headers, None
    normal = np.cross(directions[0, :3], directions[0, 3:])
    places = [round(float(normal @ np.array(header.position)), 3) for header in headers]
    order = sorted(range(len(headers)), key=places.__getitem__)
    return [headers[index] for index in order], [places[index] for index in order]


def _spacing(headers: list[_Header], positions: list[float] | None, count: int) -> tuple[float, float, float] | None:
    """mm between frames, rows and columns; None unless it is said, the same for all, and no slice is missing."""
    pixels = headers[0].pixels
    if pixels is None or any(header.pixels != pixels for header in headers) or min(pixels) <= 0:
        return None
    distance = headers[0].distance
    if count == 1:
        distance = distance or headers[0].thickness or 1.0  # nothing lies beside it, so that no result depends on it
    elif positions is not None and len(positions) > 1:
        steps = np.diff(positions)
        even = np.ptp(steps) <= 0.01 * steps.mean() + 2 * _SAME
        distance = round(float(steps.mean()), 6) if even else None
    return None if not distance else (distance, pixels[0], pixels[1])


# Labels ---------------------------------------------------------------------------------------------------------


def _mask_order(files: tuple[Path, ...], slices: list[Path], place: str, count: int) -> list[Path]:
    """A series' masks in the order of its slices, each named as its slice's file; of one file's frames, by name.

    Slices lie in space, and names need not follow it: a mask is never paired by its rank.
    """
    if len(files) != count:
        raise DataError(place, f"found {len(files)} masks for {count} slices", "expected one each", "Check masks/.")
    if len(slices) == 1:
        return list(files)
    by_stem = {path.stem: path for path in files}
    # Of a slice only .dcm is an ending: the rest of a name such as 1.2.840.7 is not.
    stems = [path.stem if path.suffix.lower() == ".dcm" else path.name for path in slices]
    strange = len(by_stem.keys() - set(stems))
    if strange or len(by_stem) < len(files) or len(set(stems)) < len(stems):
        raise DataError(
            place,
            f"found {strange} of {count} masks without a slice of their name",
            "expected each mask named as its slice's file",
            "Rename the masks, or give one SEG.",
        )
    return [by_stem[stem] for stem in stems]


def _read_masks(files: list[Path], place: str, shape: tuple[int, ...], classes: int) -> NDArray[np.uint8]:
    count = len(files)
    masks = []
    for number, path in enumerate(files, 1):
        mask = read_mask(path, f"{place}, mask {number} of {count}", classes, shape)
        if len(mask) != 1:
            raise DataError(place, "a mask of several pages", "expected one page", "Save each slice's mask.")
        masks.append(mask[0])
    return np.stack(masks)


def _seg_classes(request: Request, labels: list[_Labels | None]) -> tuple[str, ...] | None:
    """Class names from the segments of all SEG files, a segment's number being the class index; None without SEG."""
    names: dict[int, str] = {}
    for case, label in enumerate(labels, 1):
        if label is None or not label.is_seg:
            continue
        place = f"{request.place('case', case, len(labels))}, its SEG"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = _attributes(label.files[0], place, ["SegmentSequence"])
            try:
                segments = {int(item.SegmentNumber): str(item.SegmentLabel) for item in data.SegmentSequence}
            except Exception:  # a missing attribute, or one of the wrong kind
                segments = {}
        if not segments and request.classes:
            return None  # numbers alone: they are the indices of the classes that were asked for
        if not segments:
            raise _not_seg(place, "without named segments")
        if any(names.setdefault(number, name) != name for number, name in segments.items()):
            raise DataError(
                place,
                "names a segment otherwise than another case",
                "expected the same names",
                "Renumber the segments.",
            )
    if not names:
        return None
    classes = ("background", *(names.get(number, f"class {number}") for number in range(1, max(names) + 1)))
    if min(names) < 1 or max(names) > 255 or len(set(classes)) < len(classes):
        raise DataError(
            f"{request.kind} data",
            "SEG segments below 1, above 255 or named alike",
            "expected different names for 1 to 255",
            "Give the class names.",
        )
    return classes


def _not_seg(place: str, found_: str) -> DataError:
    return DataError(
        place,
        f"DICOM {found_}",
        "expected a binary SEG whose frames each refer to one segment and one slice of the series",
        "Export it anew, or as PNG files.",
    )


def _read_seg(
    path: Path, place: str, slices: list[tuple[str, int]], shape: tuple[int, ...], classes: int
) -> NDArray[np.uint8]:
    """(D, H, W) segment numbers. Slices that no frame refers to are background."""
    pydicom = package("pydicom")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = pydicom.dcmread(path)
            kind = str(data.get("Modality")), str(data.get("SegmentationType"))
            size = int(data.Rows), int(data.Columns)
        except Exception:
            raise _damaged(place) from None
        if kind != ("SEG", "BINARY"):
            raise _not_seg(place, "that is no SEG, or one not binary")
        if size != shape[:2]:
            raise DataError(
                place,
                f"got {size[0]} rows x {size[1]} columns",
                f"expected {shape[0]} x {shape[1]} as the slices",
                "Is it of this series?",
            )
        try:
            targets = _targets(data, slices)
        except Exception:  # a missing sequence raises AttributeError, an empty one IndexError
            raise _not_seg(place, "with a frame of no or several segments or slices") from None
        wrong = [segment for segment, _ in targets if not 1 <= segment < classes]
        if wrong:
            raise DataError(
                place, f"has segment {wrong[0]}", f"expected 1 to {classes - 1}", "Give every segment a class name."
            )
        if size[0] * size[1] * max(len(targets), 1) > 16 * MAX_PIXELS:
            raise DataError(place, "too large", f"expected at most {16 * MAX_PIXELS} pixels", "Split it.")
        try:
            # Not read_frames: one frame at a time, pydicom fails on packed frames that end within a byte.
            masks = pydicom.pixels.pixel_array(data).reshape(len(targets), *size)
        except Exception:
            raise _damaged(place) from None
    labels = np.zeros((len(slices), *size), np.uint8)
    shared = 0
    for (segment, index), mask in zip(targets, masks, strict=True):
        inside = mask > 0
        shared += int((labels[index][inside] > 0).sum())
        labels[index][inside] = segment
    if shared:
        raise DataError(
            place, f"{shared} pixels lie in two segments", "expected each in one", "Segments must not overlap."
        )
    return labels


def _targets(data: Any, slices: list[tuple[str, int]]) -> list[tuple[int, int]]:
    """Of each frame of a SEG: segment number and index of the slice. Raises anything if it does not say."""
    index = {source: position for position, source in enumerate(slices)}
    if len(index) < len(slices):
        raise ValueError("two files with one UID")
    several = {uid for uid, frame in slices if frame > 1}
    shared = data.get("SharedFunctionalGroupsSequence") or [{}]
    targets = []
    for groups in data.PerFrameFunctionalGroupsSequence:
        segments = groups.get("SegmentIdentificationSequence") or shared[0].get("SegmentIdentificationSequence")
        [segment] = segments
        [derivation] = groups.DerivationImageSequence
        [source] = derivation.SourceImageSequence
        uid, frame = str(source.ReferencedSOPInstanceUID), 1
        if uid in several:
            frame = int(source.ReferencedFrameNumber)
        targets.append((int(segment.ReferencedSegmentNumber), index[uid, frame]))
    return targets
