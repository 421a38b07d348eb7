"""Exact inference-time rewrites of the reference network: the same function, in a form that exports better.

Each leaves its argument alone and returns a rewritten copy.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from msa2net.core.maxvit import RelativePosition, WindowAttention
from msa2net.core.network import MSA2Net


class PositionTable(nn.Module):
    """The attention bias (h, T, T) as a constant."""

    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias)

    def forward(self) -> Tensor:
        return self.bias


@torch.no_grad()
def store_position_bias(model: MSA2Net) -> MSA2Net:
    """Replaces each relative-position MLP by the table it computes.

    bias[j, q, k] = MLP(s(row(q) - row(k)), s(col(q) - col(k)))_j, s(d) = sign(d) ln(1 + |d|), has no input but
    constants, so in evaluation mode it is one. Raises ValueError for a network in training mode (its dropout is on).
    """
    if model.training:
        raise ValueError("model: got training mode, expected evaluation mode. Call model.eval() first.")
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, WindowAttention) and isinstance(module.rel_pos, RelativePosition):
            module.rel_pos = PositionTable(module.rel_pos())
    return model
