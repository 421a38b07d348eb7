"""Staying up: `python -m benchmarks.soak --bundle B --hours 0.5 --cpp build/cpp/segment --json FILE`.

Every runtime in a process of its own, all at the same time: masks without end, a while by `predict`, a while by a new
`stream`, and so on; with `--cpp` the example program, too. Beside them memory, file descriptors and threads are read
from /proc. No mask may ever be another than the first of its frame, memory may not grow: a stream's frames come and go,
so it is read between two turns, when what is free has gone back to the system.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from msa2net.benchmarks import machine
from msa2net.core.phantoms import frames
from msa2net.errors import Msa2NetError
from msa2net.runtimes import Predictor
from msa2net.runtimes.backends import RUNTIMES, why_not, why_not_here
from msa2net.runtimes.bundle import Bundle
from msa2net.runtimes.stream import give_memory_back

SEED = 7_000_000  # apart from all others
FRAMES, OTHER_SHAPE = 4, (480, 640, 3)
SAMPLE_SECONDS, TURN_SECONDS = 5.0, 5.0
MOST_SILENT_SECONDS = 120.0  # starting is the longest
WARM_UP = 0.2  # of the time: caches fill, the allocator finds its size
MOST_MB_PER_HOUR = 1.0
# What each thread used is kept in an arena of its own else, more of it or less, whatever has been freed.
ENVIRONMENT = {"MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "1")}


def slope(hours: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Least squares per hour, with its 95 % confidence bounds: (low, slope, high). Infinite bounds below 10 points.

    Memory mostly is what it was a moment before: the bounds are as wide as the correlation of neighbours asks, or as a
    random walk's where it may be one.
    """
    t, y = np.asarray(hours), np.asarray(values)
    if len(t) < 10:
        return -math.inf, math.nan, math.inf
    spread = float(((t - t.mean()) ** 2).sum())
    rate = float(((t - t.mean()) * (y - y.mean())).sum() / spread)
    rest = y - y.mean() - rate * (t - t.mean())
    squares, freedom = float((rest**2).sum()), len(t) - 2
    alike = float((rest[1:] * rest[:-1]).sum()) / squares if squares else 0.0
    walks = alike > 1 - 28 / len(t)  # as 19 of 20 random walks do once their trend is taken out
    alike = min(0.95, max(0.0, alike + (1 + 4 * alike) / len(t)))  # what few points show is less than there is
    worth = (1 - alike) / (1 + alike)  # of a point, beside one that is alike to no other
    left = max(2.0, freedom * worth)
    z = 1.959964
    student = z + (z**3 + z) / (4 * left) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * left**2)
    error = student * math.sqrt(squares / freedom / spread / worth)
    if walks:
        step = float(np.std(np.diff(y), ddof=1))
        error = max(error, z * step * math.sqrt(1.2 * (len(t) - 1)) / float(t[-1] - t[0]))
    return rate - error, rate, rate + error


class Watched:
    """A process that makes masks, what it says, and what /proc says of it."""

    def __init__(self, name: str, process: subprocess.Popen[str], said: IO[str]) -> None:
        self.name, self.process = name, process
        self.samples: list[dict[str, float]] = []
        self.windows: list[dict[str, float]] = []
        self.rests: list[dict[str, float]] = []
        self.about: dict[str, Any] = {}
        self.heard = time.monotonic()
        self._reader = threading.Thread(target=self._read, args=(said,), daemon=True)
        self._reader.start()

    def _read(self, said: IO[str]) -> None:
        for line in said:
            found = json.loads(line)
            self.heard = time.monotonic()
            if "about" in found:
                self.about = found["about"]
            else:
                (self.rests if "RssAnon" in found else self.windows).append(found)

    def sample(self, hours: float) -> None:
        """Raises Msa2NetError if it has ended."""
        if self.process.poll() is not None:
            raise Msa2NetError(self.name, f"ended with exit code {self.process.returncode}", "expected it to go on")
        if time.monotonic() - self.heard > MOST_SILENT_SECONDS:
            raise Msa2NetError(self.name, f"has said nothing for {MOST_SILENT_SECONDS:g} s", "expected masks")
        self.samples.append({"hours": round(hours, 5), **_status(self.process.pid)})

    def summary(self, hours: float) -> dict[str, Any]:
        self._reader.join(30)
        warm, rests = (
            [each for each in some if each["hours"] >= WARM_UP * hours]
            for some in (self.windows, self.rests or self.samples)
        )
        low, rate, high = slope([each["hours"] for each in rests], [each["RssAnon"] for each in rests])
        first, last = (statistics.median(each["median"] for each in some) for some in _ends(warm))
        changed, masks = (int(sum(each[key] for each in self.windows)) for key in ("changed", "masks"))
        # Between two turns as well, and the medians: a file that is just being read, or a thread that ends, is no leak.
        counts = {
            key: [int(statistics.median_low(each[key] for each in some)) for some in _ends(rests)]
            for key in ("files", "threads")
        }
        bounds = [value if math.isfinite(value) else None for value in (low, rate, high)]
        flat = all(later <= earlier for earlier, later in counts.values())
        return {
            "name": self.name,
            "about": self.about,
            "masks": masks,
            "changed": changed,
            "megabytes_per_hour": bounds,
            "resident_megabytes": [self.samples[0]["VmRSS"], self.samples[-1]["VmRSS"]],
            **counts,
            "median_milliseconds": [first, last],
            "passed": changed == 0 and high <= MOST_MB_PER_HOUR and flat,
            "samples": self.samples,
            "windows": self.windows,
            "rests": self.rests,
        }


