"""Convolutions and linear layers with weights in the CPU library's own layout, and SiLU and GELU inside the product.

PyTorch's eager CPU path brings each convolution's weights into oneDNN's blocked layout at every call and writes a
product's result before it reads it again for the activation. oneDNN does neither when it is given weights that are
packed once and the activation as part of the product: silu(W x + b) and gelu(W x + b) in one pass. For PyTorch on an
x86-64 CPU in float32; the operators are those that PyTorch's own compiler uses. Weights are packed at the first call,
which two threads may not make at once; a packed network cannot be copied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msa2net.core.maxvit import MBConv, Mlp
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites.fold import give_back


class PackedConv(nn.Module):
    """A convolution, and `activation` ("none" or "swish") of its result. (B, C, H, W) -> (B, C', H', W').

    Packed at the first call, when the size of the map is known.
    """

    def __init__(self, layer: nn.Conv2d, activation: str = "none") -> None:
        super().__init__()
        assert isinstance(layer.padding, tuple)
        self.weight: Tensor | None = None
        self.layer: nn.Conv2d | None = layer
        self.bias = layer.bias
        self.settings = list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.layer is not None:
            weight = self.layer.weight.detach().contiguous(memory_format=torch.channels_last)
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.settings, list(x.shape))
            self.layer = None
            del weight
            give_back()
        run = torch.ops.mkldnn._convolution_pointwise
        packed: Tensor = run(x, self.weight, self.bias, *self.settings, self.activation, [], "")
        return packed


class PackedLinear(nn.Module):
    """A linear layer, and `activation` ("none" or "gelu") of its result. (..., C) -> (..., C')."""

    def __init__(self, layer: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.weight: Tensor | None = None
        self.layer: nn.Linear | None = layer
        self.bias = layer.bias
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.layer is not None:
            rows = x.numel() // x.shape[-1]
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.layer.weight.detach(), rows)
            self.layer = None
            give_back()
        run = torch.ops.mkldnn._linear_pointwise
        packed: Tensor = run(x, self.weight, self.bias, self.activation, [], "none")  # erf, not tanh
        return packed


class PackedMlp(nn.Module):
    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.fc2 = PackedLinear(mlp.fc1, "gelu"), PackedLinear(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x))
        return out


class PackedMBConv(nn.Module):
    """An inverted bottleneck whose BatchNorms are folded."""

    def __init__(self, block: MBConv) -> None:
        super().__init__()
        self.conv1, self.conv2 = PackedConv(block.conv1_1x1, "swish"), PackedConv(block.conv2_kxk, "swish")
        self.se, self.conv3, self.shortcut = block.se, block.conv3_1x1, block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3(self.se(self.conv2(self.conv1(x)))) + self.shortcut(x)
        return out


def apply(model: MSA2Net) -> int:
    """One site for each convolution and linear layer that is used."""
    sites = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Mlp):
                module.add_module(name, PackedMlp(child))
            elif isinstance(child, MBConv) and isinstance(child.norm1, nn.Identity):
                module.add_module(name, PackedMBConv(child))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and not isinstance(module, PackedConv):
                module.add_module(name, PackedConv(child))
            elif isinstance(child, nn.Linear) and not isinstance(module, PackedLinear):
                module.add_module(name, PackedLinear(child))
    for module in model.modules():
        sites += isinstance(module, PackedConv | PackedLinear)
    return sites
