"""What stands between products on the residual stream and in the gated MLP. CUDA only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from component.runner.gpu.launch import launch_options, pick, start_in_turn
from component.runner.layout import SMALL_BATCH, Layout


@triton.jit
def _add_norm_kernel(
    hidden, z, columns, bias, weight, out, t, d, sz, start, eps,
    ADD: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    cols = tl.arange(0, BD)
    inside = cols < d
    mask = (rows < t)[:, None] & inside[None, :]
    place = tl.load(columns + cols, mask=inside, other=0) if GATHER else start + cols
    g = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    start_in_turn(PDL)
    stream = hidden + rows[:, None] * d + cols[None, :]
    h = tl.load(stream, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        h += pick(z + rows * sz, place, mask, GATHER)
        if BIAS:
            h += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        kept = h.to(hidden.dtype.element_ty)
        tl.store(stream, kept, mask=mask)
        h = kept.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 1) / d + eps)
    normed = h * scale[:, None] * g[None, :]
    tl.store(out + rows[:, None] * d + cols[None, :], normed.to(out.dtype.element_ty), mask=mask)


def add_and_norm(
    hidden: Tensor, update: tuple[Tensor, Layout] | None, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """As runner/ops.py says."""
    tokens, d = hidden.shape
    out = torch.empty_like(hidden)
    z, columns, bias, start, gather = hidden, weight, None, 0, False
    if update is not None:
        z, layout = update
        columns, bias, gather = layout.columns, layout.bias, layout.starts is None
        start = 0 if layout.starts is None else layout.starts[0]
    width = triton.next_power_of_2(d)
    rows, most = (1, 16) if tokens <= SMALL_BATCH else (2, 8)
    _add_norm_kernel[(triton.cdiv(tokens, rows),)](
        hidden, z, columns, weight if bias is None else bias, weight, out, tokens, d, z.stride(0), start, eps,
        ADD=update is not None, GATHER=gather, BIAS=bias is not None, BT=rows, BD=width,
        num_warps=max(1, min(most, width // 256)), **launch_options(tokens),
    )  # fmt: skip
    return hidden, out


@triton.jit
def _silu_kernel(
    z, columns, bias, out, t, d, sz, split0, low0, high0, split1, low1, high1,
    GATHER: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * BT + tl.arange(0, BT)
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = cols < d
    if GATHER:
        at_gate = tl.load(columns + cols, mask=inside, other=0)
        at_up = tl.load(columns + d + cols, mask=inside, other=0)
    else:
        at_gate = cols + tl.where(cols < split0, low0, high0)
        at_up = cols + tl.where(cols < split1, low1, high1)
    start_in_turn(PDL)
    mask = (rows < t)[:, None] & inside[None, :]
    start = z + rows.to(tl.int64) * sz
    gate, up = pick(start, at_gate, mask, GATHER), pick(start, at_up, mask, GATHER)
    if BIAS:
        gate += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + d + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + rows.to(tl.int64)[:, None] * d + cols[None, :], y.to(out.dtype.element_ty), mask=mask)


def silu_product(z: Tensor, layout: Layout) -> Tensor:
    """As runner/ops.py says."""
    tokens, d = len(z), layout.sizes[0]
    out = z.new_empty(tokens, d)
    gate, up = layout.runs or ((0, 0, 0), (0, 0, 0))
    rows, cols, warps = (4, 1024, 8) if tokens > SMALL_BATCH else (1, 256, 4)
    _silu_kernel[(triton.cdiv(d, cols), triton.cdiv(tokens, rows))](
        z, layout.columns, z if layout.bias is None else layout.bias, out, tokens, d, z.stride(0), *gate, *up,
        GATHER=layout.runs is None, BIAS=layout.bias is not None, BT=rows, BD=cols, num_warps=warps,
        **launch_options(tokens),
    )  # fmt: skip
    return out
