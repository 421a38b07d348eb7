"""Synapse multi-organ CT as TransUNet and MSA2Net publish it: slices to train on (.npz), volumes to test on (.h5)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msa2net.core.data.cases import Case, Dataset, Volume
from msa2net.core.data.layout import Request, found, package
from msa2net.errors import DataError

CLASSES = (
    "background",
    "aorta",
    "gallbladder",
    "left kidney",
    "right kidney",
    "liver",
    "pancreas",
    "spleen",
    "stomach",
)
_EXCESS = 1e-6  # what rounding may add to 0 and 1
_LISTS = ("lists/lists_Synapse", "lists", ".")


def open_synapse(request: Request) -> Dataset:
    """The slices of "train" or the volumes of "test", in the list's order. Slices are named <patient>_slice<number>."""
    if request.split == "validation":
        raise DataError(
            "synapse data", "has no validation split", "expected train or test", "Hold out slices of train."
        )
    train = request.split == "train"
    folder, listed, ending = ("train_npz", "train.txt", ".npz") if train else ("test_vol_h5", "test_vol.txt", ".npy.h5")
    root = request.root()
    lists = [path for name in _LISTS if (path := root / name / listed).is_file()]
    if not (root / folder).is_dir() or not lists:
        raise request.wrong(found(root, folder) + ("" if lists else f", no {listed}"))
    names = _names(lists[0], listed)
    missing = sum(not (root / folder / f"{name}{ending}").is_file() for name in names)
    if missing:
        raise request.wrong(f"{len(names)} names in {listed}, {missing} of them without a file in {folder}/")
    what, read = ("slice", read_slice) if train else ("case", read_volume)
    cases = tuple(
        Case(
            f"{what} {number}",
            partial(read, request.place(what, number, len(names)), root / folder / f"{name}{ending}"),
            patient=name.partition("_slice")[0],
        )
        for number, name in enumerate(names, 1)
    )
    return Dataset(request.kind, request.own(CLASSES), cases)


def _names(path: Path, listed: str) -> list[str]:
    place = f"synapse data, {listed}"
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise DataError(place, "not readable as text", "expected one name a line", "Copy it anew.") from None
    for number, name in enumerate(names, 1):
        if "/" in name or "\\" in name or ".." in name or not name.isprintable():
            raise DataError(
                place, f"name {number} of {len(names)} is a path", "expected a name without folder", "Correct the list."
            )
    if not names or len(set(names)) < len(names):
        raise DataError(
            place,
            f"{len(names)} names, {len(names) - len(set(names))} of them repeated",
            "expected each once, one a line",
            "Correct the list.",
        )
    return names


def read_slice(place: str, path: Path) -> Volume:
    """One slice of the training set."""
    try:
        # Opened here, since numpy leaves a damaged file open. A bare .npy gives an array, which `with` refuses.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            image, label = np.asarray(file["image"]), np.asarray(file["label"])
    except Exception:  # a damaged zip raises BadZipFile, zlib.error, ValueError and more; all can name the file
        raise _damaged(place, "npz") from None
    return _volume(place, image, label, 2)


def read_volume(place: str, path: Path) -> Volume:
    """One volume of the test set."""
    h5py = package("h5py")
    try:
        with h5py.File(path, "r") as file:
            image, label = np.asarray(file["image"][()]), np.asarray(file["label"][()])
    except Exception:  # h5py raises OSError, KeyError, RuntimeError, and names the file
        raise _damaged(place, "HDF5") from None
    return _volume(place, image, label, 3)


def _damaged(place: str, kind: str) -> DataError:
    return DataError(place, f"no {kind} file of image and label, or a damaged one", "expected both", "Copy it anew.")


def _volume(place: str, image: NDArray[Any], label: NDArray[Any], axes: int) -> Volume:
    """Checks types, shapes and values; one slice becomes a volume of one frame."""
    layout = "(H, W)" if axes == 2 else "(D, H, W)"
    if image.ndim != axes or not image.size or image.dtype.kind != "f":
        raise DataError(place, f"image is {image.dtype} {image.shape}", f"expected float {layout}", "Convert it anew.")
    if label.shape != image.shape or label.dtype.kind not in "buif":
        raise DataError(
            place,
            f"label is {label.dtype} {label.shape}",
            f"expected numbers {image.shape} as image",
            "Convert it anew.",
        )
    low, high = float(image.min()), float(image.max())  # NaN if any value is
    if not (low >= -_EXCESS and high <= 1 + _EXCESS):
        raise DataError(
            place,
            f"image has values from {low:g} to {high:g}",
            "expected [0, 1]",
            "Clip and scale it as the release does.",
        )
    if not np.isin(label, np.arange(len(CLASSES))).all():
        raise DataError(
            place,
            f"label has values that are no class, from {float(label.min()):g} to {float(label.max()):g}",
            f"expected whole numbers 0 to {len(CLASSES) - 1}",
            "Map the 13 organs to the 8.",
        )
    frames = np.clip(image.astype(np.float32), 0, 1).reshape(-1, *image.shape[-2:])
    return Volume(tuple(frames), label.astype(np.uint8).reshape(frames.shape))
