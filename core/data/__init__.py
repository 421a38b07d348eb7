"""Labelled images by name: `open_data("KIND:PATH")` reads the layouts that public data sets come in. No torch.

H W are a frame's rows and columns, D the frames of a case (1 for a photograph), K the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msa2net.core.data.cases import Case, Dataset, Volume
from msa2net.core.data.dicom import open_dicom
from msa2net.core.data.folder import open_folder, open_images, open_isic2018, open_pairs
from msa2net.core.data.layout import Request
from msa2net.core.data.phantom import open_phantoms
from msa2net.core.data.synapse import open_synapse
from msa2net.errors import DataError

__all__ = ["KINDS", "SPLITS", "Case", "Dataset", "Kind", "Volume", "open_data", "open_for"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Kind:
    """Who reads a layout, what it looks like, and whether its classes are always the same."""

    read: Callable[[Request], Dataset]
    layout: str
    own_classes: bool = False


KINDS = {
    "synapse": Kind(
        open_synapse,
        "train_npz/<slice>.npz, test_vol_h5/<case>.npy.h5, and train.txt and test_vol.txt in lists/lists_Synapse/",
        own_classes=True,
    ),
    "isic2018": Kind(
        open_isic2018,
        "ISIC2018_Task1-2_<Split>_Input/ISIC_<number>.jpg and "
        "ISIC2018_Task1_<Split>_GroundTruth/ISIC_<number>_segmentation.png",
        own_classes=True,
    ),
    "folder": Kind(open_folder, "images/<name>.png and masks/<name>.png"),
    "pairs": Kind(open_pairs, "<name>.png beside <name>_mask.png"),
    "images": Kind(open_images, "image files (.png, .jpg, .tif, .bmp, .npy, .dcm)"),
    "dicom": Kind(
        open_dicom, "images/<case>/<slice>.dcm, and masks/<case>/ with <slice>.png for each or one DICOM SEG"
    ),
    "phantoms": Kind(open_phantoms, "phantoms:N or phantoms:N@SEED", own_classes=True),
}


def open_data(spec: str, split: str = "test", classes: Sequence[str] | None = None) -> Dataset:
    """The data set that `spec`, "KIND:PATH", names. Raises DataError if its layout is not as KIND promises.

    split     "train", "validation" or "test"; only synapse and isic2018 have splits, the other kinds ignore it
    classes   the classes' names, the background first, for kinds that do not know them: ("background", "lesion") if
              None, and a DICOM SEG names its own. With more than two, masks hold class indices.

    Layouts are checked here, pixels when a case is read. A group is named after its folder.
    """
    name, colon, target = spec.partition(":")
    if not colon or name not in KINDS:
        # The text is not repeated: without a colon it may be a path.
        found = "of an unknown kind" if colon else "without a colon"
        raise DataError("data", f"got a name {found}", f"expected KIND:PATH with KIND one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise DataError(f"{name} data", f"got the split {split!r}", f"expected one of {', '.join(SPLITS)}")
    if classes is not None:
        _check_classes(name, classes)
    kind = KINDS[name]
    return kind.read(Request(name, target, split, None if classes is None else tuple(classes), kind.layout))


def open_for(model_classes: Sequence[str], spec: str, split: str = "test") -> Dataset:
    """The data set, for a model with these classes: they name those of a kind that does not know its own.

    Raises DataError if a kind that does has another number of them, or the same in another order; else its names may
    differ from the model's.
    """
    kind = KINDS.get(spec.partition(":")[0])
    dataset = open_data(spec, split, None if kind is None or kind.own_classes else model_classes)
    if len(dataset.classes) != len(model_classes):
        raise DataError(
            f"{dataset.kind} data",
            f"has {len(dataset.classes)} classes",
            f"expected the model's {len(model_classes)}",
            "Use data of the model's own task.",
        )
    if set(dataset.classes) == set(model_classes) and dataset.classes != tuple(model_classes):
        raise DataError(
            f"{dataset.kind} data",
            f"has the classes {', '.join(dataset.classes)}",
            f"expected the model's order, {', '.join(model_classes)}",
            "Correct the model's class list.",
        )
    return dataset


def _check_classes(name: str, classes: Sequence[str]) -> None:
    if isinstance(classes, str) or not 2 <= len(classes) <= 256 or len(set(classes)) < len(classes):
        raise DataError(
            f"{name} data",
            "got class names that are one text, alike, fewer than 2 or more than 256",
            "expected a list of different names",
            "Start it with the background.",
        )
