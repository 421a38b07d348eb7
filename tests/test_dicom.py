"""Masks out as DICOM Segmentations of real ultrasound files: read back, referred to their source, refused by name."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from msa2net.__main__ import main
from msa2net.errors import FrameError, Msa2NetError
from msa2net.runtimes import Predictor, dicom
from msa2net.runtimes.bundle import ClassInfo
from msa2net.runtimes.images import read_frames

LESION = (ClassInfo(name="background", color=(0, 0, 0)), ClassInfo(name="lesion", color=(230, 60, 60)))


def stored(masks: list[NDArray[np.uint8]], file: Path, **options: Any) -> Callable[[Dataset], Any]:
    """Writes the Segmentation of a source and opens it again."""

    def write(source: Dataset) -> Any:
        made = dicom.segmentation(source, masks, **options)
        made.save_as(file)
        return highdicom.seg.segread(file)

    return write


@pytest.mark.parametrize("name", ["rgb_color", "palette_color"])
def test_an_image_and_its_segmentation(
    examples: Callable[[str], Path], predictors: dict[str, Predictor], tmp_path: Path, name: str
) -> None:
    source = dcmread(examples(name))
    found = predictors["onnxruntime"].predict(examples(name))
    read = stored([found.mask], tmp_path / "out.dcm", classes=found.classes, execution=found.execution)(source)
    assert read.SOPClassUID.name == "Segmentation Storage"
    assert np.array_equal(read.pixel_array.reshape(found.mask.shape), found.mask)
    assert (read.PatientID, read.StudyInstanceUID) == (source.get("PatientID", ""), source.StudyInstanceUID)
    assert read.SeriesInstanceUID != source.SeriesInstanceUID
    reference = read.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    (segment,) = read.SegmentSequence
    assert (segment.SegmentLabel, segment.SegmentAlgorithmType) == ("lesion", "AUTOMATIC")
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"
    digest = predictors["onnxruntime"].bundle.digest
    assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters == f"bundle={digest}"
    ours = [item for item in read.ContributingEquipmentSequence if item.Manufacturer == "MSA2Net Edge"]
    (equipment,) = ours
    assert equipment.ManufacturerModelName == found.execution.model
    assert f"{found.execution.model} {found.execution.model_version}" in equipment.SoftwareVersions
    assert digest in equipment.ContributionDescription


def test_a_clip_frame_by_frame(
    examples: Callable[[str], Path], predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    source = dcmread(examples("ybr_color"), stop_before_pixels=True)
    predictor = predictors["onnxruntime"]
    masks = [predictor.predict(pixels, bits=bits).mask for pixels, bits in read_frames(examples("ybr_color"))]
    masks[3][:] = 0  # a frame without a lesion is in it, too
    options = {"classes": LESION, "execution": predictor.execution}
    read = stored(masks, tmp_path / "out.dcm", **options)(source)
    assert np.array_equal(read.pixel_array, np.stack(masks))
    for number, group in enumerate(read.PerFrameFunctionalGroupsSequence, 1):
        of = group.DerivationImageSequence[0].SourceImageSequence[0]
        assert (of.ReferencedSOPInstanceUID, of.ReferencedFrameNumber) == (source.SOPInstanceUID, number)
        assert of.ReferencedSOPClassUID == source.SOPClassUID
    by_source = read.get_pixels_by_source_frame(source.SOPInstanceUID, range(1, 31))
    assert np.array_equal(by_source[..., 0], np.stack(masks))


def test_several_classes_and_codes_of_the_users_own(
    examples: Callable[[str], Path], predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    source = dcmread(examples("rgb_color"), stop_before_pixels=True)
    classes = (*LESION, ClassInfo(name="liver", color=(1, 2, 3)), ClassInfo(name="hair", color=(4, 5, 6)))
    mask = np.random.default_rng(0).integers(0, 4, (source.Rows, source.Columns), np.uint8)
    options: dict[str, Any] = {"classes": classes, "execution": predictors["onnxruntime"].execution}
    with pytest.raises(Msa2NetError, match="codes: none for 'hair', expected a category and a type"):
        dicom.segmentation(source, [mask], **options)
    codes = {"hair": (("91723000", "SCT", "Anatomical Structure"), ("386045008", "SCT", "Hair"))}
    read = stored([mask], tmp_path / "out.dcm", codes=codes, **options)(source)
    for frame, number in zip(read.pixel_array, range(1, 4), strict=True):
        assert np.array_equal(frame, mask == number)
    assert read.SegmentSequence[2].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Hair"


def test_several_classes_in_a_clip_whose_frames_end_within_a_byte(
    examples: Callable[[str], Path], predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    """5 frames of 9 x 11, 2 segments: 99 bits each."""
    source = dcmread(examples("ybr_color"), stop_before_pixels=True)
    source.Rows, source.Columns, source.NumberOfFrames = 9, 11, 5
    study = Dataset()  # another reference of the source, which the object takes over
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = "1.2.840.10008.3.1.2.3.1", "1.2.3.4"
    source.ReferencedStudySequence = [study]
    classes = (*LESION, ClassInfo(name="liver", color=(1, 2, 3)))
    masks = np.random.default_rng(1).integers(0, 3, (5, 9, 11), np.uint8)
    read = stored(list(masks), tmp_path / "out.dcm", classes=classes, execution=predictors["onnxruntime"].execution)(
        source
    )
    by_source = read.get_pixels_by_source_frame(source.SOPInstanceUID, range(1, 6))
    assert np.array_equal(by_source, np.stack([masks == 1, masks == 2], -1))
    assert read.ReferencedStudySequence[0].ReferencedSOPClassUID == "1.2.840.10008.3.1.2.3.1"
    indices = [
        tuple(group.FrameContentSequence[0].DimensionIndexValues) for group in read.PerFrameFunctionalGroupsSequence
    ]
    assert len(set(indices)) == 10
    assert all(len(index) == len(read.DimensionIndexSequence) for index in indices)


@pytest.mark.parametrize(
    ("sets", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("ISO 2022 IR 100", "Müller^Jörg"),
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 144", "Диана"),
        ("ISO_IR 192", "Müller=山田^太郎"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 6", "Mueller^Joerg"),
        ("", "Mueller^Joerg"),
        (None, "Mueller^Joerg"),
    ],
)
def test_character_sets_of_the_source(
    examples: Callable[[str], Path], predictors: dict[str, Predictor], tmp_path: Path, sets: Any, name: str
) -> None:
    source = dcmread(examples("rgb_color"), stop_before_pixels=True)
    source.SpecificCharacterSet, source.PatientName = sets, name
    source.save_as(tmp_path / "in.dcm")
    source = dcmread(tmp_path / "in.dcm")
    assert str(source.PatientName) == name
    mask = np.ones((source.Rows, source.Columns), np.uint8)
    read = stored([mask], tmp_path / "out.dcm", classes=LESION, execution=predictors["onnxruntime"].execution)(source)
    assert str(read.PatientName) == name
    assert str(source.PatientName) == name


def test_an_image_in_space_keeps_its_place(
    examples: Callable[[str], Path], predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    source = dcmread(examples("ct"), stop_before_pixels=True)
    mask = np.triu(np.ones((source.Rows, source.Columns), np.uint8))
    read = stored([mask], tmp_path / "out.dcm", classes=LESION, execution=predictors["onnxruntime"].execution)(source)
    assert np.array_equal(read.pixel_array.reshape(mask.shape), mask)
    assert read.FrameOfReferenceUID == source.FrameOfReferenceUID
    shared, (frame,) = read.SharedFunctionalGroupsSequence[0], read.PerFrameFunctionalGroupsSequence
    measures, plane = shared.PixelMeasuresSequence[0], shared.PlaneOrientationSequence[0]
    assert frame.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient
    assert plane.ImageOrientationPatient == source.ImageOrientationPatient
    assert measures.PixelSpacing == source.PixelSpacing


def test_an_orientation_without_a_place_is_kept(
    examples: Callable[[str], Path], predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    source = dcmread(examples("rgb_color"), stop_before_pixels=True)
    source.PatientOrientation = ["L", "F"]
    mask = np.ones((source.Rows, source.Columns), np.uint8)
    read = stored([mask], tmp_path / "out.dcm", classes=LESION, execution=predictors["onnxruntime"].execution)(source)
    assert list(read.PatientOrientation) == ["L", "F"]


def test_what_dicom_cannot_hold_is_refused(examples: Callable[[str], Path], predictors: dict[str, Predictor]) -> None:
    source = dcmread(examples("rgb_color"), stop_before_pixels=True)
    mask, execution = np.zeros((source.Rows, source.Columns), np.uint8), predictors["onnxruntime"].execution
    pair = dicom.CODES["lesion"]
    named = (LESION[0], ClassInfo(name="Läsion", color=(1, 2, 3)))
    tries: list[tuple[Any, Any, str]] = [
        (named, {"Läsion": pair}, "codes: got 'Läsion', expected ASCII"),
        (LESION, {"lesoin": pair}, "codes: got 'lesoin', expected some of 'lesion'. Check the spelling."),
        (LESION, {"lesion": (pair[0], ("1", "SCT", "x" * 65))}, "a meaning of up to 64"),
        (LESION, {"lesion": (pair[0], ("", "SCT", "x"))}, "a value and a scheme of up to 16 characters"),
    ]
    for classes, codes, text in tries:
        with pytest.raises(Msa2NetError) as caught:
            dicom.segmentation(source, [mask], classes, execution, codes=codes)
        assert text in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_no_error_quotes_the_source(examples: Callable[[str], Path], predictors: dict[str, Predictor]) -> None:
    source = dcmread(examples("rgb_color"), stop_before_pixels=True)
    mask, execution = np.zeros((source.Rows, source.Columns), np.uint8), predictors["onnxruntime"].execution
    source.PatientName, source.PatientID = "Sekret^Siri", "SEKRET"
    source.PatientSex = "SEKRET"  # which is no sex
    source.FrameOfReferenceUID, source.ImageOrientationPatient = "1.2.3", [1, 0, 0, 0, 1, 0]
    with pytest.raises(FrameError, match="source: cannot be referred to") as caught:
        dicom.segmentation(source, [mask], LESION, execution)
    assert "ekret" not in repr(caught.value).lower()
    assert caught.value.__cause__ is None


def test_every_known_code_is_one_of_the_standard_tables() -> None:
    from pydicom.sr.codedict import codes

    kidneys = {"18639004", "9846003"}  # the tables have them by laterality only
    for category, kind in dicom.CODES.values():
        assert category[0] in {codes.SCT.AnatomicalStructure.value, codes.SCT.MorphologicallyAbnormalStructure.value}
        assert kind[0] in kidneys or getattr(codes.SCT, kind[2].title().replace(" ", "")).value == kind[0]


@pytest.mark.parametrize("name", ["SOPInstanceUID", "StudyInstanceUID", "Rows"])
def test_a_source_that_cannot_be_referred_to_is_refused(
    examples: Callable[[str], Path], predictors: dict[str, Predictor], name: str
) -> None:
    source = dcmread(examples("rgb_color"), stop_before_pixels=True)
    mask = np.zeros((source.Rows, source.Columns), np.uint8)
    delattr(source, name)
    with pytest.raises(FrameError, match=f"source: has no {name}, expected a DICOM image"):
        dicom.segmentation(source, [mask], LESION, predictors["onnxruntime"].execution)


@pytest.mark.parametrize("claimed", [{"Rows": 40_000, "Columns": 40_000}, {"NumberOfFrames": 2_000_000_000}])
def test_a_source_that_claims_too_much_costs_nothing(
    examples: Callable[[str], Path], predictors: dict[str, Predictor], claimed: dict[str, int]
) -> None:
    source = dcmread(examples("rgb_color"), stop_before_pixels=True)
    source.FrameOfReferenceUID, source.ImageOrientationPatient = "1.2.3", [1, 0, 0, 0, 1, 0]
    for name, value in claimed.items():
        setattr(source, name, value)
    tracemalloc.start()
    dicom.require_source(source, LESION, predictors["onnxruntime"].execution)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 24


@pytest.mark.filterwarnings("ignore")
def test_the_command_finds_a_source_that_cannot_be_referred_to_before_it_segments(
    examples: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of two inputs, at its last step in highdicom: the first is not segmented either."""
    source = dcmread(examples("rgb_color"))
    source.PatientSex = "NONE"  # which is no sex
    source.FrameOfReferenceUID, source.ImageOrientationPatient = "1.2.3", [1, 0, 0, 0, 1, 0]
    source.save_as(tmp_path / "second.dcm")
    inputs = [str(examples("rgb_color")), str(tmp_path / "second.dcm")]
    options = ["--runtime", "onnxruntime", "--segmentation", str(tmp_path / "out")]
    assert main(["predict", *inputs, *options]) == 2
    out, error = capsys.readouterr()
    assert "\nerror: input 2 of 2, source: cannot be referred to" in error
    assert not any(line.split()[:1] == ["1"] for line in out.splitlines())


