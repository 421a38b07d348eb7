"""Baked graphs beside a network in bf16, on an emulated processor: whether they are right, never how fast they are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from test_bake import ENDS, write

HERE = Path(__file__).parent
CASES = ENDS[::7]  # each text, fit, rule and way to enlarge; minutes instead of an hour
NEEDED = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(NEEDED), reason=f"needs {', '.join(NEEDED)}")]


def test_both_ends_stay_in_fp32_and_the_network_gives_the_same_bits(tmp_path: Path) -> None:
    for case in CASES:
        folder = tmp_path / "-".join(map(str, case))
        folder.mkdir()
        write(folder, *case)
    shutil.copy(HERE / "ends.py", tmp_path / "main.py")
    command = ["sh", str(HERE / "avx512.sh"), str(HERE.parent / "build" / "avx512"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": passes") == len(CASES)
