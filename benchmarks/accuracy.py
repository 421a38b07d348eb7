"""Accuracy of every runtime and precision of a bundle on labelled data: `python -m benchmarks.accuracy`.

What is scored are the artifacts that ship, through `Predictor`. Each is held against the truth, and against the fp32
reference with the export's own judgement (`runtimes.measure.judge`). Volumes are segmented slice by slice and scored
whole.

standard   the bundle's pixel contract; scores as MONAI computes them; means leave out what is undefined
public     the released code's pipeline (Synapse): cubic-spline resize of each slice, argmax at the network's size,
           nearest zoom back, medpy's HD95, its rules for empty sets (see `benchmarks.metrics`)
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from msa2net.benchmarks import machine
from msa2net.benchmarks.metrics import Protocol, Scores, score
from msa2net.core.data import Case, Dataset, Volume, open_for
from msa2net.core.phantoms import otsu_largest_component
from msa2net.errors import DataError, Msa2NetError
from msa2net.runtimes import DemoModelWarning, Predictor
from msa2net.runtimes.backends import default_threads
from msa2net.runtimes.bundle import Bundle
from msa2net.runtimes.measure import FALSE_PIXELS, ImageParity, dice, image_parity, judge
from msa2net.runtimes.overlay import draw, side_by_side, to_rgb
from msa2net.runtimes.postprocess import to_mask
from msa2net.runtimes.predictor import DEMO_BUNDLE
from msa2net.runtimes.preprocess import check_frame, place, to_tensor

METRICS = ("dice", "hd95", "nsd", "sensitivity", "specificity", "accuracy")
WORST = 4  # cases that are drawn
OTSU = "otsu"
Mask = NDArray[np.uint8]
Segment = Callable[[NDArray[Any], "int | None"], Mask]


def segmenter(predictor: Predictor, protocol: Protocol) -> Segment:
    """A function from a frame and its bits to a mask of the frame's size, by the protocol's pipeline."""
    if protocol == "standard":
        return lambda frame, bits: predictor.predict(frame, bits=bits).mask
    contract = replace(predictor.bundle.manifest.input, resize="spline", fit="stretch")

    def segment(frame: NDArray[Any], bits: int | None) -> Mask:
        rows, columns = frame.shape[:2]
        logits = predictor.logits(to_tensor(check_frame(frame, bits), contract, bits))
        return to_mask(logits, place(contract, rows, columns), (rows, columns), "aligned")

    return segment


@dataclass
class Tally:
    """What one artifact made of the data so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # one a case and class
    counts: dict[tuple[str, str], NDArray[np.int64]] = field(default_factory=dict)  # TP FP FN TN by group and class
    parity: list[ImageParity] = field(default_factory=list)  # one a frame
    worst: list[tuple[float, int]] = field(default_factory=list)  # mean Dice of a case, its index
    free: list[tuple[str, bool]] = field(default_factory=list)  # frames without a lesion: group, whether a false alarm


def add_case(
    tally: Tally,
    index: int,
    case: Case,
    masks: Mask,
    volume: Volume,
    classes: tuple[str, ...],
    protocol: Protocol,
    tolerance: float,
) -> None:
    """Scores one case, (D, H, W) masks, into the tally."""
    labels = volume.labels
    assert labels is not None
    found: list[Scores] = [
        score(masks, labels, label, protocol=protocol, spacing=volume.spacing, tolerance=tolerance)
        for label in range(1, len(classes))
    ]
    for label, scores in enumerate(found, 1):
        known = {"case": case.name, "group": case.group, "class": classes[label], "unit": unit_of(volume, protocol)}
        tally.rows.append(known | asdict(scores))
        predicted, true = masks == label, labels == label
        tp, p, t = int((predicted & true).sum()), int(predicted.sum()), int(true.sum())
        counts = np.array([tp, p - tp, t - tp, masks.size - p - t + tp], np.int64)
        key = (case.group, classes[label])
        tally.counts[key] = tally.counts.get(key, np.zeros(4, np.int64)) + counts
    for mask, truth in zip(masks, labels, strict=True):
        if not truth.any():
            tally.free.append((case.group, int((mask > 0).sum()) > FALSE_PIXELS))
    tally.worst.append((mean([scores.dice for scores in found]), index))


