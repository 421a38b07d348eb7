"""What runs on the device: numpy, Pillow and one runtime. Importing this imports no runtime."""

from msa2net.runtimes.cache import CacheWarning
from msa2net.runtimes.predictor import (
    AccuracyLossWarning,
    Availability,
    DemoModelWarning,
    Execution,
    Predictor,
    Segmentation,
    SelfTest,
    Timings,
)

__all__ = [
    "AccuracyLossWarning",
    "Availability",
    "CacheWarning",
    "DemoModelWarning",
    "Execution",
    "Predictor",
    "Segmentation",
    "SelfTest",
    "Timings",
]
