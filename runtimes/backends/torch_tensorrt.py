"""Torch-TensorRT: the reference network, exported and compiled to one TensorRT engine on the device at the first load.

What it saves is a pickle inside: it is kept in the cache, which nobody else can write to, and in no bundle.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_tensorrt
from numpy.typing import NDArray

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import Facts, log
from msa2net.runtimes.backends.pytorch import Graph, network, target_of
from msa2net.runtimes.backends.tensorrt import recipe_of, require_version
from msa2net.runtimes.bundle import Manifest
from msa2net.runtimes.cache import Entry, Slot

_MODULE, _VERDICT = "module.pt2", "verdict.json"
# float32 is IEEE's, and all of the network is in one engine or there is an error: nothing runs in PyTorch unseen.
SETTINGS: dict[str, Any] = {
    "disable_tf32": True,
    "require_full_compilation": True,
    "pass_through_build_failures": True,
    "min_block_size": 1,
}


class TorchTensorRtBackend:
    """See `msa2net.runtimes.backends`."""

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
        if not device.startswith("cuda") or precision != "fp32":
            raise RuntimeUnavailableError(
                "runtime 'torch-tensorrt'",
                f"got device {device!r} and precision {precision!r}",
                "expected 'cuda' or 'cuda:N', and 'fp32'",
                "TensorRT has lower precisions.",
            )
        recipe = recipe_of(manifest, "torch-tensorrt", precision)
        require_version("torch-tensorrt", "torch_tensorrt", torch_tensorrt.__version__, recipe)
        target = target_of("torch-tensorrt", device)
        contract = manifest.input
        self._image = torch.zeros(1, contract.channels, contract.height, contract.width, device=target)
        self._slot = slot

        def from_cache(entry: Entry) -> Any:
            loaded = torch_tensorrt.load(str(entry.path / _MODULE)).module()
            entry.require_unmoved(_MODULE)
            return loaded

        with torch.cuda.device(target), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own internals
            module = slot.find(from_cache, exclusive=True) if slot else None
            self._built = None
            if module is None:
                if slot:
                    slot.confirm()
                log.warning("torch-tensorrt: compiling for %s, which takes minutes", torch.cuda.get_device_name(target))
                module = self._built = compiled(network(files[0], manifest).to(target), self._image, recipe.workspace)
            self._run = Graph(module, tuple(self._image.shape), target)
        self.facts = Facts(
            version=torch_tensorrt.__version__,
            device=torch.cuda.get_device_name(target),
            provider="one TensorRT engine, CUDA graph",
            precision="fp32",
            threads=0,
            built=self._built is not None,
        )

    @staticmethod
    def compiled_for(device: str, threads: int) -> dict[str, Any]:
        target = target_of("torch-tensorrt", device)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(target))
        versions = {"version": torch_tensorrt.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
        return versions | {"gpu": torch.cuda.get_device_name(target), "capability": capability}

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._run(torch.from_numpy(x)).numpy()
        return logits

    def infer_without_graph(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same without a CUDA graph: what that gains is for benchmarks to say."""
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._run(torch.from_numpy(x), replay=False).numpy()
        return logits

    def keep(self, verdict: dict[str, Any]) -> None:
        """Puts what was compiled into the cache, with the verdict of the golden frames on it."""
        module, self._built = self._built, None
        if self._slot and not self._slot.problem:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, _MODULE)
                torch_tensorrt.save(module, str(path), output_format="exported_program", arg_inputs=[self._image])
                self._slot.keep({_MODULE: path.read_bytes(), _VERDICT: json.dumps(verdict).encode()})

    def close(self) -> None:
        del self._run, self._image


def compiled(model: Any, image: torch.Tensor, workspace: int) -> Any:
    """The network in TensorRT; `image` is an input on the GPU, `workspace` in bytes."""
    program = exported(model, image)
    return torch_tensorrt.dynamo.compile(program, arg_inputs=[image], workspace_size=workspace, **SETTINGS)


def exported(model: Any, image: torch.Tensor) -> torch.export.ExportedProgram:
    """The network, rewritten as for ONNX Runtime (what pays here has not been measured), as an exported program."""
    from msa2net.core.rewrites import chosen, rewritten

    with torch.no_grad():
        return torch.export.export(rewritten(model, chosen("onnxruntime")), (image,))
