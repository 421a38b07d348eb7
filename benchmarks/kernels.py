"""The gate's kernels on a GPU, right first and then fast: `python -m benchmarks.kernels --json FILE`.

Each kernel is held against float64 at every gate of the released network, and the network against its own layers; one
that is wrong, or fails, is named and not timed. Then gate and network are timed in interleaved rounds, by the device's
own events, alone and inside a CUDA graph, which holds several gates:
    eager                the paper's steps as PyTorch's layers
    compile              the same by torch.compile
    collapsed            the collapsed gate in plain PyTorch: what is gained without fusion
    collapsed, compile   the same by torch.compile
    triton               core/kernels/triton.py
    cuda                 core/kernels/csrc; built first: `python -m msa2net.core.kernels.build`
The floor of a gate is what its bytes and products take at this GPU's own measured rates: of square matrix products in
the same dtype, and of copies. Maps and weights are used again and again, as a network's are: where they fit into half
of the L2 cache, the copies are of that size, too (the table marks those floors with *), else far larger.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from msa2net.benchmarks import machine
from msa2net.core import VARIANTS
from msa2net.core.config import IMAGE_SIZE, ModelConfig
from msa2net.core.kernels import reference
from msa2net.core.kernels.operator import FUSED, masag, why_not
from msa2net.core.kernels.reference import GateWeights, collapse
from msa2net.core.masag import MASAG
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites import rewritten
from msa2net.core.rewrites.fused_gate import FusedGate
from msa2net.errors import Msa2NetError
from msa2net.runtimes.acceptance import version_of
from msa2net.runtimes.measure import interleaved

GATES = ((384, 14), (192, 28), (96, 56))  # channels; rows and columns
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BATCHES = (1, 4, 16)
CALLS = 20  # of a gate in one CUDA graph, whose launch takes as long as a small gate
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of errors: an ulp or two of the results
SAMPLE_SECONDS = 2e-3
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What is timed: a gate, or the network if `channels` is 0."""

    channels: int
    size: int
    dtype: str
    batch: int

    def __str__(self) -> str:
        name = f"{self.channels} x {self.size} x {self.size}" if self.channels else "network"
        return f"{name}, {self.dtype}, batch {self.batch}"


# Right --------------------------------------------------------------------------------------------------------------


def gate_problem(case: Case, device: str) -> tuple[MASAG, Tensor, Tensor]:
    """A gate whose BatchNorms do something, and its two maps; the same numbers at every call."""
    torch.manual_seed(0)
    gate = MASAG(case.channels).double().eval()
    with torch.no_grad():
        for name, value in (*gate.named_parameters(), *gate.named_buffers()):
            if "running_var" in name or ("bn" in name and name.endswith("weight")):
                value.uniform_(0.5, 2)
            elif value.ndim == 1:
                value.normal_(0, 0.5)
    shape = (case.batch, case.channels, case.size, case.size)
    x, g = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    dtype = DTYPES[case.dtype]
    return gate.to(device, dtype), x.to(device, dtype), g.to(device, dtype)


def network(config: ModelConfig, device: str, dtype: torch.dtype) -> MSA2Net:
    """The network whose gates take the paper's steps, on a GPU too."""
    torch.manual_seed(0)
    model = MSA2Net(config).eval().to(device, dtype)
    for layer in (model.decoder_2, model.decoder_1, model.decoder_0):
        vars(layer.ag_attn)["kernel_for"] = lambda _: None
    return model


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip()[:500]


def usable(device: str) -> dict[str, str]:
    """Of each fused kernel, why it cannot run here; empty if it can."""
    return {kernel: why_not(kernel, torch.zeros(1, 96, 8, 8, device=device)) or "" for kernel in FUSED}


def judged(case: str, norm: bool, kernel: str, most: float, error: Callable[[], float]) -> dict[str, Any]:
    """A check: the error, the most that it may be, and whether it is right; a failure in words is not."""
    row: dict[str, Any] = {"case": case, "norm": norm, "kernel": kernel, "most": most}
    try:
        found = error()
    except Exception as failure:  # whatever it is, the other checks are to be made
        return row | {"failed": said(failure), "right": False}
    return row | {"error": found, "right": found <= most}


