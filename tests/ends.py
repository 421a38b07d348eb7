"""Beside a network in bf16, do a baked graph's ends run in fp32, and does the network give the same bits?

On a CPU with bf16 `test_bake.py` asks it; elsewhere `test_avx512.py` runs this file on an emulated one, with the
packages of a device. It takes a folder with what `write` in `test_bake.py` makes: the network, the baked graph, a
frame, and the frame as the network takes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino

from msa2net.runtimes.backends import ADDED


def complaints(folder: Path) -> list[str]:
    """What is wrong; nothing if all is well."""
    core, hint = openvino.Core(), {"INFERENCE_PRECISION_HINT": openvino.Type.bf16, "INFERENCE_NUM_THREADS": 1}
    compiled, alone = (
        core.compile_model(core.read_model(folder / f"{name}.xml", folder / "network.bin"), "CPU", hint)
        for name in ("baked", "network")
    )
    found, network = [], set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(node.get_rt_info()[key].value) for key in ("originalLayersNames", "runtimePrecision")}
        if ADDED not in info["originalLayersNames"]:
            network.add(info["runtimePrecision"])
        elif info["runtimePrecision"] == "bf16":
            found.append(f"{info['originalLayersNames']} runs in bf16")
    if "bf16" not in network:
        found.append("the network does not run in bf16")
    frame, image = (np.load(folder / f"{name}.npy") for name in ("frame", "image"))
    if "bilinear-fixed" in folder.name and not np.array_equal(compiled([frame])[0], alone([image])[0]):
        found.append("the network gives other logits behind the baked front")
    return found


if __name__ == "__main__":
    wrong = 0
    for path in sorted(path for path in Path().iterdir() if path.is_dir()):
        print(path.name, *(found := complaints(path)) or ["passes"], sep=": ")
        wrong += bool(found)
    sys.exit(wrong > 0)
