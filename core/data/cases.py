"""What every reader gives: a data set of cases, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Volume:
    """The pixels of one case.

    frames    D arrays, (H, W) grey or (H, W, 3) RGB, that `runtimes.preprocess.check_frame` accepts: uint8, uint16,
              or float32 in [0, 1]
    labels    (D, H, W) uint8 class indices; None if the data has none
    bits      how many bits the values of uint16 frames have; None for all 16, and for other types
    spacing   millimetres between neighbouring (frames, rows, columns), or None where the data does not say
    """

    frames: tuple[NDArray[Any], ...]
    labels: NDArray[np.uint8] | None = None
    bits: int | None = None
    spacing: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Case:
    """One image or one patient's volume.

    name     such as "image 12": for reports, so it tells nothing of a patient
    read     gives the pixels; a function of a module or a `functools.partial` of one, so that it can go to a process
    group    cases of one group are reported together; "" if the data has no groups
    patient  cases of one patient are never split; never shown; "" if each case is a patient's own
    """

    name: str
    read: Callable[[], Volume]
    group: str = ""
    patient: str = ""

    def frame_name(self, index: int, count: int) -> str:
        """What reports call one of its `count` frames, numbered from 1; the case's own name if it is the only one."""
        return f"{self.name} frame {index + 1}" if count > 1 else self.name


@dataclass(frozen=True)
class Dataset:
    """kind, the names of its K classes (the background first), and its cases in a fixed order."""

    kind: str
    classes: tuple[str, ...]
    cases: tuple[Case, ...]