def _ends(some: list[dict[str, float]]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The first and the last third."""
    third = max(1, len(some) // 3)
    return some[:third], some[-third:]


def _status(process: int | str) -> dict[str, float]:
    """Megabytes, anonymous ones and all that are resident, file descriptors and threads of a process."""
    root = f"/proc/{process}"  # not by pathlib, see `Bundle`
    with open(f"{root}/status") as file:
        status = dict(line.split(":", 1) for line in file)
    megabytes = {key: round(int(status[key].split()[0]) * 1024 / 1e6, 3) for key in ("RssAnon", "VmRSS")}
    return {**megabytes, "files": len(os.listdir(f"{root}/fd")), "threads": int(status["Threads"])}


class _Windows:
    """What a process says of itself: of its masks every `SAMPLE_SECONDS`, of its memory when it rests."""

    def __init__(self, out: IO[str]) -> None:
        self._out, self._start = out, time.monotonic()
        self._begin()

    def _begin(self) -> None:
        self._next = time.monotonic() + SAMPLE_SECONDS
        self._times: list[float] = []
        self._changed = 0

    def mask(self, milliseconds: float, right: bool) -> None:
        self._times.append(milliseconds)
        self._changed += not right
        if time.monotonic() >= self._next or not right:
            self.say()

    def rest(self) -> None:
        gc.collect()
        give_memory_back()
        self._print(_status("self"))

    def _print(self, found: dict[str, float]) -> None:
        hours = round((time.monotonic() - self._start) / 3600, 5)
        print(json.dumps({"hours": hours, **found}), file=self._out, flush=True)

    def say(self) -> None:
        """What has been since it was said last."""
        if self._times:
            window = {
                "masks": len(self._times),
                "changed": self._changed,
                "median": round(statistics.median(self._times), 3),
            }
            self._print(window)
        self._begin()


def soak(path: Path, runtime: str, precision: str, threads: int, stop: threading.Event, out: IO[str]) -> None:
    """In a process of its own: masks until it is stopped, what is said of them to `out`."""
    bundle = Bundle(path)
    shapes = [graph.frame for graph in bundle.artifact(runtime, precision).baked] or [(1080, 1920, 3)]
    images = [image for shape in (*shapes, OTHER_SHAPE) for image in frames(shape, FRAMES, SEED)]
    with Predictor.load(path, runtime=runtime, precision=precision, threads=threads) as predictor:
        print(json.dumps({"about": predictor.execution.to_json()}), file=out, flush=True)
        masks = [predictor.predict(image).mask for image in images]
        said = _Windows(out)

        def turn() -> None:
            for i, image in enumerate(_turn(images, stop)):
                found = predictor.predict(image)
                said.mask(found.timings.total, np.array_equal(found.mask, masks[i % len(masks)]))
            with predictor.stream(_turn(images, stop), late="wait", recheck_every=100) as stream:
                for each in stream:
                    segmentation = each.segmentation
                    right = np.array_equal(segmentation.mask, masks[each.index % len(masks)])
                    said.mask(segmentation.timings.total, right)

        while not stop.is_set():
            turn()
            said.rest()
        said.say()


def _turn(images: list[NDArray[np.uint8]], stop: threading.Event) -> Iterator[NDArray[np.uint8]]:
    end = time.monotonic() + TURN_SECONDS
    for image in cycle(images):
        if time.monotonic() > end or stop.is_set():
            return
        yield image


def soak_cpp(
    program: Path, path: Path, precision: str, threads: int, stop: threading.Event, stack: ExitStack
) -> tuple[subprocess.Popen[str], IO[str]]:
    """The example program: frames go to its standard input and masks come back by a pipe, from a thread of this one."""
    graph = Bundle(path).artifact("openvino", precision).baked[0]
    rows, columns, channels = (*graph.frame, 1)[:3]
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    os.mkfifo(folder / "masks")
    shape = [str(each) for each in (rows, columns, channels)]
    command = [str(program), str(path), precision, *shape, "/dev/stdin", str(folder / "masks"), str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | ENVIRONMENT)
    stack.callback(process.kill)
    read, write = os.pipe()
    images = frames(graph.frame, FRAMES, SEED)

    def feed() -> None:
        assert process.stdin
        with (folder / "masks").open("rb") as masks, os.fdopen(write, "w") as out, process.stdin:
            print(json.dumps({"about": {"runtime": "openvino, C++", "precision": precision}}), file=out, flush=True)
            first: dict[int, bytes] = {}
            said = _Windows(out)
            for i, image in cycle(enumerate(images)):
                start = time.perf_counter()
                process.stdin.write(image.tobytes())
                process.stdin.flush()
                mask = masks.read(rows * columns)
                said.mask((time.perf_counter() - start) * 1e3, mask == first.setdefault(i, mask))
                if stop.is_set():
                    break
            said.say()

    threading.Thread(target=feed, daemon=True).start()
    return process, os.fdopen(read)  # type: ignore[return-value]  # its standard input is bytes, its output goes nowhere


def measure(
    path: Path, runtimes: Sequence[str], precision: str, threads: int, hours: float, cpp: Path | None
) -> dict[str, Any]:
    stop, watched = threading.Event(), list[Watched]()
    with ExitStack() as stack:
        for runtime in runtimes:
            command = [sys.executable, "-m", "msa2net.benchmarks.soak", "--child", "--bundle", str(path)]
            command += ["--runtimes", runtime, "--precision", precision, "--threads", str(threads)]
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
            )
            stack.callback(process.kill)  # before its end is waited for
            assert process.stdout
            watched.append(Watched(f"{runtime} {precision}", process, process.stdout))
        if cpp:
            process, said = soak_cpp(cpp, path, precision, threads, stop, stack)
            watched.append(Watched(f"openvino {precision}, C++", process, said))
        while not all(each.windows for each in watched):  # they load and make their first masks
            time.sleep(0.5)
            for each in watched:
                if each.process.poll() is not None or time.monotonic() - each.heard > MOST_SILENT_SECONDS:
                    raise Msa2NetError(each.name, "has ended, or hangs, before its first masks")
        start = time.monotonic()
        for _ in tqdm(range(max(1, int(hours * 3600 / SAMPLE_SECONDS))), "soak", disable=None):
            time.sleep(SAMPLE_SECONDS)
            for each in watched:
                each.sample((time.monotonic() - start) / 3600)
        stop.set()
        for each in watched:
            if "C++" not in each.name:  # it ends when it gets no more frames
                each.process.terminate()
            try:
                code: int | str = each.process.wait(60)
            except subprocess.TimeoutExpired:
                code = "none within 60 s"
            if code != 0:
                raise Msa2NetError(each.name, f"ended with exit code {code}", "expected 0")
        rows = [each.summary(hours) for each in watched]
    return {
        "benchmark": "soak",
        "machine": machine.describe(threads),
        "bundle_digest": Bundle(path).digest,
        "environment": ENVIRONMENT,
        "hours": hours,
        "rows": rows,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'':<26} {'masks':>8} {'changed':>8} {'MB per hour [95 %]':>26} {'resident MB':>14} {'files':>8} "
        f"{'threads':>8} {'median ms':>16}",
    ]
    for row in rows:
        low, rate, high = (math.nan if value is None else value for value in row["megabytes_per_hour"])
        first, last = row["resident_megabytes"]
        before, after = row["median_milliseconds"]
        files, count = (" ".join(map(str, row[key])) for key in ("files", "threads"))
        grown = f"{rate:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(
            f"{row['name']:<26} {row['masks']:>8} {row['changed']:>8} {grown:>26} {first:>6.1f} {last:>7.1f} "
            f"{files:>8} {count:>8} {before:>7.2f} {after:>8.2f} {'pass' if row['passed'] else 'FAIL'}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--runtimes", help="names, separated by commas; default: all for CPUs that the bundle has")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--cpp", type=Path, metavar="PROGRAM", help="the example of runtimes/cpp; needs a baked graph")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        machine.require_folder(arguments.json)
        there = [
            each.runtime
            for each in Bundle(arguments.bundle).manifest.artifacts
            if each.precision == arguments.precision and RUNTIMES[each.runtime].device == "CPU"
        ]
        runtimes = arguments.runtimes.split(",") if arguments.runtimes else there
        for runtime in runtimes:
            if error := why_not(runtime) or why_not_here(runtime, arguments.precision):
                raise error
        if arguments.child:
            stop = threading.Event()
            signal.signal(signal.SIGTERM, lambda *_: stop.set())
            soak(arguments.bundle, runtimes[0], arguments.precision, arguments.threads, stop, sys.stdout)
            return 0
        result = measure(
            arguments.bundle, runtimes, arguments.precision, arguments.threads, arguments.hours, arguments.cpp
        )
    except Msa2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result["rows"]))
    machine.write_json(arguments.json, result)
    return 0 if all(row["passed"] for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
