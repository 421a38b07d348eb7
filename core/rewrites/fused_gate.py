"""The gate, the residual sum after it and the LayerNorm after that as one operator, `torch.ops.msa2net.masag`.

For a GPU, where it is three launches; on a CPU the operator computes its reference. See `core.kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msa2net.core.kernels.operator import masag, select
from msa2net.core.kernels.reference import EPS, GateWeights, collapse
from msa2net.core.masag import MASAG
from msa2net.core.network import MSA2Net


class FusedGate(nn.Module):
    """LayerNorm(g + gate(x, g)): x and g (B, C, H, W) -> (B, C, H, W), channels-last.

    `kernel` is one of `operator.KERNELS`; the network's precision is IEEE in float32.
    """

    def __init__(self, gate: MASAG, norm: nn.LayerNorm) -> None:
        super().__init__()
        assert norm.eps == EPS
        self.kernel = gate.kernel
        for name, value in collapse(gate)._asdict().items():
            self.register_buffer(name, value)
        self.norm = norm

    def kernel_for(self, x: Tensor) -> str:
        """What computes the gate of this map. Raises KernelError."""
        return select(self.kernel, x)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        weights = (getattr(self, name) for name in GateWeights._fields)
        return masag(x, g, *weights, self.norm.weight, self.norm.bias, kernel=self.kernel)


@torch.no_grad()
def apply(model: MSA2Net) -> int:
    """One site for each gate that is used: 3 in the dual form, 2 in the LKA form."""
    sites = 0
    for layer in (model.decoder_2, model.decoder_1, model.decoder_0):
        if layer.gated and isinstance(layer.ag_attn, MASAG):
            layer.fused_gate = FusedGate(layer.ag_attn, layer.ag_attn_norm)
            del layer.ag_attn, layer.ag_attn_norm
            sites += 1
    return sites
