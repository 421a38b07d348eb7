"""The ONNX file in fp16: weights and arithmetic in 16 bits, the image and the logits in 32, for GPUs and for Arm.

Two things fp16 cannot do: hold a number beyond 65,504, and hold one below 6e-8. So the largest value of every tensor is
measured, with the sums that a node makes inside, and a node that comes near the limit, or reads a constant that would
be zero, stays in fp32. ONNX Runtime computes an fp16 file in fp32 on x86, which hides both: it is judged with every
tensor rounded to fp16 as it is written, `emulated`. Sums inside a node are taken in fp32, as tensor cores take them;
what Arm's kernels make of them is in `fp16_sums`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from msa2net.errors import ExportError
from msa2net.export import onnx_file
from msa2net.export.precision import Infer, place_of

LARGEST, SMALLEST = 65504.0, 2.0**-24
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
# With this one in fp16, ONNX Runtime 1.32 cannot load a graph on Arm: its layout pass asks for a kernel it has not.
_NO_KERNEL = {"AveragePool"}
HEADROOM = 4.0  # other images may give larger values than the few that are measured
LISTED = 20  # tensors that the manifest lists, the largest
# These only move numbers: they take the type that comes in, and round nothing.
_MOVES = {"Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Identity", "Expand", "Concat", "Gather"}


class Fp16:
    """See `msa2net.export.precision.Lowering`.

    source    the ONNX file in fp32, and `target`, the one in fp16: paths below `folder`
    tensors   inputs that show how large its tensors grow
    """

    def __init__(self, folder: Path, source: str, target: str, tensors: Sequence[NDArray[np.float32]]) -> None:
        self._source, self._folder, self._target = onnx.load(folder / source), folder, target
        self.places = tuple(sorted({place_of(node.name) for node in self._source.graph.node}))
        self.ranges = ranges(self._source, tensors)
        self.vanishing = vanishing(self._source)
        self.kept_nodes = unfit(self._source, self.ranges, self.vanishing)
        self.kept_nodes |= {node.name for node in self._source.graph.node if node.op_type in _NO_KERNEL}

    def reference(self) -> Infer:
        return onnx_file.runner(self._source)

    def infer(self, kept: Collection[str]) -> Infer:
        return onnx_file.runner(emulated(self._converted(kept)))

    def write(self, kept: Collection[str]) -> tuple[str, ...]:
        model = self._converted(kept)
        onnx.checker.check_model(model, full_check=True)
        (self._folder / self._target).write_bytes(model.SerializeToString(deterministic=True))
        return (self._target,)

    def _converted(self, kept: Collection[str]) -> ModelProto:
        nodes = {node.name for node in self._source.graph.node if place_of(node.name) in kept}
        return convert(self._source, nodes | self.kept_nodes)

    def found(self) -> dict[str, Any]:
        return described(self.ranges, self.vanishing, self.kept_nodes)


def described(
    ranges: dict[str, tuple[float, float]], vanishing: dict[str, float], kept_nodes: Collection[str]
) -> dict[str, Any]:
    """For the manifest: the largest tensors, the nodes that stay in fp32 for their range, the constants lost."""
    largest = sorted(ranges.items(), key=lambda item: -max(item[1]))[:LISTED]
    return {
        "limit": LARGEST,
        "headroom": HEADROOM,
        "largest": [{"node": name, "value": given, "sum": inside} for name, (given, inside) in largest],
        "vanishing": [{"node": name, "value": value} for name, value in vanishing.items()],
        "kept_nodes": sorted(kept_nodes),
    }


def emulation(file: Path) -> Infer:
    """Runs an ONNX file, in fp16 as a device does that computes in it, and between Q/DQ nodes in floats."""
    model = onnx.load(file)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return onnx_file.runner(emulated(model), fuse=not quantized)


def ranges(model: ModelProto, tensors: Sequence[NDArray[np.float32]]) -> dict[str, tuple[float, float]]:
    """By computing node, the largest |value| that it gives, and that it sums inside, as a norm does and a mean."""
    shapes = typed_shapes(model)
    computing = [node for node in model.graph.node if node.op_type not in _MOVES]
    names = {name: node for node in computing for name in node.output if shapes[name][0] == FLOAT}
    probed = ModelProto()
    probed.CopyFrom(model)
    for index, name in enumerate(names):
        probed.graph.node.append(helper.make_node("Abs", [name], [f"abs {index}"]))
        probed.graph.node.append(helper.make_node("ReduceMax", [f"abs {index}"], [f"largest {index}"], keepdims=0))
        probed.graph.output.append(helper.make_tensor_value_info(f"largest {index}", FLOAT, []))
    session = onnx_file.session(probed)
    found: dict[str, tuple[float, float]] = {}
    image, wanted = session.get_inputs()[0].name, [f"largest {index}" for index in range(len(names))]
    for tensor in tensors:
        values = session.run(wanted, {image: tensor})
        for (name, node), value in zip(names.items(), values, strict=True):
            given = float(value) if np.isfinite(value) else math.inf
            inside = given
            if node.op_type == "ReduceL2":
                inside = given**2
            elif node.op_type in ("ReduceMean", "AveragePool"):
                inside = given * math.prod(shapes[node.input[0]][1]) / math.prod(shapes[name][1])
            before = found.get(node.name, (0.0, 0.0))
            found[node.name] = (max(before[0], given), max(before[1], inside))
    return found


def vanishing(model: ModelProto) -> dict[str, float]:
    """By node, the constant number that it reads and that would be zero in fp16, such as an epsilon of 1e-12."""
    lost = {}
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT and math.prod(tensor.dims) == 1:
            value = float(numpy_helper.to_array(tensor).reshape(()))
            if value and abs(value) < SMALLEST:
                lost[tensor.name] = value
    return {node.name: lost[name] for node in model.graph.node for name in node.input if name in lost}


def unfit(
    model: ModelProto, ranges: dict[str, tuple[float, float]], vanishing: Collection[str], headroom: float = HEADROOM
) -> set[str]:
    """The nodes that cannot run in fp16: out of its range, or reading what one gives that is."""

    def fits(value: float) -> bool:
        return value * headroom <= LARGEST

    kept = {name for name, (given, inside) in ranges.items() if not fits(max(given, inside))} | set(vanishing)
    lost: set[str] = set()  # tensors that fp16 cannot hold
    for node in model.graph.node:
        reads = lost.intersection(node.input)
        if reads and node.op_type not in _MOVES:
            kept.add(node.name)
        wide = node.name in vanishing or not fits(ranges.get(node.name, (0.0, 0.0))[0])
        if wide or (reads and node.op_type in _MOVES):
            lost.update(node.output)
    return kept


def convert(model: ModelProto, kept: Collection[str]) -> ModelProto:
    """The fp32 model with everything in fp16 but the nodes named in `kept`, its inputs and its outputs."""
    shapes = typed_shapes(model)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    types = {value.name: FLOAT for value in graph.input}
    made: dict[tuple[str, int], str] = {}
    nodes: list[NodeProto] = []
    tensors: dict[str, TensorProto] = {}

    def in_type(name: str, wanted: int, reader: NodeProto) -> str:
        """The name of this tensor in the type wanted, converted once."""
        if name in constants:
            if wanted == FLOAT:
                tensors[name] = constants[name]
                return name
            if (name, wanted) not in made:
                made[name, wanted] = f"{name}/fp16"
                with np.errstate(over="ignore"):
                    values = numpy_helper.to_array(constants[name]).astype(np.float16)
                if not np.isfinite(values).all():
                    raise ExportError(
                        f"fp16: {name}", f"has weights beyond {LARGEST:.0f}", "expected smaller ones", "Export fp32."
                    )
                tensors[f"{name}/fp16"] = numpy_helper.from_array(values, f"{name}/fp16")
            return made[name, wanted]
        if types[name] == wanted:
            return name
        if (name, wanted) not in made:
            made[name, wanted] = f"{name}/{'fp32' if wanted == FLOAT else 'fp16'}"
            output = made[name, wanted]
            path = reader.name.rpartition("/")[0]
            nodes.append(helper.make_node("Cast", [name], [output], f"{path}/{output}", to=wanted))
        return made[name, wanted]

    for node in graph.node:
        floats = [name for name in node.input if name and shapes[name][0] == FLOAT]
        if node.op_type in _MOVES:
            wanted = next((types[name] for name in floats if name in types), HALF)
        else:
            wanted = FLOAT if node.name in kept else HALF
        inputs = [in_type(name, wanted, node) if name in floats else name for name in node.input]
        tensors.update((name, constants[name]) for name in node.input if name in constants and name not in floats)
        written = [f"{name}/fp16" if name in outputs and wanted == HALF else name for name in node.output]
        types.update((name, wanted) for name, old in zip(written, node.output, strict=True) if shapes[old][0] == FLOAT)
        nodes.append(renamed(node, inputs, written))
        for name, old in zip(written, node.output, strict=True):
            if name != old:
                types[old] = FLOAT
                nodes.append(helper.make_node("Cast", [name], [old], f"{old}/fp32", to=FLOAT))
    return with_nodes(model, nodes, tensors.values())


def emulated(model: ModelProto) -> ModelProto:
    """A model in fp16 as one in fp32 that rounds to fp16 wherever the other writes a tensor in it."""
    shapes = typed_shapes(model)
    nodes = []
    for node in model.graph.node:
        rounded = [] if node.op_type in _MOVES else [name for name in node.output if shapes[name][0] == HALF]
        nodes.append(renamed(node, node.input, [f"{name} exact" if name in rounded else name for name in node.output]))
        if node.op_type == "Cast":  # what it reads is a float already, and what it writes is rounded like any other
            nodes[-1] = helper.make_node("Identity", nodes[-1].input, nodes[-1].output, node.name)
        for name in rounded:
            nodes.append(helper.make_node("Cast", [f"{name} exact"], [f"{name} in 16"], to=HALF))
            nodes.append(helper.make_node("Cast", [f"{name} in 16"], [name], to=FLOAT))
    return with_nodes(model, nodes, map(_widened, model.graph.initializer))


def _widened(tensor: TensorProto) -> TensorProto:
    if tensor.data_type != HALF:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def renamed(node: NodeProto, inputs: Iterable[str], outputs: Iterable[str]) -> NodeProto:
    """A copy of the node that reads and writes other tensors."""
    copy = NodeProto(op_type=node.op_type, name=node.name, attribute=node.attribute)
    copy.input.extend(inputs)
    copy.output.extend(outputs)
    return copy


def with_nodes(model: ModelProto, nodes: Iterable[NodeProto], tensors: Iterable[TensorProto]) -> ModelProto:
    """The model's frame around other nodes and constants."""
    graph = helper.make_graph(list(nodes), model.graph.name, model.graph.input, model.graph.output, list(tensors))
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def typed_shapes(model: ModelProto) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Type and shape of every tensor; a side that grows with the batch counts as for one image, or as 1."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    found = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        kind = value.type.tensor_type
        found[value.name] = (kind.elem_type, tuple(side.dim_value or 1 for side in kind.shape.dim))
    return found