def error_of(kernel: str, arguments: Sequence[Tensor], expected: Tensor) -> float:
    return float((masag(*arguments, kernel=kernel).double() - expected).abs().max())


def check(cases: Sequence[Case], kernels: Sequence[str], device: str) -> list[dict[str, Any]]:
    """Each kernel's error against float64, at most twice that of plain PyTorch in its dtype; with and without norm."""
    rows = []
    for case in tqdm(cases, desc="right?", disable=None):
        gate, x, g = gate_problem(case, device)
        weights = collapse(gate)
        norm = torch.linspace(-1, 2, case.channels, device=device, dtype=x.dtype)
        exact = GateWeights(*(each.double() for each in weights))
        for pair in (None, (norm, norm.flip(0))):
            wide = None if pair is None else (pair[0].double(), pair[1].double())
            expected = reference.forward(x.double(), g.double(), exact, wide)
            arguments = (x, g, *weights, *(pair or ()))
            most = 2 * error_of("reference", arguments, expected) + FLOOR[x.dtype]
            for kernel in kernels:
                error = partial(error_of, kernel, arguments, expected)
                rows.append(judged(str(case), pair is not None, kernel, most, error))
    return rows


def check_network(kernels: Sequence[str], device: str, config: ModelConfig) -> list[dict[str, Any]]:
    """The whole network in fp32 with each kernel inside, against its layers."""
    model = network(config, device, torch.float32)
    image = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    expected = model(image)
    most = 1e-4 * float(expected.abs().max())

    def error(kernel: str) -> float:
        return float((fused(model, kernel)(image) - expected).abs().max())

    return [judged("network, fp32", True, kernel, most, partial(error, kernel)) for kernel in kernels]


def fused(model: MSA2Net, kernel: str) -> MSA2Net:
    """The network with its gates and the norms after them as one operator, by this kernel."""
    model = rewritten(model, ["fused_gate"])
    for layer in (model.decoder_2, model.decoder_1, model.decoder_0):
        if isinstance(layer.fused_gate, FusedGate):
            layer.fused_gate.kernel = kernel
    return model


# Fast ---------------------------------------------------------------------------------------------------------------


def floor_of(case: Case, rates: dict[str, float], cache: int) -> dict[str, Any]:
    """What the three launches of a gate take at least: their bytes, or their products, at the measured rates.

    cache   bytes of L2; 0 if not known, then all is taken to come from memory
    """
    c, pixels = case.channels, case.batch * case.size**2
    bytes_of = DTYPES[case.dtype].itemsize
    launches = (  # (maps and weights, multiply-adds on the tensor cores)
        (3 * pixels * c + 10 * c, 0),
        (pixels * c + 9 * c * c, 9 * c * c * pixels),
        (3 * pixels * c + 2 * c * c, 2 * c * c * pixels),
    )
    cached = sum(values for values, _ in launches) * bytes_of <= cache / 2
    rate = rates["bytes_cached" if cached else "bytes"]
    times = (max(values * bytes_of / rate, 2 * products / rates[case.dtype]) for values, products in launches)
    return {"floor": sum(times), "floor_cached": cached}


def contenders(case: Case, kernels: Sequence[str], device: str, config: ModelConfig, compiled: bool) -> dict[str, Call]:
    """One call of each."""
    torch._dynamo.reset()  # it counts compilations of a function, and stops at eight
    calls: dict[str, Call] = {}
    if case.channels:
        gate, x, g = gate_problem(case, device)
        weights = collapse(gate)
        calls["eager"] = lambda: gate.steps(x, g)
        calls["collapsed"] = lambda: reference.forward(x, g, weights)
        if compiled:
            steps = torch.compile(gate.steps, fullgraph=True, dynamic=False)
            calls["compile"] = lambda: steps(x, g)
        if compiled and case.batch == 1:
            collapsed = torch.compile(reference.forward, fullgraph=True, dynamic=False)
            calls["collapsed, compile"] = lambda: collapsed(x, g, weights)
        for kernel in kernels:
            calls[kernel] = lambda kernel=kernel: masag(x, g, *weights, kernel=kernel)  # type: ignore[misc]
        return calls
    model = network(config, device, DTYPES[case.dtype])
    image = torch.randn(case.batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device, dtype=DTYPES[case.dtype])
    calls["eager"] = lambda: model(image)
    if compiled:
        whole = torch.compile(model, dynamic=False)
        calls["compile"] = lambda: whole(image)
    for name, kernel in {"collapsed": "reference", **{kernel: kernel for kernel in kernels}}.items():
        of_kernel = fused(model, kernel)
        calls[name] = lambda of_kernel=of_kernel: of_kernel(image)  # type: ignore[misc]
    return calls


