"""The baked graph: a camera's frame in, the mask at its size out, with all of sections 6 and 7 of BUNDLE.md inside.

    frame (H, W, 3) or (H, W) uint8  ->  mask (H, W) uint8, logits (1, K, h, w) float32, and on request
                                         confidence (H, W) uint8, colors (H, W, 3) uint8

Both ends are written once, as ONNX; OpenVINO's are read from there. Resizing is the same tables as in `preprocess`, in
pieces: an output sample has few inputs, and a table as wide as the frame would be mostly zeros. By the rule
"bilinear-fixed" the network gets the same bits as from `preprocess`, and gives the same. By the others the last bits
differ, and in bf16 and int8 a single one of them may become other pixels: some 0.03 % of them at 1080p.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import onnx
import openvino
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from openvino.passes import ConstantFolding, Manager

from msa2net.errors import ExportError
from msa2net.export import onnx_file, openvino_ir, parity
from msa2net.runtimes import postprocess, preprocess
from msa2net.runtimes.backends import ADDED, FrameBackend, backend_class
from msa2net.runtimes.bundle import BAKED_OUTPUTS, Artifact, Manifest
from msa2net.runtimes.postprocess import nearest_grid
from msa2net.runtimes.preprocess import GREY_STEP, MAX_PIXELS, MAX_SIDE, ROUNDING, place, resize_table

EXTRAS = BAKED_OUTPUTS[2:]
_MOST_TAPS = 12  # up to which OpenVINO fuses weighted rows; beyond, and elsewhere, products of blocks are faster
_PIECE = 320_000  # values of the rows that are weighted at a time: with what they are made of they stay in the cache
_ALIGNMENT = 64  # bytes, of a constant in the file that is mapped
_BLOCK = 28  # outputs of a block: more waste arithmetic on zeros, fewer on overlaps and calls
# Inputs of a block: ONNX Runtime sums up to as many one after the other, as numpy does, and gets nearly the same bits.
_MOST_INPUTS = 128


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
        if size is None:
            raise ExportError("--bake", f"got {text!r}", "expected WIDTHxHEIGHT, or WIDTHxHEIGHT:grey", "As 1920x1080.")
        if min(size.rows, size.columns) < 1 or max(size.rows, size.columns) > MAX_SIDE:
            raise ExportError(
                "--bake", f"got {text!r}", f"expected sides of 1 to {MAX_SIDE}", "Give the camera's size."
            )
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

    def number(self, value: float) -> str:
        return self.const(np.array(value, np.float32))

    def cast(self, x: str, kind: int) -> str:
        return self.add("Cast", x, to=kind)

    def reshape(self, x: str, *shape: int) -> str:
        if self.nodes and self.nodes[-1].op_type == "Reshape" and self.nodes[-1].output[0] == x:
            x = self.nodes.pop().input[0]  # OpenVINO would make one of the two, without the mark that asks for fp32
            self.constants.pop()
        return self.add("Reshape", x, self.const(np.array(shape, np.int64)))

    def gather(self, x: str, index: NDArray[np.intp], axis: int, output: str = "") -> str:
        return self.add("Gather", x, self.const(index.astype(np.int32)), axis=axis, output=output)

    def slice(self, x: str, start: int, end: int, axis: int) -> str:
        return self.add("Slice", x, *(self.const(np.array([value], np.int64)) for value in (start, end, axis)))


@dataclass(frozen=True)
class _Blocks:
    """A table (m, n) in blocks of `size` outputs; each needs `count` inputs from its entry in `starts` on."""

    table: NDArray[np.float32]
    size: int
    starts: NDArray[np.intp]
    count: int

    @classmethod
    def of(cls, table: NDArray[np.float32], size: int) -> _Blocks:
        """As few blocks as `_MOST_INPUTS` allows, of at most `size` outputs."""
        parts = [np.flatnonzero(table[at : at + size].any(0)) for at in range(0, len(table), size)]
        count = max(int(part[-1] - part[0]) + 1 for part in parts)
        if count > _MOST_INPUTS and size > 1:
            return cls.of(table, size - 1)
        return cls(table, size, np.array([min(part[0], table.shape[1] - count) for part in parts]), count)

    def weights(self, number: int) -> NDArray[np.float32]:
        """(outputs, count) of a block; the last may have fewer outputs."""
        start = self.starts[number]
        return self.table[number * self.size : (number + 1) * self.size, start : start + self.count]


def _pad(graph: _Graph, x: str, shape: Sequence[int], axis: int, before: int, after: int, kind: type[Any]) -> str:
    """Zeros around `x`, of this shape, along an axis. By Concat: OpenVINO replaces Pad, mark and all."""

    def zeros(count: int) -> list[str]:
        return [graph.const(np.zeros((*shape[:axis], count, *shape[axis + 1 :]), kind))] if count else []

    parts = [*zeros(before), x, *zeros(after)]
    return graph.add("Concat", *parts, axis=axis) if len(parts) > 1 else x


def _softmax(graph: _Graph, x: str, classes: int, fused: bool) -> str:
    """Over the first axis, as `postprocess.softmax`; term by term where OpenVINO would replace it, mark and all."""
    if not fused:
        return graph.add("Softmax", x, axis=0)

    def over_classes(kind: str, x: str) -> str:
        return reduce(partial(graph.add, kind), (graph.gather(x, np.array([k]), 0) for k in range(classes)))

    x = graph.add("Exp", graph.add("Sub", x, over_classes("Max", x)))
    return graph.add("Div", x, over_classes("Add", x))


def _rounded(graph: _Graph, x: str, fused: bool) -> str:
    """To multiples of `GREY_STEP`, halves to the even one."""
    if fused:
        x = graph.add("Round", graph.add("Mul", x, graph.number(1 / GREY_STEP)))
        return graph.add("Mul", x, graph.number(GREY_STEP))
    large = graph.number(float(ROUNDING))  # ONNX Runtime's Round takes three times as long
    return graph.add("Sub", graph.add("Add", x, large), large)


def _resize_rows(
    graph: _Graph, x: str, table: NDArray[np.float32], width: int, fused: bool, exact: bool = False
) -> str:
    """(n, width) of uint8 or float32 -> (m, width) float32; `exact` as in `preprocess.resize`, of uint8."""
    target, source = table.shape
    if target == source:
        return graph.cast(x, TensorProto.FLOAT)
    taps = _Blocks.of(table, 1)
    if fused and taps.count <= _MOST_TAPS:
        pieces = []
        for outputs in np.array_split(np.arange(target), math.ceil(target * width / _PIECE)):
            total = ""
            for inputs in (taps.starts[outputs] + tap for tap in range(taps.count)):
                row = graph.cast(graph.gather(x, inputs, 0), TensorProto.FLOAT)
                row = graph.add("Mul", row, graph.const(table[outputs, inputs][:, None]))
                total = graph.add("Add", total, row) if total else row
            pieces.append(_rounded(graph, total, fused) if exact else total)
        return graph.add("Concat", *pieces, axis=0) if len(pieces) > 1 else pieces[0]
    # One after the other: the float32 of a block stays in the cache, that of a frame would not.
    blocks, parts = _Blocks.of(table, _BLOCK), []
    for k, start in enumerate(blocks.starts):
        piece = graph.cast(graph.slice(x, int(start), int(start) + blocks.count, 0), TensorProto.FLOAT)
        parts.append(graph.add("MatMul", graph.const(blocks.weights(k)), piece))
    x = graph.add("Concat", *parts, axis=0)
    return _rounded(graph, x, fused) if exact else x


def _resize_columns(
    graph: _Graph, x: str, table: NDArray[np.float32], height: int, planes: int, fused: bool, exact: bool = False
) -> str:
    """(height, n * planes) float32, the planes of a pixel side by side -> (planes, height, m).

    exact   as for rows; what is fused, too, comes out as int32, in steps of `GREY_STEP`
    """
    target, source = table.shape
    # OpenVINO multiplies the planes as they lie; elsewhere that would be three times as many inputs, most of them 0.
    apart = not fused or planes == 1
    if apart:
        x = graph.add("Transpose", graph.reshape(x, height, source, planes), perm=[2, 0, 1]) if planes > 1 else x
        x = graph.reshape(x, planes * height, source)
    if target != source:
        # Between planes that lie side by side there are zeros, and they are multiplied, too: smaller blocks pay there.
        blocks = _Blocks.of(table, _BLOCK // 2 if apart else _BLOCK // 3)
        beside, parts = 1 if apart else planes, []
        for k, start in enumerate(blocks.starts):
            piece = graph.slice(x, int(start) * beside, int(start + blocks.count) * beside, 1)
            weights = np.kron(blocks.weights(k).T, np.eye(beside, dtype=np.float32))
            parts.append(graph.add("MatMul", piece, graph.const(weights)))
        x = graph.add("Concat", *parts, axis=1)
        x = _rounded(graph, x, fused) if exact else x
    if exact and fused:  # before the shape changes: OpenVINO moves a product ahead of that, and then drops its mark
        x = graph.cast(graph.add("Mul", x, graph.number(1 / GREY_STEP)), TensorProto.INT32)
    if apart:
        return graph.reshape(x, planes, height, target)
    return graph.add("Transpose", graph.reshape(x, height, target, planes), perm=[2, 0, 1])


def _normalised(graph: _Graph, x: str, manifest: Manifest, exact: bool) -> None:
    """(1, 1 or C, h, w) of grey levels -> `image` (1, C, h, w), as `preprocess.to_tensor` makes it.

    exact   for steps of `GREY_STEP` in OpenVINO, which multiplies by a rounded inverse where it should divide: each is
            looked up
    """
    contract = manifest.input
    mean, std = (np.asarray(each, np.float32).reshape(1, -1, 1, 1) for each in (contract.mean, contract.std))
    if not exact:
        x = graph.add("Sub", graph.add("Div", x, graph.number(255)), graph.const(mean))
        graph.add("Div", x, graph.const(std), output="image")
        return
    levels = np.arange(round(255 / GREY_STEP) + 1, dtype=np.float32) * np.float32(GREY_STEP)
    table = (levels / np.float32(255) - mean) / std  # (1, C, 1, levels)
    first = (np.arange(contract.channels, dtype=np.int32) * len(levels)).reshape(1, -1, 1, 1)
    graph.add("Gather", graph.const(table.ravel()), graph.add("Add", x, graph.const(first)), axis=0, output="image")


def front(manifest: Manifest, size: FrameSize, fused: bool) -> onnx.ModelProto:
    """`frame` -> `image` (1, C, h, w) float32, as `preprocess.to_tensor` makes it.

    fused   for OpenVINO, which fuses weighted rows: these instead of products of blocks, where there are few
    """
    contract, exact = manifest.input, manifest.input.resize == "bilinear-fixed"
    graph, spot, planes = _Graph("front"), place(contract, size.rows, size.columns), 3 if size.colour else 1
    x = graph.reshape("frame", size.rows, size.columns * planes)
    rows = resize_table(contract.resize, size.rows, spot.height)
    x = _resize_rows(graph, x, rows, size.columns * planes, fused, exact)
    columns = resize_table(contract.resize, size.columns, spot.width)
    x = _resize_columns(graph, x, columns, spot.height, planes, fused, exact)
    x = graph.reshape(x, 1, planes, spot.height, spot.width)
    below, right = contract.height - spot.top - spot.height, contract.width - spot.left - spot.width
    kind = np.int32 if exact and fused else np.float32
    x = _pad(graph, x, (1, planes, spot.height, spot.width), 3, spot.left, right, kind)
    x = _pad(graph, x, (1, planes, spot.height, contract.width), 2, spot.top, below, kind)
    _normalised(graph, x, manifest, exact and fused)
    image = (1, contract.channels, contract.height, contract.width)
    return _model(graph, "front", [("frame", TensorProto.UINT8, size.shape)], [("image", TensorProto.FLOAT, image)])


def back(manifest: Manifest, size: FrameSize, extras: Sequence[str], fused: bool) -> onnx.ModelProto:
    """`logits` -> `mask` and the extras, as `postprocess.to_mask` makes it; `fused` as in `front`."""
    contract, classes = manifest.input, len(manifest.classes)
    graph, spot, whole = _Graph("back"), place(contract, size.rows, size.columns), (size.rows, size.columns)
    x = graph.slice("logits", spot.top, spot.top + spot.height, 2)
    x = graph.slice(x, spot.left, spot.left + spot.width, 3)
    x = graph.reshape(x, classes, spot.height, spot.width)
    shares, rows, columns = "", *nearest_grid((spot.height, spot.width), whole, manifest.enlarge)
    if manifest.enlarge == "bilinear":
        x = graph.add("Transpose", _softmax(graph, x, classes, fused), perm=[1, 0, 2])
        x = graph.reshape(x, spot.height, classes * spot.width)
        if size.rows != spot.height:
            x = _resize_rows(graph, x, resize_table("bilinear", spot.height, size.rows), classes * spot.width, fused)
        x = graph.reshape(x, size.rows * classes, spot.width)
        x = _resize_columns(graph, x, resize_table("bilinear", spot.width, size.columns), size.rows * classes, 1, fused)
        x = graph.add("Transpose", graph.reshape(x, size.rows, classes, size.columns), perm=[1, 0, 2])
        shares = x
    best = ""
    if classes == 2:  # a comparison is argmax, and cheaper; and so is the larger of two shares
        pair = graph.gather(x, np.array(1), 0), graph.gather(x, np.array(0), 0)
        if "confidence" in extras and not shares:
            best = graph.add("Sigmoid", graph.add("Abs", graph.add("Sub", *pair)))
        x = graph.add("Greater", *pair)
    else:
        if "confidence" in extras and not shares:
            shares = _softmax(graph, x, classes, fused)
        x = graph.add("ArgMax", x, axis=0, keepdims=0)
    maps = {"mask": graph.cast(x, TensorProto.UINT8)}
    if "confidence" in extras:
        best = best or graph.add("ReduceMax", shares, graph.const(np.array([0])), keepdims=0)
        scaled = graph.add("Add", graph.add("Mul", best, graph.number(255)), graph.number(0.5))
        maps["confidence"] = graph.cast(graph.add("Floor", scaled), TensorProto.UINT8)
    if manifest.enlarge == "bilinear":
        for name, each in maps.items():
            graph.add("Identity", each, output=name)
    else:
        x = graph.add("Concat", *maps.values(), axis=0) if len(maps) > 1 else maps["mask"]
        if fused:
            x = graph.gather(x, columns, 1)
        else:  # as rows, which are copied whole: ONNX Runtime fetches single bytes with a call each
            x = graph.gather(graph.add("Transpose", x, perm=[1, 0]), columns, 0)
            x = graph.add("Transpose", x, perm=[1, 0])
        for i, name in enumerate(maps):
            graph.gather(x, rows + i * spot.height, 0, output=name)
    outputs: list[tuple[str, int, Sequence[int]]] = [(name, TensorProto.UINT8, whole) for name in maps]
    if "colors" in extras:
        palette = np.array([info.color for info in manifest.classes], np.uint8)
        graph.add("Gather", graph.const(palette), graph.cast("mask", TensorProto.INT32), axis=0, output="colors")
        outputs.append(("colors", TensorProto.UINT8, (*whole, 3)))
    logits = (1, classes, contract.height, contract.width)
    return _model(graph, "back", [("logits", TensorProto.FLOAT, logits)], outputs)


def write(
    folder: Path, manifest: Manifest, artifact: Artifact, size: FrameSize, extras: Sequence[str]
) -> tuple[str, ...]:
    """Writes the artifact's graph for frames of this size; returns its files below `folder`."""
    first = artifact.files[0].path
    target = f"{first.rpartition('.')[0]}-{str(size).replace(':', '-')}.{first.rpartition('.')[2]}"
    files = [folder / file.path for file in artifact.files]
    if artifact.runtime == "onnxruntime":
        onnx_baked(files[0], manifest, size, extras, folder / target)
        return (target,)
    openvino_baked(files, manifest, size, extras, folder / target)
    return target, artifact.files[1].path


