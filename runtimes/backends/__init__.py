"""The runtimes: one table of names, one file each. A backend's library is imported on first use and never before.

A backend is a class with
    __init__(files, manifest, device, precision, threads, slot, rest)   loads, by way of the cache if there is a
                 `slot`; raises RuntimeUnavailableError if it cannot as asked. `rest` is that of `bundle.Artifact`.
    keep(verdict)  where `facts.built`: called when the golden frames have passed on what was built just now, with their
                 figures; puts it into the cache
    infer(x)     (1, C, h, w) float32 -> (1, K, h, w) float32, an array that the caller may keep; from any thread
    run(x)       of the runtimes in `BAKED`: all outputs of a graph in their order; x is a baked graph's frame
    facts        `Facts`: what the runtime says it really runs, read back from it
    close()      frees what it holds
    compiled_for(device, threads)   what a compiled model depends on besides artifact, precision and processor: a
                 mapping of strings to JSON values; None if there is nothing to keep in the cache
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.bundle import Manifest
from msa2net.runtimes.cache import Slot, cpu_features

log = logging.getLogger("msa2net")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a loaded runtime reports of itself: version, device, provider (its execution engine), precision, threads.

    layers   how many layers it runs in each precision, such as {"bf16": 617, "f32": 24}; empty if it does not say
    built    whether it was compiled just now by what need not make the same of it each time: the golden frames are run
             before anything else is
    """

    version: str
    device: str
    provider: str
    precision: str
    threads: int
    layers: dict[str, int] = field(default_factory=dict)
    built: bool = False


class Backend(Protocol):
    facts: Facts

    def __init__(
        self,
        files: tuple[str, ...],
        manifest: Manifest,
        device: str,
        precision: str,
        threads: int,
        slot: Slot | None = None,
        rest: str = "fp32",
    ) -> None: ...

    @staticmethod
    def compiled_for(device: str, threads: int) -> dict[str, Any] | None: ...

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]: ...

    def keep(self, verdict: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class FrameBackend(Backend, Protocol):
    def run(self, x: NDArray[Any]) -> list[NDArray[Any]]: ...


@dataclass(frozen=True)
class Entry:
    """A row of the table: the backend's class, the modules it imports, and the extra that installs them.

    device   where it runs if none is named; "cuda" for those that run on NVIDIA GPUs alone
    """

    path: str
    modules: tuple[str, ...]
    extra: str
    device: str = "CPU"


# In the order in which runtime="auto" tries them: on a CPU the fastest in fp32 first, by benchmarks/results/; on a GPU
# nothing has been measured.
RUNTIMES = {
    "onnxruntime": Entry("msa2net.runtimes.backends.onnxruntime:OnnxRuntimeBackend", ("onnxruntime",), "onnxruntime"),
    "openvino": Entry("msa2net.runtimes.backends.openvino:OpenVinoBackend", ("openvino",), "openvino"),
    "pytorch": Entry("msa2net.runtimes.backends.pytorch:PyTorchBackend", ("torch", "safetensors"), "pytorch"),
    "tensorrt": Entry(
        "msa2net.runtimes.backends.tensorrt:TensorRtBackend", ("tensorrt", "cuda.bindings"), "tensorrt", "cuda"
    ),
    "tensorrt-rtx": Entry(
        "msa2net.runtimes.backends.tensorrt:TensorRtRtxBackend",
        ("tensorrt_rtx", "cuda.bindings"),
        "tensorrt-rtx",
        "cuda",
    ),
    "torch-tensorrt": Entry(
        "msa2net.runtimes.backends.torch_tensorrt:TorchTensorRtBackend",
        ("torch", "torch_tensorrt", "safetensors"),
        "torch-tensorrt",
        "cuda",
    ),
}
_ON_GPU = (
    "tensorrt",
    "tensorrt-rtx",
    "onnxruntime",
    "torch-tensorrt",
    "pytorch",
)  # those that can, in the order of "auto"


def why_not(runtime: str) -> RuntimeUnavailableError | None:
    """Why `runtime` cannot be imported here; None if it can. Raises RuntimeUnavailableError for an unknown name."""
    if runtime not in RUNTIMES:
        raise RuntimeUnavailableError(
            "runtime", f"got {runtime!r}", f"expected one of auto, {', '.join(RUNTIMES)}", "Check the spelling."
        )
    entry = RUNTIMES[runtime]
    for module in entry.modules:
        if not _is_there(module):
            return RuntimeUnavailableError(
                f"runtime {runtime!r}", f"needs the package {module}", "", f"pip install 'msa2net-edge[{entry.extra}]'"
            )
    return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def is_cuda(device: str) -> bool:
    return device.partition(":")[0] == "cuda"


def gpu_index(runtime: str, device: str, kind: str = "cuda") -> int:
    """N of "cuda:N", 0 of "cuda". Raises RuntimeUnavailableError for what is neither."""
    found = re.fullmatch(rf"{kind}(?::([0-9]{{1,4}}))?", device)
    if found is None:
        raise RuntimeUnavailableError(
            f"runtime {runtime!r}", f"got device {device!r}", f"expected '{kind}' or '{kind}:N'", "Check it."
        )
    return int(found[1] or 0)


def why_not_on(runtime: str, device: str) -> str:
    """Why `runtime`, which is installed, cannot use this device; empty if it can. For a GPU it imports the runtime."""
    if not is_cuda(device):
        return ""
    if runtime == "onnxruntime":
        import onnxruntime

        there = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        return "" if there else "the package that is installed has no CUDAExecutionProvider"
    if runtime in ("pytorch", "torch-tensorrt"):
        import torch

        return "" if torch.cuda.is_available() else f"this PyTorch ({torch.__version__}) finds no GPU"
    return why_no_gpu()


def candidates(device: str) -> tuple[str, ...]:
    """The runtimes that "auto" tries on this device, in order."""
    return _ON_GPU if is_cuda(device) else tuple(name for name, entry in RUNTIMES.items() if entry.device == "CPU")


def nvidia_driver() -> str:
    """The kernel driver as it names itself; empty where it does not."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        return ""


def why_no_gpu() -> str:
    """Why no NVIDIA GPU can be used here; empty if there is a driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    return ""


BAKED = ("onnxruntime", "openvino")  # the runtimes that take baked graphs, on a CPU
ADDED = "baked."  # before the names of the nodes that baking adds
INT8 = ("int8", "int8-portable")
# By precision: the instruction sets of which one is needed, as numpy names them, and how to say so.
_NEEDS = {
    "bf16": ({"AVX512BF16", "ASIMDBF16"}, "AVX512_BF16"),
    "fp16": ({"ASIMDHP"}, "FEAT_FP16 (of Arm; an x86 one would compute it in fp32)"),
    "int8": ({"AVX512VNNI", "AVXVNNI", "ASIMDDP"}, "VNNI or dot products (it would cut off sums)"),
}


def _features() -> set[str]:
    """`cpu_features`, with AVX-VNNI, which numpy does not know.

    /proc/cpuinfo does, but shows the host's flags under emulation. Every CPU with AVX-VNNI has VAES and GFNI as well:
    where numpy, which asks the CPU, does not find these, the file speaks of another CPU.
    """
    found = cpu_features()
    if {"VAES", "GFNI"} <= found:
        with suppress(OSError):
            if " avx_vnni" in Path("/proc/cpuinfo").read_text():
                found = found | {"AVXVNNI"}
    return found


def cpu_lacks(precision: str) -> str:
    """What this CPU would need to compute in `precision`; empty if nothing is missing."""
    needed, said = _NEEDS.get(precision, (set(), ""))
    return said if needed and not needed & _features() else ""


def why_not_precision(runtime: str, precision: str, device: str = "CPU") -> RuntimeUnavailableError | None:
    """Why `runtime` cannot run `precision` on this machine's CPU; None if it can, or on another device."""
    if device != "CPU" or not (missing := cpu_lacks(precision)):
        return None
    return RuntimeUnavailableError(
        f"runtime {runtime!r}",
        f"this CPU cannot run {precision}, it has no {missing}",
        "expected a CPU that computes in it",
        "Use the artifact in int8-portable or fp32." if precision == "int8" else "Use the artifact in fp32.",
    )


def why_not_here(runtime: str, precision: str) -> RuntimeUnavailableError | None:
    """Why `runtime` cannot run `precision` on this machine, on the device that it takes if none is named."""
    if (device := RUNTIMES[runtime].device) == "CPU":
        return why_not_precision(runtime, precision)
    if not (missing := why_no_gpu()):
        return None
    return RuntimeUnavailableError(f"runtime {runtime!r}", missing, f"expected a GPU for {device!r}", "Install it.")


def backend_class(runtime: str) -> type[Backend]:
    """The backend's class. Raises RuntimeUnavailableError naming the missing package and how to install it."""
    if error := why_not(runtime):
        raise error
    module, _, name = RUNTIMES[runtime].path.partition(":")
    try:
        found: type[Backend] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"runtime {runtime!r}",
            f"does not import ({error})",
            "",
            f"Reinstall it: pip install --force-reinstall 'msa2net-edge[{RUNTIMES[runtime].extra}]'",
        ) from error
    return found


