"""MASAG, the Multi-Scale Adaptive Spatial Attention Gate of MSA2Net (BMVC 2024, section 3.1 of the paper's method).

The gate weights a skip map x by the decoder's map g: local context from x and global context from g compete in a
softmax at each pixel, modulate each other, and leave one weight per channel and pixel for x.

B batch, C channels, H W rows and columns (any size). Attribute names are the released checkpoint's keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msa2net.core.kernels.operator import masag, select
from msa2net.core.kernels.reference import collapse


class LocalContext(nn.Module):
    """From x: a depthwise and a dilated 3 x 3 convolution, projected. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dconv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            # The paper's figure draws a depthwise dilated convolution; the public code, and so every
            # released weight, has a full C x C one.
            nn.Conv2d(channels, channels, 3, padding=2, dilation=2),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.proj = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.dconv(x))


class GlobalContext(nn.Module):
    """From g: its mean and maximum over channels, projected. (B, C, H, W) -> (B, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(2, 1, 1), nn.BatchNorm2d(1))

    def forward(self, g: Tensor) -> Tensor:
        return self.proj(torch.cat((g.mean(1, keepdim=True), g.amax(1, keepdim=True)), dim=1))


class MultiScaleFusion(nn.Module):
    """Local and global context added: the global map has one channel, broadcast over C."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.local = LocalContext(channels)
        self.global_ = GlobalContext()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return self.bn(self.local(x) + self.global_(g))


class MASAG(nn.Module):
    """The gate: `MASAG(channels)(x, g)`, both and the result (B, C, H, W) float.

    x   the encoder's skip map
    g   the decoder's map of the same shape

    `kernel` is what computes it, see `kernel_for`: "auto", "reference", "triton" or "cuda".
    """

    def __init__(self, channels: int, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel
        self.multi = MultiScaleFusion(channels)
        self.selection = nn.Conv2d(channels, 2, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.bn_2 = nn.BatchNorm2d(channels)
        self.conv_block = nn.Sequential(nn.Conv2d(channels, channels, 1))

    def kernel_for(self, x: Tensor) -> str | None:
        """What computes the gate of this map: "reference", "triton", "cuda", or None for `steps`.

        Kernels need frozen BatchNorms, so with live ones it is None. So it is, with "auto", on a CPU, where no fused
        kernel can run, and under autocast, which mixes dtypes. While the network is compiled or exported it is
        `kernel`, "auto" included: the operator then chooses when it runs. Raises KernelError for a kernel named that
        cannot run.
        """
        live = any(isinstance(each, nn.BatchNorm2d) and each.training for each in self.modules())
        if live or torch.onnx.is_in_onnx_export():
            return None
        mixed = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # a meta tensor has no autocast
        if torch.compiler.is_compiling():
            return None if self.kernel == "auto" and (mixed or not x.is_cuda) else self.kernel
        chosen = select(self.kernel, x)
        return None if self.kernel == "auto" and (chosen == "reference" or mixed) else chosen

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        if (kernel := self.kernel_for(x)) is not None:
            return masag(x, g, *collapse(self), kernel=kernel)
        return self.steps(x, g)

    def steps(self, x: Tensor, g: Tensor) -> Tensor:
        """The paper's steps, one after the other."""
        # Fusion and selection: two weights per pixel that sum to 1.
        to_x, to_g = self.selection(self.multi(x, g)).softmax(1).chunk(2, dim=1)  # (B, 1, H, W) each
        x_selected = x * (1 + to_x)
        g_selected = g * (1 + to_g)
        # Cross-modulation: each is gated by the other.
        x_modulated = torch.sigmoid(g_selected) * x_selected
        g_modulated = torch.sigmoid(x_selected) * g_selected
        # Recalibration of the original x.
        weight = torch.sigmoid(self.bn(self.proj(x_modulated * g_modulated)))
        return self.bn_2(self.conv_block(weight * x))
