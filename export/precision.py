"""Which places of the network lose accuracy in bf16, measured on OpenVINO itself, and how they are kept in fp32.

A place is a block of the network, `decoder_0.layer_lka_1`. It is measured as a whole inside the whole network, with
the fusions that OpenVINO makes of it: the network is compiled with this place alone in bf16, every other node marked
`precise`, and its logits are held against those of fp32. What the marks do not reach (OpenVINO 2026.4 runs a marked
fully connected layer in bf16 all the same) is measured by a compilation with every node marked, and subtracted.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from msa2net.errors import ExportError
from msa2net.runtimes.measure import LESION_PIXELS, dice

LEAST_SHARE = 0.05  # a place is kept in fp32 if it makes at least this share of the squared error
LEAST_DICE = 0.9995  # against the fp32 masks of the scanned frames: more is kept in fp32 until this is met
TOP = 20  # places that the manifest lists
BOUNDARY = 0.05  # the share of pixels, those nearest to a change of class, that the error is taken over
_BLOCK = re.compile(r"backbone\.backbone\.(stem|stages\.\d+\.blocks\.\d+)|(decoder_\d+(?:\.\w+)?)")
_NOT_RUN = ("Const", "Parameter", "Result")
Logits = NDArray[np.float32]


def place_of(node: str) -> str:
    """The block that a node of this name is of; "other" if the name tells none."""
    found = _BLOCK.match(node)
    return (found[1] or found[2]) if found else "other"


def keep(xml: Path, target: Path, places: Collection[str]) -> int:
    """Writes the IR anew with the nodes of some places marked to run in fp32; returns how many there are."""
    tree = ElementTree.parse(xml)
    marked = 0
    for layer in tree.getroot().iter("layer"):
        if layer.get("type") in _NOT_RUN or place_of(layer.get("name", "")) not in places:
            continue
        info = layer.find("rt_info")
        if info is None:
            info = ElementTree.Element("rt_info")
            layer.insert(1 if layer.find("data") is not None else 0, info)
        ElementTree.SubElement(info, "attribute", name="precise", version="0")
        marked += 1
    tree.write(target, encoding="utf-8", xml_declaration=True)
    return marked


def boundary_error(expected: Sequence[Logits], found: Sequence[Logits]) -> float:
    """Root mean square change of the lead of fp32's class over the next, over the pixels where it is smallest.

    Logits (1, K, h, w) of each frame. There alone a change moves the mask: far from it even a large one does not.
    """
    squares: list[float] = []
    for want, got in zip(expected, found, strict=True):
        order = want[0].argsort(0)[-2:]
        lead, changed = (np.subtract(*np.take_along_axis(each[0], order, 0)[::-1]) for each in (want, got))
        near = lead <= np.quantile(lead, BOUNDARY)
        squares.append(float(np.square(changed - lead)[near].mean(dtype=np.float64)))
    return float(np.sqrt(np.mean(squares)))


def mask_dice(expected: Sequence[Logits], found: Sequence[Logits]) -> float:
    """Mean Dice of the masks' foreground classes over the frames in which fp32 finds at least 500 pixels; 1 if none."""
    scores: list[float] = []
    for want, got in zip(expected, found, strict=True):
        reference, mask = (each[0].argmax(0).astype(np.uint8) for each in (want, got))
        labels = [int(label) for label in np.unique(reference) if label]
        if np.count_nonzero(reference) >= LESION_PIXELS:
            scores.append(float(np.mean([dice(mask, reference, label) for label in labels])))
    return float(np.mean(scores)) if scores else 1.0


def scan(
    files: Sequence[Path],
    tensors: Sequence[NDArray[np.float32]],
    tick: Callable[[str], object] = len,
) -> dict[str, Any]:
    """The manifest's `precision_scan` of an OpenVINO IR in bf16; `kept` are the places to keep in fp32.

    None is kept if bf16 as it is reaches `LEAST_DICE`; else those that make `LEAST_SHARE` of the squared error each, if
    that is enough; else all, and of the network only what the marks do not reach stays in bf16: its matrix products.

    files     the `.xml` and its `.bin`
    tensors   a few inputs (1, C, h, w)
    tick      called with the name of each place before it is measured

    `error` and each place's `error` are logits, see `boundary_error`, `share` is of the squared error. A place or step
    that OpenVINO cannot compile has neither. Raises ExportError if that leaves no step that is accurate enough.
    """
    xml, weights = files
    layers = ElementTree.parse(xml).getroot().iter("layer")
    everything = {place_of(layer.get("name", "")) for layer in layers if layer.get("type") not in _NOT_RUN} | {"other"}
    places = sorted(everything - {"other"})
    core = openvino.Core()
    with TemporaryDirectory() as folder:
        marked = Path(folder, "model.xml")

        def logits(precision: openvino.Type, kept: Collection[str]) -> list[Logits]:
            keep(xml, marked, kept)
            config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
            request = core.compile_model(core.read_model(marked, weights), "CPU", config).create_infer_request()
            return [next(iter(request.infer([tensor]).values())).copy() for tensor in tensors]

        tick("fp32")
        expected = logits(openvino.Type.f32, ())
        tick("bf16")
        whole = boundary_error(expected, logits(openvino.Type.bf16, ()))
        base = boundary_error(expected, logits(openvino.Type.bf16, everything))
        rows: list[dict[str, Any]] = []
        for name in places:
            tick(name)
            try:
                alone = boundary_error(expected, logits(openvino.Type.bf16, everything - {name}))
            except RuntimeError:
                rows.append({"place": name, "error": None, "share": None})
                continue
            power = max(0.0, alone**2 - base**2)
            rows.append({"place": name, "error": power**0.5, "share": power / whole**2 if whole else 0.0})
        rows.sort(key=lambda row: -(row["share"] or 0.0))
        worst = [row["place"] for row in rows if (row["share"] or 0.0) >= LEAST_SHARE]
        steps: list[dict[str, Any]] = []
        for kept in ([], worst, [*places, "other"]):
            tick(f"{len(kept)} kept")
            try:
                found = logits(openvino.Type.bf16, kept)
            except RuntimeError:  # some boundaries between marked and unmarked nodes OpenVINO cannot compile
                steps.append({"kept": kept, "dice": None, "error": None})
                continue
            agreement = mask_dice(expected, found)
            steps.append({"kept": kept, "dice": agreement, "error": boundary_error(expected, found)})
            if agreement >= LEAST_DICE:
                break
    if steps[-1]["dice"] is None:
        raise ExportError(
            "openvino bf16",
            f"loses accuracy (Dice {steps[0]['dice']:.4f} of fp32's masks) and cannot be compiled with places in fp32",
            f"expected {LEAST_DICE}",
            "Export fp32 alone.",
        )
    return {
        "frames": len(tensors),
        "error": whole,
        "error_of_unmarkable": base,
        "places": rows[:TOP],
        "steps": [step | {"kept": len(step["kept"])} for step in steps],
        "kept": steps[-1]["kept"],
    }
