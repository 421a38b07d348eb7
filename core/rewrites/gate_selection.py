"""MASAG's selection collapses: after the dilated convolution's ReLU all is affine up to a softmax over two logits.

See `core.kernels.reference` for the equations, and its `selection` for what is folded. Here they are written with
PyTorch's layers, which the exporters turn into standard operators.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msa2net.core.kernels.reference import selection
from msa2net.core.masag import MASAG
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites.fold import set_weights


class CollapsedMASAG(nn.Module):
    """The gate, x and g (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, gate: MASAG) -> None:
        super().__init__()
        self.dconv, self.proj, self.bn = gate.multi.local.dconv, gate.proj, gate.bn
        self.conv_block, self.bn_2 = gate.conv_block, gate.bn_2
        u, context = selection(gate)
        self.select = nn.Conv2d(len(u), 1, 1, dtype=gate.selection.weight.dtype, device="meta")
        set_weights(self.select, u.view(1, -1, 1, 1), context[2:])
        self.alpha, self.beta, _ = context.tolist()

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        context = self.alpha * g.mean(1, keepdim=True) + self.beta * g.amax(1, keepdim=True)
        to_x = torch.sigmoid(self.select(self.dconv(x)) + context)  # (B, 1, H, W)
        product = F.silu(x * (1 + to_x)) * F.silu(g * (2 - to_x))
        weight = torch.sigmoid(self.bn(self.proj(product)))
        return self.bn_2(self.conv_block(weight * x))


@torch.no_grad()
def apply(model: MSA2Net) -> int:
    """One site for each gate that is used: 3 in the dual form, 2 in the LKA form."""
    sites = 0
    for layer in (model.decoder_2, model.decoder_1, model.decoder_0):
        if layer.gated and isinstance(layer.ag_attn, MASAG):
            layer.add_module("ag_attn", CollapsedMASAG(layer.ag_attn))
            sites += 1
    return sites
