"""Sizes of the network: `ModelConfig` and the named variants. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

IMAGE_SIZE = 224  # height and width; the 7 x 7 windows and every up-sampling step are tied to it
WINDOW = 7  # tokens along one side of an attention window
CHANNEL_HEADS = 8  # heads of the dual block's channel attention
POSITION_HIDDEN = 512  # hidden width of the relative-position MLP
DEEP_DECODERS = ("dual_attention", "lka")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What fixes every key and shape of a checkpoint. The defaults are the paper's network.

    num_classes    classes, background included; any number from 2 to 256 (a mask is uint8)
    deep_decoder   blocks of decoder_3 and decoder_2: "dual_attention" (the paper's 112.77 M parameters)
                   or "lka" (what the public code builds when run: 93.66 M)
    stem           channels of the stem's two convolutions
    width          channels of encoder stage 0; stage s has width * 2**s
    depths         MaxViT blocks per encoder stage
    head_width     channels of one encoder attention head

    Raises ValueError, naming the field, for a value that no network can be built from.
    """

    num_classes: int = 9
    deep_decoder: str = "dual_attention"
    stem: tuple[int, int] = (32, 64)
    width: int = 96
    depths: tuple[int, int, int, int] = (2, 2, 5, 2)
    head_width: int = 32

    def __post_init__(self) -> None:
        if self.deep_decoder not in DEEP_DECODERS:
            raise ValueError(f"deep_decoder: got {self.deep_decoder!r}, expected one of {', '.join(DEEP_DECODERS)}")
        if not 2 <= self.num_classes <= 256:
            raise ValueError(f"num_classes: got {self.num_classes}, expected 2 to 256, the background included")
        if min(*self.stem, self.width, self.head_width) < 1 or self.stem[1] < 4:
            raise ValueError(
                f"stem, width, head_width: got {self.stem}, {self.width}, {self.head_width}, "
                "expected at least 1, and 4 for the stem's second"
            )
        if self.width % self.head_width or (self.width * 4) % CHANNEL_HEADS:
            raise ValueError(
                f"width: got {self.width}, expected a multiple of head_width ({self.head_width}) "
                f"and of {CHANNEL_HEADS // 4}"
            )
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise ValueError(f"depths: got {self.depths}, expected four numbers of at least 1")

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of the four encoder stages, shallow to deep."""
        return (self.width, self.width * 2, self.width * 4, self.width * 8)

    def to_json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_json`. Raises ValueError naming the field that is unknown or out of range."""
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"{unknown[0]}: unknown field, expected {', '.join(sorted(known))}")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return cls(**values)


# "small" is the released size. "tiny" is the demo's: the same blocks in the same places, about a million parameters.
VARIANTS = {
    "small": ModelConfig(),
    "tiny": ModelConfig(stem=(16, 16), width=16, depths=(1, 1, 1, 1), head_width=16),
}


def variant_name(config: ModelConfig) -> str:
    """The name of the variant that `config` is, whatever its classes and deep decoder; "custom" if none."""
    for name, variant in VARIANTS.items():
        if replace(variant, num_classes=config.num_classes, deep_decoder=config.deep_decoder) == config:
            return name
    return "custom"
