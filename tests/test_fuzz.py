"""The corpus of each fuzz target replayed; in the slow part, each target fuzzed for a minute from there."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import fuzz
import pytest

SECONDS = 60


def corpus(target: str) -> list[bytes]:
    with zipfile.ZipFile(fuzz.HERE / "corpus" / f"{target}.zip") as archive:
        return [archive.read(name) for name in archive.namelist()]


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_what_is_promised_holds_of_every_input_found(target: str) -> None:
    found = corpus(target)
    assert len(found) > 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the image libraries, and of a newer schema
        for content in (*fuzz.seeds(target), *found):
            fuzz.TARGETS[target](content)


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_minute_of_fuzzing_finds_nothing(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("atheris")
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, content in enumerate((*fuzz.seeds(target), *corpus(target))):
        (folder / str(i)).write_bytes(content)
    options = (f"-max_total_time={SECONDS}", "-rss_limit_mb=6000", "-max_len=20000", f"-artifact_prefix={tmp_path}/")
    done = subprocess.run(
        [sys.executable, fuzz.__file__, target, str(folder), *options],
        capture_output=True,
        text=True,
        timeout=10 * SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.findall(r"Done (\d+) runs", done.stderr)
    coverage = re.findall(r"cov: (\d+)", done.stderr)[-1]
    with capsys.disabled():
        print(f"\n{target:<10} {runs[-1]:>8} runs, {coverage:>5} places reached, nothing found")
    assert int(runs[-1]) > 1000
