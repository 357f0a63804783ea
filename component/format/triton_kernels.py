"""Triton kernels of the pivoted layer, for CUDA. Import it at the first call that needs one, never before.

`take_columns` moves whole matrices: on an H100 at 0.95 to 0.97 of the speed of a copy. `one_token` reads every weight
once, and is bound by that.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

# by name: the loader of `trust_remote_code` demands every package that a file imports, where there is no GPU too
triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

ROWS, COLUMNS = 2, 8192  # of a matrix, that one program puts in order


# ---------------------------------------------------------------- columns of a matrix


@triton.jit(do_not_specialize=["tokens"])
def _take_columns(
    z, perm, add, out, tokens, d_out, stride_z, stride_add,
    HAS_ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pieces = tl.cdiv(d_out, COLUMNS)
    first = tl.program_id(0) // pieces * ROWS  # programs side by side share rows, of which they read whole lines
    j = tl.program_id(0) % pieces * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(perm + j, mask=j < d_out, other=0).to(tl.int32)
    wide: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    for i in tl.static_range(ROWS):
        t = (first + i).to(tl.int64)
        inside = (j < d_out) & (t < tokens)
        value = tl.load(z + t * stride_z + source, mask=inside)
        if HAS_ADD:
            value = value.to(wide) + tl.load(add + t * stride_add + j, mask=inside).to(wide)
        tl.store(out + t * d_out + j, value.to(out.dtype.element_ty), mask=inside)


def take_columns(z: Tensor, perm: Tensor, add: Tensor | None = None) -> Tensor:
    """(add +) z[:, perm]: (T, d_out), in the wider dtype of the two.

    z: (T, d_out), perm: (d_out,) int32 or int64, add: (T, d_out) or None; z and add with unit column strides. Any
    order is right, and one like a layer's is fast: two runs of columns, merged, whose neighbours lie close together.
    """
    tokens, d_out = z.shape
    dtype = z.dtype if add is None else torch.promote_types(z.dtype, add.dtype)
    out = torch.empty(tokens, d_out, device=z.device, dtype=dtype)
    if out.numel() == 0:
        return out
    columns = min(COLUMNS, triton.next_power_of_2(d_out))
    _take_columns[(triton.cdiv(tokens, ROWS) * triton.cdiv(d_out, columns),)](
        z, perm, out if add is None else add, out, tokens, d_out, z.stride(0), 0 if add is None else add.stride(0),
        HAS_ADD=add is not None, ROWS=ROWS, COLUMNS=columns, num_warps=max(1, columns // 512),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- the layer for one token


@triton.jit
def _rows_times(x, row, used, inner, ROWS: tl.constexpr, INNER: tl.constexpr, WAIT: tl.constexpr):
    """(ROWS,) in float32: weight rows at the pointers row: (ROWS,), times x: (inner,). A strip is always on its way.

    WAIT: x comes from the kernel before, which may still run; weights do not.
    """
    k = tl.arange(0, INNER)
    weight = tl.load(row[:, None] + k[None, :], mask=used[:, None] & (k < inner)[None, :], other=0.0)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((ROWS, INNER // 8), tl.float32)  # a thread reads 8 numbers at once, and adds them up itself
    for start in range(0, inner, INNER):
        ahead = start + INNER + k
        following = tl.load(row[:, None] + ahead[None, :], mask=used[:, None] & (ahead < inner)[None, :], other=0.0)
        value = tl.load(x + start + k, mask=start + k < inner, other=0.0)
        product = weight.to(tl.float32) * value.to(tl.float32)[None, :]
        sums += tl.sum(tl.reshape(product, (ROWS, INNER // 8, 8)), 2)
        weight = following
    return tl.sum(sums, 1)


@triton.jit
def _pivots_of_one(
    x, pivot, y_p, rank, inner, stride, ROWS: tl.constexpr, INNER: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """y_p[i] = pivot[i] . x"""
    if EARLY:  # all that came before has ended, so the next kernel may read weights as soon as there is room for it
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y = _rows_times(x, pivot + i.to(tl.int64) * stride, i < rank, inner, ROWS, INNER, False)
    tl.store(y_p + i, y.to(y_p.dtype.element_ty), mask=i < rank)


@triton.jit
def _outputs_of_one(
    y_p, coeff, perm, bias, out, rank, d_out, stride,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[j] = y_p[s] where s = perm[j] < rank, else coeff[s - rank] . y_p; plus bias[j]"""
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = j < d_out
    source = tl.load(perm + j, mask=inside, other=0)
    product = source >= rank
    row = coeff + tl.where(product, source - rank, 0).to(tl.int64) * stride
    y = _rows_times(y_p, row, product, rank, ROWS, INNER, EARLY)
    copied = tl.load(y_p + source, mask=inside & (source < rank), other=0.0)
    y = tl.where(product, y, copied.to(tl.float32))
    if HAS_BIAS:
        y += tl.load(bias + j, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + j, y.to(out.dtype.element_ty), mask=inside)


def one_token(x: Tensor, pivot: Tensor, coeff: Tensor, perm: Tensor, bias: Tensor | None) -> Tensor:
    """The layer in natural order: (d_out,). Two launches, of which the second begins beside the first on Hopper.

    x: (d_in,), pivot: (r, d_in), coeff: (d_out - r, r), of one dtype with unit column strides, perm: (d_out,), bias:
    (d_out,) or None.
    """
    (rank, inner), d_out = pivot.shape, len(perm)
    y_p, out = x.new_empty(rank), x.new_empty(d_out)
    early = x.is_cuda and _has_early_launch(x.device)
    _pivots_of_one[(triton.cdiv(rank, 2),)](
        x, pivot, y_p, rank, inner, pivot.stride(0), ROWS=2, INNER=_strip(inner), EARLY=early, num_warps=4
    )
    _outputs_of_one[(triton.cdiv(d_out, 2),)](
        y_p, coeff, perm, out if bias is None else bias, out, rank, d_out, coeff.stride(0), HAS_BIAS=bias is not None,
        ROWS=2, INNER=_strip(rank), EARLY=early, num_warps=4, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def _strip(inner: int) -> int:
    return max(8, min(2048, triton.next_power_of_2(inner)))


@functools.cache
def _has_early_launch(device: torch.device) -> bool:
    """Hopper or later, and a Triton that knows of it."""
    return torch.cuda.get_device_capability(device)[0] >= 9 and hasattr(tl.extra.cuda, "gdc_wait")
