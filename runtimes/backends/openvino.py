"""OpenVINO, on the CPU or any device its plugins offer."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import openvino
from numpy.typing import NDArray

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import Facts, why_not_precision
from msa2net.runtimes.bundle import Manifest

# Layers that move or hold data: the precision they are labelled with is not computed in.
_NO_COMPUTE = {"Const", "Input", "Output", "Reorder", "Reshape"}
_HINTS = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16, "fp16": openvino.Type.f16}


class OpenVinoBackend:
    """See `msa2net.runtimes.backends`."""

    def __init__(self, files: tuple[str, ...], manifest: Manifest, device: str, precision: str, threads: int) -> None:
        core = openvino.Core()
        if device not in core.available_devices:
            raise RuntimeUnavailableError(
                "runtime 'openvino'",
                f"got device {device!r}",
                f"expected one of {', '.join(core.available_devices)}",
                "Is the device's driver installed?",
            )
        if precision not in _HINTS:
            raise RuntimeUnavailableError(
                "runtime 'openvino'",
                f"got precision {precision!r}",
                f"expected one of {', '.join(_HINTS)}",
                "Others are not supported yet.",
            )
        if error := why_not_precision("openvino", precision, device):
            raise error
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            # Without it the CPU plugin runs fp32 models in bf16 where the CPU can.
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
        }
        if device == "CPU":
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = core.compile_model(core.read_model(*files), device, config)
        except RuntimeError as error:
            first = (str(error).strip().splitlines() or ["no reason given"])[-1]
            raise RuntimeUnavailableError(
                "runtime 'openvino'", f"cannot load the model ({first})", "", "Update openvino, or export again."
            ) from error
        self._compiled = compiled
        self._local = threading.local()
        self._layers = self._executed_layers()
        self.facts = Facts(
            version=openvino.__version__.split("-")[0],
            device=", ".join(compiled.get_property("EXECUTION_DEVICES")),
            provider=core.get_property(device, "FULL_DEVICE_NAME"),
            precision=self._executed_precision(precision),
            threads=compiled.get_property("INFERENCE_NUM_THREADS") if device == "CPU" else 0,
            layers=self._layers,
        )

    def _executed_layers(self) -> dict[str, int]:
        """How many layers that compute were compiled to each precision."""
        counts: Counter[str] = Counter()
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            if "runtimePrecision" in info and str(info["layerType"].value) not in _NO_COMPUTE:
                counts[str(info["runtimePrecision"].value)] += 1
        return dict(sorted(counts.items()))

    def _executed_precision(self, asked: str) -> str:
        """The precision asked for, once both the property and every executed node agree with it."""
        hint = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        nodes = {
            str(node.get_rt_info()["runtimePrecision"].value)
            for node in self._compiled.get_runtime_model().get_ordered_ops()
            if "runtimePrecision" in node.get_rt_info()
        }
        lower = {"bf16", "f16", "i8", "u8"} & nodes
        # A graph in bf16 has layers in f32, too: those kept there. One without any in bf16 is not in bf16.
        wrong = bool(lower) if asked == "fp32" else _HINTS[asked].get_type_name() not in self._layers
        if hint != _HINTS[asked] or wrong:
            raise RuntimeUnavailableError(
                "runtime 'openvino'",
                f"runs in {hint.get_type_name()} with nodes in {sorted(nodes)}",
                f"expected {asked}",
                "Use another runtime on this device.",
            )
        return asked

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        # One request per thread: a request may not be shared while it runs.
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        request = self._local.request
        request.infer([x], share_inputs=True)
        return request.get_output_tensor(0).data.copy()  # the tensor is reused by the next call

    def close(self) -> None:
        self._local = threading.local()
        del self._compiled
