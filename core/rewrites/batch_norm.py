"""BatchNorm folds into the convolution beside it.

In evaluation mode BN(x) = s x + t with s = weight / sqrt(var + eps), t = bias - s mean. After a convolution,
BN(W x + b) = (s W) x + (s b + t). Before a 1 x 1 convolution without padding, W BN(x) + b = (W s) x + (W t + b).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from msa2net.core.masag import MASAG
from msa2net.core.maxvit import MBConv, Stem
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites.fold import affine_of, scale_after, scale_before


def apply(model: MSA2Net) -> int:
    """33 sites in the encoder's blocks of the released size, 1 in the stem, 7 in each gate that is used."""
    sites = 0
    for module in model.modules():
        if isinstance(module, Stem):
            sites += _after(module.conv1, module, "norm1")
        elif isinstance(module, MBConv):
            sites += _before(module.conv1_1x1, module, "pre_norm")
            sites += _after(module.conv1_1x1, module, "norm1") + _after(module.conv2_kxk, module, "norm2")
        elif isinstance(module, MASAG):
            local, context = module.multi.local, module.multi.global_
            sites += _after(local.dconv[0], local.dconv, "1") + _after(local.dconv[3], local.dconv, "4")
            sites += _after(local.proj[0], local.proj, "1") + _after(context.proj[0], context.proj, "1")
            sites += _before(module.selection, module.multi, "bn")
            sites += _after(module.proj, module, "bn") + _after(module.conv_block[0], module, "bn_2")
    return sites


def _fold(fold: Callable[..., None], layer: nn.Module, owner: nn.Module, name: str) -> int:
    norm = owner.get_submodule(name)
    assert isinstance(norm, nn.BatchNorm2d)
    fold(layer, *affine_of(norm))
    owner.add_module(name, nn.Identity())
    return 1


_after, _before = partial(_fold, scale_after), partial(_fold, scale_before)
