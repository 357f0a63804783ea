"""Products of at most 32 tokens: a decode step is bound by reading their weights once. CUDA only."""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from component.runner.gpu.launch import is_hopper, launch_options, multiprocessors, precision, start_in_turn
from component.runner.layout import Coefficients, Scratch

VECTOR = 8  # numbers that a thread reads at once
MOST_ROWS, LEAST_ROWS = 64, 16  # of a matrix, that one program computes
LONG, VERY_LONG = 2048, 8192  # rows of so many numbers may be shared: then programs wait for each other at the end
LEAST_OF_LONG, LEAST_OF_VERY_LONG = 28, 48  # rows that a program should have, for x is read by all of them
MOST_SPLITS, LEAST_PIECE = 6, 512  # of a row


@triton.jit
def _select(g, a0, a1, a2):
    return tl.where(g == 0, a0, tl.where(g == 1, a1, a2))


@triton.jit
def _group_of(pid, w0, w1, w2, n0, n1, n2, k0, k1, k2, x0, x1, x2, z0, z1, z2, p1, p2, GROUPS: tl.constexpr):
    """Of a program's product: the weight, how many rows of how many numbers, columns of x and z, its first program."""
    w, n, k, xc, zc, first = w0, n0, k0, x0, z0, 0
    if GROUPS > 1:
        g = (pid >= p1).to(tl.int32) + (pid >= p2).to(tl.int32)
        n, k, xc, zc = _select(g, n0, n1, n2), _select(g, k0, k1, k2), _select(g, x0, x1, x2), _select(g, z0, z1, z2)
        first = _select(g, 0, p1, p2)
        if g == 1:
            w = w1
        if g == 2:
            w = w2
    return w, n, k, xc, zc, first


@triton.jit
def _vector_kernel(
    x, z, w0, w1, w2, n0, n1, n2, k0, k1, k2, x0, x1, x2, z0, z1, z2, p1, p2,
    GROUPS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of x: every program reads BN whole rows of one weight, the next tile always on its way."""
    pid = tl.program_id(0)
    w, n, k, xc, zc, first = _group_of(
        pid, w0, w1, w2, n0, n1, n2, k0, k1, k2, x0, x1, x2, z0, z1, z2, p1, p2, GROUPS
    )  # fmt: skip
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


@triton.jit(do_not_specialize=["share"])  # ranks differ from layer to layer, and every constant is compiled for
def _matrix_kernel(
    x, z, partial, arrivals, sx, sz, t, share, w0, w1, w2, n0, n1, n2, k0, k1, k2, x0, x1, x2, z0, z1, z2, p1, p2,
    GROUPS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, TALL_X: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to BT rows of x and `share` of the weights, of the BN that a tile has; SPLITS programs may share k.

    The tall operand of the dot, which needs 64 rows to run on all of a tensor core, are the weights or x.
    """
    pid = tl.program_id(0)
    piece = tl.program_id(1)
    w, n, k, xc, zc, first = _group_of(
        pid, w0, w1, w2, n0, n1, n2, k0, k1, k2, x0, x1, x2, z0, z1, z2, p1, p2, GROUPS
    )  # fmt: skip
    place = tl.arange(0, BN)
    rows = (pid - first) * share + place
    tokens = tl.arange(0, BT)
    inside = (place < share) & (rows < n)
    each = tl.cdiv(tl.cdiv(k, SPLITS), BK) * BK
    begin = piece * each
    end = tl.minimum(begin + each, k)
    start = w + rows.to(tl.int64)[:, None] * k
    start_in_turn(PDL)
    acc = tl.zeros((BT, BN) if TALL_X else (BN, BT), tl.float32)
    for step in tl.range(begin, end, BK, num_stages=STAGES):
        cols = step + tl.arange(0, BK)
        weight = tl.load(start + cols[None, :], mask=inside[:, None] & (cols < end)[None, :], other=0.0)
        there = (tokens < t)[:, None] & (cols < end)[None, :]
        value = tl.load(x + xc + tokens[:, None] * sx + cols[None, :], mask=there, other=0.0)
        if TALL_X:
            acc = tl.dot(value, tl.trans(weight), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(weight, tl.trans(value), acc, input_precision=PRECISION)
    if TALL_X:
        acc = tl.trans(acc)
    out = z + zc + tokens[None, :] * sz + rows[:, None]
    mask = inside[:, None] & (tokens < t)[None, :]
    if SPLITS == 1:
        tl.store(out, acc.to(z.dtype.element_ty), mask=mask)
    else:
        tile = place[:, None] * BT + tokens[None, :]
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


class Tiling(NamedTuple):
    """rows: of the weights, that a program computes; splits: programs that share the numbers of each row."""

    rows: int
    splits: int


@functools.cache  # every launch asks
def matrix_tiling(counts: tuple[int, ...], k: int, programs: int) -> Tiling:
    """How to cut products of `counts` rows of k numbers, so that `programs` that run at a time all have the same to do.

    On an H100, a product whose last programs are few takes up to a fifth longer.
    """
    splits, wanted = 1, LEAST_OF_VERY_LONG if k >= VERY_LONG else LEAST_OF_LONG
    most = min(MOST_SPLITS, k // LEAST_PIECE) if k >= LONG else 1
    while splits < most and _rows_each(counts, programs // splits) < wanted:
        splits += 1
    waves = 1
    while (rows := _rows_each(counts, waves * programs // splits)) > MOST_ROWS:
        waves += 1
    return Tiling(max(LEAST_ROWS, rows), splits)


def _rows_each(counts: tuple[int, ...], programs: int) -> int:
    """The least number of rows a program with which so many are enough, each for one of the products."""
    rows = triton.cdiv(sum(counts), programs)
    while sum(triton.cdiv(count, rows) for count in counts) > programs:
        rows += 1
    return rows


def small_products(x: Tensor, products: list[Coefficients], z: Tensor, *, scratch: Scratch) -> None:
    """Up to three products of the same rows in one launch; x and z may be one buffer, in columns that do not meet."""
    tokens, groups = len(x), len(products)
    longest = max(weight.shape[1] for weight, _, _ in products)
    if tokens == 1:
        rows, cols, warps = vector_tile(longest)
        programs, numbers = _groups(products, rows)
        _vector_kernel[(programs,)](
            x, z, *numbers, GROUPS=groups, BN=rows, BK=cols, VECTOR=VECTOR, num_warps=warps, **launch_options(tokens)
        )
        return
    gpu = torch.cuda.is_available()
    rows, splits = matrix_tiling(tuple(len(weight) for weight, _, _ in products), longest, multiprocessors(gpu))
    tall_x = rows <= 32 and x.dtype.itemsize == 2
    if x.dtype.itemsize == 4:
        cols, stages = 64, 2
    elif is_hopper(gpu):
        cols, stages = 128, 6 if tall_x else 4
    else:
        cols, stages = 128, 2
    programs, numbers = _groups(products, rows)
    _matrix_kernel[(programs, splits)](
        x, z, *scratch, x.stride(0), z.stride(0), tokens, rows, *numbers, GROUPS=groups,
        BT=64 if tall_x else 16 if tokens <= 16 else 32, BN=triton.next_power_of_2(rows), BK=cols,
        SPLITS=splits, TALL_X=tall_x, PRECISION=precision(x), STAGES=stages, num_warps=4, **launch_options(tokens),
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
