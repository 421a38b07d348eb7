"""The baked graph: a camera's frame in, the mask at its size out, with all of sections 6 and 7 of BUNDLE.md inside.

    frame (H, W, 3) or (H, W) uint8  ->  mask (H, W) uint8, logits (1, K, h, w) float32, and on request
                                         confidence (H, W) uint8, colors (H, W, 3) uint8

Both ends are written once, as ONNX; OpenVINO's are read from there. Resizing is the same tables as in `preprocess`, in
pieces: an output sample has few inputs, and a table as wide as the frame would be mostly zeros.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from msa2net.errors import ExportError
from msa2net.export import onnx_file
from msa2net.runtimes.backends import ADDED
from msa2net.runtimes.bundle import Manifest
from msa2net.runtimes.postprocess import nearest_grid
from msa2net.runtimes.preprocess import MAX_PIXELS, MAX_SIDE, place, resize_table

EXTRAS = ("confidence", "colors")
_MOST_TAPS = 12  # up to which OpenVINO fuses weighted rows; beyond, and elsewhere, products of blocks are faster
_ROWS, _COLUMNS = 28, 14  # outputs of a block: more waste arithmetic on zeros, fewer on overlaps and calls


@dataclass(frozen=True)
class FrameSize:
    """The frames that a graph takes: rows H, columns W, and whether they are (H, W, 3) or (H, W)."""

    rows: int
    columns: int
    colour: bool

    @classmethod
    def parse(cls, text: str) -> FrameSize:
        """ "1920x1080" is W x H, in colour; "1920x1080:grey" in grey. Raises ExportError."""
        found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})(:grey)?", text)
        size = cls(int(found[2]), int(found[1]), not found[3]) if found else None
        if size is None or min(size.rows, size.columns) < 1 or max(size.rows, size.columns) > MAX_SIDE:
            raise ExportError("--bake", f"got {text!r}", "expected WIDTHxHEIGHT, or WIDTHxHEIGHT:grey", "As 1920x1080.")
        if size.rows * size.columns > MAX_PIXELS:
            raise ExportError("--bake", f"got {text!r}", f"expected at most {MAX_PIXELS} pixels", "Downscale before.")
        return size

    def __str__(self) -> str:
        return f"{self.columns}x{self.rows}{'' if self.colour else ':grey'}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.columns, 3) if self.colour else (self.rows, self.columns)


class _Graph:
    """Nodes and constants as they are added; each node's one output goes by a number."""

    def __init__(self, end: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._prefix = f"{ADDED}{end}/"

    def const(self, array: NDArray[Any]) -> str:
        name = f"{self._prefix}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{self._prefix}{len(self.nodes)}"
        name = f"{self._prefix}{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def cast(self, x: str, kind: int, output: str = "") -> str:
        return self.add("Cast", x, to=kind, output=output)

    def reshape(self, x: str, *shape: int) -> str:
        return self.add("Reshape", x, self.const(np.array(shape, np.int64)))

    def gather(self, x: str, index: NDArray[np.intp], axis: int, output: str = "") -> str:
        return self.add("Gather", x, self.const(index.astype(np.int32)), axis=axis, output=output)

    def slice(self, x: str, start: int, end: int, axis: int) -> str:
        return self.add("Slice", x, *(self.const(np.array([value], np.int64)) for value in (start, end, axis)))


def _spans(table: NDArray[np.float32], size: int) -> tuple[NDArray[np.intp], int]:
    """For each `size` outputs of a table (m, n), the first input that they need, and of how many, the same for all."""
    parts = [np.flatnonzero(table[at : at + size].any(0)) for at in range(0, len(table), size)]
    count = max(int(part[-1] - part[0]) + 1 for part in parts)
    return np.array([min(part[0], table.shape[1] - count) for part in parts]), count


def _block(table: NDArray[np.float32], number: int, size: int, start: int, count: int) -> NDArray[np.float32]:
    """(size, count) weights of a block; beyond the table's end they are 0."""
    part = table[number * size : (number + 1) * size, start : start + count]
    return np.pad(part, ((0, size - len(part)), (0, 0)))


def _resize_rows(graph: _Graph, x: str, table: NDArray[np.float32], width: int, fused: bool) -> str:
    """(n, width) of uint8 or float32 -> (m, width) float32."""
    target, source = table.shape
    if target == source:
        return graph.cast(x, TensorProto.FLOAT)
    starts, count = _spans(table, 1)
    if fused and count <= _MOST_TAPS:
        total = ""
        for tap in range(count):
            weights = table[np.arange(target), starts + tap][:, None]
            row = graph.cast(graph.gather(x, starts + tap, 0), TensorProto.FLOAT)
            row = graph.add("Mul", row, graph.const(weights))
            total = graph.add("Add", total, row) if total else row
        return total
    starts, count = _spans(table, _ROWS)
    index = (starts[:, None] + np.arange(count)).ravel()
    blocks = np.stack([_block(table, k, _ROWS, start, count) for k, start in enumerate(starts)])
    x = graph.reshape(graph.gather(x, index, 0), len(starts), count, width)
    x = graph.add("MatMul", graph.const(blocks), graph.cast(x, TensorProto.FLOAT))
    x = graph.reshape(x, len(starts) * _ROWS, width)
    return graph.slice(x, 0, target, 0) if len(starts) * _ROWS != target else x


def _resize_columns(graph: _Graph, x: str, table: NDArray[np.float32], planes: int) -> str:
    """(N, n * planes) float32 -> (N, m * planes), the planes of a pixel side by side."""
    target, source = table.shape
    if target == source:
        return x
    starts, count = _spans(table, _COLUMNS)
    parts = []
    for k, start in enumerate(starts):
        piece = graph.slice(x, int(start) * planes, int(start + count) * planes, 1)
        weights = _block(table, k, _COLUMNS, int(start), count)[: target - k * _COLUMNS]
        parts.append(graph.add("MatMul", piece, graph.const(np.kron(weights.T, np.eye(planes, dtype=np.float32)))))
    return graph.add("Concat", *parts, axis=1)


def front(manifest: Manifest, size: FrameSize, fused: bool) -> onnx.ModelProto:
    """`frame` -> `image` (1, C, h, w) float32, as `preprocess.to_tensor` makes it.

    fused   weighted rows instead of products of blocks, where there are few: for a runtime that fuses them
    """
    contract = manifest.input
    if size.colour and contract.channels == 1:
        raise ExportError("--bake", f"got {size}", "expected grey: the network takes grey", f"As {size}:grey.")
    graph, spot, planes = _Graph("front"), place(contract, size.rows, size.columns), 3 if size.colour else 1
    x = graph.reshape("frame", size.rows, size.columns * planes)
    rows = resize_table(contract.resize, size.rows, spot.height)
    x = _resize_rows(graph, x, rows, size.columns * planes, fused)
    x = _resize_columns(graph, x, resize_table(contract.resize, size.columns, spot.width), planes)
    x = graph.add("Transpose", graph.reshape(x, spot.height, spot.width, planes), perm=[2, 0, 1])
    x = graph.reshape(x, 1, planes, spot.height, spot.width)
    below, right = contract.height - spot.top - spot.height, contract.width - spot.left - spot.width
    if below or right or spot.top or spot.left:
        edges = np.array([0, 0, spot.top, spot.left, 0, 0, below, right], np.int64)
        x = graph.add("Pad", x, graph.const(edges))
    mean, std = (np.asarray(each, np.float64).reshape(1, -1, 1, 1) for each in (contract.mean, contract.std))
    x = graph.add("Mul", x, graph.const((1 / (255 * std)).astype(np.float32)))
    graph.add("Add", x, graph.const((-mean / std).astype(np.float32)), output="image")
    image = (1, contract.channels, contract.height, contract.width)
    return _model(graph, "front", [("frame", TensorProto.UINT8, size.shape)], [("image", TensorProto.FLOAT, image)])


def back(manifest: Manifest, size: FrameSize, extras: Sequence[str], fused: bool) -> onnx.ModelProto:
    """`logits` -> `mask` and the extras, as `postprocess.to_mask` makes it."""
    contract, classes = manifest.input, len(manifest.classes)
    graph, spot, whole = _Graph("back"), place(contract, size.rows, size.columns), (size.rows, size.columns)
    x = graph.slice("logits", spot.top, spot.top + spot.height, 2)
    x = graph.slice(x, spot.left, spot.left + spot.width, 3)
    x = graph.reshape(x, classes, spot.height, spot.width)
    shares, rows, columns = "", *nearest_grid((spot.height, spot.width), whole, manifest.enlarge)
    if manifest.enlarge == "bilinear":
        x = graph.reshape(graph.add("Softmax", x, axis=0), classes, spot.height, spot.width)
        x = graph.add("Transpose", x, perm=[1, 0, 2])
        x = graph.reshape(x, spot.height, classes * spot.width)
        x = _resize_rows(graph, x, resize_table("bilinear", spot.height, size.rows), classes * spot.width, fused)
        x = graph.reshape(x, size.rows * classes, spot.width)
        x = _resize_columns(graph, x, resize_table("bilinear", spot.width, size.columns), 1)
        x = graph.add("Transpose", graph.reshape(x, size.rows, classes, size.columns), perm=[1, 0, 2])
        shares = x
    elif "confidence" in extras:
        shares = graph.add("Softmax", x, axis=0)
    if classes == 2:  # a comparison is argmax, and cheaper
        x = graph.add("Greater", graph.gather(x, np.array(1), 0), graph.gather(x, np.array(0), 0))
    else:
        x = graph.add("ArgMax", x, axis=0, keepdims=0)
    small = graph.cast(x, TensorProto.UINT8)

    def enlarged(maps: str, output: str) -> str:
        if manifest.enlarge == "bilinear":
            return graph.add("Identity", maps, output=output)
        return graph.gather(graph.gather(maps, columns, 1), rows, 0, output=output)

    mask = enlarged(small, "mask")
    outputs: list[tuple[str, int, Sequence[int]]] = [("mask", TensorProto.UINT8, whole)]
    if "confidence" in extras:
        best = graph.add("ReduceMax", shares, graph.const(np.array([0])), keepdims=0)
        scaled = graph.add(
            "Floor", graph.add("Add", graph.add("Mul", best, *_number(graph, 255)), *_number(graph, 0.5))
        )
        enlarged(graph.cast(scaled, TensorProto.UINT8), "confidence")
        outputs.append(("confidence", TensorProto.UINT8, whole))
    if "colors" in extras:
        palette = np.array([info.color for info in manifest.classes], np.uint8)
        graph.add("Gather", graph.const(palette), graph.cast(mask, TensorProto.INT32), axis=0, output="colors")
        outputs.append(("colors", TensorProto.UINT8, (*whole, 3)))
    logits = (1, classes, contract.height, contract.width)
    return _model(graph, "back", [("logits", TensorProto.FLOAT, logits)], outputs)


def _number(graph: _Graph, value: float) -> tuple[str]:
    return (graph.const(np.array(value, np.float32)),)


_Ends = Sequence[tuple[str, int, Sequence[int]]]


def _model(graph: _Graph, name: str, inputs: _Ends, outputs: _Ends) -> onnx.ModelProto:
    first, last = ([helper.make_tensor_value_info(*each) for each in group] for group in (inputs, outputs))
    made = helper.make_graph(graph.nodes, f"{ADDED}{name}", first, last, graph.constants)
    opset = helper.make_opsetid("", onnx_file.OPSET)
    return helper.make_model(made, opset_imports=[opset], ir_version=onnx_file.IR_VERSION)


def onnx_baked(network: Path, manifest: Manifest, size: FrameSize, extras: Sequence[str], target: Path) -> None:
    """Writes an ONNX artifact with both ends to `target`."""
    model = onnx.load(network)
    first, last = front(manifest, size, False).graph, back(manifest, size, extras, False).graph
    graph = model.graph
    nodes = [*first.node, *graph.node, *last.node]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(first.input)
    graph.initializer.extend([*first.initializer, *last.initializer])
    graph.output.extend(last.output)
    onnx_file.check(model)
    target.write_bytes(model.SerializeToString(deterministic=True))
