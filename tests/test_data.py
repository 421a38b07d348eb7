"""Readers of data sets: every layout as it is published, every wrong one by its text, and no file's name in any."""

from __future__ import annotations

import io
import pickle
import random
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset as Attributes
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels import pack_bits
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage

from msa2net.core.data import KINDS, Dataset, Volume, layout, open_data, open_for
from msa2net.core.data.phantom import TEST_SEED
from msa2net.core.phantoms import phantom
from msa2net.errors import DataError
from msa2net.runtimes.preprocess import check_frame

PATIENT = "Smith"  # in every file's and every case folder's name here
ORGANS = "background, aorta, gallbladder, left kidney, right kidney, liver, pancreas, spleen, stomach"
GREY = np.random.default_rng(1).integers(0, 256, (11, 7), dtype=np.uint8)
RGB = np.random.default_rng(2).integers(0, 256, (11, 7, 3), dtype=np.uint8)
LESION = (GREY > 99).astype(np.uint8)
PAIR_ADVICE = "Name a mask as its image, or add _mask, _mask_1, _segmentation or _lesion."
CHECK = "Check the path and the names."
FOLDER = "expected images/<name>.png and masks/<name>.png"


def save(path: Path, pixels: NDArray[Any] | Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def empty(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def refused(action: Callable[[], Any]) -> str:
    """The text of the DataError, after a check that neither it nor a logged traceback names a patient."""
    with pytest.raises(DataError) as caught:
        action()
    told = str(caught.value)
    logged = "".join(traceback.format_exception(caught.value))
    assert PATIENT not in told + logged
    assert "\n" not in told
    return told


def refuses(spec: str, **options: Any) -> str:
    return refused(lambda: open_data(spec, **options))


def read(data: Dataset) -> list[Volume]:
    """Every case, after what all promise: frames that can be segmented, labels of their size and of known classes."""
    volumes = [case.read() for case in data.cases]
    for volume in volumes:
        for frame in volume.frames:
            check_frame(frame, volume.bits)
        if volume.labels is not None:
            assert volume.labels.dtype == np.uint8
            assert volume.labels.shape == (len(volume.frames), *volume.frames[0].shape[:2])
            assert volume.labels.max() < len(data.classes)
    assert len({case.name for case in data.cases}) == len(data.cases)
    return volumes


def only(spec: str, **options: Any) -> Volume:
    [volume] = read(open_data(spec, **options))
    return volume


def labels(volume: Volume) -> NDArray[np.uint8]:
    assert volume.labels is not None
    return volume.labels


# Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "found"), [("/home/Smith", "without a colon"), ("Smith:/a", "of an unknown kind")])
def test_a_name_of_no_kind_is_refused_and_not_repeated(spec: str, found: str) -> None:
    kinds = "synapse, isic2018, folder, pairs, images, dicom, phantoms"
    assert refuses(spec) == f"data: got a name {found}, expected KIND:PATH with KIND one of {kinds}"


def test_an_unknown_split_is_refused() -> None:
    told = refuses("phantoms:1", split="val")
    assert told == "phantoms data: got the split 'val', expected one of train, validation, test"


@pytest.mark.parametrize("classes", ["ab", ["background"], ["a", "a"], [str(number) for number in range(257)]])
def test_class_names_that_are_no_list_of_different_names_are_refused(classes: Any) -> None:
    assert refuses("phantoms:1", classes=classes) == (
        "phantoms data: got class names that are one text, alike, fewer than 2 or more than 256, "
        "expected a list of different names. Start it with the background."
    )


def test_a_kind_that_knows_its_classes_refuses_others() -> None:
    assert open_data("phantoms:1", classes=["background", "lesion"]).classes == ("background", "lesion")
    told = refuses("phantoms:1", classes=["background", "vessel"])
    assert told == "phantoms data: got other class names, expected background, lesion. Leave them out."


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "phantoms"])
def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, kind: str) -> None:
    expected = f"expected {KINDS[kind].layout}. {CHECK}"
    for target in ("", str(tmp_path / PATIENT)):
        assert refuses(f"{kind}:{target}") == f"{kind} data: found no such folder, {expected}"
    file = save(tmp_path / f"{PATIENT}.png", GREY)
    assert refuses(f"{kind}:{file}") == f"{kind} data: found a file in place of a folder, {expected}"


