"""Masks out as a DICOM Segmentation: `msa2net predict clip.dcm --segmentation out.dcm`. highdicom writes it.

The object refers to its source frame by frame, belongs to the same patient and study, and names the model, its version
and the bundle's digest, once for each segment and once as contributing equipment. It is imported on use.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import FrameError, Msa2NetError
from msa2net.runtimes.bundle import ClassInfo
from msa2net.runtimes.predictor import Execution
from msa2net.runtimes.preprocess import MAX_PIXELS

if TYPE_CHECKING:
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset

Code = tuple[str, str, str]  # value, scheme designator, meaning: ("10200004", "SCT", "Liver")
MAKER = "MSA2Net Edge"
_ABNORMAL: Code = ("49755003", "SCT", "Morphologically Abnormal Structure")
_ANATOMICAL: Code = ("91723000", "SCT", "Anatomical Structure")
# Category and type of the classes of the published data sets, by name. There is no code that fits any other class.
CODES: dict[str, tuple[Code, Code]] = {
    "lesion": (_ABNORMAL, ("52988006", "SCT", "Lesion")),
    "aorta": (_ANATOMICAL, ("15825003", "SCT", "Aorta")),
    "gallbladder": (_ANATOMICAL, ("28231008", "SCT", "Gallbladder")),
    "left kidney": (_ANATOMICAL, ("18639004", "SCT", "Left kidney")),
    "right kidney": (_ANATOMICAL, ("9846003", "SCT", "Right kidney")),
    "liver": (_ANATOMICAL, ("10200004", "SCT", "Liver")),
    "pancreas": (_ANATOMICAL, ("15776009", "SCT", "Pancreas")),
    "spleen": (_ANATOMICAL, ("78961009", "SCT", "Spleen")),
    "stomach": (_ANATOMICAL, ("69695003", "SCT", "Stomach")),
}
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns")
# Attributes that every image has, but for their value, which may be unknown.
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_LONGEST = 64  # characters of a DICOM string of type LO


def segmentation(
    source: Dataset,
    masks: Iterable[NDArray[np.uint8]],
    classes: Sequence[ClassInfo],
    execution: Execution,
    *,
    codes: Mapping[str, tuple[Code, Code]] | None = None,
    manufacturer: str = MAKER,
    serial_number: str = "unknown",
    series_number: int = 1000,
) -> Dataset:
    """The DICOM Segmentation of one image or clip; write it with `save_as`.

    source     the dataset that was segmented; its pixels are not needed
    masks      one (H, W) uint8 for each of its frames, at their size: `Segmentation.on_frame()`
    classes, execution   as a `Segmentation` has them; every class but the first becomes a segment
    codes      by class, category and type as (value, scheme, meaning); beside those of `CODES`
    manufacturer, serial_number   of the device that makes the object

    Raises FrameError if the source lacks what is referred to, or the masks are not of its frames; Msa2NetError for a
    class without codes, a text that DICOM cannot hold, and if highdicom is not installed.
    """
    try:
        import highdicom
        from pydicom.sr.codedict import codes as known
        from pydicom.sr.coding import Code as Coded
        from pydicom.uid import SecondaryCaptureImageStorage, generate_uid
    except ImportError as error:
        raise Msa2NetError(
            "DICOM Segmentation", f"needs the package {error.name}", "", "pip install 'msa2net-edge[dicom-seg]'"
        ) from error
    chosen = require_codes(classes, codes)
    header, frames = _header(source)
    size = (int(header.Rows), int(header.Columns))
    software = [
        f"{execution.model} {execution.model_version}"[:_LONGEST],
        f"msa2net-edge {version('msa2net-edge')}",
        f"{execution.runtime} {execution.runtime_version}, {execution.precision}"[:_LONGEST],
    ]
    _require_ascii("model", *software, manufacturer, serial_number)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=execution.model[:_LONGEST],
        family=known.DCM.ArtificialIntelligence,
        version=execution.model_version[:_LONGEST],
        source=MAKER,
        parameters={"bundle": execution.bundle_digest},
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=info.name[:_LONGEST],
            segmented_property_category=Coded(*chosen[info.name][0]),
            segmented_property_type=Coded(*chosen[info.name][1]),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            display_color=highdicom.color.CIELabColor.from_rgb(*info.color),
        )
        for number, info in enumerate(classes[1:], 1)
    ]
    equipment = highdicom.ContributingEquipment(
        manufacturer=MAKER,
        purpose_of_reference=known.DCM.ProcessingEquipment,
        manufacturer_model_name=execution.model[:_LONGEST],
        software_versions=software,
        contribution_description=f"Segmented by the bundle with SHA-256 {execution.bundle_digest}",
    )
    series, instance = generate_uid(), generate_uid()

    def written(pixels: NDArray[np.uint8]) -> Dataset:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they quote the patient's name
                return highdicom.seg.Segmentation(
                    source_images=[header],
                    pixel_array=pixels,
                    segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                    segment_descriptions=segments,
                    series_instance_uid=series,
                    series_number=series_number,
                    sop_instance_uid=instance,
                    instance_number=1,
                    manufacturer=manufacturer,
                    manufacturer_model_name=MAKER,
                    software_versions=software,  # type: ignore[arg-type]  # any number of them
                    device_serial_number=serial_number,
                    content_label="SEGMENTATION",
                    omit_empty_frames=False,  # a frame without a lesion was segmented, too
                    contributing_equipment=[equipment],
                )
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # whose texts quote attributes, too
            found = f"cannot be referred to ({type(error).__name__} in highdicom)"
            raise FrameError("source", found, "expected a standard DICOM image", "Use another output.") from None

    checked = _checked(masks, frames, size, len(classes))
    if _lies_in_space(header):
        stack = np.stack(list(checked))
        return written(stack if frames > 1 else stack[0])
    # highdicom writes several frames only of a source that lies somewhere in space, which a clip does not: each is
    # written as if it were an image of its own.
    kind, orientation = header.SOPClassUID, header.get("PatientOrientation") or ""
    _replace(header, SOPClassUID=SecondaryCaptureImageStorage, FrameOfReferenceUID=None, NumberOfFrames=None)
    return _clip((written(mask) for mask in checked), frames, kind, header.SOPInstanceUID, orientation)


def require_source(
    source: Dataset,
    classes: Sequence[ClassInfo],
    execution: Execution,
    codes: Mapping[str, tuple[Code, Code]] | None = None,
) -> None:
    """Raises what `segmentation` would, for a source that it cannot refer to, before anything is segmented.

    One that claims more pixels than a frame may have is only looked at: the claim may be false.
    """
    header, frames = _header(source)
    if not _lies_in_space(header):  # where one frame tells as much as all
        _replace(header, NumberOfFrames=None)
        frames = 1
    rows, columns = int(header.Rows), int(header.Columns)
    if frames * rows * columns > MAX_PIXELS:
        return
    blank = np.zeros((rows, columns), np.uint8)
    segmentation(header, (blank for _ in range(frames)), classes, execution, codes=codes)


def _lies_in_space(header: Dataset) -> bool:
    placed = "SharedFunctionalGroupsSequence" in header or "ImageOrientationPatient" in header
    return placed and "FrameOfReferenceUID" in header


def require_codes(
    classes: Sequence[ClassInfo], codes: Mapping[str, tuple[Code, Code]] | None
) -> dict[str, tuple[Code, Code]]:
    """The codes of every class but the first. Raises Msa2NetError for one without, or codes that DICOM cannot hold."""
    names = [info.name for info in classes[1:]]
    if other := set(codes or ()) - set(names):
        found = f"got {', '.join(map(repr, sorted(other)))}"
        raise Msa2NetError("codes", found, f"expected some of {', '.join(map(repr, names))}", "Check the spelling.")
    chosen = CODES | dict(codes or {})
    if unknown := [name for name in names if name not in chosen]:
        raise Msa2NetError(
            "codes", f"none for {', '.join(map(repr, unknown))}", "expected a category and a type", "Give their codes."
        )
    for name in names:
        for value, scheme, meaning in chosen[name]:
            _require_ascii("codes", name, value, scheme, meaning)
            if not (0 < len(value) <= 16 and 0 < len(scheme) <= 16 and 0 < len(meaning) <= _LONGEST):
                expected = f"expected a value and a scheme of up to 16 characters, a meaning of up to {_LONGEST}"
                raise Msa2NetError("codes", f"got {(value, scheme, meaning)} for {name!r}", expected, "Shorten it.")
    return {name: chosen[name] for name in names}


def _require_ascii(place: str, *texts: str) -> None:
    for text in texts:
        if not text.isascii():  # the object has the source's character set, which need not have it
            raise Msa2NetError(place, f"got {text!r}", "expected ASCII in a DICOM Segmentation", "Rename it.")


def _header(source: Dataset) -> tuple[Dataset, int]:
    """A copy without the pixels, in which attributes that may be unknown are there; and the number of frames."""
    from pydicom.dataset import Dataset

    if missing := [name for name in _NEEDED if not source.get(name)]:
        raise FrameError("source", f"has no {', '.join(missing)}", "expected a DICOM image", "Give a whole one.")
    found = Dataset()
    for element in source:
        if element.tag not in _PIXELS:
            found.add(deepcopy(element))
    for name in _MAY_BE_EMPTY:
        if name not in found:
            setattr(found, name, "")
    _simplify_characters(found)
    try:
        return found, int(found.get("NumberOfFrames") or 1)
    except (TypeError, ValueError):
        raise FrameError("source", "NumberOfFrames is no number", "expected one", "Give a whole image.") from None


def _simplify_characters(dataset: Dataset) -> None:
    """Texts in Unicode where highdicom does not know the character sets that they came in."""
    from highdicom import SpecificCharacterSetValues

    sets = dataset.get("SpecificCharacterSet")
    named = [sets] if isinstance(sets, str) else [each or "ISO 2022 IR 6" for each in sets or ()]
    extended = {each for each in named if each.startswith("ISO 2022 ")}
    known = {each.value for each in SpecificCharacterSetValues}
    if set(named) <= {"", "ISO_IR 6", "ISO 2022 IR 6"}:
        _replace(dataset, SpecificCharacterSet=None)
    elif set(named) <= known and len(extended) == (0 if len(named) == 1 else len(named)):
        _replace(dataset, SpecificCharacterSet=named)
    else:
        dataset.decode()  # else each text is written in the set that it was read in
        _replace(dataset, SpecificCharacterSet="ISO_IR 192")


def _replace(dataset: Dataset, **values: object) -> None:
    """Sets attributes, or removes those of None."""
    for name, value in values.items():
        if name in dataset:
            delattr(dataset, name)
        if value is not None:
            setattr(dataset, name, value)


def _checked(
    masks: Iterable[NDArray[np.uint8]], frames: int, size: tuple[int, int], classes: int
) -> Iterator[NDArray[np.uint8]]:
    count = 0
    for mask in masks:
        count += 1
        if mask.shape != size or mask.dtype != np.uint8 or mask.max() >= classes or count > frames:
            found = f"got {mask.dtype} {mask.shape} with classes up to {mask.max(initial=0)} for frame {count}"
            raise FrameError(
                "masks", found, f"expected {frames} of uint8 {size}, below {classes}", "One of each frame."
            )
        yield mask
    if count != frames:
        raise FrameError("masks", f"got {count}", f"expected {frames}", "Give one of each frame.")


def _clip(objects: Iterator[Dataset], frames: int, kind: str, instance: str, orientation: Any) -> Dataset:
    """The Segmentations of a clip's frames, each made as of an image, in one, by their place in time.

    kind, instance   SOP class and instance of the clip
    orientation      its PatientOrientation; empty if that is unknown
    """
    from pydicom.dataset import Dataset
    from pydicom.tag import Tag

    whole, groups = Dataset(), list[Dataset]()
    packed, rest = bytearray(), np.zeros(0, np.uint8)
    for number, each in enumerate(objects, 1):
        whole = whole if groups else each
        for group in each.PerFrameFunctionalGroupsSequence:
            content = group.FrameContentSequence[0]
            content.TemporalPositionIndex = number
            content.DimensionIndexValues = [*np.atleast_1d(content.DimensionIndexValues).tolist(), number]
            for derived in group.DerivationImageSequence:
                for image in derived.SourceImageSequence:
                    if frames > 1:
                        image.ReferencedFrameNumber = number
            groups.append(group)
        bits = np.concatenate([rest, each.pixel_array.reshape(-1)])
        full = len(bits) // 8 * 8  # a frame may end within a byte, and the next one begins there
        packed += np.packbits(bits[:full], bitorder="little").tobytes()
        rest = bits[full:]
    packed += np.packbits(rest, bitorder="little").tobytes()
    dimension = Dataset()
    dimension.DimensionIndexPointer = Tag("TemporalPositionIndex")
    dimension.FunctionalGroupPointer = Tag("FrameContentSequence")
    dimension.DimensionOrganizationUID = whole.DimensionIndexSequence[0].DimensionOrganizationUID
    dimension.DimensionDescriptionLabel = "Frame of the clip"
    whole.DimensionIndexSequence.append(dimension)
    whole.PatientOrientation = orientation
    whole.PerFrameFunctionalGroupsSequence = groups
    whole.NumberOfFrames = len(groups)
    whole.PixelData = bytes(packed) + b"\0" * (len(packed) % 2)

    def refer_to_the_clip(item: Dataset, element: DataElement) -> None:
        if element.keyword == "ReferencedSOPInstanceUID" and element.value == instance:
            item.ReferencedSOPClassUID = kind

    whole.walk(refer_to_the_clip)
    return whole