def agreement(
    folder: Path,
    manifest: Manifest,
    artifact: Artifact,
    files: Sequence[str],
    size: FrameSize,
    extras: Sequence[str],
    frames: int = 4,
) -> tuple[float, float]:
    """The share of pixels in which the graph's masks of phantoms are those of the artifact behind `preprocess`, and its
    extras what its own logits ask for: the mean of `frames`; and the largest difference between their logits.
    """
    network = _opened(folder, manifest, artifact, [file.path for file in artifact.files])
    whole = _opened(folder, manifest, artifact, files)
    equal, differences = [], []
    for case in parity.shaped_cases(size.shape, frames):
        (raw,) = network(preprocess.to_tensor(case.frame, manifest.input))
        maps, mask, _ = postprocess.finish(raw, manifest, size.rows, size.columns)
        made = dict(zip(("logits", "mask", *extras), whole(case.frame), strict=True))
        logits, found, placement = postprocess.check_baked(made, manifest, size.rows, size.columns)
        right = postprocess.rightly_made(made, logits, placement, manifest.enlarge, manifest.classes)
        equal.append(float(((mask == found) & right).mean()))
        differences.append(float(np.abs(maps - logits).max()))
    return sum(equal) / frames, max(differences)


def _opened(
    folder: Path, manifest: Manifest, artifact: Artifact, files: Sequence[str]
) -> Callable[[NDArray[Any]], list[NDArray[Any]]]:
    """A model as a function. fp16 in ONNX Runtime's own emulation, as both sides of the comparison are."""
    paths = tuple(str(folder / file) for file in files)
    if artifact.precision != "fp16":
        kind = cast("type[FrameBackend]", backend_class(artifact.runtime))
        return kind(paths, manifest, "CPU", artifact.precision, 1, None, artifact.rest).run
    session = onnx_file.session(onnx.load(paths[0]))
    return lambda x: list(session.run(None, {session.get_inputs()[0].name: x}))


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


