"""Lower precisions: which places of the network lose accuracy, measured one by one, and the few that stay in fp32.

A place is a block of the network, `decoder_0.layer_lka_1`. It is measured inside the whole network: it alone is
lowered, and the logits are held against those of fp32. The worst are then kept in fp32, as few as make the artifact's
verdict "high": what is judged is the whole artifact, the ranking only says in which order to try.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import ExportError

BOUNDARY = 0.05  # the share of pixels, those nearest to a change of class, that the error is taken over
_BLOCK = re.compile(r"backbone\.backbone\.(stem|stages\.\d+\.blocks\.\d+)|(decoder_\d+(?:\.\w+)?)")
Logits = NDArray[np.float32]
Infer = Callable[[NDArray[np.float32]], Logits]


class Lowering(Protocol):
    """A network in a lower precision, place by place.

    places      the names that `infer` and `write` take
    reference   the network in fp32, in the same runtime
    infer       the network with some places kept in fp32; raises RuntimeError where the runtime cannot mix them so
    write       the artifact with these kept; returns its files below the bundle
    """

    places: tuple[str, ...]

    def reference(self) -> Infer: ...

    def infer(self, kept: Collection[str]) -> Infer: ...

    def write(self, kept: Collection[str]) -> tuple[str, ...]: ...


def place_of(node: str) -> str:
    """The block that a node of this name is of; "other" if the name tells none."""
    found = _BLOCK.match(node)
    return (found[1] or found[2]) if found else "other"


def boundary_error(expected: Sequence[Logits], found: Sequence[Logits]) -> float:
    """Root mean square change of the lead of fp32's class over the next, over the pixels where it is smallest.

    Logits (1, K, h, w) of each frame. There alone a change moves the mask: far from it even a large one does not.
    """
    squares: list[float] = []
    for want, got in zip(expected, found, strict=True):
        order = want[0].argsort(0)[-2:]
        lead, changed = (np.subtract(*np.take_along_axis(each[0], order, 0)[::-1]) for each in (want, got))
        near = lead <= np.quantile(lead, BOUNDARY)
        squares.append(float(np.square(changed - lead)[near].mean(dtype=np.float64)))
    return float(np.sqrt(np.mean(squares)))


def rank(
    lowering: Lowering, tensors: Sequence[NDArray[np.float32]], tick: Callable[[str], object] = len, workers: int = 1
) -> dict[str, Any]:
    """The places by the error that each makes alone, the largest first.

    tensors   a few inputs (1, C, h, w)
    tick      called with the name of each place as it is measured
    workers   how many places are measured at a time

    `error` and each place's `error` are of logits, see `boundary_error`; `share` is of the squared error of the network
    with nothing kept. What no place accounts for, `error_of_unmarkable`, is subtracted from each (OpenVINO 2026.4 runs
    a fully connected layer in bf16 although it is marked to stay in fp32). A place that the runtime cannot run apart
    has no figures.
    """

    def run(infer: Infer) -> list[Logits]:
        return [infer(tensor) for tensor in tensors]

    tick("fp32")
    expected = run(lowering.reference())
    everything = set(lowering.places)
    tick("nothing kept")
    whole = boundary_error(expected, run(lowering.infer(())))
    tick("all kept")
    base = boundary_error(expected, run(lowering.infer(everything)))

    def measured(name: str) -> dict[str, Any]:
        try:
            alone = boundary_error(expected, run(lowering.infer(everything - {name})))
        except RuntimeError:
            return {"place": name, "error": None, "share": None}
        power = max(0.0, alone**2 - base**2)
        return {"place": name, "error": power**0.5, "share": power / whole**2 if whole else 0.0}

    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(workers) as pool:
        for name, row in zip(lowering.places, pool.map(measured, lowering.places), strict=True):
            tick(name)
            rows.append(row)
    rows.sort(key=lambda row: -(row["share"] or 0.0))
    return {"frames": len(tensors), "error": whole, "error_of_unmarkable": base, "places": rows}


def named(places: Sequence[str], names: Collection[str]) -> tuple[str, ...]:
    """The places that are called so, or are parts of what is: "stages.0" names all of that stage's layers.

    Raises ExportError for a name that no place has.
    """
    found: list[str] = []
    for name in names:
        those = [place for place in places if place == name or place.startswith((f"{name}.", f"{name}/"))]
        if not those:
            near = difflib.get_close_matches(name, places, 3, 0)
            raise ExportError(
                "--keep", f"no place is called {name!r}", f"the nearest are {', '.join(near)}", "Check it."
            )
        found += those
    return tuple(dict.fromkeys(found))


def fewest(most: int, good: Callable[[int], bool]) -> None:
    """Tries 0, 1, 2, 4, … up to `most` places until `good`, then numbers between the last two, to an eighth."""
    low, high = -1, 0
    while not good(high):
        if high == most:
            return
        low, high = high, min(2 * high or 1, most)
    while high - low > max(1, high // 8):
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
