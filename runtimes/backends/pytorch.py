"""PyTorch, on weights mapped from the bundle's file: the reference network, rewritten as it loads.

On the CPU it runs eagerly; on a GPU, `device="cuda"` or "cuda:1", as one CUDA graph with the fused gates inside.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import Facts, gpu_index, is_cuda, require_cpu
from msa2net.runtimes.bundle import Manifest
from msa2net.runtimes.cache import Slot


class _WithoutWeights(TorchFunctionMode):
    """What a layer leaves unfilled for its initialisation gets no memory; constants that are computed do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


class PyTorchBackend:
    """See `msa2net.runtimes.backends`. `threads` holds for the whole process, as PyTorch has only one such setting."""

    def __init__(
        self,
        files: tuple[str, ...],
        manifest: Manifest,
        device: str,
        precision: str,
        threads: int,
        slot: Slot | None = None,
        rest: str = "fp32",
    ) -> None:
        from msa2net.core.rewrites import EAGER_ONLY, GPU_ONLY, apply, chosen

        target = target_of("pytorch", device)
        require_cpu("pytorch", "CPU" if target.type == "cuda" else device, precision)
        require_ieee("pytorch")
        torch.set_num_threads(threads)
        model = network(files[0], manifest)
        (dtype,) = {parameter.dtype for parameter in model.parameters()}
        contract = manifest.input
        shape = (1, contract.channels, contract.height, contract.width)
        if target.type == "cuda":
            # Which of these pay on a GPU has not been measured.
            apply(model, {*chosen("pytorch"), *GPU_ONLY} - {*EAGER_ONLY, "gate_selection"})
            self._run: Callable[[torch.Tensor], torch.Tensor] = Graph(model.to(target), shape, target)
            device_name, engine, threads = torch.cuda.get_device_name(target), f"CUDA graph, {_gates(model)}", 0
        else:
            packed: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            apply(model, (name for name in chosen("pytorch") if packed or name not in EAGER_ONLY))
            self._run = lambda image: model(image.contiguous(memory_format=torch.channels_last))
            device_name, engine = "CPU", "eager, oneDNN" if packed else "eager"
            threads = torch.get_num_threads()
        self.facts = Facts(
            version=torch.__version__,
            device=device_name,
            provider=engine,
            precision={torch.float32: "fp32"}[dtype],
            threads=threads,
        )
        # The first call packs weights, which two threads may not do at once.
        self.infer(np.zeros(shape, np.float32))

    @staticmethod
    def compiled_for(device: str, threads: int) -> dict[str, Any] | None:
        return None

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._run(torch.from_numpy(x)).contiguous().numpy()
        return logits

    def infer_without_graph(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same on a GPU, kernel by kernel: what the graph gains is for benchmarks to say."""
        assert isinstance(self._run, Graph)
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._run(torch.from_numpy(x), replay=False).numpy()
        return logits

    def close(self) -> None:
        del self._run


def _ieee() -> Any:
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


class Graph:
    """The network captured once as a CUDA graph: an image of `shape` on the CPU -> logits on the CPU, to keep.

    float32 means IEEE here, too: cuDNN's default is tf32. One inference at a time; a second thread waits.
    """

    def __init__(self, model: torch.nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
        self._lock = Lock()
        self._device = device
        self._model = model  # the graph reads its weights where they are
        with torch.inference_mode(), torch.cuda.device(device), _ieee():
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._given = torch.zeros(shape, pin_memory=True)
            self._image = torch.zeros(shape, device=device)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(3):  # libraries choose their kernels and take their memory before the capture
                    model(self._image)
            self._stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._logits = model(self._image).contiguous()
            self._result = torch.empty(self._logits.shape, pin_memory=True)

    def __call__(self, image: torch.Tensor, replay: bool = True) -> torch.Tensor:
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._given.copy_(image)
            self._image.copy_(self._given, non_blocking=True)
            if replay:
                self._graph.replay()
            else:
                with _ieee():
                    self._logits.copy_(self._model(self._image))
            self._result.copy_(self._logits, non_blocking=True)
            self._stream.synchronize()
            return self._result.clone()


def require_ieee(runtime: str) -> None:
    """Raises RuntimeUnavailableError if this process lets products of float32 run in TF32."""
    if (found := torch.get_float32_matmul_precision()) != "highest":
        raise RuntimeUnavailableError(
            f"runtime {runtime!r}",
            f"float32 products run in {found!r} precision in this process",
            "expected 'highest'",
            "Call torch.set_float32_matmul_precision('highest').",
        )


def network(file: str, manifest: Manifest) -> Any:
    """The reference network, in evaluation mode, on weights that are mapped from the file."""
    from msa2net.core.config import ModelConfig
    from msa2net.core.network import MSA2Net, is_unused

    config = ModelConfig.from_json(manifest.model_config)
    state = load_file(file)
    with _WithoutWeights():
        model = MSA2Net(config)
    for key, value in model.state_dict().items():
        if key not in state and is_unused(key, config):
            state[key] = torch.zeros((), dtype=value.dtype).expand(value.shape)
    model.load_state_dict(state, assign=True)  # strict: every key, in its shape
    return model.eval()


def target_of(runtime: str, device: str) -> torch.device:
    """The device that is meant. Raises RuntimeUnavailableError for a GPU that is not there."""
    if runtime == "pytorch" and not is_cuda(device):
        return torch.device("cpu")  # what else it may be called, `require_cpu` refuses
    index, count = gpu_index(runtime, device), torch.cuda.device_count()
    if index >= count:
        found = f"this PyTorch ({torch.__version__}) finds {count or 'no'} GPU{'s' * (count != 1)}"
        raise RuntimeUnavailableError(
            f"runtime {runtime!r}",
            f"got device {device!r}, {found}",
            "expected cuda or cuda:N of one that is there",
            "Use device='CPU', or install a CUDA build of PyTorch and the driver.",
        )
    return torch.device("cuda", index)


def _gates(model: torch.nn.Module) -> str:
    """What computes the gates, to be read by people."""
    from msa2net.core.rewrites.fused_gate import FusedGate

    chosen = {
        each.kernel_for(each.get_buffer("u").view(1, -1, 1, 1))
        for each in model.modules()
        if isinstance(each, FusedGate)
    }
    return f"gates by {' and '.join(sorted(chosen))}"
