"""What a figure was measured on, and the arithmetic floor that it is held against."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from msa2net.errors import Msa2NetError
from msa2net.runtimes.acceptance import version_of
from msa2net.runtimes.backends import default_threads
from msa2net.runtimes.bundle import Manifest
from msa2net.runtimes.cache import processor_name
from msa2net.runtimes.files import write_json as write_whole

PACKAGES = ("msa2net-edge", "numpy", "torch", "onnxruntime", "openvino")
FLOOR_SIZE = 2048
BF16_PRODUCT = "torch.mm bf16"


def describe(threads: int) -> dict[str, Any]:
    """Processor, cores, system, versions and, in a checkout, the commit."""
    return {
        "processor": processor_name(),
        "cores": default_threads(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := version_of(name))},
        "commit": _commit(),
    }


def require_folder(file: Path | None) -> None:
    """Raises Msa2NetError unless the folder of `--json` is there: asked before a long run, not after it."""
    if file and not file.absolute().parent.is_dir():
        raise Msa2NetError("--json", "its folder does not exist", "expected one that does", "Create it.")


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    """Writes a result, if a file is named."""
    if file is not None:
        write_whole(file, result)


def _commit() -> str | None:
    """The checkout's commit; None where the package is installed, even inside another project's checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        git = ["git", "-C", str(root)]
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True)
        if Path(top.stdout.strip()).resolve() != root:
            return None
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def multiply_adds(manifest: Manifest) -> int | None:
    """Multiply-adds of one frame's convolutions and matrix products; None without torch."""
    try:
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        from msa2net.core import ModelConfig, MSA2Net
    except ImportError:
        return None
    with torch.device("meta"):  # shapes alone: nothing is computed
        model = MSA2Net(ModelConfig.from_json(manifest.model_config)).eval()
        image = torch.zeros(1, manifest.input.channels, manifest.input.height, manifest.input.width)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image)
    return int(counter.get_total_flops()) // 2


def floor_calls(threads: int, bf16: bool = False) -> dict[str, Callable[[], object]]:
    """Square float32 matrix products of `FLOOR_SIZE` on `threads` threads, by library; in bfloat16, too, if asked."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((FLOOR_SIZE, FLOOR_SIZE), np.float32) for _ in range(2))
    calls: dict[str, Callable[[], object]] = {"np.matmul": lambda: _limited(threads, lambda: np.matmul(a, b))}
    try:
        import torch
    except ImportError:
        return calls
    torch.set_num_threads(threads)
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    calls["torch.mm"] = lambda: torch.mm(ta, tb)
    if bf16:
        low_a, low_b = ta.bfloat16(), tb.bfloat16()
        calls[BF16_PRODUCT] = lambda: torch.mm(low_a, low_b)
    return calls


def _limited(threads: int, call: Callable[[], object]) -> object:
    with ExitStack() as stack:
        try:
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(threads, "blas"))
        except ImportError:
            pass  # numpy then uses every core, as `threads` is by default
        return call()


def floor_milliseconds(operations: int, product_milliseconds: float) -> float:
    """Time that `operations` multiply-adds take at the rate of the measured product."""
    return operations / FLOOR_SIZE**3 * product_milliseconds
