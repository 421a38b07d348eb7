"""LayerNorm's scale and shift fold into the layer after it: W (s n(x) + t) + b = (W s) n(x) + (W t + b).

n(x) = (x - mean) / sqrt(var + eps) stays. Where more than one layer reads the norm, each is folded into.
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from msa2net.core.decoder import DualAttentionBlock
from msa2net.core.maxvit import PartitionAttention
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites.fold import affine_of, scale_before


def apply(model: MSA2Net) -> int:
    """Two sites in each encoder attention layer (44 at the released size), four in each dual block that is used, and
    four from encoder to decoder and between decoder layers. The norm before the class projection is left to
    `last_expansion`."""
    sites = 0
    for module in model.modules():
        if isinstance(module, PartitionAttention):
            sites += _fold(module.norm1, module.attn.qkv) + _fold(module.norm2, module.mlp.fc1)
        elif isinstance(module, DualAttentionBlock):
            attention = module.attn
            sites += _fold(module.norm1, attention.keys, attention.queries, attention.values)
            sites += _fold(module.norm2, module.mlp1.fc1) + _fold(module.norm3, module.channel_attn.qkv)
            sites += _fold(module.norm4, module.mlp2.fc1)
    layers = (model.decoder_3, model.decoder_2, model.decoder_1, model.decoder_0)
    sites += _fold(model.backbone.backbone.norm, model.decoder_3.layer_up.expand)
    for deep, shallow in pairwise(layers):
        sites += _fold(deep.layer_up.norm, shallow.x1_linear)
    return sites


def _fold(norm: nn.LayerNorm, *readers: nn.Conv2d | nn.Linear) -> int:
    for reader in readers:
        scale_before(reader, *affine_of(norm))
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)
    norm.elementwise_affine = False
    return 1
