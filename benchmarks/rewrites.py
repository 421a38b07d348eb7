"""What each rewrite of the deploy form is worth on each runtime: `python -m benchmarks.rewrites`.

Every comparison is of two networks in one process, timed in interleaved rounds; a figure is the median of the rounds'
ratios with its quartiles, below 1 where the rewrite helps.
    one only        the rewrite alone, over the network with none
    leave one out   all rewrites, over all but this one
A runtime gets a rewrite unless all of them are slower with it by more than the quartiles' spread. `--write` puts the
choice where exports and the PyTorch backend read it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from msa2net.benchmarks import machine
from msa2net.benchmarks.latency import PAUSE_SECONDS
from msa2net.core import VARIANTS
from msa2net.core.checkpoint import load_model, model_by_rule, read_checkpoint
from msa2net.core.config import IMAGE_SIZE
from msa2net.core.network import MSA2Net
from msa2net.core.rewrites import EAGER_ONLY, NAMES, rewritten
from msa2net.errors import Msa2NetError
from msa2net.export import onnx_file, openvino_ir
from msa2net.export.parity import logit_limit
from msa2net.runtimes.backends import backend_class, default_threads
from msa2net.runtimes.bundle import Bundle
from msa2net.runtimes.measure import milliseconds, ratio
from msa2net.runtimes.predictor import DEMO_BUNDLE

RUNTIMES = ("onnxruntime", "openvino", "pytorch")
CHOSEN = files("msa2net.core.rewrites").joinpath("chosen.json")


def load(
    runtime: str, model: MSA2Net, names: Iterable[str], threads: int, precision: str = "fp32"
) -> Callable[[], Any]:
    """One inference of the rewritten network in `runtime`; in fp32 its logits are held against the reference's."""
    x = np.random.default_rng(0).standard_normal((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    deployed = rewritten(model, names)
    call: Callable[[], Any]
    if runtime == "pytorch":
        torch.set_num_threads(threads)
        image = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
        call = partial(_eager, deployed, image)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx_file.write(deployed, 3, path)
            paths = [str(path)]
            if runtime == "openvino":
                xml = path.with_suffix(".xml")
                openvino_ir.write(path, xml)
                paths = [str(xml), str(xml.with_suffix(".bin"))]
            manifest = Bundle(DEMO_BUNDLE).manifest  # of which a backend reads no more than the image's size
            backend = backend_class(runtime)(tuple(paths), manifest, "CPU", precision, threads)
        call = partial(backend.infer, x)
    expected = _eager(model, torch.from_numpy(x))
    difference, limit = float(np.abs(call() - expected).max()), logit_limit(float(np.abs(expected).max()))
    if precision == "fp32" and not difference <= limit:
        raise Msa2NetError(f"{runtime} with {', '.join(names)}", f"is off by {difference:.1e}", f"expected {limit:.1e}")
    return call


def _eager(model: torch.nn.Module, image: torch.Tensor) -> Any:
    with torch.inference_mode():
        return model(image).contiguous().numpy()


def measure(model: MSA2Net, runtimes: Iterable[str], threads: int, rounds: int) -> dict[str, Any]:
    """The figures of every runtime and rewrite, and the rewrites that each runtime gets."""
    result: dict[str, Any] = {
        "benchmark": "rewrites",
        "machine": machine.describe(threads),
        "multiply_adds_of": model.config.to_json(),
        "rounds": rounds,
        "runtimes": {},
    }
    plan = [(runtime, _names(runtime)) for runtime in runtimes]
    with tqdm(total=sum(2 * len(names) + 1 for _, names in plan), desc="rewrites", disable=None) as bar:
        for runtime, names in plan:
            bar.set_postfix_str(runtime)
            none, every = (load(runtime, model, each, threads) for each in ((), names))
            table = {}
            for name in names:
                alone = load(runtime, model, [name], threads)
                figures = milliseconds({"with": alone, "without": none}, rounds, PAUSE_SECONDS)
                one_only = ratio(figures["with"], figures["without"])
                bar.update()
                rest = load(runtime, model, [each for each in names if each != name], threads)
                figures = milliseconds({"with": every, "without": rest}, rounds, PAUSE_SECONDS)
                table[name] = {"one_only": one_only, "leave_one_out": ratio(figures["with"], figures["without"])}
                bar.update()
            chosen = [name for name in names if table[name]["leave_one_out"][0] <= 1]
            floor = machine.floor_calls(threads)
            calls = {"none": none, "all": every, "chosen": load(runtime, model, chosen, threads)}
            samples = milliseconds(calls | floor, max(rounds, 30), PAUSE_SECONDS)
            product = min(float(np.median(samples[name])) for name in floor)
            result["runtimes"][runtime] = {
                "rewrites": table,
                "chosen": chosen,
                "all_over_none": ratio(samples["all"], samples["none"]),
                "chosen_over_none": ratio(samples["chosen"], samples["none"]),
                "milliseconds": {name: round(float(np.median(samples[name])), 2) for name in calls},
                "product_milliseconds": round(product, 2),
                "samples": {name: [round(value, 3) for value in values] for name, values in samples.items()},
            }
            bar.update()
    return result


def _names(runtime: str) -> list[str]:
    return [name for name in NAMES if runtime == "pytorch" or name not in EAGER_ONLY]


def table(result: dict[str, Any]) -> str:
    """The result as aligned text."""

    def shown(figure: list[float]) -> str:
        return f"{figure[1]:.3f} [{figure[0]:.3f}, {figure[2]:.3f}]"

    about = result["machine"]
    lines = [f"{about['processor']}, {about['threads']} threads, {result['rounds']} rounds, commit {about['commit']}"]
    for runtime, found in result["runtimes"].items():
        times = ", ".join(f"{name} {value:.1f} ms" for name, value in found["milliseconds"].items())
        lines += ["", f"{runtime}: {times}; all over none {shown(found['all_over_none'])}"]
        lines.append(f"  {'rewrite':<18}{'one only':<24}{'leave one out':<24}given")
        for name, figures in found["rewrites"].items():
            given = "yes" if name in found["chosen"] else "no"
            lines.append(f"  {name:<18}{shown(figures['one_only']):<24}{shown(figures['leave_one_out']):<24}{given}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rewrites", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="default: the released size with weights by rule")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--rounds", type=int, default=15, help="of each comparison")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, raw samples included")
    parser.add_argument("--write", action="store_true", help=f"choose by it: {CHOSEN.name}")
    arguments = parser.parse_args(argv)
    try:
        machine.require_folder(arguments.json)
        runtimes = arguments.runtimes.split(",")
        if unknown := set(runtimes) - set(RUNTIMES):
            found = ", ".join(sorted(unknown))
            raise Msa2NetError("--runtimes", f"got {found}", f"expected some of {', '.join(RUNTIMES)}", "Check it.")
        checkpoint = arguments.checkpoint
        model = load_model(read_checkpoint(checkpoint)) if checkpoint else model_by_rule(VARIANTS["small"])
        result = measure(model, runtimes, arguments.threads, arguments.rounds)
    except Msa2NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    machine.write_json(arguments.json, result)
    if arguments.write:
        chosen = json.loads(CHOSEN.read_text("utf-8"))
        chosen |= {runtime: found["chosen"] for runtime, found in result["runtimes"].items()}
        Path(str(CHOSEN)).write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
