"""Latency of every runtime and precision of a bundle that can run here: `python -m benchmarks.latency`.

All are loaded in one process and timed in interleaved rounds, so that a drifting machine hits all alike. Each must pass
its golden frames first. Beside them: the reference network in PyTorch and, with `--plain`, its plain ONNX export in
each runtime. Start-up time and memory come from processes of each runtime's own, with a cache of their own.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from msa2net.benchmarks import machine, stream
from msa2net.errors import Msa2NetError
from msa2net.runtimes import DemoModelWarning, Predictor, Timings
from msa2net.runtimes.backends import default_threads, why_not
from msa2net.runtimes.bundle import Artifact, Bundle
from msa2net.runtimes.images import read_npy
from msa2net.runtimes.measure import interleaved, percentile, timed
from msa2net.runtimes.postprocess import nearest_index
from msa2net.runtimes.predictor import DEMO_BUNDLE

FRAME_SIZE = (480, 640)
# Between two calls, so that the threads of the runtime before have stopped spinning.
PAUSE_SECONDS = 0.004
STARTS = ("first", "second")  # with an empty cache, and with what the first has left there
FLOOR_EVERY = 8  # rounds; a 2048-cubed product takes as long as several frames of the demo

# Its arguments are the bundle, runtime, precision, threads, cache and the frame's file.
_CHILD = """
import sys, time, warnings
warnings.simplefilter("ignore")
import numpy
from msa2net import Predictor
bundle, runtime, precision, threads, cache, frame = sys.argv[1:]
predictor = Predictor.load(bundle, runtime=runtime, precision=precision, threads=int(threads), cache=cache)
predictor.predict(numpy.load(frame))
print(time.time(), predictor.execution.cached, flush=True)
for _ in range(20):
    predictor.predict(numpy.load(frame))
"""
POLL_SECONDS = 0.005


def test_frame(bundle: Bundle) -> NDArray[Any]:
    """The bundle's first golden frame, enlarged to `FRAME_SIZE` so that resizing is part of what is timed."""
    frame = read_npy(bundle.read(bundle.manifest.golden[0].frame))
    rows, columns = (nearest_index(source, target) for source, target in zip(frame.shape, FRAME_SIZE, strict=False))
    return np.ascontiguousarray(frame[rows[:, None], columns])


