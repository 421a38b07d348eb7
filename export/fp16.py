"""The ONNX file in fp16: weights and arithmetic in 16 bits, the image and the logits in 32, for GPUs and for Arm.

Two things fp16 cannot do: hold a number beyond 65,504, and hold one below 6e-8. So the largest value of every tensor is
measured, with the sums that a node makes inside, and a node that comes near the limit, or reads a constant that would
be zero, stays in fp32. ONNX Runtime computes an fp16 file in fp32 on x86, which hides both: it is judged with every
tensor rounded to fp16 as it is written, `emulated`. Sums inside a node are taken in fp32, as tensor cores take them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from msa2net.errors import ExportError
from msa2net.export.precision import Infer, place_of

LARGEST, SMALLEST = 65504.0, 2.0**-24
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
        return _session(self._source)

    def infer(self, kept: Collection[str]) -> Infer:
        return _session(emulated(self._converted(kept)))

    def write(self, kept: Collection[str]) -> tuple[str, ...]:
        model = self._converted(kept)
        onnx.checker.check_model(model, full_check=True)
        (self._folder / self._target).write_bytes(model.SerializeToString(deterministic=True))
        return (self._target,)

    def _converted(self, kept: Collection[str]) -> ModelProto:
        nodes = {node.name for node in self._source.graph.node if place_of(node.name) in kept}
        return convert(self._source, nodes | self.kept_nodes)

    def found(self) -> dict[str, Any]:
        """For the manifest: the largest tensors, the nodes that stay in fp32 for their range, the constants lost."""
        largest = sorted(self.ranges.items(), key=lambda item: -max(item[1]))[:LISTED]
        return {
            "limit": LARGEST,
            "headroom": HEADROOM,
            "largest": [{"node": name, "value": given, "sum": inside} for name, (given, inside) in largest],
            "vanishing": [{"node": name, "value": value} for name, value in self.vanishing.items()],
            "kept_nodes": sorted(self.kept_nodes),
        }


def emulation(file: Path) -> Infer:
    """Runs an ONNX file in fp16 as a device does that computes in it."""
    return _session(emulated(onnx.load(file)))


def ranges(model: ModelProto, tensors: Sequence[NDArray[np.float32]]) -> dict[str, tuple[float, float]]:
    """By computing node, the largest |value| that it gives, and that it sums inside, as a norm does and a mean."""
    shapes = _shapes(model)
    computing = [node for node in model.graph.node if node.op_type not in _MOVES]
    names = {name: node for node in computing for name in node.output if shapes[name][0] == TensorProto.FLOAT}
    probed = ModelProto()
    probed.CopyFrom(model)
    for index, name in enumerate(names):
        probed.graph.node.append(helper.make_node("Abs", [name], [f"abs {index}"]))
        probed.graph.node.append(helper.make_node("ReduceMax", [f"abs {index}"], [f"largest {index}"], keepdims=0))
        probed.graph.output.append(helper.make_tensor_value_info(f"largest {index}", TensorProto.FLOAT, []))
    session = _open(probed)
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
        if tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) == 1:
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
    shapes = _shapes(model)
    half = ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types = {value.name: TensorProto.FLOAT for value in graph.input}
    made: dict[tuple[str, int], str] = {}
    nodes: list[NodeProto] = []
    tensors: dict[str, TensorProto] = {}

    def in_type(name: str, wanted: int, reader: NodeProto) -> str:
        """The name of this tensor in the type wanted, converted once."""
        if name in constants:
            if wanted == TensorProto.FLOAT:
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
            made[name, wanted] = f"{name}/{'fp32' if wanted == TensorProto.FLOAT else 'fp16'}"
            output = made[name, wanted]
            path = reader.name.rpartition("/")[0]
            nodes.append(helper.make_node("Cast", [name], [output], f"{path}/{output}", to=wanted))
        return made[name, wanted]

    for node in graph.node:
        floats = [name for name in node.input if name and shapes[name][0] == TensorProto.FLOAT]
        if node.op_type in _MOVES:
            wanted = next((types[name] for name in floats if name in types), TensorProto.FLOAT16)
        else:
            wanted = TensorProto.FLOAT if node.name in kept else TensorProto.FLOAT16
        renamed = [in_type(name, wanted, node) if name in floats else name for name in node.input]
        tensors.update((name, constants[name]) for name in node.input if name in constants and name not in floats)
        del node.input[:]
        node.input.extend(renamed)
        types.update((name, wanted) for name in node.output if shapes[name][0] == TensorProto.FLOAT)
        nodes.append(node)
    copies = [NodeProto() for _ in nodes]
    for copy, node in zip(copies, nodes, strict=True):
        copy.CopyFrom(node)
    for value in graph.output:
        if types[value.name] == TensorProto.FLOAT16:
            inner = f"{value.name}/fp16"
            for node in copies:
                for names in (node.input, node.output):
                    for i, name in enumerate(names):
                        names[i] = inner if name == value.name else name
            copies.append(helper.make_node("Cast", [inner], [value.name], f"{value.name}/fp32", to=TensorProto.FLOAT))
    del graph.node[:], graph.initializer[:]
    graph.node.extend(copies)
    graph.initializer.extend(tensors.values())
    return half


def emulated(model: ModelProto) -> ModelProto:
    """A model in fp16 as one in fp32 that rounds to fp16 wherever the other writes a tensor in it."""
    shapes = _shapes(model)
    full = ModelProto()
    full.CopyFrom(model)
    graph = full.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes = []
    for node in full.graph.node:
        halves = [i for i, name in enumerate(node.output) if shapes[name][0] == TensorProto.FLOAT16]
        if node.op_type == "Cast" and not halves:  # back to fp32: its input is a float already
            node = helper.make_node("Identity", node.input, node.output, node.name)
        if node.op_type in _MOVES:
            halves = []
        names = list(node.output)
        if node.op_type == "Cast" and halves:
            nodes.append(helper.make_node("Cast", node.input, [f"{names[0]} in 16"], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [f"{names[0]} in 16"], names, to=TensorProto.FLOAT))
            continue
        for i in halves:
            node.output[i] = f"{names[i]} exact"
        nodes.append(node)
        for i in halves:
            nodes.append(helper.make_node("Cast", [f"{names[i]} exact"], [f"{names[i]} in 16"], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [f"{names[i]} in 16"], [names[i]], to=TensorProto.FLOAT))
    copies = [NodeProto() for _ in nodes]
    for copy, node in zip(copies, nodes, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)
    return full


def _shapes(model: ModelProto) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Type and shape of every tensor."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    found = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        kind = value.type.tensor_type
        found[value.name] = (kind.elem_type, tuple(side.dim_value for side in kind.shape.dim))
    return found


def _open(model: ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _session(model: ModelProto) -> Infer:
    session = _open(model)
    name = session.get_inputs()[0].name

    def infer(x: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {name: x})[0]
        return logits

    return infer
