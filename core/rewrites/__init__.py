"""The deploy form: exact inference-time rewrites of the network, the same function in real arithmetic but faster.

One file each, with its equation. `rewritten(model, names)` applies some of them by name; which of them a runtime gets
is measured (`python -m benchmarks.rewrites`) and stands in `chosen.json`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from importlib import import_module
from importlib.resources import files

import torch
from torch import nn

from msa2net.core.network import MSA2Net, is_unused
from msa2net.core.rewrites.fold import give_back

# In the order in which they are applied.
NAMES = (
    "position_table",
    "batch_norm",
    "attention_scale",
    "layer_scale",
    "norm_affine",
    "attention_heads",
    "lka_block",
    "gate_selection",
    "last_expansion",
    "window_order",
    "packed_products",
)
# For PyTorch alone: no exporter takes them.
EAGER_ONLY = ("packed_products",)
# For PyTorch on a GPU, in place of `gate_selection`; applied after all others.
GPU_ONLY = ("fused_gate",)
_ORDER = NAMES + GPU_ONLY


def chosen(runtime: str) -> tuple[str, ...]:
    """The rewrites that `runtime` gets. Raises ValueError for one that has not been measured."""
    table = json.loads(files(__name__).joinpath("chosen.json").read_text("utf-8"))
    if runtime not in table:
        raise ValueError(f"runtime: got {runtime!r}, expected one of {', '.join(table)}, see benchmarks.rewrites")
    return tuple(table[runtime])


@torch.no_grad()
def apply(model: MSA2Net, names: Iterable[str]) -> dict[str, int]:
    """Rewrites the network in place; returns how many sites each rewrite found. Layers without use are dropped first.

    Raises ValueError for an unknown name, for one that was applied before or comes before one that was, and for a
    network in training mode: its BatchNorms and dropout are live.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("model: got training mode, expected evaluation mode. Call model.eval() first.")
    names = set(names)
    if unknown := sorted(names - set(_ORDER)):
        raise ValueError(f"rewrites: got {unknown[0]!r}, expected some of {', '.join(_ORDER)}")
    before = getattr(model, "_rewrites", ())
    if before and names:
        first, last = min(names, key=_ORDER.index), max(before, key=_ORDER.index)
        if _ORDER.index(first) <= _ORDER.index(last):
            raise ValueError(f"rewrites: {first} after {last}, which comes later or is the same. Apply all at once.")
    model._rewrites = (*before, *names)  # type: ignore[assignment]
    for path in ("backbone", "decoder_3", "decoder_2"):
        owner = model.get_submodule(path)
        for name, layer in list(owner.named_children()):
            if all(is_unused(f"{path}.{name}.{key}", model.config) for key in layer.state_dict()):
                owner.add_module(name, nn.Identity())
    sites = {}
    for name in (name for name in _ORDER if name in names):
        sites[name] = import_module(f"{__name__}.{name}").apply(model)
        give_back()
    model.eval()  # the modules that are new, too
    return sites


def rewritten(model: MSA2Net, names: Iterable[str]) -> MSA2Net:
    """A rewritten copy of the network; see `apply`."""
    model = copy.deepcopy(model)
    apply(model, names)
    return model
