"""The collapsed gate in three Triton kernels, see `reference` for its equations.

1. `_context_kernel`    t = relu(depthwise3x3(x)), and alpha mean(g) + beta max(g) + gamma of every pixel
2. `_dilated_kernel`    u . relu(dilated3x3(t)): the dilated convolution as a product of N pixels by 9 C inputs. Its C
                        channels stay on the chip; of each tile of channels one number a pixel is written
3. `_gate_kernel`       sums these, selects, modulates, and runs both 1 x 1 convolutions with what is between them on
                        the chip; with `norm` also the residual sum and the LayerNorm

Sums are in fp32 whatever the dtype: of 9 C products in fp16 the last would be lost. fp32 means IEEE unless tf32 is
asked for. Offsets are int64: a batch of large maps passes 2^31 elements. Every sum has one order, so equal inputs give
equal bits.

B batch, C channels, H W rows and columns, N = B H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from msa2net.core.kernels.reference import EPS, GateWeights

# Configurations -----------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """Tile sizes of a kernel, and how it runs: `pixels` by `channels`, `inputs` of a product at a time."""

    pixels: int
    channels: int
    inputs: int = 0
    num_warps: int = 4
    num_stages: int = 3


# From the smallest tiles to the largest: `pick` takes the largest that still gives every multiprocessor a program.
CONTEXT = (Config(16, 16), Config(32, 32), Config(64, 32), Config(128, 16))
DILATED = (
    Config(16, 32, 64, 2, 4),  # `inputs` of two bytes; half as many of fp32
    Config(32, 32, 64, 4, 4),
    Config(32, 64, 64, 4, 4),
    Config(64, 64, 64, 4, 3),
    Config(128, 64, 64, 8, 3),
    Config(128, 128, 32, 8, 3),
)
# By kind of product, see `Case`; `channels` are those of the map between the two products that are made at a time.
GATE = {
    "ieee": (Config(16, 16, 0, 8, 2), Config(16, 32, 0, 8, 2), Config(32, 32, 0, 8, 2)),
    "tf32": (Config(16, 16, 0, 8, 1), Config(16, 32, 0, 8, 2), Config(32, 32, 0, 8, 2)),
    "half": (Config(16, 16, 0, 8, 2), Config(16, 32, 0, 4, 2), Config(32, 32, 0, 8, 2), Config(64, 16, 0, 8, 2)),
}
_HELD = 24  # sums that a thread of `_gate_kernel` can hold in registers
_SLACK = 12_288  # bytes of shared memory beyond the tiles of products: for sums across threads


class Case(NamedTuple):
    """What decides, besides its size, how a gate is computed: `capability` is 86 for 8.6."""

    channels: int
    dtype: torch.dtype
    tf32: bool
    capability: int

    @property
    def kind(self) -> str:
        """Of its products: "ieee" of fp32, "tf32", or "half" for fp16 and bf16."""
        return "half" if self.dtype.itemsize == 2 else "tf32" if self.tf32 else "ieee"


def shared_memory(capability: int) -> int:
    """The most bytes of shared memory that a program may have."""
    return {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448, 110: 232_448}.get(capability, 101_376)


def dilated_configs(case: Case) -> tuple[Config, ...]:
    """Those of `DILATED` that run without spilling: IEEE sums of fp32 use no tensor core, and more registers."""
    wide = case.dtype == torch.float32
    largest = 8192 if case.kind == "ieee" else 16_384
    fitting = (each for each in DILATED if each.pixels * each.channels <= largest)
    return tuple(each._replace(inputs=each.inputs // (2 if wide else 1)) for each in fitting)


def gate_configs(case: Case) -> tuple[Config, ...]:
    """Those of `GATE` whose sums fit the registers, and whose tiles of both matrices fit the shared memory.

    One for each number of pixels, that of the most channels.
    """
    count, size = chunks_of(case.channels)
    channels, room = count * size, (shared_memory(case.capability) - _SLACK) // case.dtype.itemsize
    fitting = (
        each
        for each in GATE[case.kind]
        if each.pixels * channels <= _HELD * 32 * each.num_warps
        and (2 * each.channels + each.pixels) * channels <= room
    )
    return tuple({each.pixels: each for each in fitting}.values())


def options(config: Config) -> dict[str, int]:
    """Of the compiler."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def pick(configs: Sequence[Config], pixels: int, channels: int, processors: int) -> Config:
    """The largest tiles that give `processors` a program each; the smallest, if none do."""
    chosen = configs[0]
    for config in configs:
        if triton.cdiv(pixels, config.pixels) * triton.cdiv(channels, config.channels) >= processors:
            chosen = config
    return chosen


