"""OpenVINO, on the CPU or any device its plugins offer.

On the CPU the compiled graph is kept in the cache; its weights stay in the bundle's file, mapped.
"""

from __future__ import annotations

import importlib
import io
import platform
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import ADDED, INT8, Facts, why_not_precision
from msa2net.runtimes.bundle import BAKED_OUTPUTS, Manifest
from msa2net.runtimes.cache import Entry, Slot


def _import_openvino() -> Any:
    """The package without its model converter, which brings a telemetry client and doubles the time of the import.

    The package takes its absence for granted; `openvino.convert_model` imports it when it is called.
    """
    converter = "openvino.tools.ovc"
    if "openvino" in sys.modules or converter in sys.modules:
        return importlib.import_module("openvino")
    sys.modules[converter] = None  # type: ignore[assignment]
    try:
        package: Any = importlib.import_module("openvino")
    finally:
        del sys.modules[converter]
    package.convert_model = lambda *given, **named: importlib.import_module(converter).convert_model(*given, **named)
    return package


openvino = _import_openvino()
_HINTS = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16, "fp16": openvino.Type.f16}
# Layers that move or hold data: the precision they are labelled with is not computed in.
_NO_COMPUTE = {"Const", "Input", "Output", "Reorder", "Reshape"}
_ENDS = ("Input", "Output")  # of uint8, in a baked graph
_BLOB = "model.blob"
_GRAPH_ALONE = {"CACHE_MODE": "OPTIMIZE_SIZE"}  # an exported model refers to its weights' file
_CACHES = platform.machine() in ("x86_64", "AMD64")  # on Arm the CPU plugin of 2026.4.1 does not know that property


class _Stream(io.BytesIO):
    """A file as the one kind of stream that OpenVINO writes to. It swallows what `write` raises: `error` keeps it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        return self._kept(self._file.write, data)

    def seek(self, *place: int) -> int:
        return self._kept(self._file.seek, *place)

    def _kept(self, call: Callable[..., int], *arguments: Any) -> int:
        try:
            return call(*arguments)
        except OSError as error:
            self.error = self.error or error
            raise


def _is_added(names: str) -> bool:
    """Whether a layer is of a baked graph's ends alone, whose uint8 and fp32 say nothing about the network's precision.

    names   of the nodes that it was made from, separated by commas
    """
    return bool(names) and all(
        name.startswith(ADDED) or name in ("image", *BAKED_OUTPUTS[1:]) for name in names.split(",")
    )


class OpenVinoBackend:
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
        core = openvino.Core()
        if device not in core.available_devices:
            raise RuntimeUnavailableError(
                "runtime 'openvino'",
                f"got device {device!r}",
                f"expected one of {', '.join(core.available_devices)}",
                "Is the device's driver installed?",
            )
        if precision not in (*_HINTS, *INT8):
            raise RuntimeUnavailableError(
                "runtime 'openvino'",
                f"got precision {precision!r}",
                f"expected one of {', '.join((*_HINTS, *INT8))}",
                "Others are not supported yet.",
            )
        if error := why_not_precision("openvino", precision, device):
            raise error
        if precision in INT8 and why_not_precision("openvino", rest, device):
            rest = "fp32"
        hint = _HINTS[rest if precision in INT8 else precision]
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            # Without it the CPU plugin runs fp32 models in bf16 where the CPU can.
            "INFERENCE_PRECISION_HINT": hint,
        }
        if device == "CPU":
            config["INFERENCE_NUM_THREADS"] = threads

        def compiled_from(entry: Entry) -> Any:
            self._blob = np.memmap(entry.files[_BLOB], np.uint8, "c")  # in use for as long as the model is
            tensor = openvino.Tensor(self._blob, shared_memory=True)
            return core.import_model(tensor, device, config | _GRAPH_ALONE | {"WEIGHTS_PATH": files[1]})

        def write(folder: Path) -> None:
            with (folder / _BLOB).open("xb") as file:
                stream = _Stream(file)
                core.compile_model(core.read_model(*files), device, config | _GRAPH_ALONE).export_model(stream)
            if stream.error:
                raise stream.error

        compiled = slot.use(compiled_from, write) if slot else None
        try:
            compiled = compiled or core.compile_model(core.read_model(*files), device, config)
        except RuntimeError as error:
            first = (str(error).strip().splitlines() or ["no reason given"])[-1]
            raise RuntimeUnavailableError(
                "runtime 'openvino'", f"cannot load the model ({first})", "", "Update openvino, or export again."
            ) from error
        self._compiled = compiled
        self._idle: deque[Any] = deque()  # requests that wait for a frame
        executed = self._executed()
        layers = Counter(found for kind, found in executed if kind not in _NO_COMPUTE)
        self.facts = Facts(
            version=openvino.__version__.split("-")[0],
            device=", ".join(compiled.get_property("EXECUTION_DEVICES")),
            provider=core.get_property(device, "FULL_DEVICE_NAME"),
            precision=self._require_precision(precision, hint, {found for _, found in executed}, layers),
            threads=compiled.get_property("INFERENCE_NUM_THREADS") if device == "CPU" else 0,
            layers=dict(sorted(layers.items())),
        )

    @staticmethod
    def compiled_for(device: str, threads: int) -> dict[str, Any] | None:
        kept = device == "CPU" and _CACHES
        return {"version": openvino.__version__, "threads": threads} if kept else None

    def _executed(self) -> list[tuple[str, str]]:
        """Type and executed precision of every layer of the network that says it."""
        baked = self._compiled.input().get_element_type() == openvino.Type.u8
        infos = (node.get_rt_info() for node in self._compiled.get_runtime_model().get_ordered_ops())
        return [
            (str(info["layerType"].value), str(info["runtimePrecision"].value))
            for info in infos
            if "runtimePrecision" in info
            and str(info["layerType"].value) not in _ENDS
            and not (baked and _is_added(str(info["originalLayersNames"].value)))
        ]

    def _require_precision(self, asked: str, wanted: Any, executed: set[str], computed: Collection[str]) -> str:
        """The precision asked for, if the property (the hint `wanted`), all layers and those that compute agree."""
        hint = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        lower = {"bf16", "f16", "i8", "u8"} & executed
        # A graph in bf16 has layers in f32, too: those kept there. One without any in bf16 is not in bf16.
        if asked == "fp32":
            agree = not lower and bool(computed)
        elif asked in INT8:
            agree = bool({"i8", "u8"} & set(computed))
        else:
            agree = wanted.get_type_name() in computed
        if hint != wanted or not agree:
            raise RuntimeUnavailableError(
                "runtime 'openvino'",
                f"runs in {hint.get_type_name()} with nodes in {sorted(executed)}",
                f"expected {asked}",
                "Use another runtime on this device.",
            )
        return asked

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        (logits,) = self.run(x)
        return logits

    def run(self, x: NDArray[Any]) -> list[NDArray[Any]]:
        # A request may not be shared while it runs, and making one takes as long as many frames: they are kept.
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        request.infer([x], share_inputs=True)
        # The tensors are reused by the next call.
        found = [request.get_output_tensor(i).data.copy() for i in range(len(self._compiled.outputs))]
        self._idle.append(request)
        return found

    def close(self) -> None:
        self._idle.clear()
        del self._compiled
