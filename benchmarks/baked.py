"""What baking gains: `python -m benchmarks.baked --bundle B`. Each graph from a camera's frame to its mask against
preprocessing, network and postprocessing of the same frame, in interleaved rounds, and the share of equal pixels.
With `--cpp build/cpp/libmsa2net.so` the C library's, too, in the same rounds and the same process.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msa2net.benchmarks import machine
from msa2net.core.phantoms import frames
from msa2net.errors import Msa2NetError
from msa2net.runtimes import Predictor, postprocess, preprocess
from msa2net.runtimes.backends import BAKED, default_threads, why_not, why_not_precision
from msa2net.runtimes.bundle import Bundle
from msa2net.runtimes.measure import milliseconds, pixel_agreement, ratio

SEED = 5_000_000  # apart from training, validation, test, the parity check and calibration
ROUNDS, PAUSE, COMPARED = 100, 0.004, 20


def in_parts(predictor: Predictor, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mask of a frame by way of the network alone."""
    manifest = predictor.bundle.manifest
    logits = predictor.logits(preprocess.to_tensor(frame, manifest.input))
    size = (frame.shape[0], frame.shape[1])
    return postprocess.to_mask(logits, preprocess.place(manifest.input, *size), size, manifest.enlarge)


@contextmanager
def in_cpp(
    library: Path, bundle: Path, precision: str, threads: int, shape: tuple[int, ...]
) -> Iterator[Callable[[NDArray[np.uint8]], NDArray[np.uint8]]]:
    """The C library's `msa2net_predict`, from a frame of the shape to its mask. Raises Msa2NetError."""
    c = ctypes.CDLL(str(library))
    c.msa2net_last_error.restype = ctypes.c_char_p
    pointer, mask = ctypes.c_void_p(), np.empty(shape[:2], np.uint8)

    def checked(code: int) -> None:
        if code:
            raise Msa2NetError("C library", c.msa2net_last_error().decode())

    checked(c.msa2net_open(str(bundle).encode(), precision.encode(), *(*shape, 1)[:3], threads, ctypes.byref(pointer)))

    def call(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        checked(
            c.msa2net_predict(pointer, *(ctypes.c_void_p(array.ctypes.data) for array in (frame, mask)), None, None)
        )
        return mask

    try:
        yield call
    finally:
        c.msa2net_close(pointer)


def measure(bundle: Bundle, threads: int, rounds: int, cpp: Path | None = None) -> list[dict[str, Any]]:
    rows = []
    for artifact in bundle.manifest.artifacts:
        runtime, precision = artifact.runtime, artifact.precision
        if not artifact.baked or runtime not in BAKED:
            continue
        if reason := why_not(runtime) or why_not_precision(runtime, precision):
            print(f"{artifact.name} left out: {reason}")
            continue
        with Predictor.load(bundle.path, runtime=runtime, precision=precision, threads=threads) as predictor:
            for graph in artifact.baked:
                images = frames(graph.frame, COMPARED, SEED)
                equal = [pixel_agreement(predictor.predict(each).mask, in_parts(predictor, each)) for each in images]
                calls: dict[str, Callable[[], object]] = {
                    "baked": partial(predictor.predict, images[0]),
                    "parts": partial(in_parts, predictor, images[0]),
                }
                equal_in_cpp = []
                with ExitStack() as opened:
                    if cpp and runtime == "openvino":
                        call = opened.enter_context(in_cpp(cpp, bundle.path, precision, threads, graph.frame))
                        equal_in_cpp = [pixel_agreement(call(each), predictor.predict(each).mask) for each in images]
                        calls["cpp"] = partial(call, images[0])
                    samples = milliseconds(calls, rounds, PAUSE)
                rows.append(
                    {
                        "artifact": artifact.name,
                        "frame": list(graph.frame),
                        "equal_pixels": statistics.mean(equal),
                        "fewest_equal": min(equal),
                        "milliseconds": samples,
                        "ratio": ratio(samples["baked"], samples["parts"]),
                        "cpp_over_python": ratio(samples["cpp"], samples["baked"]) if "cpp" in samples else None,
                        "cpp_fewest_equal": min(equal_in_cpp, default=None),
                    }
                )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'artifact':<26} {'frame':<14} {'baked ms':>9} {'parts ms':>9} {'ratio':>21} {'equal':>9} {'fewest':>9}",
    ]
    for row in rows:
        low, median, high = row["ratio"]
        baked, parts = (statistics.median(row["milliseconds"][name]) for name in ("baked", "parts"))
        shape = "x".join(map(str, row["frame"]))
        lines.append(
            f"{row['artifact']:<26} {shape:<14} {baked:>9.2f} {parts:>9.2f} {median:>7.3f} [{low:.3f}, {high:.3f}]"
            f" {row['equal_pixels']:>9.4%} {row['fewest_equal']:>9.4%}"
        )
        if row["cpp_over_python"]:
            low, median, high = row["cpp_over_python"]
            lines[-1] += (
                f"   C++ over Python {median:.3f} [{low:.3f}, {high:.3f}], equal at least {row['cpp_fewest_equal']:.4%}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="from 'msa2net export --bake'")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cpp", type=Path, metavar="LIBRARY", help="libmsa2net.so of runtimes/cpp")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        machine.require_folder(arguments.json)
        bundle = Bundle(arguments.bundle)
        rows = measure(bundle, arguments.threads, arguments.rounds, arguments.cpp)
        if not rows:
            raise Msa2NetError(arguments.bundle, "has no baked graph that runs here", "", "Export with --bake.")
    except Msa2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {"machine": machine.describe(arguments.threads), "digest": bundle.digest, "n": arguments.rounds}
    print(table(rows))
    machine.write_json(arguments.json, result | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
