"""The decoder of MSA2Net: large-kernel (LKA) and dual-attention blocks, gated skips, up-sampling.

Attribute names are the released checkpoint's keys.
B batch, C channels, H W rows and columns, N = H*W tokens, K classes.

The public code twice hands a block's memory on under another shape without moving it ("reinterpretation") where one
would expect a transpose. Trained weights depend on it, so it is kept, in `reinterpret`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msa2net.core.config import CHANNEL_HEADS
from msa2net.core.masag import MASAG


def reinterpret(x: Tensor, *shape: int) -> Tensor:
    """`x` under another shape: element i of its row-major memory stays element i. Not a transpose."""
    return x.contiguous().view(x.shape[0], *shape)


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """True transpose (B, N, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map, at each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DepthwiseConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


# Large-kernel attention -----------------------------------------------------------------------------------------


class LargeKernel(nn.Module):
    """A 23 x 23 receptive field from a depthwise 5 x 5, a depthwise 7 x 7 of dilation 3 and a 1 x 1, as a gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.conv_spatial = nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels)
        self.conv1 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class LargeKernelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(channels, channels, 1)
        self.spatial_gating_unit = LargeKernel(channels)
        self.proj_2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut is this module's input, already normalised by the block.
        return self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x)))) + x


class ConvMlp(nn.Module):
    """(B, C, H, W) -> (B, C, H, W); the depthwise convolution comes before the GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, 4 * channels, 1)
        self.dwconv = DepthwiseConv(4 * channels)
        self.fc2 = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class LKABlock(nn.Module):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.attn = LargeKernelAttention(channels)
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), 1e-2))
        self.norm2 = ChannelNorm(channels)
        self.mlp = ConvMlp(channels)
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1[:, None, None] * self.attn(self.norm1(x))
        return x + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))


# Dual attention (DAE-Former) ------------------------------------------------------------------------------------


class EfficientAttention(nn.Module):
    """Linear attention over positions, one head, no scaling. (B, C, H, W) -> (B, N, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.keys = nn.Conv2d(channels, channels, 1)
        self.queries = nn.Conv2d(channels, channels, 1)
        self.values = nn.Conv2d(channels, channels, 1)
        self.reprojection = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.keys(x).flatten(2).softmax(-1)  # (B, C, N), over positions
        queries = self.queries(x).flatten(2).softmax(1)  # over channels
        context = keys @ self.values(x).flatten(2).transpose(1, 2)  # (B, C, C), key by value
        attended = context.transpose(1, 2) @ queries  # (B, C, N)
        return self.reprojection(attended.reshape(x.shape)).flatten(2).transpose(1, 2)


class ChannelAttention(nn.Module):
    """Attention among the channels of each of 8 heads. (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(CHANNEL_HEADS, 1, 1))
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, CHANNEL_HEADS, channels // CHANNEL_HEADS)
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # (B, 8, C/8, N) each
        q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)  # (B, 8, C/8, C/8)
        return self.proj((weights @ v).reshape(batch, channels, tokens).transpose(1, 2))


class MixFfn(nn.Module):
    """MLP with a depthwise 3 x 3 on its hidden map. (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.dwconv = DepthwiseConv(4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        hidden = self.dwconv(to_map(self.fc1(tokens), height, width))
        return self.fc2(F.gelu(hidden.flatten(2).transpose(1, 2)))


class DualAttentionBlock(nn.Module):
    """Spatial then channel attention, each with its MLP. (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = EfficientAttention(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp1 = MixFfn(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.channel_attn = ChannelAttention(channels)
        self.norm4 = nn.LayerNorm(channels)
        self.mlp2 = MixFfn(channels)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        tokens = tokens + self.attn(to_map(self.norm1(tokens), height, width))
        tokens = tokens + self.mlp1(self.norm2(tokens), height, width)
        tokens = tokens + self.channel_attn(self.norm3(tokens))
        return tokens + self.mlp2(self.norm4(tokens), height, width)


# Layers ---------------------------------------------------------------------------------------------------------


class PatchExpand(nn.Module):
    """Up-sampling by `scale`: (B, H*W, C) -> (B, sH*sW, channels_out); row offsets first in the expanded channels."""

    def __init__(self, channels: int, channels_out: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(channels, scale * scale * channels_out, bias=False)
        self.norm = nn.LayerNorm(channels_out)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        batch, scale = tokens.shape[0], self.scale
        x = self.expand(tokens).view(batch, height, width, scale, scale, -1)
        x = x.permute(0, 1, 3, 2, 4, 5)  # (B, H, s, W, s, c)
        return self.norm(x.reshape(batch, height * scale * width * scale, -1))


class DecoderLayer(nn.Module):
    """One step of the decoder: gate the skip map, add, refine, enlarge.

    (B, N, C) tokens from below and a (B, C, H, W) skip map -> (B, 4N, C/2) tokens; with `num_classes`, the last
    layer: -> (B, K, 4H, 4W) logits. Without a skip map (the deepest layer) only the up-sampling runs; its other
    parts are kept because released checkpoints hold them.
    """

    def __init__(
        self, channels: int, size: int, *, blocks: str, gated: bool = True, num_classes: int | None = None
    ) -> None:
        super().__init__()
        self.size = size
        self.blocks = blocks
        self.gated = gated
        self.x1_linear = nn.Linear(channels, channels)
        self.ag_attn = MASAG(channels)
        self.ag_attn_norm = nn.LayerNorm(channels)
        self.fused_gate: nn.Module | None = None  # in place of both, see `rewrites.fused_gate`
        if blocks == "dual_attention":
            self.tran_layer1 = DualAttentionBlock(channels)
            self.tran_layer2 = DualAttentionBlock(channels)
        else:
            self.layer_lka_1 = LKABlock(channels)
            self.layer_lka_2 = LKABlock(channels)
        if num_classes is None:
            self.layer_up = PatchExpand(channels, channels // 2, 2)
            self.last_layer = None
        else:
            self.layer_up = PatchExpand(channels, channels, 4)
            self.last_layer = nn.Conv2d(channels, num_classes, 1)

    def _refine(self, tokens: Tensor, skip: Tensor) -> Tensor:
        channels, size = skip.shape[1], self.size
        # Reinterpreted, not transposed: channel c of these maps holds a stretch of N/C pixels with all their channels.
        skip = reinterpret(skip.permute(0, 2, 3, 1), channels, size, size)
        below = reinterpret(self.x1_linear(tokens), channels, size, size)
        if self.fused_gate is not None:
            fused = self.fused_gate(skip, below).permute(0, 2, 3, 1)  # (B, H, W, C)
        else:
            gated = self.ag_attn(skip, below) if self.gated else skip
            fused = self.ag_attn_norm((below + gated).permute(0, 2, 3, 1))
        if self.blocks == "dual_attention":
            # Here the reinterpretation is never undone: these tokens are positions of the scrambled map.
            tokens = self.tran_layer1(fused.flatten(1, 2), size, size)
            return self.tran_layer2(tokens, size, size)
        x = self.layer_lka_2(self.layer_lka_1(fused.permute(0, 3, 1, 2)))
        return reinterpret(x, size * size, channels)  # undoes the reinterpretation: token p is pixel p again

    def forward(self, tokens: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            tokens = self._refine(tokens, skip)
        x = self.layer_up(tokens, self.size, self.size)
        return x if self.last_layer is None else self.last_layer(to_map(x, 4 * self.size, 4 * self.size))