def test_opening_loads_neither_torch_nor_a_reader_s_package() -> None:
    # The parent package is replaced by an empty one: it holds the network, which needs torch.
    code = (
        "import sys, types, msa2net, pathlib\n"
        "core = types.ModuleType('msa2net.core')\n"
        "core.__path__ = [str(pathlib.Path(msa2net.__file__).parent / 'core')]\n"
        "sys.modules['msa2net.core'] = core\n"
        "from msa2net.core.data import open_data\n"
        "open_data('phantoms:2')\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    loaded = set(done.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "h5py", "PIL", "pydicom", "scipy"}


@pytest.mark.parametrize(("module", "name"), [("h5py", "h5py"), ("PIL.Image", "pillow"), ("pydicom", "pydicom")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    if module == "h5py":
        action = open_data(f"synapse:{synapse(tmp_path)}").cases[0].read
    elif module == "pydicom":
        action = open_data(f"dicom:{series(tmp_path)}").cases[0].read
    else:
        save(tmp_path / "images" / "a.bmp", GREY)
        save(tmp_path / "masks" / "a.png", LESION)
        action = open_data(f"folder:{tmp_path}").cases[0].read
    monkeypatch.setitem(sys.modules, module, None)
    assert refused(action) == f"data: needs the package {name}. pip install 'msa2net-edge[data]'"


def test_cases_and_errors_go_to_another_process_and_come_back(tmp_path: Path) -> None:
    save(tmp_path / "f" / "images" / f"{PATIENT}.png", RGB)
    save(tmp_path / "f" / "masks" / f"{PATIENT}.png", LESION)
    specs = [
        "phantoms:1",
        f"folder:{tmp_path / 'f'}",
        f"dicom:{series(tmp_path / 'd')}",
        f"synapse:{synapse(tmp_path)}",
    ]
    cases = [case for spec in specs for case in open_data(spec).cases]
    for case in cases:
        again = pickle.loads(pickle.dumps(case))
        assert (again.name, again.group) == (case.name, case.group)
        assert np.array_equal(again.read().frames, case.read().frames)
    broken = open_data(specs[1]).cases[0]
    empty(tmp_path / "f" / "images" / f"{PATIENT}.png")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        told = refused(lambda: pool.submit(broken.read).result(60))
    assert told.startswith("folder data, image 1 of 1: an empty file, expected a PNG")


# Synapse --------------------------------------------------------------------------------------------------------


def synapse(root: Path, lists: str = "lists/lists_Synapse", dtype: str = "f4", label: str = "u1") -> Path:
    """Two slices and one volume of three, whose labels hold every class."""
    rng = np.random.default_rng(5)
    for folder in ("train_npz", "test_vol_h5", lists):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / lists / "train.txt").write_text("case0031_slice001\n\ncase0005_slice000  \n")
    (root / lists / "test_vol.txt").write_text("case0008")
    for name in ("case0031_slice001", "case0005_slice000"):
        np.savez(
            root / "train_npz" / f"{name}.npz",
            image=rng.random((6, 5)).astype(dtype),
            label=rng.integers(0, 9, (6, 5)).astype(label),
        )
    with h5py.File(root / "test_vol_h5" / "case0008.npy.h5", "w") as file:
        file["image"] = rng.random((3, 6, 5)).astype(dtype)
        file["label"] = (np.arange(90).reshape(3, 6, 5) % 9).astype(label)
    return root


@pytest.mark.parametrize("lists", ["lists/lists_Synapse", "lists", "."])
@pytest.mark.parametrize(("dtype", "label"), [("f4", "u1"), ("f8", "f4"), ("f2", "i8")])
def test_synapse_gives_slices_to_train_and_volumes_to_test(tmp_path: Path, lists: str, dtype: str, label: str) -> None:
    root = synapse(tmp_path, lists, dtype, label)
    train = open_data(f"synapse:{root}", "train")
    assert [case.name for case in train.cases] == ["slice 1", "slice 2"]
    assert [case.patient for case in train.cases] == ["case0031", "case0005"]
    for name, volume in zip(("case0031_slice001", "case0005_slice000"), read(train), strict=True):
        with np.load(root / "train_npz" / f"{name}.npz") as kept:
            assert len(volume.frames) == 1
            assert volume.frames[0].dtype == np.float32
            assert np.array_equal(volume.frames[0], kept["image"].astype(np.float32))
            assert np.array_equal(labels(volume)[0], kept["label"])
    test = open_data(f"synapse:{root}")
    assert [(case.name, case.patient) for case in test.cases] == [("case 1", "case0008")]
    assert ", ".join(test.classes) == ORGANS
    [volume] = read(test)
    with h5py.File(root / "test_vol_h5" / "case0008.npy.h5") as file:
        assert np.array_equal(volume.frames, np.asarray(file["image"]).astype(np.float32))
        assert np.array_equal(labels(volume), np.asarray(file["label"]))
    assert (volume.spacing, volume.bits) == (None, None)


def test_synapse_takes_the_first_list_there_is(tmp_path: Path) -> None:
    synapse(tmp_path, "lists")
    (tmp_path / "lists" / "train.txt").write_text("case0005_slice000\n")
    (tmp_path / "train.txt").write_text("not this\n")
    assert [case.patient for case in open_data(f"synapse:{tmp_path}", "train").cases] == ["case0005"]


def test_a_list_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    synapse(tmp_path)
    (tmp_path / "lists" / "lists_Synapse" / "test_vol.txt").write_text("case0008\r\n", "utf-8-sig")
    assert [case.patient for case in open_data(f"synapse:{tmp_path}").cases] == ["case0008"]


def test_synapse_has_no_validation_split(tmp_path: Path) -> None:
    assert refuses(f"synapse:{synapse(tmp_path)}", split="validation") == (
        "synapse data: has no validation split, expected train or test. Hold out slices of train."
    )


def test_synapse_of_another_layout_is_shown_beside_the_expected_one(tmp_path: Path) -> None:
    expected = f"expected {KINDS['synapse'].layout}. {CHECK}"
    empty(tmp_path / f"{PATIENT}.npz", tmp_path / PATIENT / "a")
    assert refuses(f"synapse:{tmp_path}", split="train") == (
        f"synapse data: found no train_npz/, beside them 1 .npz, 1 folder, no train.txt, {expected}"
    )
    synapse(tmp_path)
    (tmp_path / "train_npz" / "case0005_slice000.npz").unlink()
    assert refuses(f"synapse:{tmp_path}", split="train") == (
        f"synapse data: found 2 names in train.txt, 1 of them without a file in train_npz/, {expected}"
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("case0008\n../Smith\n", "name 2 of 2 is a path, expected a name without folder. Correct the list."),
        ("/Smith", "name 1 of 1 is a path, expected a name without folder. Correct the list."),
        ("Smith\\a", "name 1 of 1 is a path, expected a name without folder. Correct the list."),
        ("Smith\0", "name 1 of 1 is a path, expected a name without folder. Correct the list."),
        ("a\nb\na\n", "3 names, 1 of them repeated, expected each once, one a line. Correct the list."),
        ("\n \n", "0 names, 0 of them repeated, expected each once, one a line. Correct the list."),
        ("é", "not readable as text, expected one name a line. Copy it anew."),
    ],
    ids=["parent", "absolute", "backslash", "control", "twice", "blank", "latin-1"],
)
def test_a_list_of_other_than_names_is_refused(tmp_path: Path, content: str, told: str) -> None:
    synapse(tmp_path)
    (tmp_path / "lists" / "lists_Synapse" / "test_vol.txt").write_bytes(content.encode("latin-1"))
    assert refuses(f"synapse:{tmp_path}") == f"synapse data, test_vol.txt: {told}"


def changed(array: NDArray[Any], value: float) -> NDArray[Any]:
    array = array.copy()
    array.flat[3] = value
    return array


HALVES, ONES = np.full((4, 5), 0.5), np.ones((4, 5), np.uint8)


@pytest.mark.parametrize(
    ("image", "label", "told"),
    [
        (HALVES[0], ONES, "image is float64 (5,), expected float (H, W)"),
        (ONES, ONES, "image is uint8 (4, 5), expected float (H, W)"),
        (HALVES[:0], ONES[:0], "image is float64 (0, 5), expected float (H, W)"),
        (HALVES, ONES.T, "label is uint8 (5, 4), expected numbers (4, 5) as image"),
        (changed(HALVES, 1.00001), ONES, "image has values from 0.5 to 1.00001, expected [0, 1]"),
        (changed(HALVES, -1), ONES, "image has values from -1 to 0.5, expected [0, 1]"),
        (changed(HALVES, np.nan), ONES, "image has values from nan to nan, expected [0, 1]"),
        (changed(HALVES, np.inf), ONES, "image has values from 0.5 to inf, expected [0, 1]"),
        (HALVES, changed(ONES, 9), "label has values that are no class, from 1 to 9, expected whole numbers 0 to 8"),
        (HALVES, changed(HALVES * 2, 2.5), "label has values that are no class, from 1 to 2.5, expected whole"),
        (HALVES, changed(ONES.astype("i8"), 257), "label has values that are no class, from 1 to 257, expected whole"),
    ],
)
def test_a_slice_of_other_values_is_refused(
    tmp_path: Path, image: NDArray[Any], label: NDArray[Any], told: str
) -> None:
    synapse(tmp_path)
    np.savez(tmp_path / "train_npz" / "case0005_slice000.npz", image=image, label=label)
    case = open_data(f"synapse:{tmp_path}", "train").cases[1]
    assert refused(case.read).startswith(f"synapse data, slice 2 of 2: {told}")


def test_what_rounding_adds_to_the_range_is_cut_off(tmp_path: Path) -> None:
    synapse(tmp_path)
    image = changed(changed(HALVES, 1 + 9e-7).T, -9e-7).T
    np.savez(tmp_path / "train_npz" / "case0005_slice000.npz", image=image, label=ONES)
    [frame] = open_data(f"synapse:{tmp_path}", "train").cases[1].read().frames
    assert (frame.min(), frame.max()) == (0, 1)


@pytest.mark.parametrize("damage", ["empty", "cut", "pickled", "no label", "npy"])
def test_a_damaged_slice_is_refused(tmp_path: Path, damage: str) -> None:
    synapse(tmp_path)
    path = tmp_path / "train_npz" / f"{PATIENT}.npz"
    (tmp_path / "lists" / "lists_Synapse" / "train.txt").write_text(PATIENT)
    buffer = io.BytesIO()
    if damage == "npy":
        np.save(buffer, HALVES)
    elif damage == "no label":
        np.savez(buffer, image=HALVES)
    elif damage == "pickled":
        np.savez(buffer, image=HALVES, label=np.array([[object()]]))
    else:
        np.savez(buffer, image=HALVES, label=ONES)
    content = buffer.getvalue()
    path.write_bytes({"empty": b"", "cut": content[:-50]}.get(damage, content))
    case = open_data(f"synapse:{tmp_path}", "train").cases[0]
    assert refused(case.read) == (
        "synapse data, slice 1 of 1: no npz file of image and label, or a damaged one, expected both. Copy it anew."
    )


@pytest.mark.parametrize("damage", ["cut", "no label"])
def test_a_damaged_volume_is_refused(tmp_path: Path, damage: str) -> None:
    synapse(tmp_path)
    path = tmp_path / "test_vol_h5" / f"{PATIENT}.npy.h5"
    (tmp_path / "lists" / "lists_Synapse" / "test_vol.txt").write_text(PATIENT)
    with h5py.File(path, "w") as file:
        file["image"] = HALVES[None]
        if damage == "cut":
            file["label"] = ONES[None]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-60])
    case = open_data(f"synapse:{tmp_path}").cases[0]
    assert refused(case.read) == (
        "synapse data, case 1 of 1: no HDF5 file of image and label, or a damaged one, expected both. Copy it anew."
    )


