"""Weights in and out: `.safetensors`, released `.pth`, and weights by rule for when there is no checkpoint.

The sizes of the network are read from the checkpoint's own shapes, so no configuration file has to travel with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from msa2net.core.config import ModelConfig
from msa2net.core.network import MSA2Net, is_unused
from msa2net.errors import CheckpointError

PREFIX = "module."  # parallel training puts it before every key
SUFFIXES = (".safetensors", ".pth", ".pt")

# Runs in a process of its own: unpickling, even of weights only, has been broken before, and whatever it
# does there cannot touch the exporter. Argument 1 is read, argument 2 is written as safetensors.
_CONVERT = """
import sys, torch
from safetensors.torch import save_file
try:
    loaded = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
except Exception as error:
    # Only the line that names what was refused: others of torch's lines advise loading it unsafely.
    lines = [line.strip(" .") for line in str(error).splitlines() if "weights_only" not in line]
    refused = [line for line in lines if "unsupported" in line.lower()]
    sys.exit(refused[0] if refused else f"{type(error).__name__} {' '.join(lines)[:200]}".strip())
for name in ("state_dict", "model"):
    if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
        loaded = loaded[name]
if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
    sys.exit("it does not hold a dictionary of tensors")
save_file({key: value.clone().contiguous() for key, value in loaded.items()}, sys.argv[2])
"""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors, by the keys of the reference network, and what its file says of itself."""

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def listed(self, key: str, default: list[Any]) -> list[Any]:
        """A list of numbers, or of names for "classes", from the metadata, which anybody can have written.

        Raises CheckpointError for anything else.
        """
        if key not in self.metadata:
            return default
        kind = str if key == "classes" else (int, float)
        try:
            found = json.loads(self.metadata[key])
        except ValueError:
            found = None
        if not isinstance(found, list) or not all(isinstance(each, kind) for each in found):
            shown = self.metadata[key][:40]
            raise CheckpointError(
                self.path, f"its metadata {key!r} is {shown!r}", "expected a JSON list", f"Give --{key} instead."
            )
        return found


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads `.safetensors` or `.pth` / `.pt`. Floating-point tensors are widened to float32.

    Raises CheckpointError if the file is missing, of another kind, damaged, or holds more than tensors.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(path, f"got the ending {path.suffix!r}", f"expected {', '.join(SUFFIXES)}", "Convert it.")
    if not path.is_file():
        raise CheckpointError(path, "no such file", "expected a checkpoint", "Check the path.")
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path, path)
    else:
        state, metadata = _read_pickle(path)
    widened: dict[str, Tensor] = {}
    for key, value in state.items():
        bare = key.removeprefix(PREFIX)
        if bare in widened:
            raise CheckpointError(
                path, f"holds {bare} with and without {PREFIX!r}", "expected it once", "Save one state_dict alone."
            )
        widened[bare] = value.float() if value.is_floating_point() else value
    return Checkpoint(path, widened, metadata)


def _read_safetensors(file: Path, named: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        return load_file(file), metadata
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            named, f"cannot be read ({error})", "expected a whole safetensors file", "Copy it anew."
        ) from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="msa2net-") as folder:
        converted = Path(folder) / "weights.safetensors"
        child = subprocess.run(
            [sys.executable, "-I", "-c", _CONVERT, str(path), str(converted)], capture_output=True, text=True
        )
        if child.returncode:
            last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
            raise CheckpointError(
                path,
                f"cannot be unpickled as weights only ({last})",
                "expected a state_dict of tensors and nothing else",
                "Save model.state_dict(), best as .safetensors.",
            )
        return _read_safetensors(converted, path)


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The sizes of the network that the checkpoint's keys and shapes belong to.

    Raises CheckpointError if a key that fixes a size is missing, as in another network's checkpoint.
    """
    state = checkpoint.state

    def size(key: str) -> int:
        """Length of the first axis."""
        if key not in state:
            raise CheckpointError(
                checkpoint.path,
                f"the key {key} is missing",
                "expected the keys of an MSA2Net state_dict",
                "Is this a checkpoint of another network, or of its encoder alone?",
            )
        if not state[key].numel():  # as many axes as expected is for `load_model` to check
            raise CheckpointError(checkpoint.path, f"{key} is empty", "expected weights")
        return state[key].shape[0] if state[key].ndim else 1

    if "decoder_2.tran_layer1.norm1.weight" in state:
        deep_decoder = "dual_attention"
    else:
        size("decoder_2.layer_lka_1.norm1.weight")
        deep_decoder = "lka"
    encoder = "backbone.backbone."
    width = size(f"{encoder}stages.0.blocks.0.conv.conv3_1x1.weight")
    heads = size(f"{encoder}stages.0.blocks.0.attn_block.attn.rel_pos.mlp.fc2.weight")
    depths = tuple(
        len({key.split(".")[5] for key in state if key.startswith(f"{encoder}stages.{stage}.blocks.")})
        for stage in range(4)
    )
    stem = (size(f"{encoder}stem.conv1.weight"), size(f"{encoder}stem.conv2.weight"))
    try:
        return ModelConfig(
            num_classes=size("decoder_0.last_layer.weight"),
            deep_decoder=deep_decoder,
            stem=stem,
            width=width,
            depths=depths,  # type: ignore[arg-type]  # four numbers by construction
            head_width=width // heads,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(checkpoint.path, f"its shapes give no network ({error})", "expected MSA2Net's") from error


def load_model(checkpoint: Checkpoint, config: ModelConfig | None = None) -> MSA2Net:
    """The network with the checkpoint's weights, in evaluation mode, float32 on the CPU.

    Strict: every key that an output depends on must be there in the right shape, and none may be left over.
    Only keys that no output depends on (see `is_unused`) may be absent, as in a bundle's weights; they are zero then.
    Raises CheckpointError listing missing, unexpected and mis-shaped keys.
    """
    config = config or config_of(checkpoint)
    with torch.device("meta"):
        model = MSA2Net(config)
    expected = model.state_dict()
    state = dict(checkpoint.state)
    for key, value in expected.items():
        if key not in state and is_unused(key, config):
            state[key] = torch.zeros(value.shape, dtype=value.dtype)
    _require_keys(checkpoint.path, state, expected, f"the {len(expected)} keys of the {config.deep_decoder} form")
    return _materialise(config, state)


def _require_keys(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], named: str) -> None:
    """Raises CheckpointError unless `found` has exactly the keys and shapes of `expected`, and finite values."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshaped = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & found.keys())
        if found[key].shape != expected[key].shape
    ]
    if missing or unexpected or misshaped:
        listed = "; ".join(
            f"{len(keys)} {name}: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}"
            for name, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
            if keys
        )
        raise CheckpointError(path, listed, f"expected exactly {named}")
    if broken := [key for key, value in found.items() if not torch.isfinite(value).all()]:
        shown = f"NaN or infinity in {', '.join(broken[:5])}{', …' if len(broken) > 5 else ''}"
        raise CheckpointError(path, shown, "expected finite weights", "Did the training diverge?")


