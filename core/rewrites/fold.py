"""Folding per-channel affine maps into the convolution or linear layer beside them: what the other rewrites share.

All sums are made in float64 and rounded once, so that a fold costs no more than half a unit in the last place.
"""

from __future__ import annotations

import ctypes

from torch import Tensor, nn

from msa2net.core.kernels.reference import affine


def set_weights(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Replaces weight and bias, in the layer's own dtype; the layer may gain a bias."""
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)


def give_back() -> None:
    """Returns what replaced weights took to the system: glibc keeps it, a quarter of a rewritten network's memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def scale_after(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor | None = None) -> None:
    """scale * (W x + b) + shift = (scale W) x + (scale b + shift), one number per output channel."""
    scale = scale.double()
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    bias = None if layer.bias is None else layer.bias.double() * scale
    if shift is not None:
        bias = shift.double() if bias is None else bias + shift.double()
    set_weights(layer, weight, bias)


def scale_before(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """W (scale x + shift) + b = (W scale) x + (W shift + b), one number per input channel.

    For a linear layer or an ungrouped 1 x 1 convolution without padding: padding would add zeros that are not shifted.
    """
    weight = layer.weight.double()
    assert weight[0, 0].numel() == 1
    matrix = weight.flatten(1)
    bias = matrix @ shift.double()
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    set_weights(layer, (matrix * scale.double()).view_as(weight), bias)


def affine_of(norm: nn.BatchNorm2d | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift, float64: of a BatchNorm in evaluation mode, or of what a LayerNorm does after normalising."""
    return (norm.weight.double(), norm.bias.double()) if isinstance(norm, nn.LayerNorm) else affine(norm)
