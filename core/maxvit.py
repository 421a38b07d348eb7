"""The encoder: MaxViT (Tu et al., ECCV 2022) in the form that MSA2Net uses, "rmlp small rw 224".

Each block is a squeeze-excite inverted bottleneck, then attention among neighbouring pixels (7 x 7 windows), then
attention among distant ones (a 7 x 7 grid). Attribute names are the released checkpoint's keys.

B batch, C channels, H W rows and columns, h heads, d channels of a head, T = 49 tokens of a window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msa2net.core.config import POSITION_HIDDEN, WINDOW, ModelConfig

TOKENS = WINDOW * WINDOW
LAYER_NORM_EPS = 1e-6  # the decoder's is 1e-5


class Stem(nn.Module):
    """(B, 3, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels[0])
        self.conv2 = nn.Conv2d(channels[0], channels[1], 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.norm1(self.conv1(x))))


class SqueezeExcite(nn.Module):
    """Weights each channel by a gate computed from the map's mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(squeezed))))


class Shortcut(nn.Module):
    """Halves the resolution and changes the width beside the bottleneck."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels_in, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(F.avg_pool2d(x, 2))


class MBConv(nn.Module):
    """Inverted bottleneck. The hidden width is four times the *input* width."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * channels_in
        self.shortcut = Shortcut(channels_in, channels) if stride == 2 else nn.Identity()
        self.pre_norm = nn.BatchNorm2d(channels_in)
        self.conv1_1x1 = nn.Conv2d(channels_in, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv2_kxk = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.se = SqueezeExcite(hidden)
        self.conv3_1x1 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1_1x1(self.pre_norm(x))))
        y = F.silu(self.norm2(self.conv2_kxk(y)))
        return self.conv3_1x1(self.se(y)) + self.shortcut(x)


class PositionMlp(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, POSITION_HIDDEN)
        self.fc2 = nn.Linear(POSITION_HIDDEN, heads)

    def forward(self, offsets: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(offsets))
        return self.fc2(F.dropout(hidden, 0.125, self.training))  # the network's only dropout


class RelativePosition(nn.Module):
    """The bias (h, T, T) added to the attention scores: an MLP of the log-scaled offset of query and key."""

    offsets: Tensor  # (13 * 13, 2) float32
    index: Tensor  # (T * T,) int64, the row of `offsets` for each pair of tokens

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.mlp = PositionMlp(heads)
        span = torch.arange(1 - WINDOW, WINDOW, dtype=torch.float64)
        scaled = span.sign() * torch.log1p(span.abs())
        offsets = torch.stack(torch.meshgrid(scaled, scaled, indexing="ij"), -1).reshape(-1, 2)
        row, column = torch.arange(TOKENS) // WINDOW, torch.arange(TOKENS) % WINDOW
        down = row[:, None] - row[None, :] + WINDOW - 1
        right = column[:, None] - column[None, :] + WINDOW - 1
        self.register_buffer("offsets", offsets.float(), persistent=False)
        self.register_buffer("index", (down * (2 * WINDOW - 1) + right).flatten(), persistent=False)

    def forward(self) -> Tensor:
        table = self.mlp(self.offsets)  # (13 * 13, h)
        return table[self.index].view(TOKENS, TOKENS, -1).permute(2, 0, 1)


class WindowAttention(nn.Module):
    """Multi-head attention among the T tokens of each set. (sets, T, C), or (sets * T, C) -> the same."""

    def __init__(self, channels: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.heads = channels // head_width
        self.scale = head_width**-0.5
        self.qkv = nn.Linear(channels, 3 * channels)
        self.rel_pos: nn.Module = RelativePosition(self.heads)
        self.proj = nn.Linear(channels, channels)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sets, h, T, d) each."""
        # Head-major: head j owns outputs 3dj .. 3d(j+1)-1, its q, then its k, then its v.
        qkv = self.qkv(x).view(-1, TOKENS, self.heads, 3 * self.head_width).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        if self.scale != 1:  # it is 1 once folded into the weights, see core/rewrites
            q = q * self.scale
        scores = q @ k.transpose(-2, -1) + self.rel_pos()
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PartitionAttention(nn.Module):
    """Transformer layer over sets of 49 tokens, channels last: (B, H, W, C) -> (B, H, W, C).

    `grid=False`: a set is a window of 7 x 7 neighbours. `grid=True`: 7 x 7 pixels spaced H/7 and W/7 apart.
    """

    def __init__(self, channels: int, head_width: int, *, grid: bool) -> None:
        super().__init__()
        self.grid = grid
        self.norm1 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.attn = WindowAttention(channels, head_width)
        self.ls1 = LayerScale(channels)
        self.norm2 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(channels)
        self.ls2 = LayerScale(channels)

    def _attend(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        rows, columns = height // WINDOW, width // WINDOW
        if self.grid:
            split, order, back = (WINDOW, rows, WINDOW, columns), (0, 2, 4, 1, 3, 5), (0, 3, 1, 4, 2, 5)
        else:
            split, order, back = (rows, WINDOW, columns, WINDOW), (0, 1, 3, 2, 4, 5), (0, 1, 3, 2, 4, 5)
        sets = x.view(batch, split[0], split[1], split[2], split[3], channels).permute(order)
        attended = self.attn(sets.reshape(-1, TOKENS, channels))
        attended = attended.view(batch, rows, columns, WINDOW, WINDOW, channels).permute(back)
        return attended.reshape(batch, height, width, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self._attend(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class MaxViTBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, head_width: int) -> None:
        super().__init__()
        self.conv = MBConv(channels_in, channels, stride)
        self.attn_block = PartitionAttention(channels, head_width, grid=False)
        self.attn_grid = PartitionAttention(channels, head_width, grid=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1).contiguous()  # (B, C, H, W) -> (B, H, W, C)
        return self.attn_grid(self.attn_block(x)).permute(0, 3, 1, 2).contiguous()


class Stage(nn.Module):
    def __init__(self, channels_in: int, channels: int, depth: int, head_width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(MaxViTBlock(channels if i else channels_in, channels, 1 if i else 2, head_width) for i in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class MaxViT(nn.Module):
    """(B, 3, 224, 224) -> the four stage outputs, (B, C, 56, 56) to (B, 8C, 7, 7); only the last is normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inputs = (config.stem[1], *config.channels[:3])
        self.stem = Stem(config.stem)
        self.stages = nn.Sequential(
            *(
                Stage(channels_in, channels, depth, config.head_width)
                for channels_in, channels, depth in zip(inputs, config.channels, config.depths, strict=True)
            )
        )
        self.norm = nn.LayerNorm(config.channels[-1], eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps[-1] = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return maps