def unit_of(volume: Volume, protocol: Protocol) -> str:
    """What distances in a case are measured in."""
    return "px" if volume.spacing is None or protocol == "public" else "mm"


def one_unit(tallies: Iterable[Tally]) -> str:
    """The unit of all distances. Where some cases have millimetres, distances of the others are undefined."""
    rows = [row for tally in tallies for row in tally.rows]
    units = {row["unit"] for row in rows}
    if len(units) > 1:
        for row in rows:
            if row["unit"] == "px":
                row["hd95"] = row["nsd"] = math.nan
    return "mm" if "mm" in units else "px"


def mean(values: Iterable[float]) -> float:
    """Over what is defined; NaN if nothing is."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def pooled(counts: NDArray[np.int64]) -> dict[str, float]:
    """Dice, sensitivity, specificity and accuracy over all pixels of all cases together."""
    tp, fp, fn, tn = (int(count) for count in counts)

    def ratio(part: int, whole: int) -> float:
        return part / whole if whole else math.nan

    return {
        "dice": ratio(2 * tp, 2 * tp + fp + fn),
        "sensitivity": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
    }


def summary(tally: Tally, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each group and class: means over cases, and the same figures over all pixels pooled.

    With several classes one more for their mean, taken in each case first, then over cases, as MONAI and the public
    code do; with several groups the same for all cases together.
    """
    groups = list(dict.fromkeys(row["group"] for row in tally.rows))
    rows = []
    for group in [*groups, None] if len(groups) > 1 else groups:
        here = [row for row in tally.rows if group in (None, row["group"])]
        free = [alarm for each, alarm in tally.free if group in (None, each)]
        for name in [*classes[1:], None] if len(classes) > 2 else classes[1:]:
            of_class = [row for row in here if name in (None, row["class"])]
            counts = sum(
                (c for (g, k), c in tally.counts.items() if group in (None, g) and name in (None, k)),
                np.zeros(4, np.int64),
            )
            rows.append(
                {
                    "group": "all" if group is None else group,
                    "class": "mean" if name is None else name,
                    "cases": len({row["case"] for row in of_class}),
                    "defined": sum(not math.isnan(row["dice"]) for row in of_class),
                    # A lesion that is missed as a whole has no HD95 under the standard protocol.
                    "missed": sum(row["dice"] == 0 for row in of_class),
                    **{metric: _case_mean(of_class, metric) for metric in METRICS},
                    "pooled": pooled(counts) if name is not None else None,
                    "free_frames": len(free),
                    "false_alarms": sum(free),
                }
            )
    return rows


def _case_mean(rows: list[dict[str, Any]], metric: str) -> float:
    by_case: dict[str, list[float]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row[metric])
    return mean(mean(values) for values in by_case.values())


