"""Figures that export, benchmarks and the self-test share: agreement of masks, Dice, percentiles. numpy only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]
T = TypeVar("T")


def dice(prediction: Mask, truth: Mask, label: int = 1) -> float:
    """Dice coefficient of one class, 0 to 1: 2 |P and T| / (|P| + |T|). Both empty: 1."""
    predicted, true = prediction == label, truth == label
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else 1.0


def pixel_agreement(a: Mask, b: Mask) -> float:
    """Share of equal pixels, 0 to 1."""
    return float(np.mean(a == b))


def percentile(samples: Sequence[float], p: float) -> float | None:
    """The p-th percentile (0 to 100) by nearest rank; None where fewer than 5 samples lie beyond it.

    A p99 of 50 samples is their maximum under another name, so it is left out.
    """
    if round(len(samples) * min(p, 100 - p) / 100, 6) < 5 and p != 50:
        return None
    return float(np.percentile(samples, p, method="inverted_cdf" if p != 50 else "linear"))


def timed(call: Callable[[], object]) -> float:
    """Milliseconds that one call takes."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def interleaved(
    calls: Mapping[str, Callable[[], T]],
    rounds: Iterable[int],
    *,
    every: Mapping[str, int] | None = None,
    pause: float = 0,
) -> dict[str, list[T]]:
    """Runs every call once a round, in an order that rotates, so that a drifting machine hits all alike.

    Returns what each call returned (wrap it in `timed` for milliseconds), in order.
    rounds   their numbers, such as range(100), or a progress bar over that
    every    calls that run in each n-th round only
    pause    seconds before each call, for the threads of the call before to stop spinning
    """
    names = list(calls)
    samples: dict[str, list[T]] = {name: [] for name in names}
    for i in rounds:
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            if every and i % every.get(name, 1):
                continue
            time.sleep(pause)
            samples[name].append(calls[name]())
    return samples
