"""The last 4 x expansion projects to classes before it shuffles pixels, and normalises by one number per pixel.

The shuffle moves pixels and the norm and projection are per pixel, so they commute. For the sub-pixel p of a token t,
z_p = E_p t (C channels) and the reference computes P (w n(z_p) + b) + c with n(z) = (z - mean(z)) / sqrt(var(z) + eps).
With D_p = E_p less the mean of its rows, z_p - mean(z_p) = D_p t, so that

    logits_p = (P w D_p) t / sqrt(|D_p t|^2 / C + eps) + (P b + c):

K numbers per pixel are computed and shuffled in place of C, and of the C only their sum of squares is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msa2net.core.decoder import DecoderLayer
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites.fold import affine_of


class ProjectingExpand(nn.Module):
    """(B, H*W, C) -> logits (B, K, 4H, 4W)."""

    offset: Tensor  # (K)

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        up, last = layer.layer_up, layer.last_layer
        assert last is not None
        assert last.bias is not None
        self.scale, self.eps = up.scale, up.norm.eps
        self.channels, self.classes = last.in_channels, last.out_channels
        weight, shift = affine_of(up.norm)
        projection = last.weight.double().flatten(1)
        expand = up.expand.weight.double().view(self.scale**2, self.channels, -1)
        centred = expand - expand.mean(1, keepdim=True)
        dtype, width = up.expand.weight.dtype, expand.shape[-1]
        self.deviation = nn.Linear(width, self.scale**2 * self.channels, bias=False, device="meta")
        self.project = nn.Linear(width, self.scale**2 * self.classes, bias=False, device="meta")
        self.deviation.weight = nn.Parameter(centred.reshape(-1, width).to(dtype), requires_grad=False)
        classes = ((projection * weight) @ centred).reshape(-1, width)
        self.project.weight = nn.Parameter(classes.to(dtype), requires_grad=False)
        self.register_buffer("offset", (projection @ shift + last.bias.double()).to(dtype))

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        batch, scale = tokens.shape[0], self.scale
        deviation = self.deviation(tokens).view(batch, -1, scale**2, self.channels)
        power = (deviation * deviation).mean(-1, keepdim=True)  # (B, N, s*s, 1)
        logits = self.project(tokens).view(batch, -1, scale**2, self.classes)
        logits = logits * torch.rsqrt(power + self.eps) + self.offset
        logits = logits.view(batch, height, width, scale, scale, self.classes).permute(0, 5, 1, 3, 2, 4)
        return logits.reshape(batch, self.classes, height * scale, width * scale)


@torch.no_grad()
def apply(model: MSA2Net) -> int:
    """One site."""
    model.decoder_0.add_module("layer_up", ProjectingExpand(model.decoder_0))
    model.decoder_0.last_layer = None
    return 1
