"""The soak's and the paced source's own arithmetic, and short runs of both."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from msa2net.benchmarks import latency, soak, stream
from msa2net.runtimes.bundle import Bundle


def test_the_slope_of_a_line_is_its_slope_and_few_points_have_none() -> None:
    hours = np.linspace(0, 0.5, 60)
    low, rate, high = soak.slope(hours, 100 + 3 * hours)
    assert (low, rate, high) == (pytest.approx(3, abs=1e-9),) * 3
    low, rate, high = soak.slope(hours[:9], hours[:9])
    assert math.isnan(rate)
    assert (low, high) == (-math.inf, math.inf)


@pytest.mark.parametrize(("alike", "most"), [(0.0, 0.985), (0.6, 0.985), (0.9, 1.0), (1.0, 0.985)])
def test_the_bounds_hold_the_true_slope_as_often_as_they_say(alike: float, most: float) -> None:
    """Of 400 noisy series, whose neighbours may be alike up to a random walk, at least 95 in 100."""
    rng, hours, inside = np.random.default_rng(0), np.linspace(0.1, 0.5, 48), 0
    for _ in range(400):
        noise, shocks = np.zeros(48), rng.standard_normal(48)
        for i in range(48):
            noise[i] = (alike * noise[i - 1] if i else 0) + shocks[i]
        low, _, high = soak.slope(hours, 2 * hours + noise)
        inside += low <= 2 <= high
    assert 0.92 <= inside / 400 <= most, inside


def test_a_short_soak_counts_masks_and_does_not_pass(
    baked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too short for a bound: what is not shown is not passed."""
    file = tmp_path / "soak.json"
    arguments = ["--bundle", str(baked), "--runtimes", "onnxruntime", "--hours", "0.003", "--json", str(file)]
    assert soak.main(arguments) == 1
    assert "FAIL" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    assert row["masks"] > 0
    assert row["changed"] == 0
    assert row["files"][0] > 0


@pytest.mark.parametrize(
    ("megabytes_per_hour", "files_per_hour", "passed"), [(0.0, 0.0, True), (2.0, 0.0, False), (0.0, 10.0, False)]
)
def test_memory_and_descriptors_are_judged_between_the_turns_and_not_within(
    megabytes_per_hour: float, files_per_hour: float, passed: bool
) -> None:
    hours = [i / 360 for i in range(180)]
    window = {"masks": 9, "changed": 0, "median": 20.0}
    lines = [{"about": {}}, *({"hours": hour, **window} for hour in hours)]
    lines += [
        {
            "hours": hour,
            "RssAnon": 400 + megabytes_per_hour * hour,
            "files": 7 + int(files_per_hour * hour),
            "threads": 4,
        }
        for hour in hours
    ]
    lines[-1]["files"] += 1  # that is open at the moment
    process = subprocess.Popen([sys.executable, "-c", ""])
    watched = soak.Watched("onnxruntime fp32", process, io.StringIO("\n".join(map(json.dumps, lines))))
    watched.samples = [
        {"hours": hour, "RssAnon": 400.0 + i % 30, "VmRSS": 500.0 + i % 30, "files": 6, "threads": 6}
        for i, hour in enumerate(hours)
    ]
    row = watched.summary(0.5)
    process.wait()
    assert row["megabytes_per_hour"] == [pytest.approx(megabytes_per_hour, abs=1e-6)] * 3
    assert row["passed"] is passed


def test_a_camera_loses_what_nobody_fetches_and_keeps_its_times() -> None:
    images = [np.full((2, 2), i, np.uint8) for i in range(3)]
    camera = stream.Camera(images, fps=200, seconds=0.1)
    seen = []
    for image, due in camera:
        seen.append((int(image[0, 0]), due))
        if len(seen) == 5:
            time.sleep(0.03)  # six periods
    assert len(seen) + camera.lost == camera.count == 20
    assert camera.lost >= 4
    assert [image for image, _ in seen] == [i % 3 for i in camera.played]
    assert all((due - seen[0][1]) % camera.period == 0 for _, due in seen)


def test_camera_to_mask_of_a_small_frame(baked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "stream.json"
    arguments = ["--stream", "--bundle", str(baked), "--fps", "20", "--seconds", "2", "--frame", "320x180"]
    assert latency.main([*arguments, "--recheck-every", "10", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["execution"]["graph"] == "baked 180x320x3"
    assert found["bundle_digest"] == Bundle(baked).digest
    for row in (found["stream"], found["control"]):
        assert row["due"] == 40
        assert row["masks"] + row["dropped"] + row["lost_by_camera"] == 40
    assert found["control"]["masks"] > 30
    assert "control" in capsys.readouterr().out
