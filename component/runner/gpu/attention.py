"""Rotary embedding into the cache, and one token's attention over it. CUDA only."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from component.runner.gpu.launch import launch_options, multiprocessors, pick, precision, start_in_turn
from component.runner.layout import SMALL_BATCH, AttentionState, Heads, Layout, Scratch


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
    start_in_turn(PDL)
    start = z + rows.to(tl.int64) * sz
    a, b = pick(start, at_low, mask, GATHER), pick(start, at_high, mask, GATHER)
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


def rotate_and_store(z: Tensor, layout: Layout, state: AttentionState) -> Tensor:
    """As runner/ops.py says."""
    heads, rotary, position, (keys, values), _ = state
    batch, tokens = len(keys), len(z)
    q = z.new_empty(batch, tokens // batch, heads.queries, heads.size)
    tensors, firsts, constants = _arguments(z, layout, heads)
    few = tokens <= SMALL_BATCH
    _rotate_kernel[(triton.cdiv(tokens, 1 if few else 16), heads.queries + 2 * heads.keys)](
        *tensors, *rotary, position, q, keys, values, tokens, tokens // batch, z.stride(0), *firsts, keys.stride(0),
        keys.stride(1), heads.eps, **constants, HALF=triton.next_power_of_2(heads.size // 2), BT=1 if few else 16,
        num_warps=1 if few else 4, **launch_options(tokens),
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
    start_in_turn(PDL)
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
    return 64, max(1, min(8, 2 * multiprocessors(torch.cuda.is_available()) // pairs)), 4, 2


def decode_attention(z: Tensor, layout: Layout, state: AttentionState, *, scratch: Scratch) -> Tensor:
    """As runner/ops.py says."""
    heads, rotary, position, (keys, values), scale = state
    pairs = len(keys) * heads.keys
    group, half = max(16, triton.next_power_of_2(heads.queries // heads.keys)), heads.size // 2
    half = max(16, triton.next_power_of_2(half))
    out = z.new_empty(len(keys), heads.queries * heads.size)
    rows, splits, warps, stages = attention_tile(pairs)
    splits = min(splits, len(scratch.partial) // (pairs * 2 * group * (half + 1)) or 1)
    if z.dtype.itemsize == 4:
        rows = 32
    tensors, firsts, constants = _arguments(z, layout, heads)
    _decode_kernel[(pairs, splits)](
        *tensors, *rotary, position, keys, values, out, *scratch, z.stride(0), *firsts, keys.stride(0), keys.stride(1),
        scale, heads.eps, **constants, HALF=half, BG=group, BL=rows, SPLITS=splits, AHEAD=splits > 1,
        PRECISION=precision(z), num_warps=warps, num_stages=stages, **launch_options(len(keys)),
    )  # fmt: skip
    return out


def _arguments(z: Tensor, layout: Layout, heads: Heads) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """Of both kernels: tensors from z to key_norm, the first columns of k and v, constants."""
    starts = layout.starts if layout.starts is not None and layout.starts[0] == 0 else None  # q first, all whole
    norms = (z, z) if heads.query_norm is None else (heads.query_norm, heads.key_norm)
    constants = {
        "HQ": heads.queries, "HK": heads.keys, "D": heads.size,
        "GATHER": starts is None, "BIAS": layout.bias is not None, "NORM": heads.query_norm is not None,
    }  # fmt: skip
    tensors = (z, layout.columns, z if layout.bias is None else layout.bias, *norms)
    return tensors, (0, 0) if starts is None else starts[1:], constants
