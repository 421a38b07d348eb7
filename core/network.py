"""MSA2Net: the whole network, and which of its parameters no output depends on."""

from __future__ import annotations

from torch import Tensor, nn

from msa2net.core.config import IMAGE_SIZE, ModelConfig
from msa2net.core.decoder import DecoderLayer
from msa2net.core.maxvit import MaxViT


class Encoder(nn.Module):
    """(B, 1 or 3, 224, 224) -> the four MaxViT maps."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # A grey-to-colour layer that the public code never reaches: grey input is repeated instead.
        self.conv = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.backbone = MaxViT(config)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.backbone(x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x)


class MSA2Net(nn.Module):
    """MSA2Net (BMVC 2024). `MSA2Net(config)(x)`: x (B, 1 or 3, 224, 224) float -> raw logits (B, K, 224, 224).

    Normalisation of the image is not part of the network. Raises ValueError for any other input shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        shallow, middle, deep, deepest = config.channels
        deep_blocks = config.deep_decoder
        self.backbone = Encoder(config)
        self.decoder_3 = DecoderLayer(deepest, 7, blocks=deep_blocks)
        # With LKA blocks the public code builds this layer's gate and then adds the skip map without it.
        self.decoder_2 = DecoderLayer(deep, 14, blocks=deep_blocks, gated=deep_blocks == "dual_attention")
        self.decoder_1 = DecoderLayer(middle, 28, blocks="lka")
        self.decoder_0 = DecoderLayer(shallow, 56, blocks="lka", num_classes=config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3) or x.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (B, 1 or 3, {IMAGE_SIZE}, {IMAGE_SIZE}). Resize the image."
            )
        return self.decode(self.backbone(x))

    def decode(self, maps: list[Tensor]) -> Tensor:
        """The encoder's four maps, shallow to deep -> raw logits (B, K, 224, 224)."""
        tokens = self.decoder_3(maps[3].permute(0, 2, 3, 1).flatten(1, 2))
        tokens = self.decoder_2(tokens, maps[2])
        tokens = self.decoder_1(tokens, maps[1])
        return self.decoder_0(tokens, maps[0])


def is_unused(key: str, config: ModelConfig) -> bool:
    """Whether no output depends on the state_dict entry `key`: kept in the reference, absent from every artifact."""
    if key.startswith("backbone.conv."):
        return True
    if key.startswith("decoder_3.") and not key.startswith("decoder_3.layer_up."):
        return True
    return config.deep_decoder == "lka" and key.startswith("decoder_2.ag_attn.")
