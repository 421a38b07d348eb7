"""PyTorch, eager: the reference network itself."""

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
        self.facts = Facts(
            version=torch.__version__,
            device="CPU",
            provider="eager",
            precision={torch.float32: "fp32"}[next(self._model.parameters()).dtype],
            threads=torch.get_num_threads(),
        )

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._model(torch.from_numpy(x)).numpy()
        return logits

    def close(self) -> None:
        del self._model
