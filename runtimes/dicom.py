"""Masks out as a DICOM Segmentation: `msa2net predict clip.dcm --segmentation out.dcm`. highdicom writes it.

The object refers to its source frame by frame, belongs to the same patient and study, and names the model, its version
and the bundle's digest, once for each segment and once as contributing equipment. It is imported on use.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import FrameError, Msa2NetError
from msa2net.runtimes.bundle import ClassInfo
from msa2net.runtimes.predictor import Execution

if TYPE_CHECKING:
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
_LONGEST = 64  # characters of a DICOM string of type LO


def segmentation(
    source: Dataset,
    masks: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
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
    class without codes, and if highdicom is not installed.
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
    if missing := [name for name in _NEEDED if not source.get(name)]:
        raise FrameError("source", f"has no {', '.join(missing)}", "expected a DICOM image", "Give a whole one.")
    frames = int(source.get("NumberOfFrames", None) or 1)
    array = np.asarray(masks)
    expected = (frames, int(source.Rows), int(source.Columns))
    if array.shape != expected or array.dtype != np.uint8:
        raise FrameError(
            "masks", f"got {array.dtype} {array.shape}", f"expected uint8 {expected}", "One of each frame."
        )
    chosen = CODES | dict(codes or {})
    if unknown := [info.name for info in classes[1:] if info.name not in chosen]:
        raise Msa2NetError(
            "codes", f"none for {', '.join(map(repr, unknown))}", "expected a category and a type", "Give their codes."
        )
    source = _with_empty(source)
    software = [
        f"{execution.model} {execution.model_version}"[:_LONGEST],
        f"msa2net-edge {version('msa2net-edge')}",
        f"{execution.runtime} {execution.runtime_version}, {execution.precision}"[:_LONGEST],
    ]
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

    def written(source: Dataset, pixels: NDArray[np.uint8]) -> Dataset:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they quote the patient's name
                return made_of(source, pixels)
        except (AttributeError, TypeError, ValueError) as error:  # whose texts quote attributes, too
            found = f"cannot be referred to ({type(error).__name__} in highdicom)"
            raise FrameError("source", found, "expected a standard DICOM image", "Use another output.") from None

    def made_of(source: Dataset, pixels: NDArray[np.uint8]) -> Dataset:
        return highdicom.seg.Segmentation(
            source_images=[source],
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

    lies_in_space = "SharedFunctionalGroupsSequence" in source or "ImageOrientationPatient" in source
    if lies_in_space and "FrameOfReferenceUID" in source:
        return written(source, array if frames > 1 else array[0])
    # highdicom writes several frames only of a source that lies somewhere in space, which a clip does not: each is
    # written as if it were an image of its own.
    kind = source.SOPClassUID
    source.SOPClassUID = SecondaryCaptureImageStorage
    for name in ("FrameOfReferenceUID", "NumberOfFrames"):
        if name in source:
            delattr(source, name)
    return _clip([written(source, frame) for frame in array], kind)


def _clip(objects: Sequence[Dataset], kind: str) -> Dataset:
    """The Segmentations of a clip's frames, each made as of an image, in one, by their place in time.

    kind   SOP class of the clip
    """
    from pydicom.dataset import Dataset
    from pydicom.pixels import pack_bits
    from pydicom.tag import Tag

    whole = objects[0]
    groups = []
    for number, each in enumerate(objects, 1):
        for group in each.PerFrameFunctionalGroupsSequence:
            content = group.FrameContentSequence[0]
            content.TemporalPositionIndex = number
            content.DimensionIndexValues = [*np.atleast_1d(content.DimensionIndexValues).tolist(), number]
            for derived in group.DerivationImageSequence:
                for image in derived.SourceImageSequence:
                    if len(objects) > 1:
                        image.ReferencedFrameNumber = number
            groups.append(group)
    dimension = Dataset()
    dimension.DimensionIndexPointer = Tag("TemporalPositionIndex")
    dimension.FunctionalGroupPointer = Tag("FrameContentSequence")
    dimension.DimensionOrganizationUID = whole.DimensionIndexSequence[0].DimensionOrganizationUID
    dimension.DimensionDescriptionLabel = "Frame of the clip"
    pixels = np.stack([each.pixel_array.reshape(-1) for each in objects])
    whole.DimensionIndexSequence.append(dimension)
    whole.PatientOrientation = ""  # unknown
    whole.PerFrameFunctionalGroupsSequence = groups
    whole.NumberOfFrames = len(groups)
    whole.PixelData = pack_bits(pixels.reshape(-1))
    for element in whole.iterall():
        if element.keyword == "ReferencedSOPClassUID":
            element.value = kind
    return whole


def _with_empty(source: Dataset) -> Dataset:
    """A copy in which attributes that may be unknown are there."""
    found = deepcopy(source)
    for name in _MAY_BE_EMPTY:
        if name not in found:
            setattr(found, name, "")
    return found
