"""int8's rounding during a training, so that the weights learn to bear it (Jacob et al., CVPR 2018, section 3).

As in the artifacts: weights symmetric with a scale for each output channel, here of 7 bits as in the portable one;
activations with a zero point and one scale over what the batch holds. The gradient passes the rounding as if it were
not there. The products of two activations stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_LIMIT = 63  # of 7 bits, symmetric
_TINY = 1e-8


def rounded_weight(weight: Tensor) -> Tensor:
    """Each output channel (dimension 0) on its own grid of 127 steps, symmetric around 0."""
    with torch.no_grad():
        scale = (weight.detach().flatten(1).abs().amax(1) / WEIGHT_LIMIT).clamp_min(_TINY)
        zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -WEIGHT_LIMIT, WEIGHT_LIMIT)


def rounded_activation(x: Tensor) -> Tensor:
    """On a grid of 256 steps that spans the tensor's values and 0."""
    with torch.no_grad():
        low, high = x.detach().aminmax()
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / 255).clamp_min(_TINY)
        zero = (-low / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def simulate_int8(model: nn.Module) -> None:
    """Makes every convolution and linear layer of the model round what it reads; its parameters keep their names.

    Not those of the position tables: an artifact holds the tables themselves.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and ".rel_pos." not in name:
            module.forward = _forward(module)  # type: ignore[assignment, method-assign]


def _forward(module: nn.Conv2d | nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        x, weight = rounded_activation(x), rounded_weight(module.weight)
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, module.bias)
        return module._conv_forward(x, weight, module.bias)

    return forward


def freeze_batch_norm(model: nn.Module) -> None:
    """After `train()`: the artifacts hold BatchNorm's running statistics, so these are what the weights learn with."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