def measure(
    path: Path,
    dataset: Dataset,
    protocol: Protocol = "standard",
    runtimes: list[str] | None = None,
    tolerance: float = 1.0,
    threads: int | None = None,
    otsu: bool = False,
    output: Path | None = None,
    data: str = "",
) -> dict[str, Any]:
    """Everything that the table, the CSV and the JSON show. Undefined figures are NaN.

    output   folder for `accuracy.json`, `accuracy.csv` and the worst cases drawn
    data     what the report calls the data, without a path; its kind if ""

    Raises DataError if a case has no labels, and RuntimeUnavailableError for a runtime that was named and cannot run.
    """
    predictors, skipped = _load(path, runtimes, threads)
    reference = predictors.get("pytorch fp32") or next(
        (predictor for predictor in predictors.values() if predictor.artifact.precision == "fp32"), None
    )
    if reference is None:
        raise Msa2NetError("--runtimes", "none in fp32 can run here", "expected one to compare with", "Add one.")
    manifest = reference.bundle.manifest
    classes = tuple(info.name for info in manifest.classes)
    segments = {name: segmenter(predictor, protocol) for name, predictor in predictors.items()}
    if otsu:
        segments[OTSU] = lambda frame, bits: otsu_largest_component(to_rgb(frame, bits))
    tallies = {name: Tally() for name in segments}
    frames, seconds = 0, 0.0
    for index, case in enumerate(tqdm(dataset.cases, "accuracy", unit="case", disable=None)):
        volume = case.read()
        if volume.labels is None:
            raise DataError(case.name, "has no labels", "expected masks to score against", "Use another kind.")
        masks = {
            name: np.stack([segment(frame, volume.bits) for frame in volume.frames])
            for name, segment in segments.items()
        }
        expected = masks[reference.artifact.name]
        frames += len(volume.frames)
        start = time.perf_counter()
        for name, tally in tallies.items():
            add_case(tally, index, case, masks[name], volume, classes, protocol, tolerance)
            tally.parity += [
                image_parity(
                    case.frame_name(i, len(volume.frames)), expected[i], masks[name][i], len(classes), truth, case.name
                )
                for i, truth in enumerate(volume.labels)
            ]
        seconds += time.perf_counter() - start
    unit = one_unit(tallies.values())
    result = {
        "machine": machine.describe(threads or default_threads()),
        "model": manifest.model_name,
        "digest": reference.bundle.digest,
        "data": data or dataset.kind,
        "unit": unit,
        "cases": len(dataset.cases),
        "frames": frames,
        "protocol": protocol,
        "nsd_tolerance": tolerance,
        "reference": reference.artifact.name,
        "metrics_ms_per_frame": 1000 * seconds / (frames * len(tallies)),
        "artifacts": [
            {
                "artifact": name,
                "execution": predictors[name].execution.to_json() if name in predictors else None,
                "summary": summary(tally, classes),
                "parity": judge(tally.parity, classes) if name in predictors else None,
                "each": tally.rows,
            }
            for name, tally in tallies.items()
        ],
        "skipped": skipped,
    }
    if output:
        write(result, output)
        _draw_worst(output, dataset, tallies[reference.artifact.name], segments, predictors, reference)
    for predictor in predictors.values():
        predictor.close()
    return result


def _load(
    path: Path, runtimes: list[str] | None, threads: int | None
) -> tuple[dict[str, Predictor], list[dict[str, str]]]:
    """Every artifact that was asked for, loaded, by name; and those left out, with the reason."""
    predictors: dict[str, Predictor] = {}
    skipped = []
    for entry in Predictor.available(path):
        name = f"{entry.runtime} {entry.precision}"
        if runtimes and entry.runtime not in runtimes:
            continue
        if not entry.available and not runtimes:
            skipped.append({"artifact": name, "reason": entry.reason})
            continue
        predictors[name] = Predictor.load(path, runtime=entry.runtime, precision=entry.precision, threads=threads)
    if missing := sorted(set(runtimes or ()) - {p.artifact.runtime for p in predictors.values()}):
        raise Msa2NetError(
            "--runtimes", f"got {missing[0]!r}", "expected some that the bundle has", "See msa2net info."
        )
    return predictors, skipped


def _draw_worst(
    folder: Path,
    dataset: Dataset,
    tally: Tally,
    segments: dict[str, Segment],
    predictors: dict[str, Predictor],
    reference: Predictor,
) -> None:
    """The frames that the reference is worst at: frame, truth, and what every artifact makes of it."""
    for old in folder.glob("worst_*.png"):
        old.unlink()
    defined = sorted((each for each in tally.worst if not math.isnan(each[0])), key=lambda each: each[0])
    classes = reference.bundle.manifest.classes
    for rank, (_, index) in enumerate(defined[:WORST], 1):
        volume = dataset.cases[index].read()
        assert volume.labels is not None
        segment = segments[reference.artifact.name]
        wrong = [
            int((segment(frame, volume.bits) != truth).sum())
            for frame, truth in zip(volume.frames, volume.labels, strict=True)
        ]
        worst = int(np.argmax(wrong))
        frame, truth = volume.frames[worst], volume.labels[worst]
        shown = {
            dataset.cases[index].frame_name(worst, len(wrong)): draw(frame, np.zeros_like(truth), classes, volume.bits),
            "truth": draw(frame, truth, classes, volume.bits),
        }
        for each in predictors:
            mask = segments[each](frame, volume.bits)
            scores = [dice(mask, truth, label) for label in range(1, len(classes)) if (truth == label).any()]
            shown[f"{each}: Dice {mean(scores):.3f}"] = draw(frame, mask, classes, volume.bits)
        side_by_side(shown).save(folder / f"worst_{rank}.png")


