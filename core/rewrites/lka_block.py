"""The LKA block's two layer scales and two norms' affine maps fold into its 1 x 1 convolutions.

Reference: y = s n(x) + t;  x' = x + a (P2(g) + y),  x'' = x' + c M(s' n(x') + t'), g the gated map of P1(y).
Here:      n = n(x);        x' = x + (a P2)(g) + (a s) n + a t,  x'' = x' + (c M)(n(x')),
with s and t folded into P1, a t into the bias of a P2, s' and t' into the first layer of M.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msa2net.core.decoder import LKABlock
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites.fold import affine_of, scale_after, scale_before


class FoldedLKABlock(nn.Module):
    """(B, C, H, W) -> (B, C, H, W)."""

    shortcut_scale: Tensor  # (C, 1, 1)

    def __init__(self, block: LKABlock) -> None:
        super().__init__()
        self.eps = block.norm1.eps
        self.proj_1, self.proj_2 = block.attn.proj_1, block.attn.proj_2
        self.large_kernel, self.mlp = block.attn.spatial_gating_unit, block.mlp
        scale, shift = affine_of(block.norm1)
        outer = block.layer_scale_1.double()
        scale_before(self.proj_1, scale, shift)
        scale_after(self.proj_2, outer, outer * shift)
        self.register_buffer("shortcut_scale", (outer * scale).to(block.layer_scale_1.dtype)[:, None, None])
        scale_before(self.mlp.fc1, *affine_of(block.norm2))
        scale_after(self.mlp.fc2, block.layer_scale_2)

    def _normalised(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.layer_norm(x.permute(0, 2, 3, 1), (channels,), eps=self.eps).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalised(x)
        x = x + self.proj_2(self.large_kernel(F.gelu(self.proj_1(y)))) + self.shortcut_scale * y
        return x + self.mlp(self._normalised(x))


@torch.no_grad()
def apply(model: MSA2Net) -> int:
    """Two sites in each decoder layer with LKA blocks that is used: 4 in the dual form, 6 in the LKA form."""
    sites = 0
    for layer in (model.decoder_2, model.decoder_1, model.decoder_0):
        for name in ("layer_lka_1", "layer_lka_2"):
            if isinstance(block := getattr(layer, name, None), LKABlock):
                setattr(layer, name, FoldedLKABlock(block))
                sites += 1
    return sites
