"""Figures that export, benchmarks and the self-test share: agreement of masks, Dice, percentiles. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]


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
    if len(samples) * min(p, 100 - p) / 100 < 5 and p != 50:
        return None
    return float(np.percentile(samples, p, method="inverted_cdf" if p != 50 else "linear"))


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 3,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times every call once per round, in an order that rotates, so that a drifting machine hits all alike.

    Returns milliseconds per call, in the order measured. `tick` is called after each round (for a progress bar).
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            start = perf_counter_ns()
            calls[name]()
            samples[name].append((perf_counter_ns() - start) / 1e6)
        tick()
    return samples
