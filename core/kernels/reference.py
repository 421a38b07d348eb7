"""MASAG collapsed, forward and backward, in plain PyTorch: what the fused kernels compute, in any dtype on any device.

The paper's gate (section 3.1) takes a skip map x and the decoder's map g. In its symbols, F is the fusion, S the two
selection maps, x' and g' the selected maps, x'' and g'' the modulated ones. Every BatchNorm is frozen, so an affine map
of its channels that is folded into the layer before it. What remains:

    t    = relu(depthwise3x3(x))                                 C channels
    h    = relu(dilated3x3(t))                                   C channels, read by the next line only
    s    = sigmoid(u . h + alpha mean_c(g) + beta max_c(g) + gamma)    the softmax over two maps is a sigmoid of their
                                                                 difference, which is affine in h; `collapse` gives u
    x'   = x (1 + s),  g' = g (2 - s)
    m    = x'' g'' = (sigmoid(g') x') (sigmoid(x') g') = silu(x') silu(g')
    w    = sigmoid(P m + p)                                      1 x 1 convolution
    gate = O (w x) + o                                           1 x 1 convolution

In the decoder the gate's result is added to g, and a LayerNorm over the channels follows: with `norm` the operator
gives this, laid out for the tokens that come next.

B batch, C channels, H W rows and columns, N = B H W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from msa2net.core.masag import MASAG

EPS = 1e-5  # of the LayerNorm
MOST_CHANNELS = 384  # that the fused kernels take: the widest gate of the released network


class GateWeights(NamedTuple):
    """The collapsed gate's weights, in the order in which the operator takes them; all of one dtype."""

    depthwise: Tensor  # (9, C), tap by tap, row by row
    depthwise_bias: Tensor  # (C,)
    dilated: Tensor  # (9, C, C): tap, output channel, input channel
    dilated_bias: Tensor  # (C,)
    u: Tensor  # (C,)
    context: Tensor  # (3,): alpha, beta, gamma
    projection: Tensor  # (C, C): output, input channel
    projection_bias: Tensor  # (C,)
    output: Tensor  # (C, C)
    output_bias: Tensor  # (C,)


def selection(gate: MASAG) -> tuple[Tensor, Tensor]:
    """u (C,) and context (3,) of a gate whose BatchNorms are frozen, or folded and gone; float64, differentiable.

    With the fusion's two branches  l = A h + a  and  c = q1 mean(g) + q2 max(g) + q0,  its BatchNorm  D (l + c 1) + d
    and the selection's rows S1, S2 with biases s1, s2, let  v = D (S1 - S2).  The two selection maps differ by

        v . (A h + a) + (v . 1) c + (S1 - S2) . d + s1 - s2
        = u . h + alpha mean(g) + beta max(g) + gamma,   u = A^T v,  (alpha, beta) = (v . 1) (q1, q2),

    and gamma is the rest: one C-vector and three numbers for C x C + 2 C weights.
    """
    matrix, a = _folded(*gate.multi.local.proj)
    q, q0 = _folded(*gate.multi.global_.proj)
    scale, d = affine(gate.multi.bn)
    rows, bias = _folded(gate.selection)
    difference = rows.flatten(1)[0] - rows.flatten(1)[1]
    v = scale * difference
    gamma = v @ a + v.sum() * q0[0] + (difference * d).sum() + bias[0] - bias[1]
    return matrix.flatten(1).T @ v, torch.cat([v.sum() * q.flatten(), gamma[None]])


def collapse(gate: MASAG) -> GateWeights:
    """The weights of a gate whose BatchNorms are frozen, folded in float64 and rounded once to the gate's dtype.

    Differentiable, so that a fine-tune reaches the gate's own parameters.
    """
    first, first_norm, _, second, second_norm, _ = gate.multi.local.dconv
    depthwise, depthwise_bias = _folded(first, first_norm)
    dilated, dilated_bias = _folded(second, second_norm)
    projection, projection_bias = _folded(gate.proj, gate.bn)
    output, output_bias = _folded(gate.conv_block[0], gate.bn_2)
    folded = (
        depthwise.flatten(1).T,
        depthwise_bias,
        dilated.flatten(2).permute(2, 0, 1),
        dilated_bias,
        *selection(gate),
        projection.flatten(1),
        projection_bias,
        output.flatten(1),
        output_bias,
    )
    dtype = gate.proj.weight.dtype
    return GateWeights(*(each.to(dtype).contiguous() for each in folded))