# ISIC 2018 ------------------------------------------------------------------------------------------------------


def isic(root: Path, split: str = "Test", numbers: tuple[int, ...] = (2, 10, 1)) -> Path:
    images, masks = root / f"ISIC2018_Task1-2_{split}_Input", root / f"ISIC2018_Task1_{split}_GroundTruth"
    for number in numbers:
        grey = np.full((8, 8, 3), number * 20, np.uint8)
        save(images / f"ISIC_{number:07}.jpg", grey, quality=100)
        save(masks / f"ISIC_{number:07}_segmentation.png", np.eye(8, k=number % 8, dtype=np.uint8) * 255)
    for folder in (images, masks):
        empty(folder / "ATTRIBUTION.txt", folder / "LICENSE.txt", folder / ".DS_Store")
    empty(images / "ISIC_0000002_superpixels.png")
    return root


@pytest.mark.parametrize(("split", "folder"), [("train", "Training"), ("validation", "Validation"), ("test", "Test")])
def test_isic2018_gives_each_image_its_lesion(tmp_path: Path, split: str, folder: str) -> None:
    data = open_data(f"isic2018:{isic(tmp_path, folder)}", split)
    assert data.classes == ("background", "lesion")
    assert [case.name for case in data.cases] == ["image 1", "image 2", "image 3"]
    for number, volume in zip((1, 2, 10), read(data), strict=True):
        assert np.abs(volume.frames[0].astype(int) - number * 20).max() <= 2
        assert np.array_equal(labels(volume)[0], np.eye(8, k=number % 8))


def test_isic2018_without_masks_or_images_is_refused(tmp_path: Path) -> None:
    expected = f"expected {KINDS['isic2018'].layout}"
    isic(tmp_path)
    assert refuses(f"isic2018:{tmp_path}", split="train") == (
        "isic2018 data: found no ISIC2018_Task1-2_Training_Input/, no ISIC2018_Task1_Training_GroundTruth/, "
        f"beside them 2 folders, {expected}. {CHECK}"
    )
    (tmp_path / "ISIC2018_Task1_Test_GroundTruth" / "ISIC_0000002_segmentation.png").unlink()
    assert refuses(f"isic2018:{tmp_path}") == (
        f"isic2018 data: found 1 of 3 images without a mask and 0 masks without an image, {expected}. {PAIR_ADVICE}"
    )
    for file in (tmp_path / "ISIC2018_Task1-2_Test_Input").glob("*.jpg"):
        file.unlink()
    assert refuses(f"isic2018:{tmp_path}") == (
        "isic2018 data: found ISIC2018_Task1-2_Test_Input/ (1 .png, 2 .txt), "
        f"ISIC2018_Task1_Test_GroundTruth/ (2 .png, 2 .txt), {expected}. {CHECK}"
    )


# Images and masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "_mask", "_segmentation", "_lesion", "_mask_1"])
@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "PNG"])
def test_folder_gives_each_image_its_mask(tmp_path: Path, suffix: str, ending: str) -> None:
    save(tmp_path / "images" / f"{PATIENT}.{ending}", RGB)
    save(tmp_path / "masks" / f"{PATIENT}{suffix}.{ending}", LESION * 255)
    empty(tmp_path / "images" / "notes.txt", tmp_path / "masks" / ".DS_Store")
    volume = only(f"folder:{tmp_path}")
    assert np.array_equal(volume.frames[0], RGB)
    assert np.array_equal(labels(volume)[0], LESION)


def test_subfolders_are_groups_and_numbers_sort_by_value(tmp_path: Path) -> None:
    for group, number in (("malignant", 1), ("benign", 10), ("benign", 2), ("", 7)):
        name = f"{PATIENT} ({number})"
        save(tmp_path / "images" / group / f"{name}.png", np.full((4, 4), number, np.uint8))
        save(tmp_path / "masks" / group / f"{name}_mask.png", np.full((4, 4), group == "benign", np.uint8))
    data = open_data(f"folder:{tmp_path}")
    assert [case.group for case in data.cases] == ["", "benign", "benign", "malignant"]
    assert [case.name for case in data.cases] == ["image 1", "image 2", "image 3", "image 4"]
    volumes = read(data)
    assert [int(volume.frames[0][0, 0]) for volume in volumes] == [7, 2, 10, 1]
    assert [int(labels(volume).max()) for volume in volumes] == [0, 1, 1, 0]


@pytest.mark.parametrize("kind", ["folder", "pairs"])
def test_several_masks_of_an_image_are_united(tmp_path: Path, kind: str) -> None:
    images, masks = ("images", "masks") if kind == "folder" else ("", "")
    parts = [np.eye(6, k=k, dtype=np.uint8) for k in range(3)]
    save(tmp_path / images / f"{PATIENT} (1).png", GREY[:6, :6])
    for part, suffix in zip(parts, ("", "_1", "_2"), strict=True):
        save(tmp_path / masks / f"{PATIENT} (1)_mask{suffix}.png", part * 255)
    assert np.array_equal(labels(only(f"{kind}:{tmp_path}"))[0], sum(parts))
    told = refused(open_data(f"{kind}:{tmp_path}", classes=["a", "b", "c"]).cases[0].read)
    assert told == (
        f"{kind} data, image 1 of 1: found 3 masks, expected one of class indices. "
        "Masks are united with two classes only."
    )


STEMS = st.text("ab_1", min_size=1, max_size=4) | st.sampled_from(["a_mask", "b_lesion", "a_mask_1", "1_segmentation"])
SUFFIXES = st.sampled_from(["", "_mask", "_mask_1", "_segmentation", "_lesion"])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.tuples(st.sampled_from(["", "g", "h"]), STEMS), SUFFIXES, min_size=1, max_size=6), st.data())
def test_every_image_gets_its_own_mask_or_the_folder_is_refused(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[tuple[str, str], str], data: st.DataObject
) -> None:
    """A folder is refused only where a mask's name fits two images."""
    root = tmp_path_factory.mktemp("pairs")
    for number, ((group, stem), suffix) in enumerate(data.draw(st.permutations(sorted(plan.items()))), 1):
        save(root / "images" / group / f"{stem}.png", np.full((1, 8), number, np.uint8))
        bits = np.array([[number >> bit & 1 for bit in range(8)]], np.uint8)
        save(root / "masks" / group / f"{stem}{suffix}.png", bits)
    names = set(plan)
    shortened = {
        (group, stem + suffix): (group, re.sub(r"_(mask(_\d+)?|segmentation|lesion)$", "", stem + suffix))
        for (group, stem), suffix in plan.items()
    }
    if any(mask in names and image in names and mask != image for mask, image in shortened.items()):
        assert "masks that fit in two ways" in refuses(f"folder:{root}")
        return
    cases = open_data(f"folder:{root}").cases
    assert len(cases) == len(plan)
    seen = []
    for case in cases:
        volume = case.read()
        value = int(volume.frames[0][0, 0])
        seen.append(value)
        assert sum(int(bit) << place for place, bit in enumerate(labels(volume)[0, 0])) == value
    assert sorted(seen) == list(range(1, len(plan) + 1))


def test_a_folder_of_another_layout_is_shown_beside_the_expected_one(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "images" / f"{PATIENT}{name}.png", GREY)
    assert refuses(f"folder:{tmp_path}") == (f"folder data: found images/ (3 .png), no masks/, {FOLDER}. {CHECK}")
    (tmp_path / "masks").mkdir()
    empty(tmp_path / f"a.{PATIENT}", tmp_path / f"b.{PATIENT}", tmp_path / PATIENT / "c")
    assert refuses(f"folder:{tmp_path}") == (
        f"folder data: found images/ (3 .png), masks/ (nothing), beside them 2 other files, 1 folder, {FOLDER}. {CHECK}"
    )


