"""The reference network of MSA2Net (BMVC 2024) and what belongs to its weights. Needs torch."""

from msa2net.core.config import DEEP_DECODERS, IMAGE_SIZE, VARIANTS, ModelConfig
from msa2net.core.masag import MASAG
from msa2net.core.network import MSA2Net

__all__ = ["DEEP_DECODERS", "IMAGE_SIZE", "MASAG", "VARIANTS", "MSA2Net", "ModelConfig"]