def openvino_baked(
    files: Sequence[Path], manifest: Manifest, size: FrameSize, extras: Sequence[str], target: Path
) -> None:
    """Writes an IR with both ends to `target`; its constants lie in the network's own `.bin`, which gets the new ones.

    files   the network's `.xml` and `.bin`
    """
    core = openvino.Core()
    model = core.read_model(*files)
    first, last = (
        core.read_model(end.SerializeToString())
        for end in (front(manifest, size, True), back(manifest, size, extras, True))
    )
    manager = Manager()
    manager.register_pass(ConstantFolding())
    for end in (first, last):
        manager.run_passes(end)
    (logits,) = model.get_results()
    for after, before in ((model, first.get_results()[0].input_value(0)), (last, logits.input_value(0))):
        (taken,) = after.get_parameters()
        for each in taken.output(0).get_target_inputs():
            each.replace_source_output(before)
    whole = openvino.Model([logits, *last.get_results()], first.get_parameters(), "baked")
    openvino_ir.number_unnamed(whole)
    openvino.save_model(whole, target, compress_to_fp16=False)
    tree = ElementTree.parse(target)
    for layer in tree.getroot().iter("layer"):
        if layer.get("name", "").startswith(ADDED) or layer.get("name") == "image":  # the last of the front
            openvino_ir.mark(layer)  # the frame's values do not fit into bf16
    own = target.with_suffix(".bin")
    _share_constants(tree, own.read_bytes(), *files)
    own.unlink()
    tree.write(target, encoding="utf-8", xml_declaration=True)


def _share_constants(tree: Any, content: bytes, xml: Path, weights: Path) -> None:
    """Lets the IR's constants, whose bytes are in `content`, refer to `weights`; what is not there is appended."""
    held = weights.read_bytes()
    known = {held[start:end]: start for start, end in map(_place, _constants(ElementTree.parse(xml)))}
    with weights.open("ab") as file:
        for data in _constants(tree):
            start, end = _place(data)
            piece = content[start:end]
            if piece not in known:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                known[piece] = file.tell()
                file.write(piece)
            data.set("offset", str(known[piece]))


def _constants(tree: Any) -> list[ElementTree.Element]:
    found = [layer.find("data") for layer in tree.getroot().iter("layer") if layer.get("type") == "Const"]
    return [data for data in found if data is not None]


def _place(data: ElementTree.Element) -> tuple[int, int]:
    start = int(data.get("offset", ""))
    return start, start + int(data.get("size", ""))
