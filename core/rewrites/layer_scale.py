"""The encoder's layer scale folds into the projection before it: gamma (W x + b) = (gamma W) x + gamma b."""

from __future__ import annotations

from torch import nn

from msa2net.core.maxvit import LayerScale, PartitionAttention
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites.fold import scale_after


def apply(model: MSA2Net) -> int:
    """Two sites in each encoder attention layer: 44 at the released size."""
    sites = 0
    for module in model.modules():
        if isinstance(module, PartitionAttention):
            for name, layer in (("ls1", module.attn.proj), ("ls2", module.mlp.fc2)):
                scale = module.get_submodule(name)
                assert isinstance(scale, LayerScale)
                scale_after(layer, scale.gamma)
                module.add_module(name, nn.Identity())
                sites += 1
    return sites
