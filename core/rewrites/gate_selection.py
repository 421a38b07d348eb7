"""MASAG's selection collapses: after the dilated convolution's ReLU all is affine up to a softmax over two logits.

Let h (C channels) be the ReLU's output, m and M the mean and maximum of g over its channels. Every BatchNorm is an
affine map of its channels. The reference computes, at each pixel,

    local = P h + p,  global = q1 m + q2 M + q0,  z = D (local + global 1) + d,  (za, zb) = S z + s,
    a = exp(za) / (exp(za) + exp(zb)) = sigmoid(za - zb),  b = 1 - a.

With v = S_a - S_b (a row of C numbers) the difference is
    za - zb = u . h + alpha m + beta M + gamma,   u = P' D v,  k = v . (D 1),
    alpha = k q1,  beta = k q2,  gamma = v . (D p + d) + k q0 + s_a - s_b:
one C-vector, two scalars and a constant for C x C + 2 C weights. And what follows is written with
silu(z) = z sigmoid(z): the product of the two modulated maps, (sigmoid(g') x') (sigmoid(x') g'), is silu(x') silu(g').
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msa2net.core.masag import MASAG
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites.fold import affine_of, set_weights


class CollapsedMASAG(nn.Module):
    """The gate, x and g (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, gate: MASAG) -> None:
        super().__init__()
        self.dconv, self.proj, self.bn = gate.multi.local.dconv, gate.proj, gate.bn
        self.conv_block, self.bn_2 = gate.conv_block, gate.bn_2
        u, alpha, beta, gamma = collapsed(gate)
        self.select = nn.Conv2d(len(u), 1, 1, dtype=gate.selection.weight.dtype, device="meta")
        set_weights(self.select, u.view(1, -1, 1, 1), gamma.view(1))
        self.alpha, self.beta = float(alpha), float(beta)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        context = self.alpha * g.mean(1, keepdim=True) + self.beta * g.amax(1, keepdim=True)
        to_x = torch.sigmoid(self.select(self.dconv(x)) + context)  # (B, 1, H, W)
        product = F.silu(x * (1 + to_x)) * F.silu(g * (2 - to_x))
        weight = torch.sigmoid(self.bn(self.proj(product)))
        return self.bn_2(self.conv_block(weight * x))


def collapsed(gate: MASAG) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u (C), alpha, beta and gamma of the module's equations, float64."""
    local, context = gate.multi.local.proj, gate.multi.global_.proj
    scale, shift = _affine(local[1])
    projection = scale[:, None] * _matrix(local[0])
    offset = scale * _bias(local[0]) + shift
    scale, shift = _affine(context[1])
    q, q0 = (scale * _matrix(context[0])[0]), scale * _bias(context[0]) + shift
    d_scale, d_shift = _affine(gate.multi.bn)
    selection, s = _matrix(gate.selection), _bias(gate.selection)
    v = selection[0] - selection[1]
    k = (v * d_scale).sum()
    gamma = v @ (d_scale * offset + d_shift) + k * q0[0] + s[0] - s[1]
    return projection.T @ (d_scale * v), k * q[0], k * q[1], gamma


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(norm, nn.Identity):  # folded before
        return torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert isinstance(norm, nn.BatchNorm2d)
    return affine_of(norm)


def _matrix(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    return layer.weight.double().flatten(1)


def _bias(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    return layer.bias.double()


@torch.no_grad()
def apply(model: MSA2Net) -> int:
    """One site for each gate that is used: 3 in the dual form, 2 in the LKA form."""
    sites = 0
    for layer in (model.decoder_2, model.decoder_1, model.decoder_0):
        if layer.gated and isinstance(layer.ag_attn, MASAG):
            layer.add_module("ag_attn", CollapsedMASAG(layer.ag_attn))
            sites += 1
    return sites
