"""`python -m msa2net.export` is `msa2net export`."""

from __future__ import annotations

import argparse
import sys

from msa2net.errors import ExportError
from msa2net.export import export_bundle
from msa2net.runtimes.bundle import Bundle


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ExportError(
            option, f"got {text!r}", "expected numbers separated by commas", "As in 0.5,0.5,0.5."
        ) from error


def run(arguments: argparse.Namespace) -> int:
    """The command's options to `export_bundle`, and its summary."""
    output = export_bundle(
        arguments.checkpoint,
        arguments.output,
        runtimes=tuple(arguments.runtimes.split(",")),
        precisions=arguments.precisions.split(","),
        classes=arguments.classes.split(",") if arguments.classes else None,
        mean=_numbers("--mean", arguments.mean),
        std=_numbers("--std", arguments.std),
        channels=arguments.channels,
        fit=arguments.fit,
        enlarge=arguments.enlarge,
        name=arguments.name,
        model_version=arguments.model_version,
        resize=arguments.resize,
        data=arguments.data,
        calibrate=arguments.calibration,
        keep=arguments.keep.split(",") if arguments.keep else (),
        fine_tuned=arguments.fine_tuned,
        report=arguments.report,
        allow_accuracy_loss=arguments.allow_accuracy_loss,
        allow_slower=arguments.allow_slower,
        batch=arguments.batch,
        hardware_compatibility=arguments.hardware_compatibility,
        targets=arguments.targets.split(","),
        bake=arguments.bake.split(",") if arguments.bake else (),
        bake_outputs=arguments.bake_outputs.split(",") if arguments.bake_outputs else (),
        force=arguments.force,
    )
    bundle = Bundle(output)
    print(f"{output}: bundle digest {bundle.digest}")
    for artifact in bundle.manifest.artifacts:
        figures = artifact.parity
        megabytes = sum(file.bytes for file in artifact.files) / 1e6
        bound = "-" if figures["ratio_bound"] is None else f"{figures['ratio_bound']:.4f}"
        print(
            f"{artifact.runtime:<12} {artifact.precision:<13} {megabytes:7.1f} MB  {artifact.accuracy:<8} "
            f"equal pixels {figures['pixel_agreement']:.4%}, bound {bound} of fp32's Dice, "
            f"largest logit difference {figures['logit_difference']:.1e}, {figures['images']} images"
        )
        for reason in filter(None, (figures["reason"], *artifact.shortfalls)):
            print(f"             {reason}")
        if artifact.speed:
            print(f"             {artifact.speed}")
    for each in bundle.manifest.withheld:
        print(f"{each.runtime:<12} {each.precision:<13} not shipped, it takes {each.speed} (--allow-slower ships it)")
    return 0


if __name__ == "__main__":
    from msa2net.__main__ import main

    sys.exit(main(["export", *sys.argv[1:]]))
