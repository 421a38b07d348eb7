"""`export_bundle`: a checkpoint to a bundle, each artifact held against the reference before it gets its name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from msa2net.core.checkpoint import load_model, read_checkpoint, save_checkpoint, used_state
from msa2net.core.config import IMAGE_SIZE, variant_name
from msa2net.core.data import open_for
from msa2net.core.network import MSA2Net
from msa2net.core.phantoms import MIN_SIZE
from msa2net.core.rewrites import chosen, rewritten
from msa2net.errors import CheckpointError, ExportError, Msa2NetError, RuntimeUnavailableError
from msa2net.export import bake as baking
from msa2net.export import calibration, fp16, onnx_file, openvino_ir, parity, precision, quantize, sbom, tensorrt
from msa2net.export.calibration import Tensors
from msa2net.export.writer import check_target, new_bundle
from msa2net.runtimes import postprocess, quality
from msa2net.runtimes.backends import (
    BAKED,
    INT8,
    backend_class,
    candidates,
    cpu_lacks,
    default_threads,
    why_not_precision,
)
from msa2net.runtimes.bundle import (
    BAKED_OUTPUTS,
    ENLARGE_OF,
    ENLARGE_RULES,
    FITS,
    HARDWARE_COMPATIBILITY,
    MANIFEST,
    MOST_BAKED,
    MOST_IMAGES,
    RESIZE_RULES,
    SCHEMA_VERSION,
    TARGETS,
    VERDICTS,
    Manifest,
    digest_of_path,
    parse_manifest,
    parse_speed,
)
from msa2net.runtimes.cache import processor_name
from msa2net.runtimes.measure import LEVELS, milliseconds, ratio
from msa2net.runtimes.preprocess import place

NOTICE = "Not a medical device. Validate before any clinical use."
# Overlay colours of classes 1, 2, …, repeated if there are more; the background is black.
_COLORS = (
    (230, 60, 60),
    (70, 160, 250),
    (80, 200, 120),
    (245, 190, 60),
    (180, 100, 230),
    (60, 210, 210),
    (240, 130, 190),
)
_FILES = {
    "onnxruntime": ("onnx/model.onnx",),
    "openvino": ("openvino/model.xml", "openvino/model.bin"),
    "pytorch": ("torch/weights.safetensors",),
    "tensorrt": ("onnx/model.onnx",),  # ONNX Runtime's
    "tensorrt-rtx": ("tensorrt-rtx/model.engine",),
    "torch-tensorrt": ("torch/weights.safetensors",),  # PyTorch's
}
_OF_BATCHES = ("tensorrt/model.onnx",)  # in place of TensorRT's, if it is to take several images
# The precisions that each runtime's artifacts may have.
PRECISIONS_OF = {
    "onnxruntime": ("fp32", "fp16", *INT8),
    "openvino": ("fp32", "bf16", *INT8),
    "pytorch": ("fp32",),
    "tensorrt": ("fp32", "fp16", "int8"),
    "tensorrt-rtx": ("fp32", "fp16", "int8"),
    "torch-tensorrt": ("fp32",),
}
_LOWERED = {
    "openvino": "openvino/model-{}.xml",
    "onnxruntime": "onnx/model-{}.onnx",
    "tensorrt": "tensorrt/model-{}.onnx",
}
# At least and below: TensorRT as in JetPack 6.2, up to those whose networks are strongly typed.
_VERSIONS = {"tensorrt": ["10.3", "12"], "torch-tensorrt": ["2.14", "2.15"]}
_WORKSPACE = 1 << 30  # bytes of the GPU's memory
_SOURCE = {"tensorrt-rtx": "tensorrt"}  # whose ONNX a runtime's engine is built from
_JUDGED_AS = {"tensorrt": "onnxruntime", "torch-tensorrt": "pytorch"}
_GOLDEN_CASES, _SCAN_CASES = 2, 8
_TUNED = "fine-tuned"  # folder of the models that int8 is made from, while it is
_LEAST_EQUAL = 0.999  # of the pixels: Dice alone may be "high" with more of them changed, as many one way as the other
_MOST_LOST = LEVELS["high"][1] * 2 / 3  # points of the worst image: other images than the judged ones lose more
# Of a baked graph's pixels, those of the artifact behind `preprocess`: all, by the rule "bilinear-fixed". By another,
# sums in another order change the image's last bits, and of some hundred thousand values a lower precision than fp32
# rounds a few the other way.
LEAST_EQUAL_BAKED, _LEAST_EQUAL_ROUNDED = 0.9999, 0.9995
_ROUNDS, _PAUSE = 15, 0.02  # of a race, and the seconds before each call in which threads come to rest
_RANKED_ON = 4  # of the calibration images: there are five times as many places in int8 as in bf16


def export_bundle(
    checkpoint: str | Path,
    output: str | Path,
    *,
    runtimes: Sequence[str] = candidates("CPU"),
    precisions: Sequence[str] = ("fp32",),
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels: int = 3,
    fit: str = "stretch",
    enlarge: str | None = None,
    name: str | None = None,
    model_version: str | None = None,
    data: str | None = None,
    calibrate: str | None = None,
    keep: Sequence[str] = (),
    fine_tuned: str | Path | None = None,
    report: str | Path | None = None,
    allow_accuracy_loss: bool = False,
    allow_slower: bool = False,
    resize: str | None = None,
    batch: int = 1,
    hardware_compatibility: str = "none",
    targets: Sequence[str] = TARGETS,
    bake: Sequence[str] = (),
    bake_outputs: Sequence[str] = (),
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Writes the bundle `output` from a `.safetensors` or `.pth` checkpoint and returns its path.

    precisions   of the artifacts: "fp32"; "bf16" for OpenVINO, on a CPU that can run it: it is judged on it; "fp16" for
                ONNX Runtime, judged with every tensor rounded to fp16; "int8" for CPUs with VNNI or Arm's dot products,
                and "int8-portable" for all. What loses accuracy stays in fp32, or in bf16 beside int8 where that pays.
                For TensorRT "fp16", and "int8" with the rest in fp16, both judged without a GPU.
    classes, mean, std, name, model_version   if None, what the checkpoint's metadata says, else "class 0", …; the
                released pipeline's 0.5 and 0.5 (of pixels scaled to [0, 1]); the file's stem; "1"
    channels    3, or 1 for a network that is fed grey frames
    fit         "stretch", or "letterbox" to keep the frame's aspect
    enlarge     "nearest", "aligned" (nearest on the spline's grid), "bilinear" to enlarge probabilities instead of the
                mask; None: "aligned" with "spline", else "nearest"
    resize      "bilinear", "bilinear-fixed" (the same in fixed-point numbers: the same bits in every graph), "spline"
                (the released pipeline's); None: what the metadata says, and "bilinear-fixed" for "bilinear" or nothing
    data        images for the accuracy check as "KIND:PATH", see `msa2net.core.data`; if they have labels, Dice is
                against these, else against the fp32 mask. Phantoms, without labels, if None. None goes into the bundle.
    calibrate   images that int8's ranges are taken from, as `data`; phantoms if None. Not those of `data`: what is
                judged on its own calibration looks better than it is.
    keep        places that stay out of int8 whatever the ranking says: blocks or layers, such as "stages.0.blocks.0"
    fine_tuned  checkpoint whose weights the int8 artifacts hold, from `core.train --int8 --start checkpoint`; all are
                judged against the fp32 of `checkpoint`, which the others hold
    report      folder for every image's figures and the worst image of each artifact, drawn; written on refusal, too
    allow_accuracy_loss   write artifacts that fail the check; they say so wherever they are used
    allow_slower  ship int8 although it is not faster on this machine than a higher precision, for a device where it is
    batch       images that TensorRT's engine takes at once at most; 1: its shapes are fixed
    hardware_compatibility  of an engine that TensorRT builds, one of `bundle.HARDWARE_COMPATIBILITY`
    targets     compute capabilities that TensorRT for RTX's engines are for, such as "8.6"
    bake        sizes of a camera's frames, as "1920x1080" or "1920x1080:grey" (columns x rows): ONNX Runtime's and
                OpenVINO's artifacts come besides as graphs from such a frame to its mask, see `export.bake`
    bake_outputs  what these graphs give beside the mask and the logits: "confidence", "colors"
    force       replace an existing bundle

    Raises CheckpointError, and ExportError (target exists, a class list of the wrong length, parity missed with the
    figures), and RuntimeUnavailableError for a runtime that is not installed, and DataError: then nothing is written.
    """
    output = Path(output)
    check_target(output.absolute(), force)
    runtimes = tuple(dict.fromkeys(runtimes))  # one named twice is exported once
    if not runtimes or not set(runtimes) <= set(_FILES):
        named = ", ".join(map(repr, runtimes)) or "none"
        raise ExportError("runtimes", f"got {named}", f"expected some of {', '.join(_FILES)}", "Check the spelling.")
    wanted = _artifacts(runtimes, precisions)
    made = tuple(dict.fromkeys((_SOURCE.get(runtime, runtime), named) for runtime, named in wanted))
    for option, value, choices in (
        ("channels", channels, (1, 3)),
        ("fit", fit, FITS),
        ("resize", resize, (*RESIZE_RULES, None)),
        ("enlarge", enlarge, (*ENLARGE_RULES, None)),
        ("hardware_compatibility", hardware_compatibility, HARDWARE_COMPATIBILITY),
    ):
        if value not in choices:
            raise ExportError(option, f"got {value!r}", f"expected one of {', '.join(map(str, choices))}", "Pick one.")
    if not 1 <= batch <= MOST_IMAGES:
        raise ExportError("batch", f"got {batch}", f"expected 1 to {MOST_IMAGES}", "One image is the default.")
    for runtime in runtimes:
        if runtime in candidates("CPU"):
            backend_class(runtime)
    if "tensorrt-rtx" in runtimes:
        tensorrt.require(targets)
    sizes = _frame_sizes(bake, bake_outputs, runtimes, channels)
    recipe = {
        "batch": batch,
        "workspace": _WORKSPACE,
        "hardware_compatibility": hardware_compatibility,
        "compute_capabilities": [],
    }
    read = read_checkpoint(checkpoint)
    checkpoints = {"checkpoint": digest_of_path(read.path)}
    model = load_model(read)
    int8 = any(precision in INT8 for _, precision in wanted)
    tuned = _fine_tuned(fine_tuned, model, int8)
    if fine_tuned is not None:
        checkpoints["fine-tuned checkpoint"] = digest_of_path(Path(fine_tuned))
    said = read.metadata
    trained = said.get("resize", "bilinear")
    resize = resize or ("bilinear-fixed" if trained == "bilinear" else trained)
    if resize not in RESIZE_RULES:
        raise CheckpointError(
            read.path,
            f"its metadata 'resize' is {resize[:40]!r}",
            f"expected one of {', '.join(RESIZE_RULES)}",
            "Give --resize.",
        )
    names = [each.strip() for each in classes or read.listed("classes", []) or _class_names(model.config.num_classes)]
    if len(names) != model.config.num_classes or len(set(names)) != len(names):
        raise ExportError(
            "classes", f"got {', '.join(names)}", f"expected {model.config.num_classes} different names", "Name all."
        )
    contract = {
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "channels": channels,
        "mean": _per_channel("mean", mean or read.listed("mean", [0.5]), channels),
        "std": _positive(_per_channel("std", std or read.listed("std", [0.5]), channels)),
        "resize": resize,
        "fit": fit,
    }
    document: dict[str, Any] = {
        "schema_version": "{}.{}".format(*SCHEMA_VERSION),
        "writer": f"msa2net-edge {version('msa2net-edge')}",
        "model": {
            "name": name or said.get("model") or read.path.stem,
            "version": model_version or said.get("version", "1"),
            "variant": variant_name(model.config),
            "config": model.config.to_json(),
            "notice": said.get("notice", NOTICE),
        },
        "classes": [{"name": names[0], "color": [0, 0, 0]}]
        + [{"name": each, "color": list(_COLORS[i % len(_COLORS)])} for i, each in enumerate(names[1:])],
        "input": contract,
        "output": {"enlarge": enlarge or ENLARGE_OF[resize]},
        "artifacts": [],
        "golden": [],
    }
    calibrated_on = calibration.frames(calibrate, names, channels) if int8 else []
    cases = parity.data_cases(open_for(names, data), len(names)) if data else parity.phantom_cases(grey=channels == 1)
    with (
        _one_thread(),
        new_bundle(output, force=force) as folder,
        tqdm(total=len(runtimes) + (len(wanted) + 1) * len(cases), disable=not progress, desc="export") as bar,
    ):
        try:
            versions = _write_models(model, channels, tuple(dict(made)), folder, batch, bar)
            if tuned is not None:
                of_int8 = tuple(dict.fromkeys(runtime for runtime, precision in made if precision in INT8))
                _write_models(tuned, channels, of_int8, folder / _TUNED, batch, bar)
        except (Msa2NetError, OSError):
            raise
        except Exception as error:  # each tool has its own kinds
            reason = f"the models cannot be written ({type(error).__name__}: {error})"
            raise ExportError(output, reason, "", "Is the disk full, or a tool of another version?") from error
        document["artifacts"] = [_entry(folder, *each, versions[each[0]], recipe) for each in made]
        golden = parity.phantom_cases(grey=channels == 1, count=_GOLDEN_CASES)
        if int8:
            golden.append(parity.saturating_case())
        for size in sizes:
            golden += parity.shaped_cases(size.shape)
        document["golden"] = [
            {key: f"golden/{i}_{key}.npy" for key in ("frame", "logits", "mask")} for i in range(len(golden))
        ]
        manifest = parse_manifest(json.dumps(document).encode())

        bar.set_postfix_str("reference")
        infer = parity.reference(model)
        expected = []
        for case in cases:
            expected.append(parity.run_case(case, manifest, infer))
            bar.update()
        golden_results = [parity.run_case(case, manifest, infer) for case in golden]
        _write_golden(folder, manifest, golden, golden_results)
        if found := _quality(cases, expected, manifest):
            document["quality"] = found
        judge = parity.Judge(folder, cases, expected, golden, golden_results, Path(report) if report else None, bar)
        images = calibration.tensors(parity.sample(cases, _SCAN_CASES), manifest.input)
        inputs = calibration.tensors(calibrated_on, manifest.input)
        if int8:
            bar.set_postfix_str("calibration")
            compared = calibration.tensors(parity.sample(cases, calibration.COMPARED), manifest.input)
            document["calibration"] = calibration.describe(calibrate, inputs, tuned or model, compared)
            document["calibration"]["fine_tuned"] = tuned is not None
        rankings: dict[str, dict[str, Any]] = {}  # of the runtimes, in int8
        for i, entry in enumerate(document["artifacts"]):

            def judged(index: int = i) -> dict[str, Any]:
                manifest = parse_manifest(json.dumps(document).encode())
                return judge(manifest, manifest.artifacts[index])

            if (same := _same(document["artifacts"][:i], entry)) is not None:
                entry |= same
            elif entry["precision"] == "fp32":
                entry |= judged()
            else:
                _lower(folder, entry, inputs if entry["precision"] in INT8 else images, keep, rankings, judged, bar)
            named = f"{entry['runtime']} {entry['precision']}"
            if report and "precision_scan" in entry:
                text = json.dumps(entry["precision_scan"], indent=1) + "\n"
                with parity.reporting(Path(report)):
                    Path(report, f"{named.replace(' ', '-')}-places.json").write_text(text, encoding="utf-8")
            if not allow_accuracy_loss:
                parity.require(named, entry["parity"], entry["precision"])
            entry["parity"] = {"data": _kind(data)} | entry["parity"]
            if entry["precision"] in INT8 and "recipe" not in entry:
                _race(folder, entry, manifest, images[0], judged, bar)
        if int8 and not allow_slower:
            _withhold(document)
        if tuned is not None:
            shutil.rmtree(folder / _TUNED)
        for runtime, named in wanted:
            if runtime in _SOURCE:
                bar.set_postfix_str(f"{runtime} {named}")
                document["artifacts"].append(_engine(folder, document["artifacts"], runtime, named, targets))
        document["artifacts"] = [
            entry for entry in document["artifacts"] if (entry["runtime"], entry["precision"]) in wanted
        ]
        _bake(folder, document, sizes, [each for each in baking.EXTRAS if each in bake_outputs], bar)
        graphs = [*document["artifacts"], *(each for entry in document["artifacts"] for each in entry.get("baked", ()))]
        listed = {file["path"] for each in graphs for file in each["files"]}
        for file in [file for name in ("onnx", "openvino", "tensorrt", "torch") for file in (folder / name).glob("*")]:
            if file.relative_to(folder).as_posix() not in listed:
                file.unlink()  # made only to be lowered, or not shipped
        for name in ("onnx", "tensorrt"):
            with suppress(OSError):  # unless it is empty
                (folder / name).rmdir()
        (folder / MANIFEST).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        used = {"the accuracy check": (_kind(data), cases)}
        if int8:
            used["calibration"] = (_kind(calibrate), calibrated_on)
        sbom.write(folder, document, checkpoints, used)
        bar.set_postfix_str("writing")
    return output


