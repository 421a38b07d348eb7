"""The relative-position bias is a constant: an MLP of constant coordinates.

bias[j, q, k] = MLP(s(row(q) - row(k)), s(col(q) - col(k)))_j with s(d) = sign(d) ln(1 + |d|).
"""

from __future__ import annotations

from torch import Tensor, nn

from msa2net.core.maxvit import RelativePosition, WindowAttention
from msa2net.core.network import MSA2Net


class PositionTable(nn.Module):
    """The attention bias (h, T, T), stored."""

    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias)

    def forward(self) -> Tensor:
        return self.bias


def apply(model: MSA2Net) -> int:
    """One site for each encoder attention: 22 at the released size."""
    sites = 0
    for module in model.modules():
        if isinstance(module, WindowAttention) and isinstance(module.rel_pos, RelativePosition):
            module.rel_pos = PositionTable(module.rel_pos().contiguous())
            sites += 1
    return sites
