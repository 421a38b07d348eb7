"""Everything of a bundle that runs on this machine's NVIDIA GPU: `python -m benchmarks.gpu --bundle B --json FILE`.

Each artifact is loaded, and built where its runtime builds; its golden frames must pass; its masks of phantoms are held
against those of fp32 on the CPU and judged as at export; then all are timed in interleaved rounds, with and without a
CUDA graph, copies to and from the GPU included. One that fails is named and does not stop the others, and what was
measured by then is in the file. The gate's kernels have a benchmark of their own, `python -m benchmarks.kernels`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from msa2net.benchmarks import machine
from msa2net.core.phantoms import frames as phantom_frames
from msa2net.errors import Msa2NetError
from msa2net.runtimes import Predictor, preprocess
from msa2net.runtimes.acceptance import version_of
from msa2net.runtimes.backends import candidates, why_no_gpu, why_not
from msa2net.runtimes.bundle import Bundle
from msa2net.runtimes.measure import image_parity, interleaved, judge, timed
from msa2net.runtimes.predictor import DEMO_BUNDLE

PACKAGES = ("tensorrt", "tensorrt-rtx", "torch", "torch-tensorrt", "onnxruntime-gpu", "cuda-bindings", "triton")
SEED = 4_000_000  # apart from training, validation, test, the parity check and calibration
PHANTOMS, ROUNDS = 40, 50


def wanted(bundle: Bundle) -> Iterator[tuple[str, str, str]]:
    """(Runtime, precision, device) of what may run on the GPU."""
    for artifact in bundle.manifest.artifacts:
        if artifact.runtime in candidates("cuda"):
            yield artifact.runtime, artifact.precision, "cuda"
            if artifact.runtime == "onnxruntime":
                yield artifact.runtime, artifact.precision, "tensorrt"


def frames(bundle: Bundle, count: int) -> list[Any]:
    """Phantoms of the network's own size, in grey if it takes grey."""
    contract = bundle.manifest.input
    shape = (contract.height, contract.width)
    return phantom_frames(shape if contract.channels == 1 else (*shape, 3), count, SEED)


def free_memory() -> int | None:
    """Bytes of the GPU's memory that nobody uses; None if no package is there to ask."""
    if why_not("tensorrt-rtx") is None or why_not("tensorrt") is None:
        from cuda.bindings import runtime as cudart

        from msa2net.runtimes.backends.cuda import call

        return int(call("memory", cudart.cudaMemGetInfo())[0])
    if why_not("pytorch") is None:
        import torch

        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    return None


def loaded(path: Path, runtime: str, precision: str, device: str, cache: Path) -> tuple[Predictor, dict[str, Any]]:
    """The predictor, and what loading it took, once with an empty cache and once with what the first has left there."""
    row: dict[str, Any] = {}
    before = free_memory()
    for name in ("first", "second"):
        start = time.monotonic()
        predictor = Predictor.load(path, runtime=runtime, precision=precision, device=device, cache=cache)
        row[f"{name} start"] = time.monotonic() - start
        if name == "first":
            predictor.close()
    after = free_memory()
    row["memory"] = None if before is None or after is None else before - after
    execution = predictor.execution
    row |= {key: getattr(execution, key) for key in ("runtime_version", "device", "provider", "cached", "layers")}
    return predictor, row


def compared(predictor: Predictor, images: Sequence[Any], expected: Sequence[Any]) -> dict[str, Any]:
    """The golden frames, and the masks of the phantoms against those of the reference, if there is one, judged as at
    export.
    """
    test = predictor.self_test()
    row: dict[str, Any] = {"golden": test.passed, "logit_difference": test.logit_difference}
    row |= {"pixel_agreement": test.pixel_agreement, "ratio": None, "ratio_bound": None, "verdict": "unjudged"}
    if not expected:
        return row
    classes = [each.name for each in predictor.bundle.manifest.classes]
    pairs = zip(expected, map(predictor.predict, images), strict=True)
    judgement = judge(
        [image_parity(f"phantom {i}", mask, found.mask, len(classes)) for i, (mask, found) in enumerate(pairs)], classes
    )
    return row | {key: judgement[key] for key in ("pixel_agreement", "ratio", "ratio_bound", "verdict")}


