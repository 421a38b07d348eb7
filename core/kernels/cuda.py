"""The CUDA library, built by `build.py`, from Python: as PyTorch's operator if it has been built for it, which needs
PyTorch 2.13 or newer, else its C API through ctypes.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msa2net.core.kernels import build
from msa2net.core.kernels.reference import GateWeights
from msa2net.errors import KernelError

_BUILD = "Build it: python -m msa2net.core.kernels.build"
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MOST_PIXELS = 1 << 30


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "height", "width")),
        *((name, ctypes.c_int32) for name in ("dtype", "tf32")),
    ]


class Map(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]


class Weights(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in (*GateWeights._fields, "norm_weight", "norm_bias")]


@cache
def library(folder: Path, name: str = build.LIBRARY) -> ctypes.CDLL:
    """The C API. Raises KernelError if it is not there, cannot be loaded, or was built of other sources."""
    path = folder / name
    if not path.exists():
        raise KernelError(path, "does not exist", "", _BUILD)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(path, f"cannot be loaded: {error}", "", _BUILD) from error
    loaded.masag_last_error.restype = loaded.masag_sources.restype = ctypes.c_char_p
    if (found := loaded.masag_sources().decode()) != build.digest():
        raise KernelError(path, f"was built of other sources ({found[:8] or 'unnamed'})", "", _BUILD)
    return loaded


@cache
def _operator(folder: Path) -> Any:
    """`torch.ops.msa2net.masag_cuda`; None with a PyTorch before 2.13, or if built with one. Raises KernelError."""
    if not build.has_stable_abi() or not (folder / build.BINDING).exists():
        return None
    library(folder, build.BINDING)
    torch.ops.load_library(folder / build.BINDING)  # type: ignore[no-untyped-call]
    return torch.ops.msa2net.masag_cuda


@cache
def unsupported(folder: Path, device: torch.device) -> str:
    """Why the library cannot compute on this device: it has nothing for the GPU, or the driver is too old; or ""."""
    loaded = library(folder)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return loaded.masag_last_error().decode() if loaded.masag_check_device() else ""


def why_not(x: Tensor) -> str | None:
    """Why the library cannot compute the gate of this map; None if it can. It is loaded to see."""
    try:
        loaded = library(build.folder())
    except KernelError as error:
        return str(error)
    if x.is_cuda == hasattr(loaded, "host_device"):  # a library that runs on the host, for tests
        return f"x is on {x.device}, it computes on {'a CPU' if x.is_cuda else 'a CUDA device'}"
    if x.numel() // x.shape[1] > MOST_PIXELS:
        return f"x has {x.numel() // x.shape[1]} pixels, it takes at most {MOST_PIXELS}"
    return unsupported(build.folder(), x.device) or None


def forward(
    x: Tensor, g: Tensor, weights: GateWeights, norm: tuple[Tensor, Tensor] | None = None, *, tf32: bool = False
) -> Tensor:
    """`reference.forward` by the library. The arguments are checked by the operator; what else fails, KernelError."""
    operator = _operator(build.folder())
    if operator is None:
        return forward_c(x, g, weights, norm, tf32=tf32)
    try:
        gate: Tensor = operator(x, g, *weights, *(norm or (None, None)), tf32)
    except RuntimeError as error:
        raise KernelError("kernel 'cuda'", str(error)) from error
    return gate


def forward_c(
    x: Tensor, g: Tensor, weights: GateWeights, norm: tuple[Tensor, Tensor] | None = None, *, tf32: bool = False
) -> Tensor:
    """The same through the C API, on torch's current stream."""
    loaded = library(build.folder())
    problem, size = Problem(*x.shape, _DTYPES[x.dtype], tf32), ctypes.c_size_t()

    def require(status: int) -> None:
        if status:
            raise KernelError("kernel 'cuda'", loaded.masag_last_error().decode())

    require(loaded.masag_workspace_size(ctypes.byref(problem), ctypes.byref(size)))
    workspace = x.new_empty(size.value, dtype=torch.uint8)
    layout = torch.contiguous_format if norm is None else torch.channels_last
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    maps = [Map(each.data_ptr(), (ctypes.c_int64 * 4)(*each.stride())) for each in (x, g)]
    pointers = Weights(*(each.data_ptr() for each in (*weights, *(norm or ()))))
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        require(
            loaded.masag_forward(
                *(ctypes.byref(each) for each in (problem, *maps, pointers)),
                *(ctypes.c_void_p(each.data_ptr()) for each in (out, workspace)),
                *(size, ctypes.c_void_p(stream)),
            )
        )
    return out
