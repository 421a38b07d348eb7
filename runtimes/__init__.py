"""What runs on the device: numpy, Pillow and one runtime. Importing this imports no runtime."""

from msa2net.runtimes.predictor import (
    Availability,
    DemoModelWarning,
    Execution,
    Predictor,
    Segmentation,
    SelfTest,
    Timings,
)

__all__ = ["Availability", "DemoModelWarning", "Execution", "Predictor", "Segmentation", "SelfTest", "Timings"]
