"""Triton kernels of the runner. Import it only where there is a GPU; runner_kernels.py says what each one computes.

On Hopper, kernels for few tokens are launched before the kernel ahead of them has ended: each first asks for what does
not depend on it (weights, indices), then waits. `gdc_wait` is met by every program before it reads an activation or
writes anything, so what a kernel sees is what it would see in plain stream order.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from component.runner_kernels import SMALL_BATCH, Coefficients, Heads, Layout, Scratch

VECTOR = 8  # numbers that a thread reads at once
MULTIPROCESSORS = 132  # of the GPU that tiles were chosen on, an H100


def _launch(tokens: int) -> dict[str, Any]:
    """Options that overlap a kernel's start with the end of the one before, where tokens are few."""
    early = tokens <= SMALL_BATCH and _hopper(torch.cuda.is_available())
    return {"PDL": True, "launch_pdl": True} if early else {"PDL": False}


@functools.cache
def _hopper(gpu: bool) -> bool:
    """Hopper or later, and a Triton that knows of early launches."""
    return gpu and torch.cuda.get_device_capability()[0] >= 9 and hasattr(tl.extra.cuda, "gdc_wait")


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def _begin(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _pick(start, columns, mask, GATHER: tl.constexpr):
    """(rows, columns) numbers in float32; start: (rows,) pointers, columns: (columns,), mask: (rows, columns)."""
    if GATHER:
        # columns first: the compiler gives neighbouring threads the first dimension, and neighbouring columns lie close
        y = tl.trans(tl.load(start[None, :] + columns[:, None], mask=tl.trans(mask), other=0.0))
    else:
        y = tl.load(start[:, None] + columns[None, :], mask=mask, other=0.0)
    return y.to(tl.float32)


# ---------------------------------------------------------------- products of few rows


@triton.jit
def _select(g, a0, a1, a2):
    return tl.where(g == 0, a0, tl.where(g == 1, a1, a2))


@triton.jit
def _vector_kernel(
    x, z, w0, w1, w2, n0, n1, n2, k0, k1, k2, x0, x1, x2, z0, z1, z2, p1, p2,
    GROUPS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of x: every program reads BN whole rows of one weight, the next tile always on its way."""
    pid = tl.program_id(0)
    w, n, k, xc, zc, first = w0, n0, k0, x0, z0, 0
    if GROUPS > 1:
        g = (pid >= p1).to(tl.int32) + (pid >= p2).to(tl.int32)
        n, k, xc, zc = _select(g, n0, n1, n2), _select(g, k0, k1, k2), _select(g, x0, x1, x2), _select(g, z0, z1, z2)
        first = _select(g, 0, p1, p2)
        if g == 1:
            w = w1
        if g == 2:
            w = w2
    rows = (pid - first) * BN + tl.arange(0, BN)
    inside = rows < n
    cols = tl.arange(0, BK)
    start = w + rows.to(tl.int64)[:, None] * k
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    weight = tl.load(start + cols[None, :], mask=inside[:, None] & (cols < k)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BN, BK // VECTOR), tl.float32)
    for step in range(0, k, BK):
        here = step + cols
        ahead = here + BK
        following = tl.load(start + ahead[None, :], mask=inside[:, None] & (ahead < k)[None, :], other=0.0)
        value = tl.load(x + xc + here, mask=here < k, other=0.0)
        product = weight.to(tl.float32) * value.to(tl.float32)[None, :]
        # summed inside each thread, so that one accumulator stands for VECTOR columns
        acc += tl.sum(tl.reshape(product, (BN, BK // VECTOR, VECTOR)), 2)
        weight = following
    tl.store(z + zc + rows, tl.sum(acc, 1).to(z.dtype.element_ty), mask=inside)


@triton.jit
def _matrix_kernel(
    x, z, partial, arrivals, sx, sz, t, w0, w1, w2, n0, n1, n2, k0, k1, k2, x0, x1, x2, z0, z1, z2, p1, p2,
    GROUPS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to BT rows of x: weights are the tall operand of the dot, and k may be shared among SPLITS programs."""
    pid = tl.program_id(0)
    piece = tl.program_id(1)
    w, n, k, xc, zc, first = w0, n0, k0, x0, z0, 0
    if GROUPS > 1:
        g = (pid >= p1).to(tl.int32) + (pid >= p2).to(tl.int32)
        n, k, xc, zc = _select(g, n0, n1, n2), _select(g, k0, k1, k2), _select(g, x0, x1, x2), _select(g, z0, z1, z2)
        first = _select(g, 0, p1, p2)
        if g == 1:
            w = w1
        if g == 2:
            w = w2
    rows = (pid - first) * BN + tl.arange(0, BN)
    tokens = tl.arange(0, BT)
    inside = rows < n
    each = tl.cdiv(tl.cdiv(k, SPLITS), BK) * BK
    begin = piece * each
    end = tl.minimum(begin + each, k)
    start = w + rows.to(tl.int64)[:, None] * k
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BN, BT), tl.float32)
    for step in tl.range(begin, end, BK, num_stages=STAGES):
        cols = step + tl.arange(0, BK)
        weight = tl.load(start + cols[None, :], mask=inside[:, None] & (cols < end)[None, :], other=0.0)
        there = (tokens < t)[:, None] & (cols < end)[None, :]
        value = tl.load(x + xc + tokens[:, None] * sx + cols[None, :], mask=there, other=0.0)
        acc = tl.dot(weight, tl.trans(value), acc, input_precision=PRECISION)
    out = z + zc + tokens[None, :] * sz + rows[:, None]
    mask = inside[:, None] & (tokens < t)[None, :]
    if SPLITS == 1:
        tl.store(out, acc.to(z.dtype.element_ty), mask=mask)
    else:
        tile = tl.arange(0, BN)[:, None] * BT + tokens[None, :]
        tl.store(partial + (pid * SPLITS + piece) * (BN * BT) + tile, acc)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + pid, 1, sem="acq_rel") == SPLITS - 1:
            acc = tl.zeros((BN, BT), tl.float32)
            for other in tl.static_range(SPLITS):
                acc += tl.load(partial + (pid * SPLITS + other) * (BN * BT) + tile, cache_modifier=".cg")
            tl.store(out, acc.to(z.dtype.element_ty), mask=mask)
            tl.atomic_xchg(arrivals + pid, 0)


