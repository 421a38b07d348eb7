"""The encoder attention's queries, keys and values as three products in place of one that is split.

The released weights order the 3C outputs head by head, each head's q, k, v side by side, so splitting them strides
through memory. A product's outputs may be permuted and cut freely: with the rows of W_qkv sorted into W_q, W_k, W_v,
    (q, k, v) = (W_q x + b_q, W_k x + b_k, W_v x + b_v),
each of them contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msa2net.core.maxvit import TOKENS, WindowAttention
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites.fold import set_weights


class SeparateHeads(WindowAttention):
    """The same attention."""

    def __init__(self, attention: WindowAttention) -> None:
        nn.Module.__init__(self)
        self.head_width, self.heads, self.scale = attention.head_width, attention.heads, attention.scale
        self.rel_pos, self.proj = attention.rel_pos, attention.proj
        width = self.heads * self.head_width
        weight = attention.qkv.weight.view(self.heads, 3, self.head_width, width)
        bias = attention.qkv.bias.view(self.heads, 3, self.head_width)
        self.q, self.k, self.v = (nn.Linear(width, width, dtype=weight.dtype, device="meta") for _ in range(3))
        for i, layer in enumerate((self.q, self.k, self.v)):
            set_weights(layer, weight[:, i].reshape(width, width), bias[:, i].flatten())

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            layer(x).view(-1, TOKENS, self.heads, self.head_width).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return q, k, v


@torch.no_grad()
def apply(model: MSA2Net) -> int:
    """One site for each encoder attention: 22 at the released size."""
    sites = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is WindowAttention:
                setattr(module, name, SeparateHeads(child))
                sites += 1
    return sites