@pytest.mark.parametrize(
    ("images", "masks", "told"),
    [
        ("ab", ["a"], f"1 of 2 images without a mask and 0 masks without an image, {FOLDER}. {PAIR_ADVICE}"),
        ("a", ["a", "b_mask"], f"0 of 1 images without a mask and 1 masks without an image, {FOLDER}. {PAIR_ADVICE}"),
        (
            "ab",
            ["a", "a_mask", "b"],
            f"masks that fit in two ways, for 1 of 2 images, {FOLDER}. Rename or remove them.",
        ),
        (
            ["a", "a_mask"],
            ["a", "a_mask"],
            f"masks that fit in two ways, for 2 of 2 images, {FOLDER}. Rename or remove them.",
        ),
    ],
    ids=["no mask", "no image", "two opinions", "two images"],
)
def test_images_and_masks_that_do_not_pair_are_counted(
    tmp_path: Path, images: list[str], masks: list[str], told: str
) -> None:
    empty(*(tmp_path / "images" / f"{PATIENT}{name}.png" for name in images))
    empty(*(tmp_path / "masks" / f"{PATIENT}{name}.png" for name in masks))
    assert refuses(f"folder:{tmp_path}") == f"folder data: found {told}"


def test_images_that_differ_by_their_ending_alone_are_refused(tmp_path: Path) -> None:
    empty(*(tmp_path / "images" / f"{PATIENT}.{ending}" for ending in ("png", "jpg")), tmp_path / "masks" / "a.png")
    assert refuses(f"folder:{tmp_path}") == (
        f"folder data: found 2 images of 1 names, {FOLDER}. "
        "Give each image a name that differs by more than its ending."
    )


def test_two_copies_of_a_mask_are_refused(tmp_path: Path) -> None:
    empty(tmp_path / "images" / "a.png", tmp_path / "masks" / "a_mask.png", tmp_path / "masks" / "a_mask.bmp")
    assert "masks that fit in two ways, for 1 of 1 images" in refuses(f"folder:{tmp_path}")


def test_a_mask_in_another_group_than_its_image_is_not_taken(tmp_path: Path) -> None:
    empty(tmp_path / "images" / "benign" / "a.png", tmp_path / "masks" / "malignant" / "a.png")
    assert "1 of 1 images without a mask and 1 masks without an image" in refuses(f"folder:{tmp_path}")


def test_a_file_of_another_ending_is_refused_and_not_skipped(tmp_path: Path) -> None:
    empty(tmp_path / "images" / "a.png", tmp_path / "images" / f"{PATIENT}.webp", tmp_path / "masks" / "a.png")
    empty(tmp_path / "images" / f"b.{PATIENT}")
    assert refuses(f"folder:{tmp_path}") == (
        f"folder data: found 1 .webp, 1 other file among 3 files, {FOLDER}. "
        "Use .png, .bmp, .tif, .tiff, .jpg, .jpeg, .npy, .dcm, and move the others away."
    )


def test_a_linked_folder_is_followed_but_not_upwards(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a.png", GREY)
    save(tmp_path / "elsewhere" / "a_mask.png", LESION)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    assert [case.group for case in open_data(f"pairs:{tmp_path / 'data'}").cases] == ["linked"]


# Pairs and images -----------------------------------------------------------------------------------------------


def test_pairs_reads_busi_as_it_is_published(tmp_path: Path) -> None:
    for group in ("normal", "benign"):
        for number in (1, 2, 10):
            stem = f"{group} ({number})"
            save(tmp_path / group / f"{stem}.png", np.full((5, 4, 3), number, np.uint8))
            save(tmp_path / group / f"{stem}_mask.png", np.full((5, 4), 255 * (group == "benign"), np.uint8))
    data = open_data(f"pairs:{tmp_path}")
    assert [case.group for case in data.cases] == ["benign"] * 3 + ["normal"] * 3
    volumes = read(data)
    assert [int(volume.frames[0][0, 0, 0]) for volume in volumes] == [1, 2, 10] * 2
    assert [int(labels(volume).min()) for volume in volumes] == [1, 1, 1, 0, 0, 0]


def test_pairs_reads_only_what_a_pattern_selects(tmp_path: Path) -> None:
    for stem, value in (("dermoscopy_1", 1), ("ultrasound_1", 2), ("dermoscopy_2", 3)):
        save(tmp_path / f"{stem}.png", np.full((4, 4), value, np.uint8))
        save(tmp_path / f"{stem}_mask.png", np.full((4, 4), value & 1, np.uint8))
    empty(tmp_path / "odd.webp", tmp_path / "ultrasound_1_mask_mask.png")
    volumes = read(open_data(f"pairs:{tmp_path}/dermoscopy_*"))
    assert [int(volume.frames[0][0, 0]) for volume in volumes] == [1, 3]
    assert all(labels(volume).all() for volume in volumes)
    assert refuses(f"pairs:{tmp_path}/x-ray_*") == (
        "pairs data: found no image of the pattern among 7 .png, 1 .webp, expected <name>.png beside <name>_mask.png. "
        f"{CHECK}"
    )
    (tmp_path / "dermoscopy_2_mask.png").unlink()
    assert "1 of 2 images without a mask" in refuses(f"pairs:{tmp_path}/dermoscopy_*")


def test_pairs_of_another_layout_is_shown_beside_the_expected_one(tmp_path: Path) -> None:
    expected = "expected <name>.png beside <name>_mask.png"
    assert refuses(f"pairs:{tmp_path}") == f"pairs data: found nothing, {expected}. {CHECK}"
    empty(tmp_path / f"{PATIENT}.png", tmp_path / f"{PATIENT}2_mask.png")
    assert refuses(f"pairs:{tmp_path}") == (
        f"pairs data: found 2 of 2 images without a mask and 0 masks without an image, {expected}. {PAIR_ADVICE}"
    )


def test_images_have_no_labels_and_a_file_of_pages_is_one_case(tmp_path: Path) -> None:
    save(tmp_path / f"{PATIENT}2.png", RGB)
    save(tmp_path / f"{PATIENT}10.tif", GREY, save_all=True, append_images=[Image.fromarray(GREY[::-1])])
    np.save(tmp_path / f"{PATIENT}30.npy", GREY.astype(np.float32) / 255)
    save(tmp_path / "group" / f"{PATIENT}.bmp", Image.fromarray(GREY > 99))
    data = open_data(f"images:{tmp_path}")
    colour, pages, floats, bitmap = read(data)
    assert all(volume.labels is None for volume in (colour, pages, floats, bitmap))
    assert [case.group for case in data.cases] == ["", "", "", "group"]
    assert np.array_equal(colour.frames[0], RGB)
    assert np.array_equal(pages.frames, [GREY, GREY[::-1]])
    assert np.array_equal(floats.frames[0], GREY.astype(np.float32) / 255)
    assert np.array_equal(bitmap.frames[0], np.where(GREY > 99, 255, 0))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_bmp_of_any_mode_keeps_its_pixels(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    save(tmp_path / "a.bmp", image)
    expected = image.convert({"1": "L", "P": "RGB"}.get(mode, mode))
    assert np.array_equal(only(f"images:{tmp_path}").frames[0], np.asarray(expected))


def test_pages_of_several_sizes_are_refused(tmp_path: Path) -> None:
    save(tmp_path / f"{PATIENT}.tif", GREY, save_all=True, append_images=[Image.fromarray(GREY[:3])])
    assert refused(open_data(f"images:{tmp_path}").cases[0].read) == (
        "images data, image 1 of 1: 2 frames of 2 sizes or types, expected one. Make a case of each."
    )


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    empty(tmp_path / "notes.txt")
    assert refuses(f"images:{tmp_path}") == (f"images data: found 1 .txt, expected {KINDS['images'].layout}. {CHECK}")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "an empty file, expected a PNG, JPEG, TIFF, .npy or DICOM file. Copy it anew."),
        (b"BM", "not a readable BMP, expected a whole file. Copy it anew."),
        (b"text", "not a readable image, expected a PNG, JPEG, TIFF, .npy or DICOM file. Is it whole, and of"),
    ],
    ids=["empty", "BMP", "text"],
)
def test_a_damaged_image_is_refused_by_its_number(tmp_path: Path, content: bytes, told: str) -> None:
    for name in "abc":
        save(tmp_path / f"{PATIENT} {name}.png", GREY)
    (tmp_path / f"{PATIENT} b.png").write_bytes(content)
    cases = open_data(f"images:{tmp_path}").cases
    assert cases[2].read().labels is None
    assert refused(cases[1].read).startswith(f"images data, image 2 of 3: {told}")