def captured(call: Call, times: int) -> Call:
    """So many calls as a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def seconds(call: Call, device: str, repeats: int, times: int = 1) -> float:
    """Of one of `repeats` calls in a row, by the device's events; on a CPU by the clock. Each does its work `times`."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats / times
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats / times


def repeats_of(call: Call, device: str) -> int:
    """So many that a sample takes `SAMPLE_SECONDS`."""
    seconds(call, device, 2)
    return max(1, round(SAMPLE_SECONDS / max(seconds(call, device, 3), 1e-7)))


def rates_of(device: str) -> dict[str, float]:
    """Bytes a second of a copy, both ways counted, in memory and in half of the cache, and operations a second of a
    square product in each dtype.
    """
    size, large = (4096, 1 << 28) if device != "cpu" else (256, 1 << 20)

    def best(call: Call) -> float:
        times = CALLS if device != "cpu" else 1
        call = captured(call, times) if device != "cpu" else call
        return min(seconds(call, device, repeats_of(call, device), times) for _ in range(5))

    def copies(count: int) -> float:
        source = torch.empty(count, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * count / best(lambda: target.copy_(source))

    rates = {"bytes": copies(large), "bytes_cached": copies(cache_of(device) // 4 or large)}
    for name, dtype in DTYPES.items():
        matrix = torch.randn(size, size, device=device).to(dtype)
        rates[name] = 2 * size**3 / best(lambda matrix=matrix: matrix @ matrix)  # type: ignore[misc]
    return rates


def timed(
    calls: dict[str, Call], device: str, rounds: int, times: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call, with ", graph" behind its name in a CUDA graph of so many, in interleaved rounds; and of
    those that failed, how.
    """
    samples: dict[str, Callable[[], float]] = {}
    failed = {}
    for name, call in calls.items():
        try:
            call()
            samples[name] = partial(seconds, call, device, repeats_of(call, device))
            if device != "cpu":
                graph = captured(call, times)
                samples[f"{name}, graph"] = partial(seconds, graph, device, repeats_of(graph, device), times)
        except Exception as failure:  # whatever it is, the others are to be timed
            failed[name] = said(failure)
    return interleaved(samples, range(rounds)) if samples else {}, failed


def cases_of(gates: Sequence[tuple[int, int]], batches: Sequence[int], dtypes: Sequence[str]) -> Iterator[Case]:
    """What matters most first, for a run that is out of time."""
    for batch in batches:
        for dtype in dtypes:
            for channels, size in gates:
                yield Case(channels, size, dtype, batch)
            yield Case(0, 0, dtype, batch)


def measure(
    device: str,
    *,
    gates: Sequence[tuple[int, int]] = GATES,
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[str] = tuple(DTYPES),
    config: ModelConfig = VARIANTS["small"],
    rounds: int = 15,
    minutes: float = 7,
    compiled: bool = True,
    with_network: bool = True,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """All of it; `right` is false if a kernel was wrong or none was there, `left_out` names the cases that there was no
    time for. What is there so far is saved after the checks and after each case.
    """
    start = time.monotonic()
    reasons = usable(device)
    kernels = [kernel for kernel, reason in reasons.items() if not reason]
    result: dict[str, Any] = {
        "benchmark": "kernels",
        "machine": machine.describe(torch.get_num_threads()) | describe(device),
        "not_run": {kernel: reason for kernel, reason in reasons.items() if reason},
        "rounds": rounds,
    }
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        gate_cases = [
            Case(*gate, dtype, batch) for gate in gates for dtype in dtypes for batch in sorted({*batches, 3})
        ]
        checks = check(gate_cases, kernels, device)
        checks += check_network(kernels, device, config) if with_network else []
        result["checks"], result["right"] = checks, bool(checks) and all(row["right"] for row in checks)
        save(result)
        sound = [k for k in kernels if all(row["right"] for row in checks if row["kernel"] == k)]
        result["rates"] = rates = rates_of(device)
        result["cases"], result["left_out"] = [], []
        cases = [case for case in cases_of(gates, batches, dtypes) if case.channels or with_network]
        for case in tqdm(cases, desc="fast?", disable=None):
            if time.monotonic() - start > 60 * minutes:
                result["left_out"].append(str(case))
                continue
            # Compiling the network takes a minute each time.
            with_compile = compiled and (case.channels > 0 or (case.batch == 1 and case.dtype == "fp16"))
            row = asdict(case) | (floor_of(case, rates, cache_of(device)) if case.channels else {"floor": None})
            try:
                calls = contenders(case, sound, device, config, with_compile)
                samples, failed = timed(calls, device, rounds, CALLS if case.channels else 1)
            except Exception as failure:  # whatever it is, the other cases are to be timed
                samples, failed = {}, {"case": said(failure)}
            median = {name: statistics.median(values) for name, values in samples.items()}
            result["cases"].append(row | {"median": median, "failed": failed, "seconds": samples})
            save(result)
    return result


def cache_of(device: str) -> int:
    """Bytes of the L2 cache; 0 for a CPU."""
    return 0 if device == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size


def describe(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"gpu": None}
    of = torch.cuda.get_device_properties(device)
    return {
        "gpu": of.name,
        "capability": f"{of.major}.{of.minor}",
        "multiprocessors": of.multi_processor_count,
        "gpu_memory": of.total_memory,
        "gpu_cache": of.L2_cache_size,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
    }


def table(result: dict[str, Any]) -> str:
    """The result as aligned text: medians in microseconds, in a graph where there is one."""
    about, rates = result["machine"], result["rates"]
    lines = [
        f"{about['gpu'] or about['processor']}, torch {about['versions'].get('torch')}, commit {about['commit']}",
        f"copies {rates['bytes'] / 1e9:.0f} GB/s, in the cache {rates['bytes_cached'] / 1e9:.0f}; products "
        + ", ".join(f"{name} {rates[name] / 1e12:.1f} TFLOP/s" for name in DTYPES if name in rates),
    ]
    lines += [f"{kernel} did not run: {reason}" for kernel, reason in result["not_run"].items()]
    wrong = [row for row in result["checks"] if not row["right"]]
    for row in wrong:
        what = row.get("failed") or f"error {row['error']:.1e}, expected at most {row['most']:.1e}"
        lines.append(f"WRONG: {row['kernel']} at {row['case']}: {what}")
    lines += [f"{len(result['checks'])} checks, {len(wrong)} wrong", ""]
    names = ("eager", "compile", "collapsed", "collapsed, compile", *FUSED)
    heads = ("eager", "compile", "collapsed", "compile", *FUSED, "floor")
    lines.append(f"{'microseconds':<30}" + "".join(f"{head:>10}" for head in heads) + "   over eager")
    for row in result["cases"]:
        median = {name: row["median"].get(f"{name}, graph", row["median"].get(name)) for name in names}
        shown = [f"{value * 1e6:.1f}" if value else "-" for value in (*median.values(), row["floor"])]
        shown[-1] += "*" if row.get("floor_cached") else ""
        ratios = [f"{name} {median['eager'] / median[name]:.2f}" for name in FUSED if median[name] and median["eager"]]
        case = Case(row["channels"], row["size"], row["dtype"], row["batch"])
        lines.append(f"{case!s:<30}" + "".join(f"{value:>10}" for value in shown) + "   " + ", ".join(ratios))
        lines += [f"    {name} failed: {how}" for name, how in row["failed"].items()]
    lines += [f"left out, there was no time: {case}" for case in result["left_out"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=7, help="then what is left is left out (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, raw samples included")
    args = parser.parse_args(argv)
    try:
        machine.require_folder(args.json)
        if args.device != "cuda" or not torch.cuda.is_available():
            found = "no GPU" if args.device == "cuda" else repr(args.device)
            raise Msa2NetError("--device", f"got {found}", "expected 'cuda', with a GPU and a CUDA build of PyTorch")
        result = measure(
            args.device, rounds=args.rounds, minutes=args.minutes, save=partial(machine.write_json, args.json)
        )
    except Msa2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    return 0 if result["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
