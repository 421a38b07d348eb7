"""The acceptance test on a device, as one report for the file: `msa2net selftest BUNDLE --report FILE`.

Every file against its sum, the golden frames within the manifest's tolerances, the time of an inference beside that
recorded at export, and what the device is. The report names no path and no host.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msa2net.errors import BundleError, OutputError, RuntimeUnavailableError
from msa2net.runtimes.backends import RUNTIMES
from msa2net.runtimes.bundle import Bundle
from msa2net.runtimes.cache import cpu_features, processor_name
from msa2net.runtimes.measure import percentile
from msa2net.runtimes.predictor import Predictor

FORMAT, ROUNDS = 1, 50
PAUSE = 0.004  # seconds before each frame, for the threads of the last to come to rest


def accept(
    bundle: str | Path, load: Callable[[], Predictor], *, rounds: int = ROUNDS, limit: float | None = None
) -> dict[str, Any]:
    """The report, as `msa2net selftest` writes it; `passed` is what counts.

    load     makes the predictor as the device will
    rounds   how often each golden frame that fits is timed
    limit    milliseconds that 99 of 100 frames, all included, may take at most (all of them, if there are fewer than
             500 rounds); None: no limit

    A device on which the runtime fails, or int8 refuses to start for its masks, has not passed either: its report has
    `format`, `date`, `passed`, `reasons`, `bundle` and `device` alone.

    Raises BundleError, SignatureError and RuntimeUnavailableError where nothing can be tested.
    """
    if limit is not None and not 0 < limit < math.inf:
        raise RuntimeUnavailableError("limit", f"got {limit}", "expected milliseconds above 0", "Leave it out.")
    opened = Bundle(bundle)
    files, start = opened.verify(), time.monotonic()
    try:
        with load() as predictor:
            if predictor.bundle.digest != opened.digest:
                raise BundleError(bundle, "was replaced while it was tested", "expected one bundle", "Test it again.")
            loaded = time.monotonic() - start
            golden = predictor.self_test()
            times = _times(predictor, rounds)
            artifact, execution = predictor.artifact, predictor.execution
    except OutputError as error:
        return _head(opened, files, [str(error)]) | {"device": _device(())}
    reasons = [] if golden.passed else [str(golden)]
    slowest = max(entry["p99"] or entry["longest"] for entry in times)
    if limit is not None and slowest > limit:
        reasons.append(f"frames take up to {slowest:.2f} ms (p99, or the longest of few), the limit is {limit:g}")
    recorded = artifact.speed.milliseconds[0] if artifact.speed else None
    inference = min(entry["inference"] for entry in times)
    return _head(opened, files, reasons) | {
        "artifact": {
            "name": artifact.name,
            "accuracy": artifact.accuracy,
            "sha256": {entry.path: entry.sha256 for entry in artifact.files},
        },
        "golden": asdict(golden) | {"passed": golden.passed},
        "seconds_to_load": round(loaded, 3),
        "milliseconds": times,
        "inference_at_export": {
            "milliseconds": recorded,
            "machine": artifact.speed.machine if artifact.speed else None,
            "ratio": round(inference / recorded, 3) if recorded else None,
        },
        "execution": execution.to_json(),
        "device": _device(RUNTIMES[execution.runtime].modules),
    }


def _head(bundle: Bundle, files: int, reasons: list[str]) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "passed": not reasons,
        "reasons": reasons,
        "bundle": {
            "digest": bundle.digest,
            "files": files,
            "model": manifest.model_name,
            "model_version": manifest.model_version,
            "schema_version": "{}.{}".format(*manifest.schema_version),
        },
    }


def _times(predictor: Predictor, rounds: int) -> list[dict[str, Any]]:
    """Of each shape among the golden frames: milliseconds of a frame, all included, and of the inference alone."""
    found = []
    for frame in {frame.shape: frame for frame in predictor.golden_frames()}.values():
        samples = []
        for _ in range(rounds + 2):
            time.sleep(PAUSE)
            segmentation = predictor.predict(frame)
            samples.append(segmentation.timings)
        totals, inferences = [each.total for each in samples[2:]], [each.inference for each in samples[2:]]
        found.append(
            {
                "frame": list(frame.shape),
                "graph": segmentation.execution.graph,
                "n": rounds,
                "p50": round(statistics.median(totals), 3),
                "p99": percentile(totals, 99),
                "longest": round(max(totals), 3),
                "inference": round(statistics.median(inferences), 3),
            }
        )
    return found


def _device(modules: Sequence[str]) -> dict[str, Any]:
    names = ("msa2net-edge", "numpy", "pillow", *(module.replace(".", "-") for module in modules))
    return {
        "processor": processor_name(),
        "architecture": platform.machine(),
        "cpu_features": sorted(cpu_features()),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: found for name in names if (found := version_of(name))},
    }


def version_of(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
