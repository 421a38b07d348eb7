"""Compiles every configuration of the Triton kernels ahead of time, without a GPU, and reports what each one takes.

`python -m msa2net.core.kernels.compile [--targets 87,90]` prints a line for each that spills registers or needs more
shared memory than the GPU has, and a table of the largest by target.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from msa2net.core.kernels import triton as kernels
from msa2net.core.kernels.build import TARGETS
from msa2net.core.kernels.reference import GateWeights

GATES = (384, 192, 96)  # channels, in the released network
# (dtype, whether tf32 was asked for)
PRECISIONS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
}
_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Job:
    kernel: str
    config: kernels.Config
    channels: int
    precision: str
    norm: bool
    target: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    tf32: bool  # whether an instruction computes in tf32


def jobs(targets: Sequence[int], precisions: Sequence[str] = tuple(PRECISIONS)) -> Iterator[Job]:
    """Each configuration that a launch on the target may take, once for each kernel that the compiler makes of it."""
    for target, precision, channels in itertools.product(targets, precisions, GATES):
        case = kernels.Case(channels, *PRECISIONS[precision], target)
        tried: list[tuple[str, tuple[kernels.Config, ...], bool]] = [
            ("_gate_kernel", kernels.gate_configs(case), norm) for norm in (False, True)
        ]
        if channels == GATES[0]:  # the others are the same for every width
            tried.append(("_dilated_kernel", kernels.dilated_configs(case), False))
            if precision != "tf32":  # it has no product
                tried.append(("_context_kernel", kernels.CONTEXT, False))
        for kernel, configs, norm in tried:
            for config in configs:
                yield Job(
                    kernel=kernel, config=config, channels=channels, precision=precision, norm=norm, target=target
                )


def compiled(job: Job) -> Usage:
    """Compiles one; the maps are contiguous, as the network's are."""
    dtype, tf32 = PRECISIONS[job.precision]
    channels = job.channels

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    vector, matrix = empty(channels), empty(channels, channels)
    x = empty(1, channels, 8 * 12, 8)
    weights = GateWeights(
        empty(9, channels),
        vector,
        empty(9, channels, channels),
        *(vector, vector, empty(3)),
        *(matrix, vector, matrix, vector),
    )
    context, dilated, gate = (
        job.config if name == job.kernel else configs[0]
        for name, configs in (
            ("_context_kernel", kernels.CONTEXT),
            ("_dilated_kernel", kernels.DILATED),
            ("_gate_kernel", kernels.GATE["half"]),
        )
    )
    norm = (vector, vector) if job.norm else None
    (launch,) = (
        each
        for each in kernels.launches(x, x, weights, norm, torch.empty_like(x), tf32, (context, dilated, gate))
        if each.kernel.__name__ == job.kernel
    )
    signature, constants, divisible = {}, dict(launch.constants), []
    for name, value in zip(launch.kernel.arg_names, launch.arguments, strict=False):
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
        elif value == 1:  # the just-in-time compiler makes constants of ones
            constants[name] = value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        # Tensors come from torch's allocator, which aligns; sizes and strides of the real gates are multiples, too.
        if name in signature and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)):
            divisible.append(launch.kernel.arg_names.index(name))
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=launch.kernel,
        signature={name: signature[name] for name in launch.kernel.arg_names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", job.target, 32), options=kernels.options(job.config))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, _, local = map(int, _USAGE.findall(dump.stdout)[0])
    return Usage(
        registers=registers, spilled=stack + local, shared=binary.metadata.shared, tf32="tf32" in binary.asm["ptx"]
    )


def faults(job: Job, usage: Usage) -> list[str]:
    """What is wrong with a compiled kernel; nothing, if all is right."""
    most = kernels.shared_memory(job.target)
    found = []
    if usage.spilled:
        found.append(f"spills {usage.spilled} bytes a thread")
    if usage.shared > most:
        found.append(f"needs {usage.shared} bytes of shared memory, sm_{job.target} has {most}")
    if usage.tf32 != (job.precision == "tf32") and job.kernel != "_context_kernel":
        found.append("computes in tf32" if usage.tf32 else "does not compute in tf32")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="compute capabilities without the dot")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    todo = list(jobs([int(each) for each in args.targets.split(",")], args.precisions.split(",")))
    wrong = 0
    most: dict[tuple[int, str], tuple[int, int]] = {}
    with ProcessPoolExecutor(args.workers) as pool:
        for job, usage in zip(todo, tqdm(pool.map(compiled, todo, chunksize=4), total=len(todo)), strict=True):
            for fault in faults(job, usage):
                wrong += 1
                tqdm.write(f"{job}: {fault}", sys.stdout)
            key = job.target, job.kernel
            registers, shared = most.get(key, (0, 0))
            most[key] = max(registers, usage.registers), max(shared, usage.shared)
    print(f"{'target':<8}{'kernel':<18}{'registers':>10}{'shared':>10}")
    for (target, kernel), (registers, shared) in sorted(most.items()):
        print(f"sm_{target:<5}{kernel:<18}{registers:>10}{shared:>10}")
    print(f"{len(todo)} compiled, {wrong} faults")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
