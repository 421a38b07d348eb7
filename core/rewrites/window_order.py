"""Tokens stay in the order of their attention sets: all of an attention layer but the attention itself is per token.

The reference groups and ungroups tokens in each of a block's two layers. A permutation commutes with what is per token
(norms, MLP, residual sums), so here they go to window order once, from window order to grid order directly, and back
once: three moves for four, each a gather of whole tokens, which no runtime can merge with the change of layout around
it into one slow transpose of six axes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msa2net.core.config import IMAGE_SIZE, WINDOW
from msa2net.core.maxvit import TOKENS, MaxViTBlock, PartitionAttention
from msa2net.core.network import MSA2Net


class OrderedBlock(nn.Module):
    """A MaxViT block whose map is H x W, (B, C, H', W') -> (B, C, H, W)."""

    to_windows: Tensor
    to_grid: Tensor
    to_image: Tensor

    def __init__(self, block: MaxViTBlock, height: int, width: int) -> None:
        super().__init__()
        self.conv, self.attn_block, self.attn_grid = block.conv, block.attn_block, block.attn_grid
        self.one_set = height * width == TOKENS  # then all three orders are the same
        for name, order in zip(("to_windows", "to_grid", "to_image"), moves(height, width), strict=True):
            self.register_buffer(name, order)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        shape = x.shape
        x = self._moved(x.reshape(shape[0], -1, shape[3]), self.to_windows)
        x = self._moved(attend(self.attn_block, x), self.to_grid)
        x = self._moved(attend(self.attn_grid, x), self.to_image)
        return x.view(shape).permute(0, 3, 1, 2)

    def _moved(self, tokens: Tensor, order: Tensor) -> Tensor:
        return tokens if self.one_set else tokens.index_select(1, order)


def attend(layer: PartitionAttention, tokens: Tensor) -> Tensor:
    """The layer on tokens that are in the order of its sets already: (B, N, C) -> (B, N, C).

    In between they are a plain matrix: some runtimes reshape anything else before and after every product.
    """
    x = tokens.reshape(-1, tokens.shape[-1])
    x = x + layer.ls1(layer.attn(layer.norm1(x)))
    return (x + layer.ls2(layer.mlp(layer.norm2(x)))).view(tokens.shape)


def moves(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each token comes from, (H*W) int64: image to window order, window to grid order, grid to image order."""
    rows, columns = height // WINDOW, width // WINDOW
    image = torch.arange(height * width)
    windows = image.view(rows, WINDOW, columns, WINDOW).permute(0, 2, 1, 3).flatten()
    grid = image.view(WINDOW, rows, WINDOW, columns).permute(1, 3, 0, 2).flatten()
    return windows, windows.argsort()[grid], grid.argsort()


def apply(model: MSA2Net) -> int:
    """One site for each MaxViT block: 11 at the released size."""
    sites = 0
    for number, stage in enumerate(model.backbone.backbone.stages):
        size = IMAGE_SIZE >> (number + 2)  # the stem and each stage halve it
        blocks = stage.get_submodule("blocks")
        for name, block in list(blocks.named_children()):
            if isinstance(block, MaxViTBlock):
                blocks.add_module(name, OrderedBlock(block, size, size))
                sites += 1
    return sites
