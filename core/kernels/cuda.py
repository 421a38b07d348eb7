"""The gate's CUDA library; not built yet."""

from __future__ import annotations

from msa2net.core.kernels.reference import GateWeights
from torch import Tensor


def why_not() -> str | None:
    return "the CUDA library is not part of this version"


def forward(
    x: Tensor, g: Tensor, weights: GateWeights, norm: tuple[Tensor, Tensor] | None = None, *, tf32: bool = False
) -> Tensor:
    raise NotImplementedError