def test_an_image_that_is_gone_is_refused_by_its_number(tmp_path: Path) -> None:
    path = save(tmp_path / f"{PATIENT}.png", GREY)
    [case] = open_data(f"images:{tmp_path}").cases
    path.unlink()
    assert refused(case.read).startswith("images data, image 1 of 1: no such file, expected a PNG")


def test_a_bmp_cut_short_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / f"{PATIENT}.bmp", RGB)
    path.write_bytes(path.read_bytes()[:-40])
    told = refused(open_data(f"images:{tmp_path}").cases[0].read)
    assert told == "images data, image 1 of 1: BMP data is truncated or damaged, expected a whole file. Copy it anew."


def test_values_that_cannot_be_segmented_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / f"{PATIENT}.npy", GREY.astype(np.float64))
    told = refused(open_data(f"images:{tmp_path}").cases[0].read)
    assert told.startswith("images data, image 1 of 1: got float64 (11, 7), expected uint8, uint16 or float32")


# Masks ----------------------------------------------------------------------------------------------------------


def mask_case(
    root: Path, mask: NDArray[Any] | Image.Image, classes: Any = None, ending: str = "png"
) -> Callable[[], Any]:
    """Reads a case of GREY with this mask."""
    save(root / "images" / f"{PATIENT}.png", GREY)
    save(root / "masks" / f"{PATIENT}.{ending}", mask)
    return open_data(f"folder:{root}", classes=classes).cases[0].read


def palette(indices: NDArray[Any], *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices, "L").convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette([value for colour in colours for value in colour])
    return image


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)
ALPHA = np.dstack([LESION * 255] * 3 + [np.full_like(LESION, 255)])
INDICES = GREY // 52
BINARY: dict[str, NDArray[Any] | Image.Image] = {
    "0 and 1": LESION,
    "0 and 255": LESION * 255,
    "1 bit": LESION > 0,
    "16 bits": LESION.astype(np.uint16),
    "RGB": np.dstack([LESION * 255] * 3),
    "opaque": ALPHA,
    "opaque grey": Image.fromarray(LESION * 255).convert("LA"),
    "black and white palette": palette(LESION, BLACK, WHITE),
    "coloured palette": palette(LESION, WHITE, RED),
    "grey palette": palette(LESION * 255, *((value, value, value) for value in range(256))),
}


@pytest.mark.parametrize("name", BINARY)
def test_a_binary_mask_is_read_however_it_is_stored(tmp_path: Path, name: str) -> None:
    assert np.array_equal(mask_case(tmp_path, BINARY[name])().labels[0], LESION)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 1), (255, 1)])
def test_a_mask_of_one_value_is_all_background_or_all_lesion(tmp_path: Path, value: int, expected: int) -> None:
    assert (mask_case(tmp_path, np.full_like(GREY, value))().labels == expected).all()


OTHER = "got {} of other values, most often {}, expected only 0 and 1, or 0 and 255. Save masks without loss, as PNG."
PALETTE = "got a palette in which 0 is white or another is black, expected 0 black. Save it as grey PNG."


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (changed(LESION * 255, 128), OTHER.format("1 pixel", 128)),
        (np.where(LESION, 255, np.arange(7) // 3).astype(np.uint8), None),
        (np.full_like(GREY, 128), OTHER.format("77 pixels", 128)),
        (changed(LESION.astype(np.float32), 0.5), OTHER.format("1 pixel", 0.5)),
        (changed(LESION.astype(np.float32), np.nan), OTHER.format("1 pixel", "nan")),
        (changed(LESION.astype(np.int32), -1), OTHER.format("1 pixel", -1)),
        (palette(LESION, WHITE, BLACK), PALETTE),
        (palette(LESION * 0, WHITE), PALETTE),
        (palette(LESION * 2, BLACK, RED, WHITE), OTHER.format(f"{LESION.sum()} pixels", 2)),
        (
            np.dstack([LESION * 255, LESION, LESION]),
            "got a mask in colours, expected class indices. Save it as grey PNG.",
        ),
        (ALPHA // 2, "got a mask with transparent pixels, expected none. Drop the alpha channel."),
        (Image.fromarray(RGB).convert("CMYK"), "got mode CMYK, expected a grey mask. Save it as grey PNG."),
        (LESION[:5], "got 5 rows x 7 columns, expected 11 x 7 as the image. Is it the mask of another image?"),
    ],
    ids=[
        "one pixel between",
        "values without a rule",
        "one value between",
        "one fraction",
        "one NaN",
        "one negative",
        "0 is white",
        "all white",
        "indices of a palette",
        "colours",
        "alpha",
        "CMYK",
        "another size",
    ],
)
def test_a_mask_of_doubtful_meaning_is_refused(
    tmp_path: Path, mask: NDArray[Any] | Image.Image, told: str | None
) -> None:
    if told is None:  # 0, 1, 2 and 255: which is the lesion's value?
        values = np.asarray(mask)
        wrong = values[np.isin(values, [1, 2])]
        told = OTHER.format(f"{wrong.size} pixels", np.bincount(wrong).argmax())
    numeric = isinstance(mask, np.ndarray) and mask.dtype.kind in "fi"
    ending = "tif" if numeric or (isinstance(mask, Image.Image) and mask.mode == "CMYK") else "png"
    assert refused(mask_case(tmp_path, mask, ending=ending)) == f"folder data, image 1 of 1, its mask: {told}"


def test_a_jpeg_mask_is_refused_with_its_grey_values(tmp_path: Path) -> None:
    told = refused(mask_case(tmp_path, LESION * 255, ending="jpg"))
    assert re.search(r"got \d+ pixels of other values, most often \d+, expected only 0 and 1, or 0 and 255", told)


@pytest.mark.parametrize("stored", ["grey", "palette"])
def test_with_more_classes_a_mask_holds_their_indices(tmp_path: Path, stored: str) -> None:
    mask = INDICES if stored == "grey" else palette(INDICES, WHITE, BLACK, RED, (9, 9, 9), (1, 2, 3))
    read_it = mask_case(tmp_path, mask, classes=["a", "b", "c", "d", "e"])
    assert np.array_equal(read_it().labels[0], INDICES)
    told = refused(mask_case(tmp_path, mask, classes=["a", "b", "c", "d"]))
    count = (INDICES == 4).sum()
    assert told == (
        f"folder data, image 1 of 1, its mask: got {count} pixels of other values, most often 4, "
        "expected class indices 0 to 3. Give every class a name, or correct the mask."
    )


def test_with_more_classes_a_palette_s_black_and_white_mean_nothing(tmp_path: Path) -> None:
    read_it = mask_case(tmp_path, palette(LESION, WHITE, BLACK), classes=["a", "b", "c"])
    assert np.array_equal(read_it().labels[0], LESION)


def test_a_mask_is_turned_upright_as_its_image_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "images" / "a.png", GREY, exif=exif)
    save(tmp_path / "masks" / "a.png", LESION, exif=exif)
    volume = only(f"folder:{tmp_path}")
    assert np.array_equal(volume.frames[0], np.rot90(GREY, -1))
    assert np.array_equal(labels(volume)[0], np.rot90(LESION, -1))


def test_a_mask_of_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MAX_PIXELS", 76)
    assert refused(mask_case(tmp_path, LESION)) == (
        "folder data, image 1 of 1, its mask: got too many pixels, expected at most 76. Is it a mask?"
    )


def test_a_damaged_mask_is_refused(tmp_path: Path) -> None:
    read_it = mask_case(tmp_path, LESION)
    path = tmp_path / "masks" / f"{PATIENT}.png"
    path.write_bytes(path.read_bytes()[:60])
    assert refused(read_it) == (
        "folder data, image 1 of 1, its mask: not a readable image, expected a whole PNG, BMP, TIFF, JPEG file. "
        "Copy it anew."
    )


