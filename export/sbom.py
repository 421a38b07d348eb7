"""What a bundle is made of: `sbom.cdx.json`, a software bill of materials in CycloneDX 1.6, and `SOUP.md`.

SOUP.md holds the facts that IEC 62304 asks of software of unknown provenance: title, manufacturer and version (8.1.2),
what it is for and what it needs (5.3.3, 5.3.4), and where its anomalies are published (7.1.3). Neither file holds a
time or a path: the same model and versions give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from packaging.requirements import Requirement

from msa2net.export.parity import Case
from msa2net.runtimes.bundle import digest_of_path, files_below

SBOM, SOUP = "sbom.cdx.json", "SOUP.md"
OURS = "msa2net-edge"
# What an artifact of each runtime is made and judged with, and what runs it on the device, beside numpy and Pillow.
_TOOLS = {
    "onnxruntime": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "openvino": ("torch", "onnx", "onnxscript", "openvino", "nncf"),
    "pytorch": ("torch", "safetensors"),
    "tensorrt": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "tensorrt-rtx": ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt-rtx"),
    "torch-tensorrt": ("torch", "safetensors"),
}
_RUNS_ON = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "pytorch": ("torch", "safetensors"),
    "tensorrt": ("tensorrt", "cuda-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx", "cuda-bindings"),
    "torch-tensorrt": ("torch", "torch-tensorrt", "safetensors"),
}
_PURPOSE = {
    OURS: "checks the bundle, frames to tensors, logits to masks",
    "numpy": "arrays; resizing as matrix products",
    "pillow": "decodes PNG, JPEG and TIFF; not used for frames that come as arrays",
    "onnxruntime": "computes the network's logits",
    "openvino": "computes the network's logits",
    "tensorrt": "builds the engine, computes the network's logits",
    "tensorrt-rtx": "computes the network's logits",
    "torch-tensorrt": "compiles the network, computes its logits",
    "torch": "computes the network's logits",
    "safetensors": "reads the weights",
    "cuda-bindings": "memory, streams and graphs of the GPU",
}
# Where known faults are published, of those whose packages do not tell.
_ANOMALIES = {
    "onnxruntime": "https://github.com/microsoft/onnxruntime/issues",
    "openvino": "https://github.com/openvinotoolkit/openvino/issues",
    "protobuf": "https://github.com/protocolbuffers/protobuf/issues",
}
_PYTHON = "CPython"
_PARTS = ("core", "export", "runtimes")  # of this package: what makes and reads a bundle
_NEEDS = {
    "int8": "a CPU with AVX512-VNNI, AVX-VNNI or Arm's dot products",
    "bf16": "a CPU with bf16",
    "fp16": "an Arm CPU with FEAT_FP16, or an NVIDIA GPU",
    "tensorrt": "an NVIDIA GPU and its driver; the engine is built on the device",
    "tensorrt-rtx": "an NVIDIA GPU of compute capability {} and its driver",
    "torch-tensorrt": "an NVIDIA GPU and its driver; the engine is built on the device",
}


def digest_of_frames(cases: Iterable[Case]) -> str:
    """SHA-256 over the sorted SHA-256 of each frame's type, shape and pixels: of what was seen, not of its names."""
    digests = []
    for case in cases:
        frame = np.ascontiguousarray(case.frame)
        digest = hashlib.sha256(f"{frame.dtype.str} {frame.shape}".encode())
        digest.update(frame.data)
        digests.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def write(
    folder: Path,
    document: dict[str, Any],
    checkpoints: Mapping[str, str],
    data: Mapping[str, tuple[str, Sequence[Case]]],
) -> None:
    """Writes both files into a bundle that is complete but for them and its sums.

    document      its manifest
    checkpoints   SHA-256 by what they are ("checkpoint", "fine-tuned checkpoint")
    data          by what it was for ("calibration", "accuracy check"): kind, and the images that were used
    """
    runtimes = list(dict.fromkeys(entry["runtime"] for entry in document["artifacts"]))
    on_device = _closure([OURS, "numpy", "pillow", *(name for each in runtimes for name in _RUNS_ON[each])])
    tools = dict.fromkeys([OURS, "numpy", *(name for each in runtimes for name in _TOOLS[each])])
    libraries = {name: _library(name) for name in {**on_device, **tools}}
    bill = _bill(folder, document, checkpoints, data, on_device, list(tools), libraries)
    (folder / SBOM).write_text(json.dumps(bill, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / SOUP).write_text(_page(document, on_device, libraries), encoding="utf-8")


def _bill(
    folder: Path,
    document: dict[str, Any],
    checkpoints: Mapping[str, str],
    data: Mapping[str, tuple[str, Sequence[Case]]],
    on_device: dict[str, list[str]],
    tools: Sequence[str],
    libraries: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    sets: list[dict[str, Any]] = [
        {
            "type": "data",
            "bom-ref": f"data:{purpose}",
            "name": f"{kind}, for {purpose}",
            "description": f"{len(cases)} images; hashed: the sorted SHA-256 of each one's type, shape and pixels.",
            "hashes": _sha256(digest_of_frames(cases)),
        }
        for purpose, (kind, cases) in data.items()
    ]
    files = []
    for path in files_below(folder):
        digest = digest_of_path(folder / path)
        files.append({"type": "file", "bom-ref": f"file:{path}", "name": path, "hashes": _sha256(digest)})
    model_needs = [_PYTHON, f"library:{OURS}", *(f"file:{each['name']}" for each in files)]
    python = {"type": "platform", "bom-ref": _PYTHON, "name": _PYTHON, "version": platform.python_version()}
    bill: dict[str, Any] = {
        "version": 1,
        "metadata": {
            "tools": {"components": [libraries[name] | {"bom-ref": f"tool:{name}"} for name in tools]},
            "component": _model(document, checkpoints, [each["bom-ref"] for each in sets]),
        },
        "components": [*sets, *files, python, *(libraries[name] for name in on_device)],
        "dependencies": [
            {"ref": "model", "dependsOn": model_needs},
            *(
                {"ref": f"library:{name}", "dependsOn": [f"library:{other}" for other in needs]}
                for name, needs in on_device.items()
            ),
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(bill, sort_keys=True))
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": serial.urn} | bill


def _model(document: dict[str, Any], checkpoints: Mapping[str, str], sets: list[str]) -> dict[str, Any]:
    model, contract = document["model"], document["input"]
    judged = [entry for entry in document["artifacts"] if entry["parity"].get("ratio_bound") is not None]
    size = f"{contract['height']} x {contract['width']}"
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": model["name"],
        "version": model["version"],
        "pedigree": {
            "ancestors": [
                {"type": "machine-learning-model", "name": f"{what} of {model['name']}", "hashes": _sha256(digest)}
                for what, digest in checkpoints.items()
            ]
        },
        "modelCard": {
            "modelParameters": {
                "task": "semantic segmentation",
                "architectureFamily": "MSA2Net",
                "modelArchitecture": f"MSA2Net {model['variant']}",
                "datasets": [{"ref": ref} for ref in sets],
                "inputs": [
                    {"format": f"float32 (1, {contract['channels']}, {size}), from uint8, uint16 or float32 frames"}
                ],
                "outputs": [{"format": f"uint8 mask of the frame's size, {len(document['classes'])} classes"}],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {
                        "type": "mean Dice over that of the fp32 reference",
                        "value": str(entry["parity"]["ratio"]),
                        "slice": f"{entry['runtime']} {entry['precision']}",
                        "confidenceInterval": {"lowerBound": str(entry["parity"]["ratio_bound"])},
                    }
                    for entry in judged
                ]
            },
            "considerations": {"technicalLimitations": [model["notice"]]},
        },
    }


def _library(name: str) -> dict[str, Any]:
    """A Python package as a component, with what its own metadata says."""
    found = _distribution(name)
    component: dict[str, Any] = {"type": "library", "bom-ref": f"library:{name}", "name": name}
    if found is None:
        return component | {"purl": f"pkg:pypi/{name}", "description": "Not installed where the bundle was exported."}
    component["version"] = found.version
    component["purl"] = f"pkg:pypi/{name}@{quote(found.version)}"
    if maker := _maker(found):
        component["supplier"] = {"name": maker}
    if licence := _licence(found):
        component["licenses"] = licence
    if digest := _digest(found):
        component["properties"] = [{"name": f"{OURS}:sha256-of-installed-files", "value": digest}]
    urls = {"issue-tracker": _anomalies(found) or _ANOMALIES.get(name), "website": _urls(found).get("homepage")}
    component["externalReferences"] = [{"type": kind, "url": url} for kind, url in urls.items() if url]
    return component


def _closure(names: Iterable[str]) -> dict[str, list[str]]:
    """Each package, and what it needs, with what is needed in turn, as far as it is installed here."""
    found: dict[str, list[str]] = {}
    names = list(dict.fromkeys(names))
    found[OURS], open_ = names[1:], names[1:]
    while open_:
        name = open_.pop(0)
        if name in found:
            continue
        package = _distribution(name)
        needs = [Requirement(each) for each in (package.requires if package else None) or []]
        wanted = {_normal(each.name) for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})}
        found[name] = sorted(each for each in wanted if _distribution(each))
        open_ += found[name]
    return found


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _field(package: Distribution, key: str) -> str:
    return str((package.metadata.get_all(key) or [""])[0])


