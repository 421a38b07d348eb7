"""The runtimes: one table of names, one file each. A backend's library is imported on first use and never before.

A backend is a class with
    __init__(files, manifest, device, precision, threads)   loads; raises RuntimeUnavailableError if it cannot as asked
    infer(x)     (1, C, h, w) float32 -> (1, K, h, w) float32, an array that the caller may keep; from any thread
    facts        `Facts`: what the runtime says it really runs, read back from it
    close()      frees what it holds
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.bundle import Manifest


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a loaded runtime reports of itself: version, device, provider (its execution engine), precision, threads.

    layers   how many layers it runs in each precision, such as {"bf16": 617, "f32": 24}; empty if it does not say
    """

    version: str
    device: str
    provider: str
    precision: str
    threads: int
    layers: dict[str, int] = field(default_factory=dict)


class Backend(Protocol):
    facts: Facts

    def __init__(
        self, files: tuple[str, ...], manifest: Manifest, device: str, precision: str, threads: int
    ) -> None: ...

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Entry:
    """A row of the table: the backend's class, the modules it imports, and the extra that installs them."""

    path: str
    modules: tuple[str, ...]
    extra: str


# In the order in which runtime="auto" tries them: the fastest in fp32 first, by benchmarks/results/.
RUNTIMES = {
    "onnxruntime": Entry("msa2net.runtimes.backends.onnxruntime:OnnxRuntimeBackend", ("onnxruntime",), "onnxruntime"),
    "openvino": Entry("msa2net.runtimes.backends.openvino:OpenVinoBackend", ("openvino",), "openvino"),
    "pytorch": Entry("msa2net.runtimes.backends.pytorch:PyTorchBackend", ("torch", "safetensors"), "pytorch"),
}


def why_not(runtime: str) -> RuntimeUnavailableError | None:
    """Why `runtime` cannot be imported here; None if it can. Raises RuntimeUnavailableError for an unknown name."""
    if runtime not in RUNTIMES:
        raise RuntimeUnavailableError(
            "runtime", f"got {runtime!r}", f"expected one of auto, {', '.join(RUNTIMES)}", "Check the spelling."
        )
    entry = RUNTIMES[runtime]
    for module in entry.modules:
        if importlib.util.find_spec(module) is None:
            return RuntimeUnavailableError(
                f"runtime {runtime!r}", f"needs the package {module}", "", f"pip install 'msa2net-edge[{entry.extra}]'"
            )
    return None


def cpu_lacks(precision: str) -> str:
    """What this CPU would need to compute in `precision`; empty if nothing is missing, or for a precision of any CPU.

    By CPUID, as numpy reads it: /proc/cpuinfo shows the host's flags under emulation.
    """
    if precision != "bf16":
        return ""
    from numpy._core._multiarray_umath import __cpu_features__ as features  # type: ignore[import-not-found]

    return "" if features.get("AVX512BF16") or features.get("ASIMDBF16") else "AVX512_BF16"


def why_not_precision(runtime: str, precision: str, device: str = "CPU") -> RuntimeUnavailableError | None:
    """Why `runtime` cannot run `precision` on this machine's CPU; None if it can, or on another device."""
    if device != "CPU" or not (missing := cpu_lacks(precision)):
        return None
    return RuntimeUnavailableError(
        f"runtime {runtime!r}",
        f"this CPU cannot run {precision}, it has no {missing}",
        "expected a CPU that computes in it",
        "Use the artifact in fp32.",
    )


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
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_fp32_cpu(runtime: str, device: str, precision: str) -> None:
    """Raises RuntimeUnavailableError unless `device` is "CPU" and `precision` is "fp32"."""
    if precision != "fp32":
        raise RuntimeUnavailableError(
            f"runtime {runtime!r}", f"got precision {precision!r}", "expected 'fp32'", "Others are not supported yet."
        )
    if device != "CPU":
        raise RuntimeUnavailableError(
            f"runtime {runtime!r}", f"got device {device!r}", "expected 'CPU'", "Other devices are not supported yet."
        )