# Output -----------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The figures as aligned text."""
    about = result["machine"]
    heads = [
        "artifact",
        "group",
        "class",
        "cases",
        "Dice",
        f"HD95 {result['unit']}",
        "NSD",
        "sens",
        "spec",
        "acc",
        "pooled Dice",
    ]
    heads += ["missed", "alarms", "equal px", "bound", "verdict"]
    rows = []
    for each in result["artifacts"]:
        for line in each["summary"]:
            parity = each["parity"] or {}
            rows.append(
                [
                    each["artifact"],
                    line["group"],
                    line["class"],
                    f"{line['defined']}/{line['cases']}" if line["class"] != "mean" else str(line["cases"]),
                    *(_shown(line[metric], 2 if metric == "hd95" else 4) for metric in METRICS),
                    _shown(line["pooled"]["dice"], 4) if line["pooled"] else "-",
                    str(line["missed"]),
                    f"{line['false_alarms']}/{line['free_frames']}",
                    f"{parity['pixel_agreement']:.3%}" if parity else "-",
                    _shown(parity.get("ratio_bound"), 4),
                    parity.get("verdict", "-"),
                ]
            )
    widths = [max(len(cells[i]) for cells in (heads, *rows)) for i in range(len(heads))]
    lines = [
        f"{about['processor']}, {about['threads']} threads, Python {about['python']}, "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + (f", commit {about['commit']}" if about["commit"] else ""),
        f"{result['model']} ({result['digest'][:12]}), {result['data']}: {result['cases']} cases, {result['frames']} "
        f"frames, protocol {result['protocol']}; metrics {result['metrics_ms_per_frame']:.1f} ms a frame; "
        f"parity against {result['reference']}",
    ]
    for cells in (heads, *rows):
        aligned = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
        aligned += [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
        lines.append("  ".join(aligned))
    lines += [f"{each['artifact']} not run: {each['reason']}" for each in result["skipped"]]
    return "\n".join(lines)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _json_ready(value: Any) -> Any:
    """NaN, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _json_ready(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_json_ready(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write(result: dict[str, Any], folder: Path) -> None:
    """`accuracy.json`, everything, and `accuracy.csv`, a row for each artifact, case and class."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_json_ready(result), indent=1, allow_nan=False)
    (folder / "accuracy.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "accuracy.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["artifact", "case", "group", "class", "unit", *METRICS])
        writer.writeheader()
        for each in result["artifacts"]:
            writer.writerows({"artifact": each["artifact"]} | row for row in each["each"])


def _named(spec: str, dataset: Dataset, split: str) -> str:
    """The data for the report: a path can name a patient, numbers of phantoms cannot."""
    if dataset.kind == "phantoms":
        return spec
    return f"{dataset.kind} {split}" if dataset.kind in ("synapse", "isic2018") else dataset.kind


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=DEMO_BUNDLE, help="default: the demo's")
    parser.add_argument("--data", default="phantoms:100", metavar="KIND:PATH", help="default: %(default)s of each kind")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--protocol", choices=("standard", "public"), default="standard")
    parser.add_argument("--runtimes", help="names, separated by commas; default: all that the bundle has")
    parser.add_argument(
        "--tolerance", type=float, default=1.0, help="of the NSD: pixels, or mm where data has a spacing"
    )
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--otsu", action="store_true", help="add Otsu's threshold, its largest dark component")
    parser.add_argument("--output", type=Path, metavar="DIR", help="accuracy.json, accuracy.csv, worst cases drawn")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore", DemoModelWarning)
    try:
        classes = [info.name for info in Bundle(arguments.bundle).manifest.classes]
        dataset = open_for(classes, arguments.data, arguments.split)
        if arguments.output:
            arguments.output.mkdir(parents=True, exist_ok=True)  # before hours of scoring
        result = measure(
            arguments.bundle,
            dataset,
            arguments.protocol,
            arguments.runtimes.split(",") if arguments.runtimes else None,
            arguments.tolerance,
            arguments.threads,
            arguments.otsu,
            arguments.output,
            _named(arguments.data, dataset, arguments.split),
        )
    except Msa2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --output: cannot be written ({error.strerror}). Name another folder.", file=sys.stderr)
        return 2
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
