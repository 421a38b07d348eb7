"""What a model file may hold, seen before a runtime parses it: one graph of standard operators that asks for no other
file. Standard library only.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from xml.parsers import expat

from msa2net.errors import BundleError

Data = mmap.mmap | bytes
DOMAINS = ("", "ai.onnx")  # of ONNX's own operators
_OPSET = re.compile(r"opset[0-9]{1,2}")  # OpenVINO's own operators
_ADVICE = "Do not use this bundle: export the model again."

# ONNX's messages by name: their fields that are messages in turn, and those that are looked at (see onnx.proto).
_INSIDE = {
    "Model": {7: "Graph", 8: "Opset", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute", 7: "domain"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "external", 14: "location"},
    "Opset": {1: "domain"},
}
_MOST_DEPTH = 16  # of graphs in attributes of nodes


def check(name: str, data: Data) -> None:
    """Raises BundleError, naming the file and what is in it, for an ONNX file or an IR that a bundle may not hold."""
    if name.endswith(".onnx"):
        try:
            _check_onnx(name, data, "Model", 0, len(data), 0)
        except ValueError as error:
            raise BundleError(name, f"is {error}", "expected one", _ADVICE) from error
    elif name.endswith(".xml"):
        _check_ir(name, bytes(data))


def _check_onnx(name: str, data: Data, kind: str, start: int, end: int, depth: int) -> None:
    if depth > _MOST_DEPTH:
        raise BundleError(name, "has graphs deep in each other", f"expected at most {_MOST_DEPTH}", _ADVICE)
    inside = _INSIDE[kind]
    for field, _, value, stop in fields(data, start, end):
        found = inside.get(field)
        if found in ("external", "location"):
            raise BundleError(name, "has weights outside its file", "expected them inside", _ADVICE)
        if found == "Function":
            raise BundleError(name, "defines functions", "expected standard operators alone", _ADVICE)
        if found == "domain":
            domain = bytes(data[value:stop]).decode("utf-8", "replace")
            if domain not in DOMAINS:
                shown = ascii(domain[:40])
                raise BundleError(name, f"has operators of the domain {shown}", "expected standard ones", _ADVICE)
        elif found:
            _check_onnx(name, data, found, value, stop, depth + (found == "Graph"))


def _check_ir(name: str, data: bytes) -> None:
    def refuse(*_: object) -> None:
        raise BundleError(name, "declares a document type or an entity", "expected a plain IR", _ADVICE)

    def element(tag: str, attributes: dict[str, str]) -> None:
        if any(":" in each or each == "xmlns" for each in (tag, *attributes)):
            raise BundleError(name, "uses XML namespaces", "expected a plain IR", _ADVICE)
        if tag == "layer" and not _OPSET.fullmatch(attributes.get("version", "")):
            shown = ascii(attributes.get("version", "")[:40])
            raise BundleError(name, f"has a layer of {shown}", "expected OpenVINO's own operators", _ADVICE)
        if tag == "data" and "path" in attributes:
            raise BundleError(name, "asks for another file", "expected its weights in its .bin", _ADVICE)

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.ProcessingInstructionHandler = refuse
    parser.StartElementHandler = element
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise BundleError(name, f"is no XML ({error})", "expected an IR", _ADVICE) from error


# Protocol buffers ---------------------------------------------------------------------------------------------------


def fields(data: Data, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each field of a message: its number, its start, the start of its value, its end. Raises ValueError."""
    while position < end:
        start = position
        tag, value = _read_varint(data, position)
        kind = tag & 7
        if kind == 2:
            length, value = _read_varint(data, value)
            position = value + length
        elif kind == 0:
            position = _read_varint(data, value)[1]
        else:
            position = value + (8 if kind == 1 else 4)
        if kind not in (0, 1, 2, 5) or position > end:
            raise ValueError("not an ONNX model")
        yield tag >> 3, start, value, position


def _read_varint(data: Data, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64 and position < len(data):
        byte = data[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position
    raise ValueError("not an ONNX model")


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(field: int, content: bytes) -> bytes:
    """A field that holds bytes or a message."""
    return varint(field << 3 | 2) + varint(len(content)) + content
