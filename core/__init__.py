"""The reference network of MSA2Net (BMVC 2024), what belongs to its weights, and the data it is trained and scored on.

The network needs torch, which is imported when it is first asked for: phantoms and data sets do not need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msa2net.core.config import DEEP_DECODERS, IMAGE_SIZE, VARIANTS, ModelConfig

if TYPE_CHECKING:
    from msa2net.core.masag import MASAG
    from msa2net.core.network import MSA2Net

__all__ = ["DEEP_DECODERS", "IMAGE_SIZE", "MASAG", "VARIANTS", "MSA2Net", "ModelConfig"]


def __getattr__(name: str) -> Any:
    if name == "MSA2Net":
        from msa2net.core.network import MSA2Net

        return MSA2Net
    if name == "MASAG":
        from msa2net.core.masag import MASAG

        return MASAG
    raise AttributeError(f"module 'msa2net.core' has no attribute {name!r}")
