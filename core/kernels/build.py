"""Builds the CUDA library: `python -m msa2net.core.kernels.build [--targets 87,90]`.

Two files: `libmasag.so`, the C API of `csrc/masag.h`, and `libmasag_torch.so`, the same with PyTorch's binding, which
is left out without PyTorch 2.13 or newer. The compiler's report on registers and spills is printed as a table.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from msa2net.errors import KernelError, Msa2NetError

SOURCES = Path(__file__).parent / "csrc"
FOLDER = "MSA2NET_KERNELS"  # the environment variable
TARGETS = (80, 86, 87, 89, 90, 110, 120)
LIBRARY, BINDING = "libmasag.so", "libmasag_torch.so"
TORCH_ABI = "0x020d000000000000"  # 2.13, the first whose stable ABI gives the current stream
_FILES = ("masag.h", "instructions.cuh", "masag.cu", "binding.cpp")
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for 'sm_(?P<target>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stored>\d+) bytes spill stores, (?P<loaded>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def folder() -> Path:
    """Where the libraries are: $MSA2NET_KERNELS, or `lib` beside this file."""
    return Path(os.environ.get(FOLDER) or Path(__file__).parent / "lib")


def digest() -> str:
    """SHA-256 of the sources, which a library carries: one of other sources is not used."""
    return hashlib.sha256(b"\0".join((SOURCES / name).read_bytes() for name in _FILES)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What the compiler reports of one kernel on one target."""

    name: str  # mangled
    target: int
    registers: int  # a thread
    spilled: int  # bytes a thread


def nvcc() -> str:
    """The CUDA compiler: $NVCC, the one on PATH, or the toolkit's own folder. Raises KernelError if there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for candidate in (os.environ.get("NVCC"), "nvcc", f"{home}/bin/nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    raise KernelError(
        "nvcc",
        f"not found: not in $NVCC, not on PATH, not in {home}/bin",
        "",
        "Install NVIDIA's CUDA toolkit, 11.8 or newer, for sm_120 12.8, for sm_110 13.0, or use kernel='triton'.",
    )


def known(compiler: str) -> list[int]:
    """The compute capabilities, without the dot, that this nvcc and the source have in common. Raises KernelError."""
    listed = re.findall(r"^sm_(\d+)$", _run([compiler, "--list-gpu-code"]), re.MULTILINE)
    return [int(each) for each in listed if int(each) >= min(TARGETS)]


def report(printed: str) -> list[Kernel]:
    """The kernels in what `nvcc -Xptxas -v` printed."""
    return [
        Kernel(
            name=found["name"],
            target=int(found["target"]),
            registers=int(found["registers"]),
            spilled=max(int(found[key]) for key in ("stack", "stored", "loaded")),
        )
        for found in _ENTRY.finditer(printed)
    ]


def has_stable_abi() -> bool:
    """Whether there is a PyTorch for the binding."""
    if find_spec("torch") is None:
        return False
    import torch

    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def binding_flags() -> tuple[list[str], list[str]] | None:
    """(Of the compiler, of the linker) for the binding; None without a PyTorch that has what it needs."""
    if not has_stable_abi():
        return None
    import torch

    home = Path(torch.__file__).parent
    return (
        [f"-DTORCH_TARGET_VERSION={TORCH_ABI}", "-DUSE_CUDA", "-isystem", f"{home}/include"],
        [f"-L{home}/lib", "-ltorch_cpu", "-lc10"],
    )


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        name, said = Path(command[0]).name, (done.stderr + done.stdout).strip()
        raise KernelError(name, f"failed: {said[-2000:]}", "", f"The command was: {' '.join(map(str, command))}")
    return done.stdout + done.stderr


def build(output: Path, targets: Sequence[int] = ()) -> list[Kernel]:
    """Puts the libraries into `output`, whole or not at all, and returns the compiler's report.

    targets   compute capabilities without the dot; none: those of `TARGETS` that this nvcc knows. The smallest is also
              kept as PTX, which the driver compiles for a GPU after it that is not among them.

    Raises KernelError without nvcc, for a target that it does not know, or with what it said.
    """
    compiler = nvcc()
    of_nvcc = known(compiler)
    targets = targets or [each for each in TARGETS if each in of_nvcc]
    if unknown := [str(each) for each in targets if each not in of_nvcc]:
        expected = f"expected some of {', '.join(map(str, of_nvcc))}, as {compiler} knows them"
        raise KernelError(
            "targets", f"got {', '.join(unknown)}", expected, "Leave out the others, or take a newer nvcc."
        )
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC"]
    code = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in targets]
    code += [f"-gencode=arch=compute_{min(targets)},code=compute_{min(targets)}"]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".build-") as scratch:
        made = Path(scratch)
        printed = _run(
            [
                *(compiler, *flags, *code, "--threads", str(os.cpu_count()), "-Xptxas", "-v"),
                *(f'-DMASAG_SOURCES="{digest()}"', "-c", SOURCES / "masag.cu", "-o", made / "masag.o"),
            ]
        )
        _run([compiler, "-shared", made / "masag.o", "-o", made / LIBRARY])
        if (needed := binding_flags()) is not None:
            _run([compiler, *flags, *needed[0], "-c", SOURCES / "binding.cpp", "-o", made / "binding.o"])
            _run([compiler, "-shared", made / "masag.o", made / "binding.o", *needed[1], "-o", made / BINDING])
        else:
            (output / BINDING).unlink(missing_ok=True)  # of other sources
        for name in (BINDING, LIBRARY):
            with contextlib.suppress(FileNotFoundError):
                os.replace(made / name, output / name)
    return report(printed)


def main(argv: Sequence[str] | None = None) -> int:
    named = ",".join(map(str, TARGETS))
    parser = argparse.ArgumentParser(prog="python -m msa2net.core.kernels.build", description=__doc__)
    parser.add_argument(
        "--targets", help=f"compute capabilities without the dot (default: {named}, if nvcc knows them)"
    )
    parser.add_argument("--output", type=Path, default=folder(), help=f"default: %(default)s, or ${FOLDER}")
    args = parser.parse_args(argv)
    try:
        kernels = build(args.output, [int(each) for each in args.targets.split(",")] if args.targets else ())
    except Msa2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'target':<8}{'kernels':>8}{'registers':>11}{'spilled':>9}")
    for target in sorted({each.target for each in kernels}):
        of = [each for each in kernels if each.target == target]
        registers, spilled = max(each.registers for each in of), max(each.spilled for each in of)
        print(f"sm_{target:<5}{len(of):>8}{registers:>11}{spilled:>9}")
    for name in (LIBRARY, BINDING):
        path = args.output / name
        print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB" if path.exists() else f"{name}: needs PyTorch 2.13 or newer"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