def test_masks_of_other_frames_are_refused(examples: Callable[[str], Path], predictors: dict[str, Predictor]) -> None:
    source = dcmread(examples("rgb_color"), stop_before_pixels=True)
    shape = (source.Rows, source.Columns)
    wrong = [np.zeros((1, 9, 9), np.uint8), np.zeros((2, *shape), np.uint8), np.full((1, *shape), 2, np.uint8), []]
    for masks in wrong:
        with pytest.raises(FrameError, match=r"masks: got .*, expected 1"):
            dicom.segmentation(source, masks, LESION, predictors["onnxruntime"].execution)


def test_attributes_that_are_missing_become_empty_and_the_source_is_left_alone(
    examples: Callable[[str], Path], predictors: dict[str, Predictor]
) -> None:
    source = dcmread(examples("rgb_color"), stop_before_pixels=True)
    for name in ("PatientBirthDate", "AccessionNumber"):
        if name in source:
            delattr(source, name)
    mask = np.zeros((source.Rows, source.Columns), np.uint8)
    made = dicom.segmentation(source, [mask], LESION, predictors["onnxruntime"].execution)
    assert made.AccessionNumber == ""
    assert "AccessionNumber" not in source


def test_the_command_writes_one_object_for_each_input(
    examples: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [str(examples("rgb_color")), str(examples("ybr_color"))]
    options = ["--runtime", "onnxruntime", "--segmentation"]
    assert main(["predict", *inputs, *options, str(tmp_path / "out")]) == 0
    sizes = [highdicom.seg.segread(tmp_path / "out" / f"000{i}.dcm").number_of_frames for i in (1, 2)]
    assert sizes == [1, 30]
    assert main(["predict", inputs[0], *options, str(tmp_path / "one.dcm")]) == 0
    assert highdicom.seg.segread(tmp_path / "one.dcm").number_of_frames == 1
    capsys.readouterr()
    assert main(["predict", *inputs, *options, str(tmp_path / "two.dcm")]) == 2
    assert "--segmentation: got 2 inputs, expected a folder for their objects" in capsys.readouterr().err
    assert main(["predict", *inputs, *options, str(tmp_path / "two.png")]) == 2
    assert "--segmentation: got the ending '.png', expected .dcm or a folder" in capsys.readouterr().err
    np.save(tmp_path / "frame.npy", np.zeros((64, 64), np.uint8))
    assert main(["predict", str(tmp_path / "frame.npy"), *options, str(tmp_path / "no.dcm")]) == 2
    assert "input 1 of 1, --segmentation: is no DICOM file" in capsys.readouterr().err
    assert not (tmp_path / "no.dcm").exists()
    shutil.copy(inputs[0], tmp_path / "0000.dcm")
    assert main(["predict", str(tmp_path / "0000.dcm"), *options, str(tmp_path)]) == 2
    assert "--segmentation: is the folder of an input, expected another" in capsys.readouterr().err


def test_the_command_takes_codes_from_a_file(
    examples: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, codes = str(examples("rgb_color")), tmp_path / "codes.json"
    options = ["--runtime", "onnxruntime", "--segmentation", str(tmp_path / "out.dcm"), "--codes", str(codes)]
    pair = [["49755003", "SCT", "Morphologically Abnormal Structure"], ["4147007", "SCT", "Mass"]]
    codes.write_text(json.dumps({"lesion": pair}))
    assert main(["predict", source, *options]) == 0
    read = highdicom.seg.segread(tmp_path / "out.dcm")
    assert read.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Mass"
    for text in (
        "[",
        "[1]",
        '{"lesion": [["1", "2"]]}',
        '{"lesion": ["abc", "def"]}',
        '{"lesion": [[1, 2, 3], [1, 2, 3]]}',
    ):
        codes.write_text(text)
        assert main(["predict", source, *options]) == 2
        assert "--codes: " in capsys.readouterr().err