def _materialise(config: ModelConfig, state: Mapping[str, Tensor]) -> MSA2Net:
    with torch.device("cpu"):
        model = MSA2Net(config)
    model.load_state_dict(state)
    return model.eval()


def load_encoder(model: MSA2Net, checkpoint: Checkpoint) -> None:
    """Fills the encoder from an ImageNet MaxViT's file, such as timm's `maxvit_rmlp_small_rw_224.sw_in1k`.

    Its keys are the encoder's without "backbone.backbone."; those of its classifier ("head.") are left out. Strict:
    raises CheckpointError listing missing, unexpected, mis-shaped or infinite ones, and the network is as it was.
    """
    prefix = "backbone.backbone."
    found = {
        prefix + key.removeprefix(prefix): value
        for key, value in checkpoint.state.items()
        if not key.startswith("head.")
    }
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
    _require_keys(checkpoint.path, found, expected, f"the {len(expected)} keys of this network's MaxViT encoder")
    model.load_state_dict(found, strict=False)


def used_state(model: MSA2Net) -> dict[str, Tensor]:
    """The entries that an output depends on, contiguous: what a bundle carries."""
    return {
        key: value.detach().contiguous()
        for key, value in model.state_dict().items()
        if not is_unused(key, model.config)
    }


def save_checkpoint(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes `.safetensors` beside `path` and renames it, so that a kill leaves the old file or the new one.

    The same tensors and metadata give the same bytes.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in state.items()}, partial, dict(metadata or {})
        )
        _sort_metadata(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _sort_metadata(file: Path) -> None:
    """safetensors writes metadata in an order that changes from call to call: here in that of its keys."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) > length:
                raise CheckpointError(file, f"its header grew to {len(text)} bytes", f"expected {length} at most")
            opened.seek(8)
            opened.write(text.ljust(length))


def rule_value(key: str, shape: tuple[int, ...], name: str | None = None) -> np.ndarray:
    """The value that the fill rule gives the state_dict entry `key`: float32, or int64 zero for a step counter.

    The array depends on the key and the shape alone, so that two implementations can be compared without a checkpoint.
    `name` is hashed instead of `key` if given.
    """
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    seed = int.from_bytes(hashlib.sha256((name or key).encode()).digest()[:8], "little")
    rng = np.random.Generator(np.random.PCG64(seed))
    if leaf in ("running_var", "temperature"):
        value = rng.uniform(0.5, 1.5, shape)
    elif leaf == "running_mean":
        value = 0.1 * rng.standard_normal(shape)
    elif leaf in ("gamma", "layer_scale_1", "layer_scale_2"):
        value = rng.uniform(0.1, 1.0, shape)
    elif leaf == "bias":
        value = 0.05 * rng.standard_normal(shape)
    elif len(shape) == 1:
        value = 1 + 0.1 * rng.standard_normal(shape)
    else:
        value = rng.standard_normal(shape) * math.sqrt(1 / math.prod(shape[1:]))
    return value.astype(np.float32)


def model_by_rule(config: ModelConfig) -> MSA2Net:
    """The network with weights by the fill rule, in evaluation mode: for timing and tests, it segments nothing."""
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in MSA2Net(config).state_dict().items()}
    return _materialise(config, {key: torch.from_numpy(rule_value(key, shape)) for key, shape in shapes.items()})
