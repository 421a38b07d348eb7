"""PyTorch, eager, on weights mapped from the bundle's file: the reference network, rewritten as it loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import Facts, require_cpu
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
        from msa2net.core.config import ModelConfig
        from msa2net.core.network import MSA2Net, is_unused
        from msa2net.core.rewrites import EAGER_ONLY, apply, chosen

        require_cpu("pytorch", device, precision)
        if torch.get_float32_matmul_precision() != "highest":
            raise RuntimeUnavailableError(
                "runtime 'pytorch'",
                f"float32 products run in {torch.get_float32_matmul_precision()!r} precision in this process",
                "expected 'highest'",
                "Call torch.set_float32_matmul_precision('highest').",
            )
        torch.set_num_threads(threads)
        config = ModelConfig.from_json(manifest.model_config)
        state = load_file(files[0])  # mapped
        with _WithoutWeights():
            model = MSA2Net(config)
        for key, value in model.state_dict().items():
            if key not in state and is_unused(key, config):
                state[key] = torch.zeros((), dtype=value.dtype).expand(value.shape)
        model.load_state_dict(state, assign=True)  # strict: every key, in its shape
        (dtype,) = {parameter.dtype for parameter in model.parameters()}
        self._model = model.eval()
        packed: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        apply(model, (name for name in chosen("pytorch") if packed or name not in EAGER_ONLY))
        self.facts = Facts(
            version=torch.__version__,
            device="CPU",
            provider="eager, oneDNN" if packed else "eager",
            precision={torch.float32: "fp32"}[dtype],
            threads=torch.get_num_threads(),
        )
        contract = manifest.input
        # The first call packs weights, which two threads may not do at once.
        self.infer(np.zeros((1, contract.channels, contract.height, contract.width), np.float32))

    @staticmethod
    def compiled_for(device: str, threads: int) -> dict[str, Any] | None:
        return None

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        image = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._model(image).contiguous().numpy()
        return logits

    def close(self) -> None:
        del self._model
