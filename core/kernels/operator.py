"""`torch.ops.msa2net.masag`: the collapsed gate as one operator, whichever kernel computes it.

    gate = masag(x, g, *weights)                      (B, C, H, W)
    next = masag(x, g, *weights, *norm)               LayerNorm(g + gate), channels-last

On the CPU it is `reference`; on a GPU the Triton kernels, the CUDA library or `reference`, by `kernel`. torch.export
and torch.compile see one node. Gradients are `reference.backward`'s, whichever kernel ran forward.

B batch, C channels, H W rows and columns.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from msa2net.core.kernels import reference
from msa2net.core.kernels.reference import EPS, MOST_CHANNELS, GateWeights
from msa2net.errors import KernelError

KERNELS = ("auto", "reference", "triton", "cuda")
FUSED = ("triton", "cuda")  # in the order in which "auto" tries them
LEAST_CAPABILITY = (8, 0)  # bf16 and asynchronous copies
_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_log = logging.getLogger(__name__)


def why_not(kernel: str, x: Tensor) -> str | None:
    """Why a fused kernel, "triton" or "cuda", cannot compute the gate of this map; None if it can."""
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, it computes in float32, float16 and bfloat16"
    if x.shape[1] > MOST_CHANNELS:
        return f"x has {x.shape[1]} channels, it takes at most {MOST_CHANNELS}"
    if x.is_cuda and (found := torch.cuda.get_device_capability(x.device)) < LEAST_CAPABILITY:
        return f"the GPU has compute capability {found[0]}.{found[1]}, it needs {LEAST_CAPABILITY[0]}.0"
    if kernel == "cuda":
        from msa2net.core.kernels import cuda

        return cuda.why_not(x)
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install 'msa2net-edge[triton]'"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x is on {x.device}, it computes on a CUDA device"
    return None


@cache
def _say(message: str) -> None:
    """Once, not at every frame."""
    _log.info(message)


def select(kernel: str, x: Tensor) -> str:
    """The kernel that computes the gate of this map: "reference", "triton" or "cuda".

    "auto" takes the first of `FUSED` that can on a GPU, else the reference, and logs what it took and why not the
    others; on a CPU it takes the reference. Raises KernelError for a kernel asked for by name that cannot: it is never
    replaced by another.
    """
    if kernel not in KERNELS:
        raise KernelError("kernel", f"got {kernel!r}", f"expected one of {', '.join(KERNELS)}", "Choose one.")
    if kernel == "reference" or (kernel == "auto" and not x.is_cuda):
        return "reference"
    for candidate in FUSED if kernel == "auto" else (kernel,):
        reason = why_not(candidate, x)
        if reason is None:
            break
        if kernel != "auto":
            raise KernelError(f"kernel {kernel!r}", reason, "", "Or let kernel='auto' choose.")
        _say(f"kernel 'auto' passed {candidate} over: {reason}")
    else:
        candidate = "reference"
    if kernel == "auto":
        _say(f"kernel 'auto' took {candidate}")
    return candidate


def _check(x: Tensor, g: Tensor, weights: GateWeights, norm: tuple[Tensor, Tensor] | None) -> None:
    """Raises KernelError, naming the argument, for what no kernel may be given."""
    if x.ndim != 4 or 0 in x.shape:
        raise KernelError("x", f"got the shape {tuple(x.shape)}", "expected (B, C, H, W), none of them 0")
    if not x.is_floating_point():
        raise KernelError("x", f"got {x.dtype}", "expected a floating-point map")
    channels = x.shape[1]
    of = {
        "depthwise": (9, channels),
        "dilated": (9, channels, channels),
        "context": (3,),
        "projection": (channels, channels),
        "output": (channels, channels),
    }
    named = {"g": (g, x.shape)} | {
        name: (value, of.get(name, (channels,))) for name, value in weights._asdict().items()
    }
    if norm is not None:
        named |= {"norm_weight": (norm[0], (channels,)), "norm_bias": (norm[1], (channels,))}
    for name, (value, shape) in named.items():
        if value.shape != shape:
            raise KernelError(name, f"got the shape {tuple(value.shape)}", f"expected {tuple(shape)}")
        if value.dtype != x.dtype or value.device != x.device:
            got, expected = (f"{each.dtype} on {each.device}" for each in (value, x))
            raise KernelError(name, f"got {got}", f"expected {expected}, as x is", "Convert it.")
        if name != "g" and not value.is_contiguous():
            raise KernelError(name, f"got the strides {value.stride()}", "expected a contiguous tensor", "Copy it.")


def _pair(norm_weight: Tensor | None, norm_bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if norm_weight is None or norm_bias is None:
        if norm_weight is not norm_bias:
            raise KernelError("norm_weight, norm_bias", "got one of them", "expected both or neither")
        return None
    return norm_weight, norm_bias


@torch.library.custom_op("msa2net::masag", mutates_args=())
def masag(
    x: Tensor,
    g: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    dilated: Tensor,
    dilated_bias: Tensor,
    u: Tensor,
    context: Tensor,
    projection: Tensor,
    projection_bias: Tensor,
    output: Tensor,
    output_bias: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    kernel: str = "auto",
    tf32: bool = False,
) -> Tensor:
    """The gate of a skip map x and the decoder's map g, both (B, C, H, W) of any strides; see `reference.forward`.

    depthwise … output_bias   `reference.GateWeights`, contiguous, of x's dtype and device
    norm_weight, norm_bias    (C,), both or neither: the result is LayerNorm(g + gate), channels-last
    kernel                    one of `KERNELS`, see `select`
    tf32                      lets the fused kernels' products of float32 run in tf32; else they are IEEE

    Returns a new tensor of x's shape and dtype. Raises KernelError.
    """
    weights = GateWeights(
        depthwise, depthwise_bias, dilated, dilated_bias, u, context, projection, projection_bias, output, output_bias
    )
    norm = _pair(norm_weight, norm_bias)
    _check(x, g, weights, norm)
    chosen = select(kernel, x)
    if chosen == "reference":
        return reference.forward(x, g, weights, norm)
    fused = importlib.import_module(f"msa2net.core.kernels.{chosen}")
    result: Tensor = fused.forward(x, g, weights, norm, tf32=tf32)
    return result


@masag.register_fake
def _(x: Tensor, *rest: Any, **named: Any) -> Tensor:
    norm = rest[11] if len(rest) > 11 else named.get("norm_weight")
    layout = torch.contiguous_format if norm is None else torch.channels_last
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  # PyTorch passes it by name
    ctx.save_for_backward(*inputs[:14])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, g, *rest, norm_weight, norm_bias = ctx.saved_tensors
    weights = GateWeights(*rest)
    if norm_weight is None:
        grad_x, grad_g, grads = reference.backward(grad, x, g, weights)
        return grad_x, grad_g, *grads, None, None, None, None
    channels = [x.shape[1]]
    added = (g + reference.forward(x, g, weights)).permute(0, 2, 3, 1)
    _, mean, scale = torch.ops.aten.native_layer_norm(added, channels, norm_weight, norm_bias, EPS)
    grad_added, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.permute(0, 2, 3, 1), added, channels, mean, scale, norm_weight, norm_bias, [True] * 3
    )
    grad_added = grad_added.permute(0, 3, 1, 2)
    grad_x, grad_g, grads = reference.backward(grad_added, x, g, weights)
    return grad_x, grad_g + grad_added, *grads, grad_weight, grad_bias, None, None


masag.register_autograd(_backward, setup_context=_keep)