def chunks_of(channels: int) -> tuple[int, int]:
    """(number, size) of the parts that a pixel's channels are held in: one or three powers of two.

    The network's widths are three times one (96, 192, 384); whole, 384 would be padded to 512.
    """
    choices = [(count, max(16, triton.next_power_of_2(triton.cdiv(channels, count)))) for count in (1, 3)]
    return min(choices, key=lambda choice: choice[0] * choice[1])


# Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def _relu(z):
    return tl.where(z < 0, 0.0, z)  # NaN stays NaN; tl.maximum would hide it


@triton.jit
def _silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def _context_kernel(
    x_ptr,  # (B, C, H, W), strides below
    g_ptr,  # (B, C, H, W)
    weight_ptr,  # (9, C)
    bias_ptr,  # (C,)
    context_weight_ptr,  # (3,): alpha, beta, gamma
    t_ptr,  # out: (N, C)
    context_ptr,  # out: (N,) fp32
    N,
    C,
    H,
    W,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < N
    image, row, column = o_p // (H * W), o_p // W % H, o_p % W
    o_c = tl.arange(0, BLOCK_C)
    if tl.program_id(1) < tl.num_programs(1) - 1:
        o_c += tl.program_id(1) * BLOCK_C
        m_c = o_c < C
        b_x = x_ptr + image[:, None] * stride_xb + o_c[None, :].to(tl.int64) * stride_xc
        acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for tap in range(9):
            near_row, near_column = row + (tap // 3 - 1), column + (tap % 3 - 1)
            inside = m_p & (near_row >= 0) & (near_row < H) & (near_column >= 0) & (near_column < W)
            place = near_row * stride_xh + near_column * stride_xw
            value = tl.load(b_x + place[:, None], mask=inside[:, None] & m_c[None, :], other=0.0)
            weight = tl.load(weight_ptr + tap * C + o_c, mask=m_c, other=0.0)
            acc += value.to(tl.float32) * weight.to(tl.float32)[None, :]
        acc += tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        tl.store(t_ptr + o_p[:, None] * C + o_c[None, :], _relu(acc), mask=m_p[:, None] & m_c[None, :])
    else:  # the last programs: one number a pixel, from all channels of g
        b_g = g_ptr + image * stride_gb + row * stride_gh + column * stride_gw
        total = tl.zeros([BLOCK_P], tl.float32)
        largest = tl.full([BLOCK_P], float("-inf"), tl.float32)
        for c in range(0, C, BLOCK_C):
            m_c = c + o_c < C
            place = (c + o_c).to(tl.int64) * stride_gc
            value = tl.load(b_g[:, None] + place[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            total += tl.sum(value, 1)
            largest = tl.maximum(largest, tl.max(tl.where(m_c[None, :], value, float("-inf")), 1))
        alpha = tl.load(context_weight_ptr).to(tl.float32)
        beta = tl.load(context_weight_ptr + 1).to(tl.float32)
        gamma = tl.load(context_weight_ptr + 2).to(tl.float32)
        # A NaN that the maximum hid is in the sum.
        tl.store(context_ptr + o_p, alpha * (total / C) + beta * largest + gamma, mask=m_p)


@triton.jit
def _dilated_kernel(
    t_ptr,  # (N, C)
    weight_ptr,  # (9, C, C): tap, output channel, input channel
    bias_ptr,  # (C,)
    u_ptr,  # (C,)
    partial_ptr,  # out: (tiles of channels, N) fp32
    N,
    C,
    H,
    W,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < N
    row, column = o_p // W % H, o_p % W
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    parts = tl.cdiv(C, BLOCK_K)
    for step in range(9 * parts):  # one loop over taps and inputs, so that loads run ahead across both
        tap, k = step // parts, step % parts * BLOCK_K + o_k
        down, right = (tap // 3 - 1) * 2, (tap % 3 - 1) * 2
        inside = m_p & (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W)
        near = (o_p + down * W + right)[:, None] * C + k[None, :]
        value = tl.load(t_ptr + near, mask=inside[:, None] & (k < C)[None, :], other=0.0)
        place = (tap * C + o_c[None, :]) * C + k[:, None]  # 9 C C stays below 2^31
        weight = tl.load(weight_ptr + place, mask=m_c[None, :] & (k < C)[:, None], other=0.0)
        acc = tl.dot(value, weight, acc, input_precision=PRECISION)
    bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    partial = tl.sum(_relu(acc + bias[None, :]) * u[None, :], 1)
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * N + o_p, partial, mask=m_p)


@triton.jit
def _modulated(x_ptr, g_ptr, b_x, b_g, s, c, C, m_p, stride_xc, stride_gc, BLOCK_C: tl.constexpr):
    """silu(x') silu(g') of the channels from c on, in the dtype of the maps."""
    o_c = c + tl.arange(0, BLOCK_C)
    mask = m_p[:, None] & (o_c < C)[None, :]
    x = tl.load(x_ptr + b_x[:, None] + o_c[None, :].to(tl.int64) * stride_xc, mask=mask, other=0.0)
    g = tl.load(g_ptr + b_g[:, None] + o_c[None, :].to(tl.int64) * stride_gc, mask=mask, other=0.0)
    product = _silu(x.to(tl.float32) * (1 + s)[:, None]) * _silu(g.to(tl.float32) * (2 - s)[:, None])
    return product.to(x.dtype)


@triton.jit
def _turned(matrix_ptr, c, k, C, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile (inputs, outputs) of a matrix (output, input channel): inputs from k on, outputs from c on."""
    o_c, o_k = c + tl.arange(0, BLOCK_C), k + tl.arange(0, BLOCK_K)
    return tl.load(
        matrix_ptr + o_c[None, :] * C + o_k[:, None], mask=(o_c < C)[None, :] & (o_k < C)[:, None], other=0.0
    )


@triton.jit
def _residual(acc, c, C, g_ptr, b_g, m_p, bias_ptr, stride_gc, BLOCK_C: tl.constexpr, NORM: tl.constexpr):
    """The product's bias added, and with NORM g; beyond the last channel 0."""
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    acc += tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if NORM:
        place = g_ptr + b_g[:, None] + o_c[None, :].to(tl.int64) * stride_gc
        acc += tl.load(place, mask=m_p[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    return acc


@triton.jit
def _squares(acc, mean, c, C, BLOCK_C: tl.constexpr):
    """Sum over the channels of the squared distance to the mean."""
    m_c = c + tl.arange(0, BLOCK_C) < C
    away = tl.where(m_c[None, :], acc - mean[:, None], 0.0)
    return tl.sum(away * away, 1)


@triton.jit
def _put(
    acc,
    c,
    C,
    mean,
    scale,
    norm_ptr,
    shift_ptr,
    out_ptr,
    b_out,
    m_p,
    stride_oc,
    BLOCK_C: tl.constexpr,
    NORM: tl.constexpr,
):
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if NORM:
        weight = tl.load(norm_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        bias = tl.load(shift_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        acc = (acc - mean[:, None]) * scale[:, None] * weight[None, :] + bias[None, :]
    place = out_ptr + b_out[:, None] + o_c[None, :].to(tl.int64) * stride_oc
    tl.store(place, acc, mask=m_p[:, None] & m_c[None, :])


@triton.jit
def _gate_kernel(
    x_ptr,  # (B, C, H, W), strides below
    g_ptr,  # (B, C, H, W)
    partial_ptr,  # (TILES, N) fp32
    context_ptr,  # (N,) fp32
    projection_ptr,  # (C, C): output, input channel
    projection_bias_ptr,  # (C,)
    output_ptr,  # (C, C)
    output_bias_ptr,  # (C,)
    norm_ptr,  # (C,), the LayerNorm's weight and bias; not read without NORM
    shift_ptr,
    out_ptr,  # out: (B, C, H, W), strides below
    N,
    C,
    H,
    W,
    TILES,
    EPSILON,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    NORM: tl.constexpr,
    CHUNKS: tl.constexpr,  # 1 or 3, of a pixel's channels, each of
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < N
    image, row, column = o_p // (H * W), o_p // W % H, o_p % W
    b_x = image * stride_xb + row * stride_xh + column * stride_xw
    b_g = image * stride_gb + row * stride_gh + column * stride_gw
    b_out = image * stride_ob + row * stride_oh + column * stride_ow

    s = tl.load(context_ptr + o_p, mask=m_p, other=0.0)
    b_partial = partial_ptr + o_p
    for _ in range(TILES):
        s += tl.load(b_partial, mask=m_p, other=0.0)
        b_partial += N
    s = tl.sigmoid(s)
    m_0 = _modulated(x_ptr, g_ptr, b_x, b_g, s, 0, C, m_p, stride_xc, stride_gc, CHUNK)
    out_0 = tl.zeros([BLOCK_P, CHUNK], tl.float32)
    if CHUNKS == 3:
        m_1 = _modulated(x_ptr, g_ptr, b_x, b_g, s, CHUNK, C, m_p, stride_xc, stride_gc, CHUNK)
        m_2 = _modulated(x_ptr, g_ptr, b_x, b_g, s, 2 * CHUNK, C, m_p, stride_xc, stride_gc, CHUNK)
        out_1 = tl.zeros([BLOCK_P, CHUNK], tl.float32)
        out_2 = tl.zeros([BLOCK_P, CHUNK], tl.float32)

    for c in range(0, C, BLOCK_C):  # these channels of w x: made by one product, read by the next
        acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        acc = tl.dot(m_0, _turned(projection_ptr, c, 0, C, BLOCK_C, CHUNK), acc, input_precision=PRECISION)
        if CHUNKS == 3:
            acc = tl.dot(m_1, _turned(projection_ptr, c, CHUNK, C, BLOCK_C, CHUNK), acc, input_precision=PRECISION)
            acc = tl.dot(m_2, _turned(projection_ptr, c, 2 * CHUNK, C, BLOCK_C, CHUNK), acc, input_precision=PRECISION)
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        acc += tl.load(projection_bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        place = x_ptr + b_x[:, None] + o_c[None, :].to(tl.int64) * stride_xc
        x = tl.load(place, mask=m_p[:, None] & m_c[None, :], other=0.0)
        weighted = (tl.sigmoid(acc) * x.to(tl.float32)).to(x.dtype)
        out_0 = tl.dot(weighted, _turned(output_ptr, 0, c, C, CHUNK, BLOCK_C), out_0, input_precision=PRECISION)
        if CHUNKS == 3:
            out_1 = tl.dot(weighted, _turned(output_ptr, CHUNK, c, C, CHUNK, BLOCK_C), out_1, input_precision=PRECISION)
            out_2 = tl.dot(
                weighted, _turned(output_ptr, 2 * CHUNK, c, C, CHUNK, BLOCK_C), out_2, input_precision=PRECISION
            )

    out_0 = _residual(out_0, 0, C, g_ptr, b_g, m_p, output_bias_ptr, stride_gc, CHUNK, NORM)
    if CHUNKS == 3:
        out_1 = _residual(out_1, CHUNK, C, g_ptr, b_g, m_p, output_bias_ptr, stride_gc, CHUNK, NORM)
        out_2 = _residual(out_2, 2 * CHUNK, C, g_ptr, b_g, m_p, output_bias_ptr, stride_gc, CHUNK, NORM)
    mean = s
    scale = s
    if NORM:
        mean = tl.sum(out_0, 1)
        if CHUNKS == 3:
            mean += tl.sum(out_1, 1) + tl.sum(out_2, 1)
        mean = mean / C
        scale = _squares(out_0, mean, 0, C, CHUNK)
        if CHUNKS == 3:
            scale += _squares(out_1, mean, CHUNK, C, CHUNK) + _squares(out_2, mean, 2 * CHUNK, C, CHUNK)
        scale = 1 / tl.sqrt(scale / C + EPSILON)
    _put(out_0, 0, C, mean, scale, norm_ptr, shift_ptr, out_ptr, b_out, m_p, stride_oc, CHUNK, NORM)
    if CHUNKS == 3:
        _put(out_1, CHUNK, C, mean, scale, norm_ptr, shift_ptr, out_ptr, b_out, m_p, stride_oc, CHUNK, NORM)
        _put(out_2, 2 * CHUNK, C, mean, scale, norm_ptr, shift_ptr, out_ptr, b_out, m_p, stride_oc, CHUNK, NORM)


# Launcher -----------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One kernel of a gate: what the benchmark times and the ahead-of-time compilation compiles."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config


def launches(
    x: Tensor,
    g: Tensor,
    weights: GateWeights,
    norm: tuple[Tensor, Tensor] | None,
    out: Tensor,
    tf32: bool,
    configs: tuple[Config, Config, Config],
) -> Iterator[Launch]:
    """The gate's kernels in their order, with the memory between them."""
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    context_config, dilated_config, gate_config = configs
    tiles = triton.cdiv(channels, dilated_config.channels)
    t = x.new_empty(pixels, channels)
    context, partial = (x.new_empty(shape, dtype=torch.float32) for shape in ((pixels,), (tiles, pixels)))
    sizes = (pixels, channels, height, width)
    precision = "tf32" if tf32 else "ieee"
    yield Launch(
        _context_kernel,
        (triton.cdiv(pixels, context_config.pixels), triton.cdiv(channels, context_config.channels) + 1),
        (
            x,
            g,
            weights.depthwise,
            weights.depthwise_bias,
            weights.context,
            t,
            context,
            *sizes,
            *x.stride(),
            *g.stride(),
        ),
        {"BLOCK_P": context_config.pixels, "BLOCK_C": context_config.channels},
        context_config,
    )
    yield Launch(
        _dilated_kernel,
        (triton.cdiv(pixels, dilated_config.pixels), tiles),
        (t, weights.dilated, weights.dilated_bias, weights.u, partial, *sizes),
        {
            "BLOCK_P": dilated_config.pixels,
            "BLOCK_C": dilated_config.channels,
            "BLOCK_K": dilated_config.inputs,
            "PRECISION": precision,
        },
        dilated_config,
    )
    count, size = chunks_of(channels)
    matrices = (weights.projection, weights.projection_bias, weights.output, weights.output_bias)
    yield Launch(
        _gate_kernel,
        (triton.cdiv(pixels, gate_config.pixels),),
        (
            *(x, g, partial, context, *matrices, *(norm or (weights.u, weights.u)), out),
            *(*sizes, tiles, EPS, *x.stride(), *g.stride(), *out.stride()),
        ),
        {
            "NORM": norm is not None,
            "CHUNKS": count,
            "CHUNK": size,
            "BLOCK_P": gate_config.pixels,
            "BLOCK_C": gate_config.channels,
            "PRECISION": precision,
        },
        gate_config,
    )


def forward(
    x: Tensor,
    g: Tensor,
    weights: GateWeights,
    norm: tuple[Tensor, Tensor] | None = None,
    *,
    tf32: bool = False,
    configs: tuple[Config, Config, Config] | None = None,
) -> Tensor:
    """`reference.forward` on a GPU, or on the CPU in Triton's interpreter. The arguments are checked by the operator.

    tf32      products of fp32 in tf32, 10 bits of mantissa, where the GPU has them
    configs   of the three kernels; chosen by the number of pixels and of multiprocessors if None
    """
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    if configs is None:
        processors, capability = 1, 120  # the interpreter's: the least shared memory
        if x.is_cuda:
            properties = torch.cuda.get_device_properties(x.device)
            processors, capability = properties.multi_processor_count, properties.major * 10 + properties.minor
        case = Case(channels, x.dtype, tf32, capability)
        configs = (
            pick(CONTEXT, pixels, channels, processors),
            pick(dilated_configs(case), pixels, channels, processors),
            pick(gate_configs(case), pixels, 1, processors),
        )
    layout = torch.contiguous_format if norm is None else torch.channels_last
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    with torch.cuda.device(x.device) if x.is_cuda else torch.no_grad():
        for each in launches(x, g, weights, norm, out, tf32, configs):
            each.kernel[each.grid](*each.arguments, **each.constants, **options(each.config))
    return out
