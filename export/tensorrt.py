"""What TensorRT takes: strongly typed ONNX, in int8 with explicit Q/DQ nodes, and engines of TensorRT for RTX.

fp32 and fp16 are ONNX Runtime's files. TensorRT's int8 is symmetric, one scale a tensor and one a channel of weights,
and what is not in int8 is in fp16. Q/DQ pairs stand where TensorRT fuses them: before both inputs of a convolution or
of a product with weights, and nowhere else, so that an activation that several read, or that is put together of
several, is rounded once, with one scale. What such a product gives is in fp16 and is rounded where the next one reads
it: in this network a norm, an addition or a gate lies between, which int8 would only make worse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from msa2net.errors import ExportError
from msa2net.export import fp16, onnx_file, quantize
from msa2net.export.calibration import Tensors
from msa2net.export.precision import Infer
from msa2net.runtimes.backends.tensorrt import build
from msa2net.runtimes.bundle import parse_recipe

_LEAST_SCALE = 2.0**-20  # fp16 holds it to 1 part in 16; weights below 127 times that are as good as none


class Int8(quantize.OnnxInt8):
    """See `quantize._Int8`; a quantization is the largest |value| of every tensor that is rounded."""

    def _read(self, files: Sequence[Path]) -> None:
        self._fp32 = onnx.load(files[0])
        self._nodes = quantize.quantized_nodes(self._fp32)

    def _quantizations(self, inputs: Tensors, tick: Callable[[str], object]) -> Iterator[tuple[str, Any]]:
        tick("fp16's ranges")
        found, lost = fp16.ranges(self._fp32, inputs), fp16.vanishing(self._fp32)
        self._in_fp32 = fp16.unfit(self._fp32, found, lost)
        self._described = fp16.described(found, lost, self._in_fp32)
        self._nodes = {name: place for name, place in self._nodes.items() if name not in self._in_fp32}
        for method, ranges in super()._quantizations(inputs, tick):
            yield method, {name: float(np.abs(both).max()) for name, both in ranges.items()}

    def found(self) -> dict[str, Any]:
        """See `fp16.described`: what is not in int8 is in fp16."""
        return self._described

    def infer(self, kept: Collection[str]) -> Infer:
        return onnx_file.runner(fp16.emulated(self._with_quantizers(kept)), fuse=False)

    def _with_quantizers(self, kept: Collection[str]) -> onnx.ModelProto:
        chosen = [name for name, place in self._nodes.items() if place not in kept]
        return fp16.convert(with_qdq(self._fp32, chosen, self._quantization), self._in_fp32)


def with_qdq(model: onnx.ModelProto, chosen: Collection[str], largest: dict[str, float]) -> onnx.ModelProto:
    """The model with Q/DQ nodes before both inputs of the chosen nodes, a convolution or a product with weights each.

    largest   by tensor that they read, the |value| that becomes 127
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[NodeProto] = []
    constants: dict[str, onnx.TensorProto] = dict(weights)
    made: dict[str, str] = {}

    def add(tensor: str, values: NDArray[Any]) -> str:
        constants[tensor] = numpy_helper.from_array(values, tensor)
        return tensor

    def dequantize(name: str, source: str, scale: NDArray[np.float32], axis: int, path: str) -> str:
        inputs = [source, add(f"{name}/scale", scale), add(f"{name}/zero", np.zeros(scale.shape, np.int8))]
        attributes: dict[str, Any] = {"axis": axis} if scale.ndim else {}
        if source not in constants:
            nodes.append(helper.make_node("QuantizeLinear", inputs, [f"{name}/int8"], f"{path}/{name}/quantize"))
            inputs[0] = f"{name}/int8"
        output = f"{name}/rounded"
        nodes.append(helper.make_node("DequantizeLinear", inputs, [output], f"{path}/{name}/dequantize", **attributes))
        return output

    for node in model.graph.node:
        if node.name in chosen:
            path = node.name.rpartition("/")[0]
            data, weight = node.input[:2]
            if data not in made:
                scale = np.array(_scale(np.array(largest[data], np.float32)), np.float32)
                made[data] = dequantize(data, data, scale, 0, path)
            if weight not in made:
                values = numpy_helper.to_array(weights[weight])
                axis = _output_axis(node, values.ndim)
                scale = _scale(np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != axis)))
                shape = [-1 if i == axis else 1 for i in range(values.ndim)]
                rounded = np.rint(values / scale.reshape(shape)).clip(-127, 127).astype(np.int8)
                made[weight] = dequantize(weight, add(f"{weight}/int8", rounded), scale, axis, path)
            node = fp16.renamed(node, [made[data], made[weight], *node.input[2:]], node.output)
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    return fp16.with_nodes(model, nodes, [tensor for name, tensor in constants.items() if name in used])


def _scale(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """As fp16 will hold it, so that the weights are rounded with the very scale that they are multiplied by again."""
    return np.maximum(largest / np.float32(127), _LEAST_SCALE).astype(np.float16).astype(np.float32)


def _output_axis(node: NodeProto, axes: int) -> int:
    """The axis of a product's weights that its outputs lie along."""
    transposed = any(each.name == "transB" and each.i for each in node.attribute)  # of a Gemm
    return 0 if node.op_type == "Conv" or transposed else axes - 1


def require(targets: Sequence[str]) -> Any:
    """The module `tensorrt_rtx`. Raises ExportError if it is not there, or does not build for one of the targets."""
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        raise ExportError(
            "tensorrt-rtx", f"needs the package {error.name}", "", "pip install 'msa2net-edge[tensorrt-rtx]'"
        ) from error
    known = [name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    capabilities = [f"{name[:-1]}.{name[-1]}" for name in known]
    if not targets or (unknown := [each for each in targets if each not in capabilities]):
        found = ", ".join(unknown) if targets else "none"
        raise ExportError("targets", f"got {found}", f"expected some of {', '.join(capabilities)}", "Check them.")
    return trt


def engine(model: bytes, recipe: dict[str, Any], targets: Sequence[str]) -> tuple[str, bytes]:
    """The version of TensorRT for RTX, and the engine that it makes of an ONNX file, for all targets at once."""
    trt = require(targets)
    built, _ = build(trt, model, parse_recipe(recipe | needs(trt.__version__, targets)))
    return trt.__version__, built


def needs(version: str, targets: Sequence[str]) -> dict[str, Any]:
    """A recipe's fields that tell what an engine runs on: on the version that built it alone."""
    *most, last = version.split(".")
    versions = [version, ".".join([*most, str(int(last) + 1)])]
    return {"version": versions, "compute_capabilities": list(targets), "hardware_compatibility": "none"}
