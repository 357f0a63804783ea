"""Triton kernels of the pivoted layer, for CUDA. Import it at the first call that needs one, never before.

`take_columns` moves whole matrices: on an H100 it runs at 0.95 of the speed of a copy up to 16,384 columns, and at 0.85
beyond. `few_tokens` is bound by reading the weights once; from some tens of tokens on, cuBLAS is faster.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

# by name: the loader of `trust_remote_code` demands every package that a file imports, where there is no GPU too
triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

WHOLE_ROW_BYTES = 32768  # rows that are read at once and put in order in shared memory


# ---------------------------------------------------------------- columns of a matrix


@triton.jit(do_not_specialize=["tokens"])
def _take_columns(
    z, perm, add, out, tokens, d_out, stride_z, stride_add,
    HAS_ADD: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(perm + j, mask=j < d_out, other=0).to(tl.int32)
    wide: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    for i in tl.static_range(ROWS):
        t = tl.program_id(0) * ROWS + i
        inside = (j < d_out) & (t < tokens)
        row = z + t.to(tl.int64) * stride_z
        value = tl.gather(tl.load(row + j, mask=inside), source, 0) if WHOLE else tl.load(row + source, mask=inside)
        if HAS_ADD:
            value = value.to(wide) + tl.load(add + t.to(tl.int64) * stride_add + j, mask=inside).to(wide)
        tl.store(out + t.to(tl.int64) * d_out + j, value.to(out.dtype.element_ty), mask=inside)


def take_columns(z: Tensor, perm: Tensor, add: Tensor | None = None) -> Tensor:
    """(add +) z[:, perm]: (T, d_out), in the wider dtype of the two.

    z: (T, d_out), perm: (d_out,) int32 or int64, add: (T, d_out) or None. Columns lie next to each other; rows may lie
    anywhere, and those of `add` be one and the same.
    """
    tokens, d_out = z.shape
    out = torch.empty(
        tokens, d_out, device=z.device, dtype=z.dtype if add is None else torch.promote_types(z.dtype, add.dtype)
    )
    if out.numel() == 0:
        return out
    columns = triton.next_power_of_2(d_out)
    whole = columns * z.element_size() <= WHOLE_ROW_BYTES
    rows, columns = (1, columns) if whole else (4, 4096)
    _take_columns[(triton.cdiv(tokens, rows), triton.cdiv(d_out, columns))](
        z, perm, out if add is None else add, out, tokens, d_out, z.stride(0), 0 if add is None else add.stride(0),
        HAS_ADD=add is not None, WHOLE=whole, ROWS=rows, COLUMNS=columns, num_warps=8 if columns >= 4096 else 4,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- the layer for few tokens


@triton.jit
def _rows_times(
    x, row, used, tokens, inner, stride_x,
    ROWS: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """(ROWS, TOKENS) in float32: weight rows at the pointers row: (ROWS,), times x: (tokens, inner).

    WAIT: x comes from the kernel before, which may still run; the first weights are on their way meanwhile.
    """
    k = tl.arange(0, INNER)
    if TOKENS == 1:
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
        return tl.sum(sums, 1)[:, None]
    else:
        if WAIT:
            tl.extra.cuda.gdc_wait()
        t = tl.arange(0, TOKENS)
        sums = tl.zeros((ROWS, TOKENS), tl.float32)
        for start in range(0, inner, INNER):
            here = start + k
            weight = tl.load(row[:, None] + here[None, :], mask=used[:, None] & (here < inner)[None, :], other=0.0)
            there = (t < tokens)[:, None] & (here < inner)[None, :]
            value = tl.load(x + t[:, None] * stride_x + here[None, :], mask=there, other=0.0)
            sums = tl.dot(weight, tl.trans(value), sums, input_precision="ieee")
        return sums


@triton.jit(do_not_specialize=["tokens"])
def _few_pivots(
    x, pivot, y_p, tokens, rank, inner, stride_x, stride_w,
    ROWS: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y_p[t, i] = pivot[i] . x[t]"""
    if EARLY:  # all that came before has ended, so the next kernel may read weights as soon as there is room for it
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    row = pivot + i.to(tl.int64) * stride_w
    y = _rows_times(x, row, i < rank, tokens, inner, stride_x, ROWS, INNER, TOKENS, False)
    here = t[None, :] * rank + i[:, None]
    tl.store(y_p + here, y.to(y_p.dtype.element_ty), mask=(i < rank)[:, None] & (t < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _few_outputs(
    y_p, coeff, perm, bias, out, tokens, rank, d_out, stride_w,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[t, j] = y_p[t, s] where s = perm[j] < rank, else coeff[s - rank] . y_p[t]; plus bias[j]"""
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    source = tl.load(perm + j, mask=j < d_out, other=0)
    product = source >= rank
    row = coeff + tl.where(product, source - rank, 0).to(tl.int64) * stride_w
    y = _rows_times(y_p, row, product, tokens, rank, rank, ROWS, INNER, TOKENS, EARLY)
    inside = (j < d_out)[:, None] & (t < tokens)[None, :]
    copied = tl.load(y_p + t[None, :] * rank + source[:, None], mask=inside & (source < rank)[:, None], other=0.0)
    y = tl.where(product[:, None], y, copied.to(tl.float32))
    if HAS_BIAS:
        y += tl.load(bias + j, mask=j < d_out, other=0.0).to(tl.float32)[:, None]
    tl.store(out + t[None, :] * d_out + j[:, None], y.to(out.dtype.element_ty), mask=inside)


def few_tokens(x: Tensor, pivot: Tensor, coeff: Tensor, perm: Tensor, bias: Tensor | None) -> Tensor:
    """The layer in natural order for 1 to 16 tokens: (T, d_out). Two launches, the second begun beside the first.

    x: (T, d_in), pivot: (r, d_in), coeff: (d_out - r, r), of one dtype with unit column strides, perm: (d_out,), bias:
    (d_out,) or None.
    """
    tokens, inner = x.shape
    rank, d_out = len(pivot), len(perm)
    y_p = torch.empty(tokens, rank, device=x.device, dtype=x.dtype)
    out = torch.empty(tokens, d_out, device=x.device, dtype=x.dtype)
    early = x.is_cuda and _has_early_launch(x.device)
    rows = 2 if tokens == 1 else 16
    _few_pivots[(triton.cdiv(rank, rows),)](
        x, pivot, y_p, tokens, rank, inner, x.stride(0), pivot.stride(0), ROWS=rows, EARLY=early, **_tile(tokens, inner)
    )
    _few_outputs[(triton.cdiv(d_out, rows),)](
        y_p, coeff, perm, out if bias is None else bias, out, tokens, rank, d_out, coeff.stride(0),
        HAS_BIAS=bias is not None, ROWS=rows, EARLY=early, **_tile(tokens, rank),
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def _tile(tokens: int, inner: int) -> dict[str, Any]:
    """One token: a pair of weight rows in long strips. More: 16 rows on the tensor cores, four strips on their way."""
    if tokens == 1:
        return {"TOKENS": 1, "INNER": max(8, min(2048, triton.next_power_of_2(inner))), "num_warps": 4}
    return {"TOKENS": 16, "INNER": 256, "num_warps": 4, "num_stages": 5}


@functools.cache
def _has_early_launch(device: torch.device) -> bool:
    """Hopper or later, and a Triton that knows of it."""
    return torch.cuda.get_device_capability(device)[0] >= 9 and hasattr(tl.extra.cuda, "gdc_wait")
