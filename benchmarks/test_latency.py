"""The cases of `benchmarks.latency` under pytest-benchmark: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest

from msa2net.benchmarks.latency import test_frame as frame_of
from msa2net.runtimes import Availability, Predictor
from msa2net.runtimes.bundle import Bundle
from msa2net.runtimes.predictor import DEMO_BUNDLE


@pytest.mark.parametrize("entry", Predictor.available(), ids=lambda entry: f"{entry.runtime}-{entry.precision}")
def test_predict(benchmark: Any, entry: Availability) -> None:
    if not entry.available:
        pytest.skip(entry.reason)
    with Predictor.load(DEMO_BUNDLE, runtime=entry.runtime, precision=entry.precision) as predictor:
        assert predictor.self_test().passed
        benchmark(predictor.predict, frame_of(Bundle(DEMO_BUNDLE)))