def start_up(path: Path, entry: Artifact, threads: int, frame: Path, cache: Path) -> tuple[float, float]:
    """A new process: seconds from its start to its first mask, and the largest anonymous memory in MB until 20 more.

    Anonymous memory is what the system cannot drop and read again from a file, as it can the mapped weights.
    """
    arguments = [str(path), entry.runtime, entry.precision, str(threads), str(cache), str(frame)]
    start, peak = time.time(), 0
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        while child.poll() is None:
            peak = max(peak, _anonymous(child.pid))
            time.sleep(POLL_SECONDS)
        out, err = child.communicate()
    if child.returncode:
        last = (err.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise Msa2NetError(f"{entry.runtime} {entry.precision}", f"fails in a process of its own ({last})")
    return float(out.split()[0]) - start, peak / 1e6


def _anonymous(process: int) -> int:
    """Bytes of a process's anonymous memory; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def rounds_for(predictors: dict[str, Predictor], frame: NDArray[Any], seconds: float) -> int:
    """How many rounds fit into `seconds`, 10 to 500; this is the warm-up, too."""
    start = time.perf_counter()
    for _ in range(3):
        for predictor in predictors.values():
            predictor.predict(frame)
    return max(10, min(500, math.floor(3 * seconds / (time.perf_counter() - start))))


def _timings(predictor: Predictor, frame: NDArray[Any]) -> Timings:
    return predictor.predict(frame).timings


def row(predictor: Predictor, samples: list[Timings]) -> dict[str, Any]:
    """One runtime's figures, raw samples included; milliseconds."""
    totals = [timings.total for timings in samples]
    sizes = [file.bytes for file in predictor.artifact.files]
    return {
        "runtime": predictor.artifact.runtime,
        "precision": predictor.artifact.precision,
        "n": len(totals),
        "p50": percentile(totals, 50),
        "p90": percentile(totals, 90),
        "p99": percentile(totals, 99),
        "preprocess": statistics.median(timings.preprocess for timings in samples),
        "inference": statistics.median(timings.inference for timings in samples),
        "postprocess": statistics.median(timings.postprocess for timings in samples),
        "frames_per_second": 1000 / statistics.median(totals),
        "megabytes": sum(sizes) / 1e6,
        "execution": predictor.execution.to_json(),
        "samples": [[round(t.preprocess, 4), round(t.inference, 4), round(t.postprocess, 4)] for t in samples],
    }


def references(bundle: Bundle, threads: int, plain: bool) -> dict[str, Callable[[], Any]]:
    """The network alone, as it was before it was made fast: the eager reference, and its plain export if `plain`.

    Empty without torch or without the weights in the bundle.
    """
    weights = bundle.path / "torch" / "weights.safetensors"
    if why_not("pytorch") or not weights.exists():
        return {}
    from msa2net.benchmarks import rewrites
    from msa2net.core import ModelConfig
    from msa2net.core.checkpoint import load_model, read_checkpoint

    model = load_model(read_checkpoint(weights), ModelConfig.from_json(bundle.manifest.model_config))
    found = {"eager reference": rewrites.load("pytorch", model, (), threads)}
    for artifact in bundle.manifest.artifacts if plain else ():
        if artifact.runtime != "pytorch" and not why_not(artifact.runtime):
            call = rewrites.load(artifact.runtime, model, (), threads, artifact.precision)
            found[f"plain export, {artifact.name}"] = call
    return found


def measure(
    path: Path, runtimes: list[str] | None, threads: int, rounds: int | None, quick: bool, plain: bool = False
) -> dict[str, Any]:
    """Runs the benchmark on a bundle; returns what is printed and written as JSON."""
    bundle = Bundle(path)
    there = {artifact.runtime for artifact in bundle.manifest.artifacts}
    if unknown := set(runtimes or ()) - there:
        found = ", ".join(sorted(unknown))
        raise Msa2NetError("--runtimes", f"got {found}", f"expected some of {', '.join(sorted(there))}", "Check it.")
    for option, value in (("--rounds", rounds), ("--threads", threads)):
        if value is not None and value < 1:
            raise Msa2NetError(option, f"got {value}", "expected at least 1", "Leave it out.")
    frame = test_frame(bundle)
    predictors: dict[str, Predictor] = {}
    parity, skipped = {}, []
    for entry in Predictor.available(path):
        name = f"{entry.runtime} {entry.precision}"
        if runtimes and entry.runtime not in runtimes:
            continue
        if not entry.available:
            skipped.append({"runtime": entry.runtime, "precision": entry.precision, "reason": entry.reason})
            continue
        predictor = Predictor.load(path, runtime=entry.runtime, precision=entry.precision, threads=threads, cache=False)
        tested = predictor.self_test()
        if not tested.passed:
            raise Msa2NetError(name, str(tested), "expected a pass before it is timed", "Run msa2net verify.")
        predictors[name] = predictor
        parity[name] = {"logit_difference": tested.logit_difference, "pixel_agreement": tested.pixel_agreement}
    if not predictors:
        reasons = "; ".join(f"{each['runtime']}: {each['reason']}" for each in skipped) or "none was asked for"
        raise Msa2NetError("benchmark", f"nothing can run here: {reasons}")

    rounds = rounds or rounds_for(predictors, frame, 8 if quick else 60)
    floor = machine.floor_calls(threads, any(each.artifact.precision == "bf16" for each in predictors.values()))
    before = references(bundle, threads, plain)
    calls: dict[str, Callable[[], Any]] = {
        name: partial(_timings, predictor, frame) for name, predictor in predictors.items()
    }
    calls |= {name: partial(timed, call) for name, call in (before | floor).items()}
    samples = interleaved(
        calls,
        tqdm(range(rounds), "rounds", unit="round", disable=None),
        every=dict.fromkeys(floor, FLOOR_EVERY),
        pause=PAUSE_SECONDS,
    )
    products = {name: samples[name] for name in floor}
    rows = [row(predictors[name], samples[name]) | {"parity": parity[name]} for name in predictors]
    starts: dict[str, list[tuple[float, float]]] = {f"{which} {name}": [] for which in STARTS for name in predictors}
    with tempfile.TemporaryDirectory() as folder:
        frame_file = Path(folder) / "frame.npy"
        np.save(frame_file, frame)
        for number in tqdm(range(1 if quick else 3), "start-up", unit="round", disable=None):
            for name, predictor in predictors.items():
                cache = Path(folder) / f"cache {number} {name}"  # empty at the first start
                for which in STARTS:
                    measured = start_up(path, predictor.artifact, threads, frame_file, cache)
                    starts[f"{which} {name}"].append(measured)
                shutil.rmtree(cache, ignore_errors=True)

    operations = machine.multiply_adds(bundle.manifest)
    low = products.pop(machine.BF16_PRODUCT, None)
    fastest = min(products, key=lambda name: statistics.median(products[name]))
    product = statistics.median(products[fastest])
    floor_ms = machine.floor_milliseconds(operations, product) if operations else None
    low_floor_ms = machine.floor_milliseconds(operations, statistics.median(low)) if operations and low else None
    medians = {name: statistics.median(samples[name]) for name in before}
    for each, name in zip(rows, predictors, strict=True):
        plain_ms, eager_ms = medians.get(f"plain export, {name}"), medians.get("eager reference")
        own_floor = low_floor_ms if each["precision"] == "bf16" else floor_ms
        each["speedup_over_eager"] = eager_ms / each["inference"] if eager_ms else None
        each["inference_over_plain"] = each["inference"] / plain_ms if plain_ms else None
        each["inference_over_floor"] = each["inference"] / own_floor if own_floor else None
        for which in STARTS:
            seconds, peaks = zip(*starts[f"{which} {name}"], strict=True)
            each[f"{which}_start_seconds"] = statistics.median(seconds)
            each[f"{which}_start_anonymous_megabytes"] = statistics.median(peaks)
            each[f"{which}_start_samples"] = starts[f"{which} {name}"]
    for predictor in predictors.values():
        predictor.close()
    return {
        "benchmark": "latency",
        "machine": machine.describe(threads),
        "model": {"name": bundle.manifest.model_name, "variant": bundle.manifest.model_variant},
        "bundle_digest": bundle.digest,
        "frame": list(frame.shape),
        "rounds": rounds,
        "start_up_rounds": len(next(iter(starts.values()))),
        "multiply_adds": operations,
        "floor": {
            "product": fastest,
            "gflops": 2 * machine.FLOOR_SIZE**3 / product / 1e6,
            "milliseconds": floor_ms,
            "samples": products,
            "bf16_milliseconds": low_floor_ms,
            "bf16_samples": low,
        },
        "references": [
            {
                "name": name,
                "inference": medians[name],
                "over_floor": medians[name] / floor_ms if floor_ms else None,
                "samples": [round(value, 4) for value in samples[name]],
            }
            for name in before
        ],
        "rows": rows,
        "skipped": skipped,
    }


def table(result: dict[str, Any]) -> str:
    """The result as aligned text. A figure that could not be measured is a dash."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    about, model = result["machine"], result["model"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['processor']}, {about['cores']} cores, {about['threads']} threads",
        f"Python {about['python']}, {versions}",
        f"model {model['name']} ({model['variant']}), frame {' x '.join(map(str, result['frame']))}, "
        f"commit {about['commit'] or '-'}",
    ]
    if result["multiply_adds"]:
        floor = result["floor"]
        lines.append(
            f"floor: {result['multiply_adds'] / 1e9:.2f} G multiply-adds at {floor['gflops']:.0f} GFLOP/s "
            f"({floor['product']}) = {floor['milliseconds']:.1f} ms"
            + (f"; in bf16 {floor['bf16_milliseconds']:.1f} ms" if floor["bf16_milliseconds"] else "")
        )
    heads: tuple[str, ...] = ("runtime", "precision", "p50 ms", "p90", "p99", "n", "fps", "pre", "infer", "post")
    heads += ("x eager", "/ plain", "/ floor", "1st start s", "2nd", "1st anon MB", "x size", "2nd", "x size")
    heads += ("size MB", "equal px")
    rows = [
        (
            each["runtime"],
            each["precision"],
            shown(each["p50"], ".1f"),
            shown(each["p90"], ".1f"),
            shown(each["p99"], ".1f"),
            str(each["n"]),
            shown(each["frames_per_second"], ".1f"),
            shown(each["preprocess"], ".1f"),
            shown(each["inference"], ".1f"),
            shown(each["postprocess"], ".1f"),
            shown(each["speedup_over_eager"], ".2f"),
            shown(each["inference_over_plain"], ".2f"),
            shown(each["inference_over_floor"], ".2f"),
            shown(each["first_start_seconds"], ".2f"),
            shown(each["second_start_seconds"], ".2f"),
            shown(each["first_start_anonymous_megabytes"], ".0f"),
            shown(each["first_start_anonymous_megabytes"] / each["megabytes"], ".2f"),
            shown(each["second_start_anonymous_megabytes"], ".0f"),
            shown(each["second_start_anonymous_megabytes"] / each["megabytes"], ".2f"),
            shown(each["megabytes"], ".1f"),
            shown(each["parity"]["pixel_agreement"], ".3%"),
        )
        for each in sorted(result["rows"], key=lambda each: each["p50"])
    ]
    widths = [max(len(cells[i]) for cells in (heads, *rows)) for i in range(len(heads))]
    for cells in (heads, *rows):
        aligned = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
        aligned += [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
        lines.append("  ".join(aligned))
    for each in result["references"]:
        over = shown(each["over_floor"], ".2f")
        lines.append(f"{each['name']}: {each['inference']:.1f} ms, {over} of the fp32 floor")
    for each in result["skipped"]:
        lines.append(f"{each['runtime']:<{widths[0]}}  {each['precision']:<{widths[1]}}  not run: {each['reason']}")
    return "\n".join(lines)


def small_bundle() -> Path:
    """A bundle of the released size with weights by rule, made once: it is for timing and segments nothing."""
    from msa2net.core import VARIANTS
    from msa2net.core.checkpoint import model_by_rule, save_checkpoint
    from msa2net.export import export_bundle

    about = machine.describe(1)
    written_by = [
        about["versions"]["torch"].partition("+")[0],
        about["versions"]["openvino"],
        about["commit"] or "installed",
    ]
    target = Path("build") / f"small-by-rule-{'-'.join(written_by)}.bundle"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "small.safetensors"
            save_checkpoint(checkpoint, model_by_rule(VARIANTS["small"]).state_dict(), {"model": "by rule"})
            export_bundle(checkpoint, target)
    return target


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--bundle", type=Path, help="default: the demo's")
    source.add_argument(
        "--model", choices=("small",), help="the full network without a checkpoint: weights by rule, for timing only"
    )
    parser.add_argument("--runtimes", help="names, separated by commas; default: all that the bundle has")
    parser.add_argument("--rounds", type=int, help="default: as many as fit into a minute, 10 to 500")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--plain", action="store_true", help="beside each runtime the plain export of the reference")
    parser.add_argument("--quick", action="store_true", help="under 40 s: fewer rounds, start-up once")
    parser.add_argument("--stream", action="store_true", help="camera to mask, under a source paced at --fps")
    parser.add_argument("--fps", type=float, default=30, help="of --stream, default 30")
    parser.add_argument("--seconds", type=float, default=60, help="of --stream, default 60")
    parser.add_argument("--frame", default="1920x1080", help="of --stream, WIDTHxHEIGHT or WIDTHxHEIGHT:grey")
    parser.add_argument("--precision", default="fp32", help="of --stream, whose --runtimes is one")
    parser.add_argument("--recheck-every", type=int, help="of --stream: a golden frame after so many frames")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, raw samples included")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore", DemoModelWarning)
    try:
        machine.require_folder(arguments.json)
        path = small_bundle() if arguments.model else arguments.bundle or DEMO_BUNDLE
        runtimes = arguments.runtimes.split(",") if arguments.runtimes else None
        if arguments.stream:
            from msa2net.export.bake import FrameSize

            result = stream.measure(
                path,
                (runtimes or ["openvino"])[0],
                arguments.precision,
                arguments.threads,
                fps=arguments.fps,
                seconds=arguments.seconds,
                shape=FrameSize.parse(arguments.frame).shape,
                recheck_every=arguments.recheck_every,
            )
            print(stream.table(result))
            machine.write_json(arguments.json, result)
            return 0
        result = measure(path, runtimes, arguments.threads, arguments.rounds, arguments.quick, arguments.plain)
    except Msa2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    machine.write_json(arguments.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