def _maker(package: Distribution) -> str:
    for key in ("Author", "Author-email", "Maintainer", "Maintainer-email"):
        text = re.sub(r"\s*<[^>]*>|\S+@\S+", "", _field(package, key)).replace('"', "")
        if text.strip(" ,"):
            return " ".join(text.split())
    return ""


def _licence(package: Distribution) -> list[dict[str, Any]]:
    if expression := _field(package, "License-Expression"):
        return [{"expression": expression}]
    text = _field(package, "License")
    if text and len(text) <= 60 and "\n" not in text:
        return [{"license": {"name": text}}]
    kinds = [
        each.split(" :: ")[-1] for each in package.metadata.get_all("Classifier") or [] if each.startswith("License")
    ]
    return [{"license": {"name": kind}} for kind in kinds]


def _urls(package: Distribution) -> dict[str, str]:
    """The addresses in a package's metadata, by label in lower case."""
    pairs = [each.partition(",") for each in package.metadata.get_all("Project-URL") or []]
    found = {label.strip().lower(): url.strip() for label, _, url in pairs}
    if home := _field(package, "Home-page"):
        found.setdefault("homepage", home)
    return found


def _anomalies(package: Distribution) -> str | None:
    """Where a package's known faults are published."""
    urls = _urls(package)
    for label in ("tracker", "issue tracker", "issues", "bug tracker", "bug reports"):
        if label in urls:
            return urls[label]
    for url in urls.values():
        if code := re.match(r"https?://(?:www\.)?github\.com/[^/]+/[^/#]+", url):
            return code[0].removesuffix(".git") + "/issues"
    return None


