"""Image files: folders of images and masks, images beside their masks, ISIC 2018, and images without labels."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from msa2net.core.data.cases import Case, Dataset, Volume
from msa2net.core.data.layout import (
    IMAGE_ENDINGS,
    LESION,
    MASK_ENDINGS,
    Request,
    contents,
    entries,
    files,
    found,
    read_image,
    read_mask,
)
from msa2net.errors import DataError

_MASK_NAME = re.compile(r"(?P<image>.+)_(?P<part>mask(_[0-9]+)?|segmentation|lesion)", re.DOTALL)
_ISIC_FOLDER = {"train": "Training", "validation": "Validation", "test": "Test"}
_ISIC_IMAGE = re.compile(r"ISIC_[0-9]+\.jpe?g", re.IGNORECASE)
_ISIC_MASK = re.compile(r"ISIC_[0-9]+_segmentation\.png", re.IGNORECASE)

Found = tuple[str, Path]  # a file and its group
Pair = tuple[str, Path, tuple[Path, ...]]  # group, image, its masks


def open_folder(request: Request) -> Dataset:
    """images/ and masks/, paired by name."""
    root = request.root()
    if not ((root / "images").is_dir() and (root / "masks").is_dir()):
        raise request.wrong(found(root, "images", "masks"))
    images = files(request, root / "images", IMAGE_ENDINGS)
    masks = files(request, root / "masks", MASK_ENDINGS)
    if not images or not masks:
        raise request.wrong(found(root, "images", "masks"))
    return _labelled(request, request.classes or LESION, _paired(request, images, masks))


def open_pairs(request: Request) -> Dataset:
    """Images and masks in one folder. A pattern selects images; masks of the others do not matter then."""
    path = Path(request.target).expanduser()
    chosen = None
    if not path.is_dir() and re.search(r"[*?\[]", path.name) and path.parent.is_dir():
        path, chosen = path.parent, path.name
    else:
        path = request.root()
    if chosen is None:
        every = files(request, path, IMAGE_ENDINGS)
    else:
        every = [("", entry) for entry in entries(path) if entry.is_file() and entry.suffix.lower() in IMAGE_ENDINGS]
    names = {(group, entry.stem) for group, entry in every}
    images: list[Found] = []
    masks: list[Found] = []
    for group, entry in every:
        name = _MASK_NAME.fullmatch(entry.stem)
        (masks if name and (group, name["image"]) in names else images).append((group, entry))
    if chosen is not None:
        selected = [item for item in images if fnmatch.fnmatchcase(item[1].name, chosen)]
        kept = {entry.stem for _, entry in selected}
        masks = [(group, entry) for group, entry in masks if kept & {image for image, _ in _readings(entry.stem)}]
        if not selected:
            raise request.wrong(f"no image of the pattern among {contents(entries(path))}")
        images = selected
    if not images:
        raise request.wrong(contents(entries(path)))
    return _labelled(request, request.classes or LESION, _paired(request, images, masks))


def open_isic2018(request: Request) -> Dataset:
    """ISIC 2018, task 1. Files of other names, such as the licence, are passed over."""
    root, split = request.root(), _ISIC_FOLDER[request.split]
    folders = (f"ISIC2018_Task1-2_{split}_Input", f"ISIC2018_Task1_{split}_GroundTruth")
    if not all((root / name).is_dir() for name in folders):
        raise request.wrong(found(root, *folders))
    images, masks = (
        [("", path) for path in entries(root / name) if pattern.fullmatch(path.name) and path.is_file()]
        for name, pattern in zip(folders, (_ISIC_IMAGE, _ISIC_MASK), strict=True)
    )
    if not images:
        raise request.wrong(found(root, *folders))
    return _labelled(request, request.own(LESION), _paired(request, images, masks))


def open_images(request: Request) -> Dataset:
    """Image files without labels, one case each."""
    root = request.root()
    images = files(request, root, IMAGE_ENDINGS)
    if not images:
        raise request.wrong(contents(entries(root)))
    return _labelled(request, request.classes or LESION, [(group, path, ()) for group, path in images])


def _readings(stem: str) -> list[tuple[str, str]]:
    """The images that a mask's name can belong to, and which part of one it then is."""
    name = _MASK_NAME.fullmatch(stem)
    return [(stem, "")] + ([(name["image"], name["part"])] if name else [])


def _paired(request: Request, images: Iterable[Found], masks: Iterable[Found]) -> list[Pair]:
    """Each image with its masks, in the images' order. Raises DataError unless every file has its place."""
    images, owners = list(images), defaultdict(list)
    names = {(group, path.stem) for group, path in images}
    if len(names) < len(images):
        raise request.wrong(
            f"{len(images)} images of {len(names)} names",
            "Give each image a name that differs by more than its ending.",
        )
    strays = doubtful = 0
    for group, path in masks:
        owned = [(image, part) for image, part in _readings(path.stem) if (group, image) in names]
        strays += not owned
        doubtful += len(owned) > 1
        for image, part in owned:
            owners[group, image].append((part, path))
    bare = sum((group, path.stem) not in owners for group, path in images)
    if bare or strays:
        raise request.wrong(
            f"{bare} of {len(images)} images without a mask and {strays} masks without an image",
            "Name a mask as its image, or add _mask, _mask_1, _segmentation or _lesion.",
        )
    # Only numbered masks (_mask, _mask_1, ...) are parts of one; others of one image are two opinions or two copies.
    for parts in owners.values():
        kinds = [part for part, _ in parts]
        numbered = all(part.startswith("mask") for part in kinds)
        doubtful += len(parts) > 1 and not (numbered and len(set(kinds)) == len(kinds))
    if doubtful:
        raise request.wrong(
            f"masks that fit in two ways, for {doubtful} of {len(images)} images", "Rename or remove them."
        )
    return [(group, path, tuple(mask for _, mask in owners[group, path.stem])) for group, path in images]


def _labelled(request: Request, classes: tuple[str, ...], pairs: list[Pair]) -> Dataset:
    cases = tuple(
        Case(
            f"image {number}",
            partial(read_pair, request.place("image", number, len(pairs)), image, masks, len(classes)),
            group,
        )
        for number, (group, image, masks) in enumerate(pairs, 1)
    )
    return Dataset(request.kind, classes, cases)


def read_pair(place: str, image: Path, masks: tuple[Path, ...], classes: int) -> Volume:
    """An image and the union of its masks."""
    frames, bits = read_image(image, place)
    if not masks:
        return Volume(frames, bits=bits)
    if len(masks) > 1 and classes > 2:
        raise DataError(
            place,
            f"found {len(masks)} masks",
            "expected one of class indices",
            "Masks are united with two classes only.",
        )
    labels = [read_mask(mask, f"{place}, its mask", classes, frames[0].shape) for mask in masks]
    if any(len(mask) != len(frames) for mask in labels):
        raise DataError(
            place, f"found {len(frames)} frames and a mask of another number", "expected the same", "Is it its mask?"
        )
    return Volume(frames, np.max(labels, axis=0), bits)