def vector_tile(k: int) -> tuple[int, int, int]:
    """BN, BK, warps."""
    return 2, min(2048, triton.next_power_of_2(k)), 4


def matrix_tile(rows: int, k: int) -> tuple[int, int, int, int, int]:
    """BN, BK, splits, warps, stages."""
    # long rows are shared among programs where there are fewer tiles than multiprocessors
    splits = max(1, min(MULTIPROCESSORS // triton.cdiv(rows, 64), k // 640)) if k >= 2048 else 1
    cols, stages = (256, 3) if _hopper(torch.cuda.is_available()) else (128, 2)
    return 64, cols, splits, 4, stages


def small_products(x: Tensor, products: list[Coefficients], z: Tensor, scratch: Scratch) -> None:
    """Up to three products of the same rows in one launch; x and z may be one buffer, in columns that do not meet."""
    tokens, groups = len(x), len(products)
    longest = max(weight.shape[1] for weight, _, _ in products)
    if tokens == 1:
        rows, cols, warps = vector_tile(longest)
        programs, numbers = _groups(products, rows)
        _vector_kernel[(programs,)](
            x, z, *numbers, GROUPS=groups, BN=rows, BK=cols, VECTOR=VECTOR, num_warps=warps, **_launch(tokens)
        )
        return
    rows, cols, splits, warps, stages = matrix_tile(sum(len(weight) for weight, _, _ in products), longest)
    if x.dtype.itemsize == 4:
        cols, stages = 64, 2
    programs, numbers = _groups(products, rows)
    _matrix_kernel[(programs, splits)](
        x, z, *scratch, x.stride(0), z.stride(0), tokens, *numbers, GROUPS=groups, BT=16 if tokens <= 16 else 32,
        BN=rows, BK=cols, SPLITS=splits, PRECISION=_precision(x), STAGES=stages, num_warps=warps, **_launch(tokens),
    )  # fmt: skip


def _groups(products: list[Coefficients], rows: int) -> tuple[int, tuple[Any, ...]]:
    """How many programs of `rows` rows, and the kernels' arguments from w0 to p2."""
    programs = [triton.cdiv(len(weight), rows) for weight, _, _ in products]
    total = sum(programs)
    first = [
        sum(programs[:i]) if i < len(programs) else total for i in (1, 2)
    ]  # a group that is not there never begins
    weights, starts, columns = zip(*products, *[products[0]] * (3 - len(products)), strict=True)
    sizes = (*(len(weight) for weight in weights), *(weight.shape[1] for weight in weights))
    return total, (*weights, *sizes, *starts, *columns, *first)


# ---------------------------------------------------------------- residual stream


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
    _begin(PDL)
    stream = hidden + rows[:, None] * d + cols[None, :]
    h = tl.load(stream, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        h += _pick(z + rows * sz, place, mask, GATHER)
        if BIAS:
            h += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        kept = h.to(hidden.dtype.element_ty)
        tl.store(stream, kept, mask=mask)
        h = kept.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 1) / d + eps)
    normed = h * scale[:, None] * g[None, :]
    tl.store(out + rows[:, None] * d + cols[None, :], normed.to(out.dtype.element_ty), mask=mask)


def add_and_norm(
    hidden: Tensor, update: tuple[Tensor, Layout] | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
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
        num_warps=max(1, min(most, width // 256)), **_launch(tokens),
    )  # fmt: skip
    return hidden, out


# ---------------------------------------------------------------- gated MLP


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
    _begin(PDL)
    mask = (rows < t)[:, None] & inside[None, :]
    start = z + rows.to(tl.int64) * sz
    gate, up = _pick(start, at_gate, mask, GATHER), _pick(start, at_up, mask, GATHER)
    if BIAS:
        gate += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + d + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + rows.to(tl.int64)[:, None] * d + cols[None, :], y.to(out.dtype.element_ty), mask=mask)


def silu_product(z: Tensor, layout: Layout) -> Tensor:
    tokens, d = len(z), layout.sizes[0]
    out = z.new_empty(tokens, d)
    gate, up = layout.runs or ((0, 0, 0), (0, 0, 0))
    rows, cols, warps = (4, 1024, 8) if tokens > SMALL_BATCH else (1, 256, 4)
    _silu_kernel[(triton.cdiv(d, cols), triton.cdiv(tokens, rows))](
        z, layout.columns, z if layout.bias is None else layout.bias, out, tokens, d, z.stride(0), *gate, *up,
        GATHER=layout.runs is None, BIAS=layout.bias is not None, BT=rows, BD=cols, num_warps=warps, **_launch(tokens),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- attention


@triton.jit
def _rotate_kernel(
    z, columns, bias, query_norm, key_norm, cos, sin, position, q, keys, values,
    t, length, sz, first_k, first_v, scb, sch, eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    GATHER: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one head of q, k or v for BT tokens, as its two halves. D: head size, HALF: D / 2 rounded up."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    half = D // 2
    c = tl.arange(0, HALF)
    mask = (rows < t)[:, None] & (c < half)[None, :]
    low, high = head * D + c, head * D + half + c  # outputs, counted over q, k and v
    if GATHER:
        at_low = tl.load(columns + low, mask=c < half, other=0)
        at_high = tl.load(columns + high, mask=c < half, other=0)
    else:
        shift = tl.where(head < HQ, 0, tl.where(head < HQ + HK, first_k - HQ * D, first_v - (HQ + HK) * D))
        at_low, at_high = low + shift, high + shift
    _begin(PDL)
    start = z + rows.to(tl.int64) * sz
    a, b = _pick(start, at_low, mask, GATHER), _pick(start, at_high, mask, GATHER)
    if BIAS:
        a += tl.load(bias + low, mask=c < half, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias + high, mask=c < half, other=0.0).to(tl.float32)[None, :]
    place = tl.load(position) + rows % length
    sequence = (rows // length).to(tl.int64)
    if head < HQ + HK:
        if NORM:
            scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
            g = query_norm
            if head >= HQ:
                g = key_norm
            a *= scale * tl.load(g + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
            b *= scale * tl.load(g + half + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
        angle = place[:, None] * D + c[None, :]
        cosine, sine = tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)
        a, b = a * cosine - b * sine, b * cosine + a * sine
    if head < HQ:
        target = q + rows.to(tl.int64)[:, None] * (HQ * D) + low[None, :]
        tl.store(target, a.to(q.dtype.element_ty), mask=mask)
        tl.store(target + half, b.to(q.dtype.element_ty), mask=mask)
    else:
        cache = keys
        if head >= HQ + HK:
            cache = values
        at = sequence[:, None] * scb + ((head - HQ) % HK) * sch + place[:, None] * D + c[None, :]
        tl.store(cache + at, a.to(q.dtype.element_ty), mask=mask)
        tl.store(cache + at + half, b.to(q.dtype.element_ty), mask=mask)


def rotate_and_store(
    z: Tensor,
    layout: Layout,
    heads: Heads,
    rotary: tuple[Tensor, Tensor],
    position: Tensor,
    cache: tuple[Tensor, Tensor],
) -> Tensor:
    keys, values = cache
    batch, tokens = len(keys), len(z)
    q = z.new_empty(batch, tokens // batch, heads.queries, heads.size)
    starts, norms = _starts(layout), (z, z) if heads.query_norm is None else (heads.query_norm, heads.key_norm)
    few = tokens <= SMALL_BATCH
    _rotate_kernel[(triton.cdiv(tokens, 1 if few else 16), heads.queries + 2 * heads.keys)](
        z, layout.columns, z if layout.bias is None else layout.bias, *norms, *rotary, position, q, keys, values,
        tokens, tokens // batch, z.stride(0),
        *((0, 0) if starts is None else starts[1:]), keys.stride(0), keys.stride(1), heads.eps,
        HQ=heads.queries, HK=heads.keys, D=heads.size, HALF=triton.next_power_of_2(heads.size // 2),
        GATHER=starts is None, BIAS=layout.bias is not None, NORM=heads.query_norm is not None, BT=1 if few else 16,
        num_warps=1 if few else 4, **_launch(tokens),
    )  # fmt: skip
    return q


@triton.jit
def _attend(query_low, query_high, key_low, key_high, value_low, value_high, there, top, total, low, high, scale,
            PRECISION: tl.constexpr):  # fmt: skip
    """One step of a running softmax over (BL, HALF) keys and values, of which rows `there` count."""
    score = tl.dot(query_low, tl.trans(key_low), input_precision=PRECISION)
    score = tl.dot(query_high, tl.trans(key_high), score, input_precision=PRECISION) * scale
    score = tl.where(there[None, :], score, float("-inf"))
    peak = tl.maximum(top, tl.max(score, 1))
    zero = tl.where(peak == float("-inf"), 0.0, peak)  # where nothing has counted yet
    shrink = tl.exp2(top - zero)
    p = tl.exp2(score - zero[:, None])
    total = total * shrink + tl.sum(p, 1)
    p = p.to(value_low.dtype)
    low = tl.dot(p, value_low, low * shrink[:, None], input_precision=PRECISION)
    high = tl.dot(p, value_high, high * shrink[:, None], input_precision=PRECISION)
    return peak, total, low, high


@triton.jit
def _decode_kernel(
    z, columns, bias, query_norm, key_norm, cos, sin, position, keys, values, out, partial, arrivals,
    sz, first_k, first_v, scb, sch, scale, eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BG: tl.constexpr, BL: tl.constexpr,
    SPLITS: tl.constexpr, AHEAD: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the queries that share a key head, over a part of the cache; the last of SPLITS adds up.

    Part 0 also has the new token, whose key and value come straight from z; so all that is read of the cache was
    there before this step, and with AHEAD its first tile is asked for before z is awaited.
    """
    pair = tl.program_id(0)
    part = tl.program_id(1)
    GROUP: tl.constexpr = HQ // HK
    half: tl.constexpr = D // 2
    sequence = pair // HK
    head = pair % HK
    place = tl.load(position).to(tl.int32)
    each = tl.cdiv(tl.cdiv(place, SPLITS), BL) * BL
    begin = part * each
    end = tl.minimum(begin + each, place)
    g = tl.arange(0, BG)
    c = tl.arange(0, HALF)
    used = c < half
    tile = sequence.to(tl.int64) * scb + head * sch + tl.arange(0, BL)[:, None] * D + c[None, :]
    if AHEAD:
        first = begin + tl.arange(0, BL)
        mask = (first < end)[:, None] & used[None, :]
        first_key_low = tl.load(keys + tile + begin * D, mask=mask, other=0.0)
        first_key_high = tl.load(keys + tile + begin * D + half, mask=mask, other=0.0)
        first_value_low = tl.load(values + tile + begin * D, mask=mask, other=0.0)
        first_value_high = tl.load(values + tile + begin * D + half, mask=mask, other=0.0)
    cosine, sine = tl.load(cos + place * D + c, mask=used), tl.load(sin + place * D + c, mask=used)
    at_query = (head * GROUP + g)[:, None] * D + c[None, :]  # outputs, counted over q, k and v
    at_key, at_value = (HQ + head) * D + c, (HQ + HK + head) * D + c
    heads = (g < GROUP)[:, None] & used[None, :]
    if GATHER:
        query_l = tl.load(columns + at_query, mask=heads, other=0)
        query_h = tl.load(columns + at_query + half, mask=heads, other=0)
        key_l, key_h = tl.load(columns + at_key, mask=used), tl.load(columns + at_key + half, mask=used)
        value_l, value_h = tl.load(columns + at_value, mask=used), tl.load(columns + at_value + half, mask=used)
    else:
        query_l, query_h = at_query, at_query + half
        key_l = at_key - HQ * D + first_k
        key_h = key_l + half
        value_l = at_value - (HQ + HK) * D + first_v
        value_h = value_l + half
    _begin(PDL)
    start = z + sequence.to(tl.int64) * sz
    q_low = tl.load(start + query_l, mask=heads, other=0.0).to(tl.float32)
    q_high = tl.load(start + query_h, mask=heads, other=0.0).to(tl.float32)
    k_low = tl.load(start + key_l, mask=used, other=0.0).to(tl.float32)
    k_high = tl.load(start + key_h, mask=used, other=0.0).to(tl.float32)
    v_low = tl.load(start + value_l, mask=used, other=0.0).to(tl.float32)
    v_high = tl.load(start + value_h, mask=used, other=0.0).to(tl.float32)
    if BIAS:
        q_low += tl.load(bias + at_query, mask=heads, other=0.0).to(tl.float32)
        q_high += tl.load(bias + at_query + half, mask=heads, other=0.0).to(tl.float32)
        k_low += tl.load(bias + at_key, mask=used, other=0.0).to(tl.float32)
        k_high += tl.load(bias + at_key + half, mask=used, other=0.0).to(tl.float32)
        v_low += tl.load(bias + at_value, mask=used, other=0.0).to(tl.float32)
        v_high += tl.load(bias + at_value + half, mask=used, other=0.0).to(tl.float32)
    if NORM:
        shrink = tl.rsqrt((tl.sum(q_low * q_low, 1) + tl.sum(q_high * q_high, 1)) / D + eps)[:, None]
        q_low *= shrink * tl.load(query_norm + c, mask=used, other=0.0).to(tl.float32)[None, :]
        q_high *= shrink * tl.load(query_norm + half + c, mask=used, other=0.0).to(tl.float32)[None, :]
        shrink = tl.rsqrt((tl.sum(k_low * k_low, 0) + tl.sum(k_high * k_high, 0)) / D + eps)
        k_low *= shrink * tl.load(key_norm + c, mask=used, other=0.0).to(tl.float32)
        k_high *= shrink * tl.load(key_norm + half + c, mask=used, other=0.0).to(tl.float32)
    kind = z.dtype.element_ty
    q_low, q_high = q_low * cosine - q_high * sine, q_high * cosine + q_low * sine
    k_low, k_high = (k_low * cosine - k_high * sine).to(kind), (k_high * cosine + k_low * sine).to(kind)
    scale = scale * 1.4426950408889634  # exp2 is what the hardware has
    own = tl.sum(q_low * k_low.to(tl.float32)[None, :] + q_high * k_high.to(tl.float32)[None, :], 1) * scale
    mine = part == 0
    top = tl.where(mine, own, float("-inf"))
    total = tl.where(mine, tl.full((BG,), 1.0, tl.float32), 0.0)
    low = tl.where(mine, tl.broadcast_to(v_low[None, :], (BG, HALF)), 0.0)
    high = tl.where(mine, tl.broadcast_to(v_high[None, :], (BG, HALF)), 0.0)
    q_low, q_high = q_low.to(kind), q_high.to(kind)
    if AHEAD:
        top, total, low, high = _attend(
            q_low, q_high, first_key_low, first_key_high, first_value_low, first_value_high, first < end,
            top, total, low, high, scale, PRECISION,
        )  # fmt: skip
        begin += BL
    for step in range(begin, end, BL):
        rows = step + tl.arange(0, BL)
        mask = (rows < end)[:, None] & used[None, :]
        key_low = tl.load(keys + tile + step * D, mask=mask, other=0.0)
        key_high = tl.load(keys + tile + step * D + half, mask=mask, other=0.0)
        value_low = tl.load(values + tile + step * D, mask=mask, other=0.0)
        value_high = tl.load(values + tile + step * D + half, mask=mask, other=0.0)
        top, total, low, high = _attend(
            q_low, q_high, key_low, key_high, value_low, value_high, rows < end, top, total, low, high, scale, PRECISION
        )
    if part == 0:
        new = sequence.to(tl.int64) * scb + head * sch + place * D + c
        tl.store(keys + new, k_low, mask=used)
        tl.store(keys + new + half, k_high, mask=used)
        tl.store(values + new, v_low.to(kind), mask=used)
        tl.store(values + new + half, v_high.to(kind), mask=used)
    at = out + sequence.to(tl.int64) * (HQ * D) + at_query
    if SPLITS == 1:
        tl.store(at, (low / total[:, None]).to(kind), mask=heads)
        tl.store(at + half, (high / total[:, None]).to(kind), mask=heads)
    else:
        # a part is 2 x (BG, HALF) sums, then BG tops, then BG totals
        size: tl.constexpr = 2 * BG * (HALF + 1)
        inner = g[:, None] * HALF + c[None, :]
        here = partial + (pair * SPLITS + part) * size
        tl.store(here + inner, low)
        tl.store(here + BG * HALF + inner, high)
        tl.store(here + 2 * BG * HALF + g, top)
        tl.store(here + 2 * BG * HALF + BG + g, total)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == SPLITS - 1:
            top = tl.full((BG,), float("-inf"), tl.float32)
            total = tl.zeros((BG,), tl.float32)
            low = tl.zeros((BG, HALF), tl.float32)
            high = tl.zeros((BG, HALF), tl.float32)
            for other in tl.static_range(SPLITS):
                there = partial + (pair * SPLITS + other) * size
                theirs = tl.load(there + 2 * BG * HALF + g, cache_modifier=".cg")
                peak = tl.maximum(top, theirs)
                old, add = tl.exp2(top - peak), tl.exp2(theirs - peak)
                low = low * old[:, None] + tl.load(there + inner, cache_modifier=".cg") * add[:, None]
                high = high * old[:, None] + tl.load(there + BG * HALF + inner, cache_modifier=".cg") * add[:, None]
                total = total * old + tl.load(there + 2 * BG * HALF + BG + g, cache_modifier=".cg") * add
                top = peak
            tl.store(at, (low / total[:, None]).to(kind), mask=heads)
            tl.store(at + half, (high / total[:, None]).to(kind), mask=heads)
            tl.atomic_xchg(arrivals + pair, 0)


def attention_tile(pairs: int) -> tuple[int, int, int, int]:
    """BL, splits, warps, stages."""
    return 64, max(1, min(8, 2 * MULTIPROCESSORS // pairs)), 4, 2


def decode_attention(
    z: Tensor,
    layout: Layout,
    heads: Heads,
    rotary: tuple[Tensor, Tensor],
    position: Tensor,
    cache: tuple[Tensor, Tensor],
    scale: float,
    scratch: Scratch,
) -> Tensor:
    keys, values = cache
    pairs = len(keys) * heads.keys
    group, half = max(16, triton.next_power_of_2(heads.queries // heads.keys)), heads.size // 2
    half = max(16, triton.next_power_of_2(half))
    out = z.new_empty(len(keys), heads.queries * heads.size)
    rows, splits, warps, stages = attention_tile(pairs)
    splits = min(splits, len(scratch.partial) // (pairs * 2 * group * (half + 1)) or 1)
    if z.dtype.itemsize == 4:
        rows = 32
    starts, norms = _starts(layout), (z, z) if heads.query_norm is None else (heads.query_norm, heads.key_norm)
    _decode_kernel[(pairs, splits)](
        z, layout.columns, z if layout.bias is None else layout.bias, *norms, *rotary, position, keys, values, out,
        *scratch, z.stride(0), *((0, 0) if starts is None else starts[1:]), keys.stride(0), keys.stride(1), scale,
        heads.eps, HQ=heads.queries, HK=heads.keys, D=heads.size, HALF=half, BG=group, BL=rows,
        SPLITS=splits, AHEAD=splits > 1, GATHER=starts is None, BIAS=layout.bias is not None,
        NORM=heads.query_norm is not None, PRECISION=_precision(z), num_warps=warps, num_stages=stages,
        **_launch(len(keys)),
    )  # fmt: skip
    return out


def _starts(layout: Layout) -> tuple[int, ...] | None:
    """The first columns of q, k and v, where q's is 0."""
    return layout.starts if layout.starts is not None and layout.starts[0] == 0 else None
