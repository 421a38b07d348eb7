"""Camera to mask: `python -m benchmarks.latency --stream --fps 30`. A paced source plays frames as a camera would, each
with the time at which it was due, and `Predictor.stream` segments them; beside it, in a process of its own, the same
source plays into a stream that does nothing. What the second one loses, the machine has lost.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from msa2net.benchmarks import machine
from msa2net.core.phantoms import frames
from msa2net.errors import Msa2NetError
from msa2net.runtimes import Predictor, stream
from msa2net.runtimes.bundle import Bundle
from msa2net.runtimes.measure import percentile

SEED = 6_000_000  # apart from training, validation, test, the parity check, calibration and benchmarks.baked
FRAMES, IN_FLIGHT, WARM_UP = 8, 2, 30
CHECKED = 31  # one mask in so many is compared with that of `predict`; no multiple of 2: each image has its turn


class Camera:
    """Plays `images` over and over, `fps` a second, for so many seconds, each with the time at which it was due.

    As a camera does, it loses a frame that nobody has fetched when the next is due: `lost`. `played` is the number of
    each frame that was fetched, lost ones counted.
    """

    def __init__(self, images: list[NDArray[np.uint8]], fps: float, seconds: float) -> None:
        self.images, self.period, self.count, self.lost = images, int(1e9 / fps), int(seconds * fps), 0
        self.played: list[int] = []

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], int]]:
        start = time.monotonic_ns() + self.period
        for i in range(self.count):
            due = start + i * self.period
            if (wait := due - time.monotonic_ns()) > 0:
                time.sleep(wait / 1e9)
            elif -wait > self.period:
                self.lost += 1
                continue
            self.played.append(i)
            yield self.images[i % len(self.images)], due


def play(running: stream.Stream[Any], camera: Camera, seen: Callable[[stream.Streamed[Any]], object]) -> dict[str, Any]:
    """Milliseconds of every mask's age and what was lost. No deadline: a frame that is old is worked on, and counted
    as late; it is dropped only for a newer one.
    """
    ages = []
    with running:
        for each in tqdm(running, "frames", total=camera.count, unit="frame", disable=None):
            ages.append(round(each.age_ms, 3))
            seen(each)
    report = asdict(running.report())
    del report["age_ms"]  # of the last ones only
    return report | {
        "due": camera.count,
        "lost_by_camera": camera.lost,
        "late": sum(age > camera.period / 1e6 for age in ages),
        "p50": percentile(ages, 50) if ages else None,
        "p99": percentile(ages, 99),
        "p99.9": percentile(ages, 99.9),
        "longest": max(ages, default=None),
        "ages": ages,
    }


def control(fps: float, seconds: float) -> dict[str, Any]:
    """What the machine does to a stream without any work."""
    camera = Camera([np.zeros((1, 1), np.uint8)], fps, seconds)
    running = stream.start(
        lambda frame, _: frame,
        lambda _: None,
        camera,
        latch=lambda _: None,
        fault_elsewhere=lambda: None,
        lock=threading.Lock(),
        in_flight=IN_FLIGHT,
        late="drop",
        deadline_ms=None,
        timeout_ms=60_000,
        recheck_every=None,
    )
    return play(running, camera, lambda _: None)


def measure(
    path: Path,
    runtime: str,
    precision: str,
    threads: int,
    *,
    fps: float,
    seconds: float,
    shape: tuple[int, ...],
    recheck_every: int | None,
) -> dict[str, Any]:
    """Plays frames of a shape for so long. Raises Msa2NetError if a mask is not that of `predict`."""
    images = frames(shape, FRAMES, SEED)
    baked = any(graph.frame == shape for graph in Bundle(path).artifact(runtime, precision).baked)
    with Predictor.load(
        path, runtime=runtime, precision=precision, threads=threads, frame_shape=shape if baked else None
    ) as predictor:
        masks = [predictor.predict(image).mask for image in images]
        for i in range(WARM_UP):
            predictor.predict(images[i % FRAMES])

        camera = Camera(images, fps, seconds)

        def seen(each: stream.Streamed[Any]) -> None:
            if each.index % CHECKED == 0:
                expected = masks[camera.played[each.index] % FRAMES]
                if not np.array_equal(each.segmentation.mask, expected):
                    raise Msa2NetError(f"frame {each.index}", "has another mask than 'predict' gives")

        command = [sys.executable, "-m", "msa2net.benchmarks.stream", str(fps), str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as beside:
            assert beside.stdout
            beside.stdout.readline()  # it has started, which takes a core for a second
            played = play(
                predictor.stream(camera, in_flight=IN_FLIGHT, recheck_every=recheck_every),
                camera,
                seen,
            )
            idle = json.loads(beside.communicate()[0])
        return {
            "benchmark": "stream",
            "machine": machine.describe(threads),
            "bundle_digest": predictor.bundle.digest,
            "fps": fps,
            "seconds": seconds,
            "frame": list(shape),
            "execution": predictor.execution.to_json(),
            "stream": played,
            "control": idle,
        }


def table(result: dict[str, Any]) -> str:
    about = result["execution"]
    lines = [
        f"{about['runtime']} {about['precision']}, {about['graph']}, {about['threads']} threads, "
        f"{' x '.join(map(str, result['frame']))} at {result['fps']:g} fps, {result['seconds']:g} s",
        f"{'':<8} {'due':>6} {'masks':>6} {'dropped':>8} {'lost':>5} {'late':>5} "
        f"{'p50 ms':>8} {'p99':>8} {'p99.9':>8} {'longest':>8}",
    ]
    for name in ("stream", "control"):
        row = result[name]
        cells = [f"{row[key]:.2f}" if row[key] is not None else "-" for key in ("p50", "p99", "p99.9", "longest")]
        counts = f"{row['due']:>6} {row['masks']:>6} {row['dropped']:>8} {row['lost_by_camera']:>5} {row['late']:>5}"
        lines.append(f"{name:<8} {counts} " + " ".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    print("ready", flush=True)
    print(json.dumps(control(float(sys.argv[1]), float(sys.argv[2]))))