def measure(
    path: Path, *, rounds: int = ROUNDS, phantoms: int = PHANTOMS, minutes: float = 7, save: Callable[[Any], None]
) -> dict[str, Any]:
    """All of it, saved after each artifact; `passed` is false if anything that ran was wrong, or nothing ran."""
    start, bundle = time.monotonic(), Bundle(path)
    about = machine.describe(0)
    about["versions"] |= {name: found for name in PACKAGES if (found := version_of(name))}
    result: dict[str, Any] = {"benchmark": "gpu", "machine": about, "bundle": bundle.digest, "rows": [], "not_run": {}}
    images = frames(bundle, phantoms)
    expected: list[Any] = []
    try:
        with Predictor.load(path) as reference:
            result["reference"] = f"{reference.execution.runtime} {reference.execution.precision} on the CPU"
            expected = [reference.predict(image).mask for image in images]
    except Msa2NetError as error:
        result["reference"] = f"the golden frames alone, fp32 does not run on the CPU ({error})"
    tensor = preprocess.to_tensor(images[0], bundle.manifest.input, None)
    calls: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory(prefix="msa2net-gpu-") as cache, ExitStack() as stack:
        for runtime, precision, device in tqdm([*wanted(bundle)], desc="artifacts", disable=None):
            name = f"{runtime} {precision}" + (" by tensorrt" if device == "tensorrt" else "")
            if time.monotonic() - start > 60 * minutes:
                result["not_run"][name] = "there was no time"
                continue
            try:
                predictor, row = loaded(path, runtime, precision, device, Path(cache))
                stack.callback(predictor.close)
                row |= {"name": name} | compared(predictor, images, expected)
            except Exception as error:  # whatever it is, the others are to run
                result["not_run"][name] = str(error) if isinstance(error, Msa2NetError) else repr(error)[:500]
                continue
            result["rows"].append(row)
            save(result)
            if row["golden"]:
                calls[name] = partial(predictor.logits, tensor)
                backend = predictor._network.backend if predictor._network else None
                if isinstance(backend, WithGraph) and "without" not in row["provider"]:
                    calls[f"{name}, no graph"] = partial(backend.infer_without_graph, tensor)
        samples = times(calls, rounds, max(10.0, 60 * minutes - (time.monotonic() - start)))
    for row in result["rows"]:
        row["milliseconds"] = samples.get(row["name"], [])
        row["milliseconds_without_graph"] = samples.get(f"{row['name']}, no graph", [])
    result["passed"] = bool(result["rows"]) and all(
        row["golden"] and row["verdict"] != "failed" for row in result["rows"]
    )
    save(result)
    return result


@runtime_checkable
class WithGraph(Protocol):
    """A backend that can leave its CUDA graph out."""

    def infer_without_graph(self, x: NDArray[np.float32]) -> NDArray[np.float32]: ...


def times(calls: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call in interleaved rounds, fewer of them if they would not fit."""
    if not calls:
        return {}
    once = {name: timed(call) for name, call in calls.items()}
    rounds = max(5, min(rounds, int(seconds * 1e3 / sum(once.values()))))
    return interleaved({name: partial(timed, call) for name, call in calls.items()}, range(rounds))


def table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    about = result["machine"]
    lines = [f"{rows[0]['device'] if rows else 'no GPU'}, beside {about['processor']}; against {result['reference']}"]
    heads = f"{'golden':>7}{'equal':>10}{'bound':>8}{'ms':>8}{'no graph':>10}{'start':>8}{'again':>8}{'MB':>8}  layers"
    lines.append(f"{'':<28}{heads}")
    for row in rows:
        with_graph, without = (
            f"{statistics.median(row[key]):.2f}" if row.get(key) else "-"
            for key in ("milliseconds", "milliseconds_without_graph")
        )
        bound = "-" if row["ratio_bound"] is None else f"{row['ratio_bound']:.4f}"
        memory = "-" if row["memory"] is None else f"{row['memory'] / 1e6:.0f}"
        layers = ", ".join(f"{count} {name}" for name, count in row["layers"].items()) or "-"
        lines.append(
            f"{row['name']:<28}{'pass' if row['golden'] else 'FAIL':>7}{row['pixel_agreement']:>10.4%}{bound:>8}"
            f"{with_graph:>8}{without:>10}{row['first start']:>8.1f}{row['second start']:>8.1f}{memory:>8}  {layers}"
        )
    return "\n".join(lines + [f"not run: {name}: {reason}" for name, reason in result["not_run"].items()])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=DEMO_BUNDLE, help="default: the demo's, which has no engine")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=7, help="then no other is begun (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, raw samples included")
    args = parser.parse_args(argv)
    try:
        machine.require_folder(args.json)
        if missing := why_no_gpu():
            raise Msa2NetError("benchmarks.gpu", missing, "expected one, and a GPU", "Run it on the device.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is the demo model
            result = measure(
                args.bundle, rounds=args.rounds, minutes=args.minutes, save=partial(machine.write_json, args.json)
            )
    except Msa2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
