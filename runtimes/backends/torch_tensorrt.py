"""Torch-TensorRT: the reference network, exported and compiled to one TensorRT engine on the device at the first load.

What it saves is a pickle inside: it is kept in the cache, which nobody else can write to, and in no bundle.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch_tensorrt

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import Facts, log, nvidia_driver
from msa2net.runtimes.backends.pytorch import Graph, PyTorchBackend, network, require_ieee, target_of
from msa2net.runtimes.backends.tensorrt import recipe_of, require_version
from msa2net.runtimes.bundle import Manifest
from msa2net.runtimes.cache import VERDICT, Entry, Slot

_MODULE = "module.pt2"
# float32 is IEEE's, and all of the network is in one engine or there is an error: nothing runs in PyTorch unseen.
SETTINGS: dict[str, Any] = {
    "disable_tf32": True,
    "require_full_compilation": True,
    "pass_through_build_failures": True,
    "min_block_size": 1,
}


class TorchTensorRtBackend(PyTorchBackend):
    """See `msa2net.runtimes.backends`. It infers as PyTorch does on a GPU, by a graph."""

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
        target = target_of("torch-tensorrt", device)
        if precision != "fp32":
            raise RuntimeUnavailableError(
                "runtime 'torch-tensorrt'", f"got precision {precision!r}", "expected 'fp32'", "TensorRT has others."
            )
        require_ieee("torch-tensorrt")
        recipe = recipe_of(manifest, "torch-tensorrt", precision)
        require_version("torch-tensorrt", "torch_tensorrt", torch_tensorrt.__version__, recipe)
        contract = manifest.input
        self._slot, self._target = slot, target
        self._image = torch.zeros(1, contract.channels, contract.height, contract.width, device=target)

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
                module = self._built = compiled(network(files[0], manifest), self._image, recipe.workspace)
            self._run = Graph(module, tuple(self._image.shape), target)
        self.facts = Facts(
            version=torch_tensorrt.__version__,
            device=torch.cuda.get_device_name(target),
            provider="TensorRT engine, CUDA graph",
            precision="fp32",
            threads=0,
            built=self._built is not None,
        )

    @staticmethod
    def compiled_for(device: str, threads: int) -> dict[str, Any]:
        target = target_of("torch-tensorrt", device)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(target))
        versions = {"version": torch_tensorrt.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
        gpu = {"gpu": torch.cuda.get_device_name(target), "capability": capability, "driver": nvidia_driver()}
        return versions | gpu

    def keep(self, verdict: dict[str, Any]) -> None:
        """Puts what was compiled into the cache, with the verdict of the golden frames on it."""
        module, self._built = self._built, None

        def write(folder: Path) -> None:
            with torch.cuda.device(self._target), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                path = str(folder / _MODULE)
                torch_tensorrt.save(module, path, output_format="exported_program", arg_inputs=[self._image])
            (folder / VERDICT).write_text(json.dumps(verdict), encoding="utf-8")

        if self._slot:
            self._slot.keep(write)

    def close(self) -> None:
        super().close()
        del self._image


def compiled(model: Any, image: torch.Tensor, workspace: int) -> Any:
    """The network, which is on the CPU, in TensorRT; `image` is an input on the GPU, `workspace` in bytes."""
    program = exported(model, image)
    # Its timing cache lies in a folder that others can write to, unless it is told another.
    with tempfile.TemporaryDirectory() as folder:
        timings = str(Path(folder, "timings"))
        return torch_tensorrt.dynamo.compile(
            program, arg_inputs=[image], workspace_size=workspace, timing_cache_path=timings, **SETTINGS
        )


def exported(model: Any, image: torch.Tensor) -> torch.export.ExportedProgram:
    """The network, rewritten as for ONNX Runtime (what pays here has not been measured), as an exported program."""
    from msa2net.core.rewrites import chosen, rewritten

    with torch.no_grad():  # rewritten on the CPU: on a GPU products may run in TF32
        return torch.export.export(rewritten(model, chosen("onnxruntime")).to(image.device), (image,))
