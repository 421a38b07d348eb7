"""Phantoms drawn when they are read: a data set that needs no file."""

from __future__ import annotations

import re
from functools import partial

from msa2net.core.data.cases import Case, Dataset, Volume
from msa2net.core.data.layout import LESION, Request
from msa2net.core.phantoms import KINDS, phantom

TEST_SEED = 1_000_000  # the first of the seeds that nothing is trained on


def open_phantoms(request: Request) -> Dataset:
    """N of each kind, the kinds in turn."""
    numbers = re.fullmatch(r"([0-9]{1,9})(?:@([0-9]{1,18}))?", request.target)
    if not numbers or not int(numbers[1]):
        raise request.wrong("another text", "Such as phantoms:100 or phantoms:100@2000000.")
    first = TEST_SEED if numbers[2] is None else int(numbers[2])
    cases = tuple(
        Case(f"phantom {kind} {seed}", partial(read_phantom, kind, seed), kind)
        for seed in range(first, first + int(numbers[1]))
        for kind in KINDS
    )
    return Dataset(request.kind, request.own(LESION), cases)


def read_phantom(kind: str, seed: int) -> Volume:
    """The phantom as a case of one frame."""
    drawn = phantom(kind, seed)
    return Volume((drawn.image,), drawn.mask[None])