def test_a_mask_has_a_page_for_every_frame(tmp_path: Path) -> None:
    pages = [Image.fromarray(LESION), Image.fromarray(1 - LESION)]
    save(tmp_path / "images" / f"{PATIENT}.tif", GREY, save_all=True, append_images=[Image.fromarray(GREY)])
    save(tmp_path / "masks" / f"{PATIENT}.tif", pages[0], save_all=True, append_images=pages[1:])
    assert np.array_equal(labels(only(f"folder:{tmp_path}")), [LESION, 1 - LESION])
    save(tmp_path / "masks" / f"{PATIENT}.tif", pages[0])
    told = refused(open_data(f"folder:{tmp_path}").cases[0].read)
    assert told.startswith("folder data, image 1 of 1: found 2 frames and a mask of another number, expected the same")


# DICOM ----------------------------------------------------------------------------------------------------------

# The rows run along y and the columns along z, so that slices lie along x.
SAGITTAL = [0, 1, 0, 0, 0, 1]
SLICES = np.random.default_rng(7).integers(0, 4096, (12, 5, 7), dtype=np.uint16)


def dataset(pixels: NDArray[Any], uid: str, bits: int = 12, storage: str = CTImageStorage, **attributes: Any) -> Any:
    """One frame, or several with three axes."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(storage), UID(uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))  # type: ignore[arg-type]
    data.SOPClassUID, data.SOPInstanceUID = storage, uid
    data.PatientName = data.PatientID = PATIENT
    if pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsStored, data.HighBit = bits, bits - 1
    data.BitsAllocated = 1 if bits == 1 else 16
    data.PixelData = pack_bits(pixels) if bits == 1 else pixels.astype("<u2").tobytes()
    for keyword, value in {"SeriesInstanceUID": "1.2.9", **attributes}.items():
        setattr(data, keyword, value)
    return data


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def series(root: Path, case: str = "", sort_by: str = "position", count: int = 12) -> Path:
    """SLICES as files in shuffled order, which only `sort_by` tells; what ranks behind it says another."""
    order = random.Random(3).sample(range(count), count)
    for place, index in enumerate(order):
        attributes: dict[str, Any] = {"PixelSpacing": [0.5, 0.75], "SliceThickness": 9}
        if sort_by == "position":
            attributes |= {"ImagePositionPatient": [-20 + 2.5 * index, 3, 4], "ImageOrientationPatient": SAGITTAL}
            attributes["InstanceNumber"] = place + 1
        elif sort_by == "number":
            attributes["InstanceNumber"] = index + 1
        name = f"{PATIENT}.{index if sort_by == 'name' else place}"
        write(root / "images" / case / name, dataset(SLICES[index], f"1.2.3.{index + 1}", **attributes))
    return root


@pytest.mark.parametrize("sort_by", ["position", "number", "name"])
def test_a_series_is_put_in_order(tmp_path: Path, sort_by: str) -> None:
    empty(tmp_path / "images" / "notes.txt")
    volume = only(f"dicom:{series(tmp_path, sort_by=sort_by)}")
    assert np.array_equal(volume.frames, SLICES)
    assert volume.labels is None
    assert volume.bits == 12
    assert volume.spacing == ((2.5, 0.5, 0.75) if sort_by == "position" else None)


def test_folders_are_cases_and_their_names_are_not_told(tmp_path: Path) -> None:
    series(tmp_path, f"{PATIENT} 10", count=3)
    series(tmp_path, f"{PATIENT} 2", count=5)
    data = open_data(f"dicom:{tmp_path}", classes=["air", "organ", "bone"])
    assert [(case.name, case.group) for case in data.cases] == [("case 1", ""), ("case 2", "")]
    assert [len(volume.frames) for volume in read(data)] == [5, 3]
    assert data.classes == ("air", "organ", "bone")


def test_slices_at_one_place_are_ordered_by_their_numbers_and_have_no_distance(tmp_path: Path) -> None:
    place: dict[str, Any] = {
        "ImagePositionPatient": [1, 2, 3],
        "ImageOrientationPatient": SAGITTAL,
        "PixelSpacing": [1, 1],
    }
    for name, number in (("a", 3), ("b", 1), ("c", 2)):
        write(tmp_path / "images" / name, dataset(SLICES[number], f"1.2.3.{number}", InstanceNumber=number, **place))
    volume = only(f"dicom:{tmp_path}")
    assert np.array_equal(volume.frames, SLICES[1:4])
    assert volume.spacing is None


def test_slices_of_several_directions_are_ordered_by_their_numbers(tmp_path: Path) -> None:
    for number, name in ((1, "c"), (2, "b"), (3, "a")):
        attributes: dict[str, Any] = {
            "InstanceNumber": number,
            "ImagePositionPatient": [-number, 0, 0],
            "ImageOrientationPatient": [0, 1, 0, 0, 0, 1] if number < 3 else [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [1, 1],
        }
        write(tmp_path / "images" / name, dataset(SLICES[number], f"1.2.3.{number}", **attributes))
    volume = only(f"dicom:{tmp_path}")
    assert np.array_equal(volume.frames, SLICES[1:4])
    assert volume.spacing is None


def test_a_missing_slice_leaves_the_distance_unsaid(tmp_path: Path) -> None:
    series(tmp_path)
    names = sorted((tmp_path / "images").iterdir())
    names[4].unlink()
    positions = only(f"dicom:{tmp_path}")
    assert len(positions.frames) == 11
    assert positions.spacing is None


def test_a_file_of_many_frames_keeps_their_order(tmp_path: Path) -> None:
    measures = Attributes()
    measures.PixelSpacing, measures.SpacingBetweenSlices = [0.5, 0.75], 3
    shared = Attributes()
    shared.PixelMeasuresSequence = [measures]
    write(tmp_path / "images" / "a", dataset(SLICES, "1.2.3", SharedFunctionalGroupsSequence=[shared]))
    volume = only(f"dicom:{tmp_path}")
    assert np.array_equal(volume.frames, SLICES)
    assert volume.spacing == (3, 0.5, 0.75)


@pytest.mark.parametrize("ending", ["", ".dcm", ".DCM"])
@pytest.mark.parametrize("falling", [False, True])
def test_masks_of_a_series_belong_to_the_slices_of_their_names(tmp_path: Path, ending: str, falling: bool) -> None:
    """Slices are ordered in space, which names need not follow: those of a CT often run the other way."""
    masks = (SLICES > 2000).astype(np.uint8)
    assert len({mask.tobytes() for mask in masks}) > 6
    for index, pixels in enumerate(SLICES):
        position = [100 - 5 * index if falling else 5 * index, 0, 0]
        attributes = {
            "ImagePositionPatient": position,
            "ImageOrientationPatient": SAGITTAL,
            "InstanceNumber": index + 1,
        }
        name = f"1.2.{PATIENT}.{index:03}"
        write(tmp_path / "images" / "a" / f"{name}{ending}", dataset(pixels, f"1.2.3.{index + 1}", **attributes))
        save(tmp_path / "masks" / "a" / f"{name}.png", masks[index] * 255)
    data = open_data(f"dicom:{tmp_path}")
    assert data.classes == ("background", "lesion")
    volume = read(data)[0]
    order = slice(None, None, -1) if falling else slice(None)
    assert np.array_equal(volume.frames, SLICES[order])
    assert np.array_equal(labels(volume), masks[order])


def test_masks_without_their_slices_names_are_refused(tmp_path: Path) -> None:
    series(tmp_path, "a")
    for index in range(len(SLICES)):
        save(tmp_path / "masks" / "a" / f"{PATIENT}{index}.png", np.zeros(SLICES[0].shape, np.uint8))
    assert refused(open_data(f"dicom:{tmp_path}").cases[0].read) == (
        "dicom data, case 1 of 1: found 12 of 12 masks without a slice of their name, "
        "expected each mask named as its slice's file. Rename the masks, or give one SEG."
    )
    (tmp_path / "masks" / "a" / f"{PATIENT}7.png").unlink()
    assert refused(open_data(f"dicom:{tmp_path}").cases[0].read) == (
        "dicom data, case 1 of 1: found 11 masks for 12 slices, expected one each. Check masks/."
    )


def test_a_slice_s_mask_has_one_page(tmp_path: Path) -> None:
    series(tmp_path, count=1)
    mask = np.ones((5, 7), np.uint8)
    save(tmp_path / "masks" / f"{PATIENT}.tif", mask, save_all=True, append_images=[Image.fromarray(mask)])
    assert refused(open_data(f"dicom:{tmp_path}").cases[0].read) == (
        "dicom data, case 1 of 1: a mask of several pages, expected one page. Save each slice's mask."
    )


# (segment, slice) of each frame; slices 0 and 4 onwards have none, and the order is no order of slices.
FRAMES = [(3, 2), (1, 1), (1, 2), (3, 1), (1, 3)]
# Of 5 x 7 pixels, no multiple of 8: frames begin within a byte.
MAPS = np.random.default_rng(8).integers(0, 4, (4, 5, 7))
MASKS = np.stack([MAPS[index] == segment for segment, index in FRAMES]).astype(np.uint8)
OVERLAP = int((MASKS[0] & MASKS[1]).sum())


def seg(root: Path, frames: Any = FRAMES, shared_segment: bool = False, **attributes: Any) -> Path:
    """A SEG of two segments, 1 and 3, for `series`."""
    groups = []
    for segment, index in frames:
        source = Attributes()
        source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = CTImageStorage, f"1.2.3.{index + 1}"
        derivation = Attributes()
        derivation.SourceImageSequence = [source]
        group = Attributes()
        group.DerivationImageSequence = [derivation]
        if not shared_segment:
            group.SegmentIdentificationSequence = [identification(segment)]
        groups.append(group)
    segments = []
    for number, name in ((1, "liver"), (3, "spleen")):
        item = Attributes()
        item.SegmentNumber, item.SegmentLabel = number, name
        segments.append(item)
    known = {
        "Modality": "SEG",
        "SegmentationType": "BINARY",
        "SegmentSequence": segments,
        "PerFrameFunctionalGroupsSequence": groups,
        **attributes,
    }
    masks = MASKS[: len(frames)]
    return write(root / f"{PATIENT}.dcm", dataset(masks, "1.2.4", bits=1, storage=SegmentationStorage, **known))


def identification(segment: int) -> Any:
    item = Attributes()
    item.ReferencedSegmentNumber = segment
    return item


def test_a_seg_marks_the_slices_that_its_frames_refer_to(tmp_path: Path) -> None:
    seg(series(tmp_path) / "masks")
    expected = np.zeros(SLICES.shape, np.uint8)
    for (segment, index), mask in zip(FRAMES, MASKS, strict=True):
        expected[index][mask > 0] = segment
    data = open_data(f"dicom:{tmp_path}")
    assert data.classes == ("background", "liver", "class 2", "spleen")
    assert np.array_equal(labels(read(data)[0]), expected)
    assert set(np.unique(expected)) == {0, 1, 3}
    given_names = open_data(f"dicom:{tmp_path}", classes=["a", "b", "c", "d"])
    assert given_names.classes == ("a", "b", "c", "d")
    assert np.array_equal(labels(read(given_names)[0]), expected)


def test_a_seg_of_one_segment_may_name_it_once_for_all_frames(tmp_path: Path) -> None:
    series(tmp_path)
    shared = Attributes()
    shared.SegmentIdentificationSequence = [identification(3)]
    seg(tmp_path / "masks", [(3, 2), (3, 1)], True, SharedFunctionalGroupsSequence=[shared])
    found = labels(only(f"dicom:{tmp_path}"))
    assert np.array_equal(found[[1, 2]], MASKS[[1, 0]] * 3)
    assert not found[[0, *range(3, 12)]].any()


def test_a_seg_of_a_file_of_many_frames_refers_to_their_numbers(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a", dataset(SLICES, "1.2.3.1"))
    path = seg(tmp_path / "masks", [(1, 0), (3, 0)])
    import pydicom

    data = pydicom.dcmread(path)
    for group, frame in zip(data.PerFrameFunctionalGroupsSequence, (12, 2), strict=True):
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber = frame
    data.save_as(path)
    found = labels(only(f"dicom:{tmp_path}"))
    assert np.array_equal(found[11], MASKS[0])
    assert np.array_equal(found[1], MASKS[1] * 3)


NOT_SEG = (
    "expected a binary SEG whose frames each refer to one segment and one slice of the series. "
    "Export it anew, or as PNG files."
)


@pytest.mark.parametrize(
    ("frames", "attributes", "told"),
    [
        (FRAMES, {"Modality": "CT"}, f"DICOM that is no SEG, or one not binary, {NOT_SEG}"),
        (FRAMES, {"SegmentationType": "FRACTIONAL"}, f"DICOM that is no SEG, or one not binary, {NOT_SEG}"),
        ([(1, 40)], {}, f"DICOM with a frame of no or several segments or slices, {NOT_SEG}"),
        (
            FRAMES,
            {"PerFrameFunctionalGroupsSequence": []},
            "a DICOM file is truncated or damaged, expected whole files. Copy it anew.",
        ),
        ([(0, 1)], {}, "has segment 0, expected 1 to 3. Give every segment a class name."),
        ([(4, 1)], {}, "has segment 4, expected 1 to 3. Give every segment a class name."),
        (
            [(1, 2), (3, 2)],
            {},
            f"{OVERLAP} pixels lie in two segments, expected each in one. Segments must not overlap.",
        ),
        (
            FRAMES,
            {"Rows": 7, "Columns": 5},
            "got 7 rows x 5 columns, expected 5 x 7 as the slices. Is it of this series?",
        ),
        (FRAMES, {"PixelData": b"\0\0"}, "a DICOM file is truncated or damaged, expected whole files. Copy it anew."),
    ],
    ids=["modality", "fractional", "foreign slice", "no frames", "0", "4", "overlap", "size", "pixels"],
)
def test_a_seg_that_does_not_fit_is_refused(tmp_path: Path, frames: Any, attributes: Any, told: str) -> None:
    assert OVERLAP
    seg(series(tmp_path) / "masks", frames, **attributes)
    assert refused(open_data(f"dicom:{tmp_path}").cases[0].read) == f"dicom data, case 1 of 1, its SEG: {told}"


def test_a_seg_of_a_series_whose_files_share_a_uid_is_refused(tmp_path: Path) -> None:
    seg(series(tmp_path) / "masks")
    write(tmp_path / "images" / "x", dataset(SLICES[0], "1.2.3.1"))
    told = refused(open_data(f"dicom:{tmp_path}").cases[0].read)
    assert told.startswith("dicom data, case 1 of 1, its SEG: DICOM with a frame of no or several segments or slices")


@pytest.mark.parametrize("segments", [[(0, "a")], [(256, "a")], [(1, "a"), (2, "a")], [(1, "background")]], ids=str)
def test_segments_that_cannot_be_classes_are_refused(tmp_path: Path, segments: list[tuple[int, str]]) -> None:
    items = []
    for number, name in segments:
        item = Attributes()
        item.SegmentNumber, item.SegmentLabel = number, name
        items.append(item)
    seg(series(tmp_path) / "masks", SegmentSequence=items)
    assert refuses(f"dicom:{tmp_path}") == (
        "dicom data: SEG segments below 1, above 255 or named alike, expected different names for 1 to 255. "
        "Give the class names."
    )


def test_a_seg_whose_segments_have_no_names_is_refused_unless_the_classes_are_given(tmp_path: Path) -> None:
    seg(series(tmp_path) / "masks", SegmentSequence=[])
    assert len(open_data(f"dicom:{tmp_path}", classes=["a", "b", "c", "d"]).classes) == 4
    assert refuses(f"dicom:{tmp_path}").startswith(
        "dicom data, case 1 of 1, its SEG: DICOM without named segments, expected a binary SEG"
    )


def test_segs_that_disagree_on_names_are_refused(tmp_path: Path) -> None:
    for case in ("a", "b"):
        series(tmp_path, case, count=4)
        seg(tmp_path / "masks" / case)
    assert len(open_data(f"dicom:{tmp_path}").classes) == 4
    item = Attributes()
    item.SegmentNumber, item.SegmentLabel = 1, "aorta"
    seg(tmp_path / "masks" / "b", SegmentSequence=[item])
    assert refuses(f"dicom:{tmp_path}") == (
        "dicom data, case 2 of 2, its SEG: names a segment otherwise than another case, "
        "expected the same names. Renumber the segments."
    )


def test_a_seg_in_another_order_than_the_classes_is_refused(tmp_path: Path) -> None:
    seg(series(tmp_path) / "masks")
    own = list(open_data(f"dicom:{tmp_path}").classes)
    assert list(open_data(f"dicom:{tmp_path}", classes=own).classes) == own
    swapped = [own[0], own[2], own[1], *own[3:]]
    with pytest.raises(DataError) as caught:
        open_data(f"dicom:{tmp_path}", classes=swapped)
    assert str(caught.value) == (
        f"dicom data: its segments are {', '.join(own[1:])}, "
        f"expected them in the order of the classes {', '.join(swapped[1:])}. Renumber the segments."
    )
    others = ["air", "one", "two", "three"]
    assert list(open_data(f"dicom:{tmp_path}", classes=others).classes) == others  # by number: no name is known


def test_a_model_is_given_data_of_its_classes_in_its_order(tmp_path: Path) -> None:
    synapse(tmp_path)
    organs = ORGANS.split(", ")
    assert open_for(organs, f"synapse:{tmp_path}").classes == tuple(organs)
    assert open_for([f"class {i}" for i in range(9)], f"synapse:{tmp_path}").classes == tuple(organs)
    swapped = [organs[0], organs[2], organs[1], *organs[3:]]
    for classes, told in (
        (["a", "b"], "has 9 classes, expected the model's 2. Use data of the model's own task."),
        (
            swapped,
            f"has the classes {ORGANS}, expected the model's order, {', '.join(swapped)}. "
            "Correct the model's class list.",
        ),
    ):
        with pytest.raises(DataError) as caught:
            open_for(classes, f"synapse:{tmp_path}")
        assert str(caught.value) == f"synapse data: {told}"


def test_two_series_in_one_folder_are_counted(tmp_path: Path) -> None:
    series(tmp_path, count=3)
    for index in (1, 2):
        write(tmp_path / "images" / f"x{index}", dataset(SLICES[0], f"1.2.5.{index}", SeriesInstanceUID="1.2.8"))
    assert refused(open_data(f"dicom:{tmp_path}").cases[0].read) == (
        "dicom data, case 1 of 1: found 2 series, of 3 and 2 files, expected one. Give each a folder of its own."
    )


def test_a_dicom_folder_of_another_layout_is_shown_beside_the_expected_one(tmp_path: Path) -> None:
    expected = f"expected {KINDS['dicom'].layout}"
    write(tmp_path / f"{PATIENT}.dcm", dataset(SLICES[0], "1.2"))
    assert refuses(f"dicom:{tmp_path}") == f"dicom data: found no images/, beside them 1 .dcm, {expected}. {CHECK}"
    series(tmp_path, PATIENT, count=2)
    empty(tmp_path / "images" / f"{PATIENT}.dcm")
    assert refuses(f"dicom:{tmp_path}") == (
        f"dicom data: found images/ (1 .dcm, 1 folder), beside them 1 .dcm, {expected}. {CHECK}"
    )


def test_labels_and_cases_that_do_not_pair_are_counted(tmp_path: Path) -> None:
    series(tmp_path, f"{PATIENT} 1", count=2)
    series(tmp_path, f"{PATIENT} 2", count=2)
    save(tmp_path / "masks" / f"{PATIENT} 1" / "a.png", LESION)
    assert refuses(f"dicom:{tmp_path}") == (
        "dicom data: found images/ (2 folders), masks/ (1 folder); by their names 1 of 2 cases have no labels and "
        f"0 labels no case, expected {KINDS['dicom'].layout}. {CHECK}"
    )
    (tmp_path / "masks" / f"{PATIENT} 2").mkdir()
    empty(tmp_path / "masks" / "loose.png")
    assert "0 of 2 cases have no labels and 1 labels no case" in refuses(f"dicom:{tmp_path}")
    (tmp_path / "masks" / "loose.png").unlink()
    assert refuses(f"dicom:{tmp_path}") == (
        f"dicom data: found a case's labels of 0 files, 0 of them DICOM, expected {KINDS['dicom'].layout}. "
        "Give one SEG, or a mask for every slice."
    )


def test_a_file_that_is_no_dicom_is_refused_and_not_skipped(tmp_path: Path) -> None:
    series(tmp_path, count=2)
    save(tmp_path / "images" / f"{PATIENT}.png", LESION)
    assert refuses(f"dicom:{tmp_path}") == (
        "dicom data: found a case's folder of 1 .png, 2 other files, 1 of the files no DICOM, "
        f"expected {KINDS['dicom'].layout}. Keep only a series' files in it."
    )


def test_a_slice_that_cannot_be_segmented_is_refused_by_its_number(tmp_path: Path) -> None:
    series(tmp_path, count=3)
    signed = dataset(SLICES[0], "1.2.3.9", PixelRepresentation=1)
    signed.ImagePositionPatient, signed.ImageOrientationPatient = [-16, 3, 4], SAGITTAL  # between 1 and 2
    write(tmp_path / "images" / "x", signed)
    assert refused(open_data(f"dicom:{tmp_path}").cases[0].read) == (
        "dicom data, case 1 of 1, file 3 of 4 in order: DICOM with signed pixels, expected unsigned. "
        "Apply the rescale and window first."
    )


@pytest.mark.parametrize(("pixels", "bits"), [(SLICES[0][:3], 12), (SLICES[0], 13)], ids=["size", "bits"])
def test_slices_of_two_sizes_or_types_are_refused(tmp_path: Path, pixels: NDArray[Any], bits: int) -> None:
    series(tmp_path, count=3)
    write(tmp_path / "images" / "x", dataset(pixels, "1.2.3.9", bits))
    assert refused(open_data(f"dicom:{tmp_path}").cases[0].read) == (
        "dicom data, case 1 of 1: slices of several sizes or types, expected one. Give each a folder of its own."
    )


def test_a_damaged_series_is_refused_and_odd_values_are_not_repeated(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = write(tmp_path / "images" / PATIENT, dataset(SLICES[0], "1.2.3", InstanceNumber=12345))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"12345 ", b"SmithX"))
    told = refused(open_data(f"dicom:{tmp_path}").cases[0].read)
    assert told == "dicom data, case 1 of 1: a DICOM file is truncated or damaged, expected whole files. Copy it anew."
    path.write_bytes(content[:180])
    assert refused(open_data(f"dicom:{tmp_path}").cases[0].read).startswith("dicom data, case 1 of 1")
    assert not recwarn.list


# Phantoms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "first"), [("2", 1_000_000), ("2@7", 7)])
def test_phantoms_are_those_of_their_seeds_the_kinds_in_turn(target: str, first: int) -> None:
    data = open_data(f"phantoms:{target}")
    order = [(kind, seed) for seed in (first, first + 1) for kind in ("dermoscopy", "ultrasound")]
    assert [(case.name, case.group) for case in data.cases] == [(f"phantom {k} {s}", k) for k, s in order]
    assert data.classes == ("background", "lesion")
    for (kind, seed), volume in zip(order, read(data), strict=True):
        drawn = phantom(kind, seed)
        assert np.array_equal(volume.frames, [drawn.image])
        assert np.array_equal(labels(volume), [drawn.mask])
    assert TEST_SEED == 1_000_000


@pytest.mark.parametrize("target", ["", "0", "-1", "x", "2@", "2@-1", "1.5", "2@x"])
def test_phantoms_of_another_text_are_refused(target: str) -> None:
    assert refuses(f"phantoms:{target}") == (
        "phantoms data: found another text, expected phantoms:N or phantoms:N@SEED. "
        "Such as phantoms:100 or phantoms:100@2000000."
    )