def _digest(package: Distribution) -> str | None:
    """SHA-256 over the digests of a package's files, as the installer recorded them, but for those it wrote itself.

    Of this package, which may be a checkout, over the sources themselves.
    """
    if package.name == OURS:
        root = Path(__file__).parents[1]
        sources = [*root.glob("*.py"), *(path for part in _PARTS for path in (root / part).rglob("*.py"))]
        digest = hashlib.sha256()
        for path in sorted(sources):
            digest.update(
                f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
            )
        return digest.hexdigest()
    listed = [(file.as_posix(), file.hash.value) for file in package.files or [] if file.hash]
    lines = [
        f"{path},{digest}\n"
        for path, digest in sorted(listed)
        if not path.startswith("..") and not path.endswith(("/INSTALLER", "/REQUESTED", "/RECORD", "/direct_url.json"))
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def _sha256(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


# SOUP.md --------------------------------------------------------------------------------------------------------


def _page(document: dict[str, Any], on_device: dict[str, list[str]], libraries: Mapping[str, dict[str, Any]]) -> str:
    model = document["model"]
    items = [
        (
            "CPython",
            "Python Software Foundation",
            platform.python_version(),
            "PSF-2.0",
            "runs what follows; 3.11 to 3.13",
            "",
            "https://github.com/python/cpython/issues",
        )
    ]
    versions = {}
    for name, needs in on_device.items():
        about = libraries[name]
        urls = {each["type"]: each["url"] for each in about.get("externalReferences", [])}
        needed_by = ", ".join(other for other in on_device if name in on_device[other])
        versions[name] = about.get("version", "to be fixed on the device")
        items.append(
            (
                name,
                about.get("supplier", {}).get("name", "not stated"),
                versions[name],
                ", ".join(each.get("expression") or each["license"]["name"] for each in about.get("licenses", []))
                or "not stated",
                _PURPOSE[name] if name in (OURS, *on_device[OURS]) else f"needed by {needed_by}",
                ", ".join(needs),
                urls.get("issue-tracker", "not stated"),
            )
        )
    forms = []
    for entry in document["artifacts"]:
        runtime, tolerance, recipe = entry["runtime"], entry["tolerance"], entry.get("recipe")
        device = _NEEDS.get(runtime) or _NEEDS.get(entry["precision"], "a CPU that the runtime supports")
        library = _RUNS_ON[runtime][0]
        version = "{} to below {}".format(*recipe["version"]) if recipe else versions[library]
        forms.append(
            (
                f"{runtime} {entry['precision']}",
                device.format(" or ".join(recipe["compute_capabilities"] if recipe else ())),
                f"{library} {version}",
                entry["parity"]["verdict"],
                f"logits within {tolerance['logit']:.3g}, {tolerance['pixels']:.2%} of the pixels",
            )
        )
    head = ("title", "manufacturer", "designator", "licence", "for", "needs", "anomalies are published at")
    return f"""# Software of unknown provenance: {model["name"]} {model["version"]}

What a device that runs this bundle holds besides its maker's own software, as far as can be told where the bundle was
exported: the versions are those that judged the model there. On the device, compare them with what is installed.
`{SBOM}` says the same for machines, with digests.

> {model["notice"]}

## Items

{_table(head, items)}

## What each form of the model needs, and what it must do

The requirement is the last column, on the frames in `golden/`: `msa2net verify BUNDLE` checks it. Run it after each
installation and each update of a driver or a package.

{_table(("artifact", "needs", "runs on", "verdict", "against the golden frames"), forms)}
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
