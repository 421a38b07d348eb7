"""What several test files share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from msa2net.runtimes.predictor import DEMO_BUNDLE


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the demo bundle, free to be damaged."""
    return Path(shutil.copytree(DEMO_BUNDLE, tmp_path / "copy.bundle"))


@pytest.fixture
def examples() -> Callable[[str], Path]:
    """Paths of real ultrasound files in pydicom's wheel: rgb_color, ybr_color (30 frames), jpeg2k, palette_color."""
    from pydicom.examples import get_path

    return lambda name: Path(get_path(name))
