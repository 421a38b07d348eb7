"""The attention's scale folds into the query weights: (s (W_q x + b_q)) . k = ((s W_q) x + s b_q) . k, s = d**-0.5."""

from __future__ import annotations

import torch

from msa2net.core.maxvit import WindowAttention
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites.fold import scale_after


def apply(model: MSA2Net) -> int:
    """One site for each encoder attention: 22 at the released size."""
    sites = 0
    for module in model.modules():
        if isinstance(module, WindowAttention) and module.scale != 1:
            scale = torch.ones(module.heads, 3, module.head_width)
            scale[:, 0] = module.scale  # head-major outputs: of each head q, then k, then v
            scale_after(module.qkv, scale.flatten())
            module.scale = 1.0
            sites += 1
    return sites
