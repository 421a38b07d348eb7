"""PyTorch, eager: the reference network, rewritten for inference as it loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import Facts, require_fp32_cpu
from msa2net.runtimes.bundle import Manifest


class PyTorchBackend:
    """See `msa2net.runtimes.backends`. `threads` holds for the whole process, as PyTorch has only one such setting."""

    def __init__(self, files: tuple[str, ...], manifest: Manifest, device: str, precision: str, threads: int) -> None:
        from msa2net.core.checkpoint import Checkpoint, load_model
        from msa2net.core.config import ModelConfig
        from msa2net.core.rewrites import EAGER_ONLY, apply, chosen

        require_fp32_cpu("pytorch", device, precision)
        if torch.get_float32_matmul_precision() != "highest":
            raise RuntimeUnavailableError(
                "runtime 'pytorch'",
                f"float32 products run in {torch.get_float32_matmul_precision()!r} precision in this process",
                "expected 'highest'",
                "Call torch.set_float32_matmul_precision('highest').",
            )
        torch.set_num_threads(threads)
        checkpoint = Checkpoint(Path("torch/weights.safetensors"), load_file(files[0]))
        self._model = load_model(checkpoint, ModelConfig.from_json(manifest.model_config))
        (dtype,) = {parameter.dtype for parameter in self._model.parameters()}
        packed: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        apply(self._model, (name for name in chosen("pytorch") if packed or name not in EAGER_ONLY))
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

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        image = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._model(image).contiguous().numpy()
        return logits

    def close(self) -> None:
        del self._model
