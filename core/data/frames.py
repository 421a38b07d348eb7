"""Cases to frames in memory, as the network sees them: what a training runs over."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from msa2net.core.config import IMAGE_SIZE
from msa2net.core.data.cases import Case, Dataset
from msa2net.errors import DataError
from msa2net.runtimes.bundle import ENLARGE_OF, InputContract
from msa2net.runtimes.postprocess import nearest_grid
from msa2net.runtimes.preprocess import check_frame, to_tensor

_FEW = 64  # cases that are read in this process: starting others takes longer


@dataclass(frozen=True)
class Frames:
    """Frames as the network sees them, before mean and std, in memory.

    images   (N, C, 224, 224) float16 in [0, 1], C 1 if all are grey, else 3; a spline's overshoot is kept
    labels   (N, 224, 224) uint8
    groups   the group of each
    """

    images: NDArray[np.float16]
    labels: NDArray[np.uint8]
    groups: tuple[str, ...]


def _contract(channels: int, resize: str) -> InputContract:
    return InputContract(
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        channels=channels,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        resize=resize,
    )


def _read(case: Case, resize: str) -> list[tuple[NDArray[np.float16], NDArray[np.uint8]]]:
    """Each frame of a case, (C, 224, 224), and its labels, (224, 224)."""
    volume = case.read()
    if volume.labels is None:
        raise DataError(case.name, "has no labels", "expected some to train on", "Add masks, or use another kind.")
    found = []
    for frame, labels in zip(volume.frames, volume.labels, strict=True):
        pixels = check_frame(frame, volume.bits)
        image = to_tensor(pixels, _contract(3 if pixels.ndim == 3 else 1, resize), volume.bits)[0]
        # On the grid that the image is resized on.
        rows, columns = nearest_grid(labels.shape, (IMAGE_SIZE, IMAGE_SIZE), ENLARGE_OF[resize])
        found.append((image.astype(np.float16), labels[rows[:, None], columns]))
    return found


@contextmanager
def _readers(cases: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map`, over processes if there are many cases: one a core, each with one BLAS thread."""
    if cases <= _FEW:
        yield map
        return
    variable = "OPENBLAS_NUM_THREADS"  # read when numpy is first imported, so the children start afresh
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
            yield partial(pool.map, chunksize=16)
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def load_frames(cases: Sequence[Case], resize: str, label: str) -> Frames:
    """All frames of the cases, resized by the pixel contract's own code. Raises DataError if a case has no labels."""
    images: list[NDArray[np.float16]] = []
    labels: list[NDArray[np.uint8]] = []
    groups: list[str] = []
    with _readers(len(cases)) as mapped:
        read = mapped(partial(_read, resize=resize), cases)
        for case, found in zip(cases, tqdm(read, label, len(cases), unit="case", disable=None), strict=True):
            images += [image for image, _ in found]
            labels += [mask for _, mask in found]
            groups += [case.group] * len(found)
    channels = max((len(image) for image in images), default=1)
    stacked = np.empty((len(images), channels, IMAGE_SIZE, IMAGE_SIZE), np.float16)
    for i in range(len(images)):
        stacked[i] = images[i]
        images[i] = stacked[i]  # frees the copy: a data set is not held twice
    return Frames(stacked, np.stack(labels), tuple(groups))


def split(dataset: Dataset, share: float, seed: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Cases to train on and to validate on, those of one patient on one side.

    Raises DataError unless the share, of patients, leaves some on both sides.
    """
    patient_of = [case.patient or case.name for case in dataset.cases]
    patients = sorted(set(patient_of))
    count = round(len(patients) * share) if 0 < share < 1 else 0
    if not 0 < count < len(patients):
        raise DataError(
            "--validation", f"got a share of {share:g} of {len(patients)} cases", "expected some on both sides", ""
        )
    chosen = {patients[i] for i in np.random.default_rng(seed).permutation(len(patients))[:count]}
    pairs = list(zip(dataset.cases, patient_of, strict=True))
    return (
        tuple(case for case, patient in pairs if patient not in chosen),
        tuple(case for case, patient in pairs if patient in chosen),
    )