def default_threads() -> int:
    """The cores this process may use: by its affinity and by the quota of its control groups, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """How many cores' time the control groups (version 1 or 2) of this process grant it; infinity if there is no limit.

    root   where to look for proc/ and the mounts
    """
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        mounts = [line.split(" - ") for line in (root / "proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return math.inf
    quota = math.inf
    for left, right in (mount for mount in mounts if len(mount) == 2):
        kind, options = right.split()[0], right.split()[-1].split(",")
        if kind != "cgroup2" and not (kind == "cgroup" and "cpu" in options):
            continue
        for _, controllers, path in (group for group in groups if len(group) == 3):
            if ("cpu" in controllers.split(",")) if kind == "cgroup" else not controllers:
                top, point = left.split()[3:5]
                quota = min(quota, _smallest_quota(root / point.lstrip("/"), path, top))
    return quota


def _smallest_quota(mounted: Path, path: str, top: str) -> float:
    """The least of a group's quota and its parents', as far up as is mounted; `top` is the group mounted there."""
    inside = path == top or path.startswith(top.rstrip("/") + "/")
    below = path[len(top.rstrip("/")) :].strip("/") if inside and ".." not in path.split("/") else ""
    folder = mounted / below
    quota = math.inf
    for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(mounted))):
        try:
            if (group / "cpu.max").exists():
                most, period = (group / "cpu.max").read_text().split()
            else:
                most, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if most not in ("max", "-1"):
                quota = min(quota, int(most) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # no limit at this level
            continue
    return quota


def require_cpu(runtime: str, device: str, precision: str, offered: tuple[str, ...] = ("fp32",)) -> None:
    """Raises RuntimeUnavailableError unless `device` is "CPU", and `precision` is offered and runs on it."""
    if precision not in offered:
        raise RuntimeUnavailableError(
            f"runtime {runtime!r}",
            f"got precision {precision!r}",
            f"expected {' or '.join(map(repr, offered))}",
            "Others are not supported yet.",
        )
    if device != "CPU":
        raise RuntimeUnavailableError(
            f"runtime {runtime!r}", f"got device {device!r}", "expected 'CPU'", "Other devices are not supported yet."
        )
    if error := why_not_precision(runtime, precision):
        raise error