def _same(before: Sequence[dict[str, Any]], entry: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of an entry of `_JUDGED_AS` if the other runtime's, with the same file, is before it."""
    source = _JUDGED_AS.get(entry["runtime"])
    if source and entry["precision"] in ("fp32", "fp16") and entry["recipe"]["batch"] == 1:
        for other in before:
            if (other["runtime"], other["precision"]) == (source, entry["precision"]):
                return {key: value for key, value in other.items() if key != "runtime"}
    return None


def _engine(
    folder: Path, entries: Sequence[dict[str, Any]], runtime: str, named: str, targets: Sequence[str]
) -> dict[str, Any]:
    """The entry of an engine, written here, and judged as the ONNX file that it is built from."""
    source = next(each for each in entries if (each["runtime"], each["precision"]) == (_SOURCE[runtime], named))
    model, *_ = source["files"]
    path = _FILES[runtime][0] if named == "fp32" else f"{runtime}/model-{named}.engine"
    (folder / path).parent.mkdir(exist_ok=True)
    try:
        version, engine = tensorrt.engine((folder / model["path"]).read_bytes(), source["recipe"], targets)
    except RuntimeError as error:
        raise ExportError(
            f"{runtime} {named}",
            str(error),
            f"expected an engine for {', '.join(targets)}",
            "Leave out a target, or the precision that it cannot run.",
        ) from error
    (folder / path).write_bytes(engine)
    about = {"runtime": runtime, "files": [_file_entry(folder, path)]}
    about["versions"] = source["versions"] | {"tensorrt_rtx": version}
    about["recipe"] = source["recipe"] | tensorrt.needs(version, targets)
    return source | about | {"built_from": model["sha256"]}


def _quality(
    cases: Sequence[parity.Case], results: Sequence[parity.Result], manifest: Manifest
) -> dict[str, Any] | None:
    """The limits that half of the images keep, and how many of the other half do not; None of a single image."""
    seen = []
    for case, result in zip(cases, results, strict=True):
        spot = place(manifest.input, case.frame.shape[0], case.frame.shape[1])
        inside = postprocess.crop(result.logits, spot)
        seen.append(quality.assess(quality.sample(case.frame), case.bits, inside, result.mask))
    if len(seen) < 2:
        return None
    first = parity.sample(range(len(seen)), len(seen) // 2)
    limits = quality.limits_of([seen[i] for i in first])
    flags = [seen[i].flags(limits) for i in range(len(seen)) if i not in first]
    return {
        "limits": {name: list(pair) for name, pair in limits.items()},
        "images": [len(first), len(flags)],
        "false_alarms": {name: sum(name in each for each in flags) for name in limits},
    }


def _frame_sizes(
    texts: Sequence[str], outputs: Sequence[str], runtimes: Sequence[str], channels: int
) -> tuple[baking.FrameSize, ...]:
    """The sizes to bake graphs for. Raises ExportError for what no graph could have."""
    sizes = tuple(dict.fromkeys(map(baking.FrameSize.parse, texts)))
    if unknown := [each for each in outputs if each not in baking.EXTRAS]:
        raise ExportError("--bake-outputs", f"got {unknown[0]!r}", f"expected {', '.join(baking.EXTRAS)}", "Check it.")
    if sizes and not set(runtimes) & set(BAKED):
        raise ExportError("--bake", "no runtime takes it", f"expected {' or '.join(BAKED)} among them", "Add one.")
    if len(sizes) > MOST_BAKED:
        raise ExportError("--bake", f"got {len(sizes)} sizes", f"expected at most {MOST_BAKED}", "Name fewer.")
    if channels == 1 and (colour := [size for size in sizes if size.colour]):
        raise ExportError(
            "--bake", f"got {colour[0]}", "expected grey: the network takes grey", f"As {colour[0]}:grey."
        )
    if small := [size for size in sizes if min(size.rows, size.columns) < MIN_SIZE]:
        raise ExportError(
            "--bake", f"got {small[0]}", f"expected at least {MIN_SIZE} a side", "Give the camera's size."
        )
    return sizes


def _bake(
    folder: Path, document: dict[str, Any], sizes: Sequence[baking.FrameSize], extras: Sequence[str], bar: Any
) -> None:
    """Bakes the artifacts of the CPU's runtimes, holds each graph against its artifact, and adds it to the entry."""
    manifest = parse_manifest(json.dumps(document).encode())
    for entry, artifact in zip(document["artifacts"], manifest.artifacts, strict=True):
        if artifact.runtime not in BAKED:
            continue
        for size in sizes:
            bar.set_postfix_str(f"{artifact.name}, {size}")
            files = baking.write(folder, manifest, artifact, size, extras)
            exact = artifact.precision == "fp32" or manifest.input.resize == "bilinear-fixed"
            least = LEAST_EQUAL_BAKED if exact else _LEAST_EQUAL_ROUNDED
            found, difference = baking.agreement(folder, manifest, artifact, files, size, extras)
            limit = artifact.tolerance.logit
            if found < least or difference > limit:
                raise ExportError(
                    f"{artifact.name}, baked for {size}",
                    f"{found:.4%} of the pixels of phantoms are equal to those without it, logits differ by "
                    f"{difference:.2g}",
                    f"expected {least:.2%}, and at most {limit:.2g}",
                    "Leave --bake out, and report it.",
                )
            about = {"frame": list(size.shape), "outputs": [*BAKED_OUTPUTS[:2], *extras], "pixel_agreement": found}
            entry.setdefault("baked", []).append(about | {"files": list(files)})
    for entry in document["artifacts"]:  # only now: the graphs of two artifacts may add to one file
        if entry["runtime"] in BAKED and sizes:
            entry["files"] = [_file_entry(folder, file["path"]) for file in entry["files"]]
            for graph in entry["baked"]:
                graph["files"] = [_file_entry(folder, path) for path in graph["files"]]


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread: their number changes the last bits, and the same checkpoint must give the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _kind(data: str | None) -> str:
    return data.partition(":")[0] if data else "phantoms"


def _class_names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


def _positive(values: list[float]) -> list[float]:
    if min(values) < 1e-6:
        raise ExportError("std", f"got {values}", "expected numbers above 0", "It divides every pixel.")
    return values


def _per_channel(field: str, values: Sequence[float], channels: int) -> list[float]:
    values = [float(value) for value in values]
    if len(set(values)) == 1:
        values = values[:1] * channels
    if not all(map(math.isfinite, values)):
        raise ExportError(field, f"got {values}", "expected finite numbers", "They are of pixels scaled to [0, 1].")
    if len(values) != channels:
        raise ExportError(field, f"got {values}", f"expected 1 or {channels} numbers", "Give one for each channel.")
    return values


def _write_models(
    model: MSA2Net, channels: int, runtimes: Sequence[str], folder: Path, batch: int, bar: Any
) -> dict[str, dict[str, str]]:
    """Writes the models of `runtimes`; returns the versions of the tools that wrote each."""
    versions: dict[str, dict[str, str]] = {}
    for runtime in runtimes:
        bar.set_postfix_str(runtime)
        path = folder / _sources(runtime, batch)[0]
        if runtime in ("pytorch", "torch-tensorrt"):  # their backends rewrite the network as they load
            path.parent.mkdir(exist_ok=True)
            save_checkpoint(path, used_state(model))
            versions[runtime] = {"torch": version("torch"), "safetensors": version("safetensors")}
        elif runtime in ("onnxruntime", "tensorrt"):  # what pays on TensorRT has not been measured
            images = batch if runtime == "tensorrt" else 1
            if not path.exists():
                written = onnx_file.write(rewritten(model, chosen("onnxruntime")), channels, path, images)
            versions[runtime] = written
        elif "onnxruntime" in versions and chosen(runtime) == chosen("onnxruntime"):
            source = folder / _FILES["onnxruntime"][0]
            versions[runtime] = versions["onnxruntime"] | openvino_ir.write(source, path)
        else:
            source = path.with_suffix(".onnx")
            versions[runtime] = onnx_file.write(rewritten(model, chosen(runtime)), channels, source)
            versions[runtime] |= openvino_ir.write(source, path)
            source.unlink()
        bar.update()
    return versions


def _fine_tuned(checkpoint: str | Path | None, model: MSA2Net, int8: bool) -> MSA2Net | None:
    """The network of the fine-tuned checkpoint. Raises ExportError if nothing would hold it, or if it is another."""
    if checkpoint is None:
        return None
    if not int8:
        raise ExportError("--fine-tuned", "no int8 artifact is asked for", "", "Add int8 to --precisions.")
    tuned = load_model(read_checkpoint(checkpoint))
    ours, theirs = model.config.to_json(), tuned.config.to_json()
    if differing := [key for key in ours if theirs[key] != ours[key]]:
        key = differing[0]
        raise ExportError(
            "--fine-tuned",
            f"its network has {key} {theirs[key]}",
            f"expected {ours[key]}, as --checkpoint's has",
            "Start the fine-tune from --checkpoint.",
        )
    return tuned


def _artifacts(runtimes: Sequence[str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of runtime and precision to write. Raises ExportError for one that cannot be judged here."""
    asked = tuple(dict.fromkeys(precisions))
    for each in asked or ("",):
        if not any(each in PRECISIONS_OF[runtime] for runtime in runtimes):
            offered = "; ".join(f"{runtime}: {', '.join(PRECISIONS_OF[runtime])}" for runtime in runtimes)
            raise ExportError(
                "precisions", f"got {each!r}", f"expected what a runtime has ({offered})", "Drop it, or add a runtime."
            )
    found = []
    for runtime in runtimes:
        for each in (each for each in PRECISIONS_OF[runtime] if each in asked):
            emulated = each == "fp16" or runtime not in candidates("CPU")
            if not emulated and (error := why_not_precision(runtime, each)):
                raise ExportError(
                    f"{runtime} {each}", error.found, "expected one that can judge it", "Export it on such a CPU."
                )
            found.append((runtime, each))
    return found


def _lowering(
    folder: Path, runtime: str, named: str, files: tuple[str, ...], tensors: Tensors, tick: Callable[[str], object]
) -> precision.Lowering:
    """Of the fp32 model's files. What TensorRT shares with ONNX Runtime in fp32, it shares in fp16."""
    shared = named == "fp16" and files == _FILES["onnxruntime"]
    target = _LOWERED["onnxruntime" if shared else runtime].format(named)
    (folder / target).parent.mkdir(exist_ok=True)
    if named == "fp16":
        return fp16.Fp16(folder, files[0], target, tensors)
    if named == "bf16":
        return openvino_ir.Bf16(folder, files, target)
    kind = {"onnxruntime": quantize.OnnxInt8, "openvino": quantize.OpenVinoInt8, "tensorrt": tensorrt.Int8}[runtime]
    held = calibration.HELD
    if (folder / _TUNED).is_dir():
        files = tuple(f"{_TUNED}/{file}" for file in files)
    return kind(folder, files, target, tensors[held:], tensors[:held], named == "int8-portable", tick)


def _lower(
    folder: Path,
    entry: dict[str, Any],
    tensors: Tensors,
    keep: Sequence[str],
    rankings: dict[str, dict[str, Any]],
    judged: Callable[[], dict[str, Any]],
    bar: Any,
) -> None:
    """Ranks the places of the entry's network on a few inputs, and keeps as few of them as make the artifact good.

    That is the verdict "high", and with a margin: `_LEAST_EQUAL` of the pixels, `_MOST_LOST` points of an image.

    If none of the steps is, the best of them is taken. Adds the ranking, the steps and the judgement to the entry.
    """
    runtime, named = entry["runtime"], entry["precision"]

    def tick(place: str) -> None:
        bar.set_postfix_str(f"{runtime} {named}: {place}")

    files = tuple(file["path"] for file in entry["files"])
    lowering = _lowering(folder, runtime, named, files, tensors, tick)
    int8 = named in INT8
    forced = precision.named(lowering.places, keep) if int8 else ()
    if lowering.places and len(forced) == len(lowering.places):
        raise ExportError("--keep", "names every place", "expected some left for int8", "Name fewer, or export fp32.")
    if not int8:
        scan = precision.rank(lowering, tensors, tick)
    elif runtime in rankings:
        scan = rankings[runtime] | {"ranked_as": INT8[0]}  # a bit of the weights changes little in the order
    else:  # a place takes seconds and there are many, so one is measured on each core
        rankings[runtime] = precision.rank(lowering, tensors[:_RANKED_ON], tick, default_threads())
        scan = dict(rankings[runtime])
    if isinstance(lowering, fp16.Fp16 | tensorrt.Int8):
        scan["ranges"] = lowering.found()
    if isinstance(lowering, quantize.OnnxInt8 | quantize.OpenVinoInt8):  # TensorRT's, too
        scan["methods"], scan["forced"] = lowering.methods, list(forced)

    worst = [row["place"] for row in scan["places"] if row["place"] not in forced]
    tried: list[tuple[tuple[int, bool, int], dict[str, Any]]] = []  # `_order`, number kept
    scan["steps"] = []

    def good(count: int) -> bool:
        kept = (*forced, *worst[:count])
        row: dict[str, Any] = {"kept": len(kept), "verdict": None}
        scan["steps"].append(row)
        entry["files"] = [_file_entry(folder, relative) for relative in lowering.write(kept)]
        try:
            found = {"files": entry["files"]} | judged()
        except RuntimeUnavailableError as error:  # OpenVINO cannot compile every mix of marked and unmarked nodes
            row["reason"] = error.found
            return False
        row |= {key: found["parity"][key] for key in ("verdict", "ratio_bound", "pixel_agreement", "largest_loss")}
        order = _order(found["parity"])
        tried.append(((*order, len(kept)), found))
        return row["verdict"] == "unjudged" or order == _GOOD  # without a judgement, more would be kept blindly

    # int8 or fp16 with every place kept would be the fp32 artifact by another name.
    precision.fewest(max(0, len(worst) - (named != "bf16")), good)
    if not tried:
        reason = f"cannot be run ({scan['steps'][-1]['reason']})"
        raise ExportError(f"{runtime} {named}", reason, "expected some mix that can", "Export fp32 alone.")
    (*_, count), found = min(tried, key=itemgetter(0))
    scan["kept"] = [*forced, *worst][:count]
    if count != scan["steps"][-1]["kept"]:  # the files are those of the last step
        lowering.write(scan["kept"])
    entry |= found
    entry["precision_scan"] = scan


_GOOD = (VERDICTS.index("high"), False)


def _order(judgement: dict[str, Any]) -> tuple[int, bool]:
    """Less is better: the verdict, then whether the pixels that are equal or the worst image miss the margin."""
    lost = judgement["largest_loss"]["points"] or 0.0  # None if nothing could be judged
    close = judgement["pixel_agreement"] < _LEAST_EQUAL or lost > _MOST_LOST
    return VERDICTS.index(judgement["verdict"]), close


def _race(
    folder: Path,
    entry: dict[str, Any],
    manifest: Manifest,
    image: NDArray[np.float32],
    judged: Callable[[], dict[str, Any]],
    bar: Any,
) -> None:
    """Times an int8 artifact beside what it is to beat, with the rest of its network in fp32 and, if it can, in bf16.

    Keeps bf16 for the rest where it is faster and the judgement no worse. The portable artifact is for CPUs without
    bf16, so it races fp32 alone, and its rest is in fp32.
    """
    runtime, named = entry["runtime"], entry["precision"]
    bar.set_postfix_str(f"{runtime} {named}: speed")
    own = tuple(str(folder / file["path"]) for file in entry["files"])
    plain = tuple(str(folder / relative) for relative in _FILES[runtime])
    runners = {"fp32": (plain, "fp32", "fp32"), named: (own, named, "fp32")}
    both = runtime == "openvino" and named == "int8" and not cpu_lacks("bf16")
    if both:
        runners |= {"bf16": (plain, "bf16", "fp32"), f"{named} beside bf16": (own, named, "bf16")}
    threads = default_threads()
    with ExitStack() as stack:
        calls = {}
        for key, (files, kind, rest) in runners.items():
            backend = backend_class(runtime)(files, manifest, "CPU", kind, threads, None, rest)
            stack.callback(backend.close)
            calls[key] = partial(backend.infer, image)
        samples = milliseconds(calls, _ROUNDS, _PAUSE)
    best = named
    if both and ratio(samples[f"{named} beside bf16"], samples[named])[2] < 1:
        before = {key: entry[key] for key in ("parity", "tolerance")}
        entry["rest"] = "bf16"
        entry |= judged()
        entry["parity"] = {"data": before["parity"]["data"]} | entry["parity"]
        if _order(entry["parity"]) > _order(before["parity"]):
            del entry["rest"]
            entry |= before
        else:
            best = f"{named} beside bf16"
    median = {key: float(np.median(values)) for key, values in samples.items()}
    over = min(("fp32", "bf16") if both else ("fp32",), key=median.__getitem__)
    entry["speed"] = {
        "ratio": ratio(samples[best], samples[over]),
        "over": over,
        "milliseconds": [round(median[best], 3), round(median[over], 3)],
        "machine": processor_name(),
        "threads": threads,
        "medians": {key: round(value, 3) for key, value in median.items()},
        "rounds": _ROUNDS,
    }


def _withhold(document: dict[str, Any]) -> None:
    """Moves what is no faster than a higher precision from the artifacts to `withheld`."""
    slower = [entry for entry in document["artifacts"] if "speed" in entry and not parse_speed(entry["speed"]).faster]
    document["artifacts"] = [entry for entry in document["artifacts"] if entry not in slower]
    document["withheld"] = [
        {"runtime": entry["runtime"], "precision": entry["precision"], "verdict": entry["parity"]["verdict"]}
        | {key: entry[key] for key in ("parity", "speed", "precision_scan")}
        for entry in slower
    ]
    if not document["artifacts"]:
        shown = "; ".join(f"{each['precision']}: {parse_speed(each['speed'])}" for each in slower)
        raise ExportError(
            "int8", shown, "expected less time than a higher precision takes", "Add fp32, or give --allow-slower."
        )


def _sources(runtime: str, batch: int) -> tuple[str, ...]:
    """The fp32 model's files for a runtime, by which TensorRT takes so many images."""
    return _OF_BATCHES if runtime == "tensorrt" and batch > 1 else _FILES[runtime]


def _file_entry(folder: Path, relative: str) -> dict[str, Any]:
    path = folder / relative
    return {"path": relative, "bytes": path.stat().st_size, "sha256": digest_of_path(path)}


def _entry(folder: Path, runtime: str, named: str, versions: dict[str, str], recipe: dict[str, Any]) -> dict[str, Any]:
    of_gpu = {"recipe": {"version": _VERSIONS[runtime]} | recipe} if runtime in _VERSIONS else {}
    return of_gpu | {
        "runtime": runtime,
        "precision": named,
        "files": [_file_entry(folder, relative) for relative in _sources(runtime, recipe["batch"])],
        "versions": versions,
        "tolerance": {"logit": 0.0, "pixels": 1.0},
        "parity": {"verdict": "unjudged", "reasons": []},  # until it is judged
    }


def _write_golden(
    folder: Path, manifest: Manifest, cases: Sequence[parity.Case], results: Sequence[parity.Result]
) -> None:
    """Writes the golden frames with the reference's outputs."""
    (folder / "golden").mkdir()
    for entry, case, result in zip(manifest.golden, cases, results, strict=True):
        for path, array in ((entry.frame, case.frame), (entry.logits, result.logits), (entry.mask, result.mask)):
            np.save(folder / path, array)