def affine(norm: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a frozen BatchNorm, float64; of what was folded before and left an Identity, 1 and 0."""
    if isinstance(norm, torch.nn.Identity):
        one = torch.ones((), dtype=torch.float64)  # without axes: these mix with tensors of any device
        return one, torch.zeros_like(one)
    assert isinstance(norm, torch.nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _folded(layer: torch.nn.Module, norm: torch.nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of a convolution and the BatchNorm after it."""
    assert isinstance(layer, torch.nn.Conv2d)
    assert layer.bias is not None
    weight, bias = layer.weight.double(), layer.bias.double()
    if norm is None:
        return weight, bias
    scale, shift = affine(norm)
    return (weight.transpose(0, -1) * scale).transpose(0, -1), bias * scale + shift


class _Steps(NamedTuple):
    """What the forward pass makes on the way, (B, C, H, W) but for s, (B, 1, H, W)."""

    t: Tensor
    h: Tensor
    s: Tensor
    x_selected: Tensor
    g_selected: Tensor
    m: Tensor
    w: Tensor
    gate: Tensor


def _steps(x: Tensor, g: Tensor, weights: GateWeights) -> _Steps:
    channels = x.shape[1]
    t = F.relu(F.conv2d(x, _depthwise(weights), weights.depthwise_bias, padding=1, groups=channels))
    h = F.relu(F.conv2d(t, _dilated(weights), weights.dilated_bias, padding=2, dilation=2))
    alpha, beta, gamma = weights.context.unbind()
    context = alpha * g.mean(1, keepdim=True) + beta * g.amax(1, keepdim=True) + gamma
    s = torch.sigmoid(F.conv2d(h, weights.u.view(1, -1, 1, 1)) + context)
    x_selected, g_selected = x * (1 + s), g * (2 - s)
    m = F.silu(x_selected) * F.silu(g_selected)
    w = torch.sigmoid(F.conv2d(m, weights.projection[..., None, None], weights.projection_bias))
    gate = F.conv2d(w * x, weights.output[..., None, None], weights.output_bias)
    return _Steps(t, h, s, x_selected, g_selected, m, w, gate)


def _depthwise(weights: GateWeights) -> Tensor:
    return weights.depthwise.T.reshape(-1, 1, 3, 3)


def _dilated(weights: GateWeights) -> Tensor:
    channels = weights.u.shape[0]
    return weights.dilated.view(3, 3, channels, channels).permute(2, 3, 0, 1)


def forward(x: Tensor, g: Tensor, weights: GateWeights, norm: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The gate of x and g (B, C, H, W), in their shape; with `norm` (weight and bias (C,)), LayerNorm(g + gate).

    What is normalised comes in the channels-last layout, (B, H, W, C) in memory.
    """
    gate = _steps(x, g, weights).gate
    if norm is None:
        return gate.contiguous()
    normalised = F.layer_norm((g + gate).permute(0, 2, 3, 1), g.shape[1:2], *norm, EPS)
    return normalised.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def backward(grad: Tensor, x: Tensor, g: Tensor, weights: GateWeights) -> tuple[Tensor, Tensor, GateWeights]:
    """Gradients of x, g and the weights from that of the gate; the forward pass's maps are computed again, not kept.

    With bars for gradients, and silu' (z) = sigmoid(z) (1 + z (1 - sigmoid(z))):

        w x  <- O^T gate,  w <- (w x)^ x,  P m + p <- w^ w (1 - w),  m <- P^T ...,
        x'   <- m^ silu(g') silu'(x'),  g' <- m^ silu(x') silu'(g'),
        s    <- sum_c (x'^ x - g'^ g),  z <- s^ s (1 - s),  h <- u z^,  and back through the two convolutions;
        the mean gives each channel of g alpha z^ / C, the maximum beta z^ to its channel (shared among equal ones).
    """
    t, h, s, x_selected, g_selected, m, w, _ = _steps(x, g, weights)
    channels = x.shape[1]
    alpha, beta, _ = weights.context.unbind()

    d_wx, d_output = _back_1x1(grad, w * x, weights.output)
    d_logits = d_wx * x * w * (1 - w)
    d_m, d_projection = _back_1x1(d_logits, m, weights.projection)
    d_x_selected = d_m * F.silu(g_selected) * _silu_slope(x_selected)
    d_g_selected = d_m * F.silu(x_selected) * _silu_slope(g_selected)
    d_z = (d_x_selected * x - d_g_selected * g).sum(1, keepdim=True) * s * (1 - s)  # (B, 1, H, W)

    d_h = d_z * weights.u.view(1, -1, 1, 1) * (h > 0)
    d_t, d_dilated, d_dilated_bias = torch.ops.aten.convolution_backward(
        d_h, t, _dilated(weights), [channels], [1, 1], [2, 2], [2, 2], False, [0, 0], 1, [True] * 3
    )
    d_x, d_depthwise, d_depthwise_bias = torch.ops.aten.convolution_backward(
        d_t * (t > 0), x, _depthwise(weights), [channels], [1, 1], [1, 1], [1, 1], False, [0, 0], channels, [True] * 3
    )
    largest = g.amax(1, keepdim=True)
    is_largest = (g == largest).to(g.dtype)
    d_x = d_x + d_wx * w + d_x_selected * (1 + s)
    d_g = d_g_selected * (2 - s) + d_z * (alpha / channels + beta * is_largest / is_largest.sum(1, keepdim=True))
    return (
        d_x,
        d_g,
        GateWeights(
            depthwise=d_depthwise.flatten(1).T.contiguous(),
            depthwise_bias=d_depthwise_bias,
            dilated=d_dilated.permute(2, 3, 0, 1).reshape(9, channels, channels),
            dilated_bias=d_dilated_bias,
            u=(d_z * h).sum((0, 2, 3)),
            context=torch.stack([(d_z * g.mean(1, keepdim=True)).sum(), (d_z * largest).sum(), d_z.sum()]),
            projection=d_projection,
            projection_bias=d_logits.sum((0, 2, 3)),
            output=d_output,
            output_bias=grad.sum((0, 2, 3)),
        ),
    )


def _back_1x1(grad: Tensor, read: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of a 1 x 1 convolution: the gradient of what it read, and of its matrix (output, input channel)."""
    back = F.conv2d(grad, matrix.T[..., None, None])
    return back, grad.transpose(0, 1).flatten(1) @ read.transpose(0, 1).flatten(1).T


def _silu_slope(z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))
