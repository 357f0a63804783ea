"""What stands between the matrix products of a LLaMA-like layer, and the products themselves: tensors in, tensors out.

A stack of linears that share an input leaves its outputs in the order in which it computed them (see `Layout`).
Nothing is ever put back in order for its own sake: the function that reads the outputs next picks each one from
where it lies. On a GPU these are Triton kernels (runner/gpu); elsewhere the plain expressions below.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from component.format.kernels import HAS_TRITON
from component.runner.layout import SMALL_BATCH, AttentionState, Coefficients, Layout, Scratch


def stacked_product(
    x: Tensor, first: Tensor, coefficients: list[Coefficients], *, width: int, scratch: Scratch
) -> Tensor:
    """z: (tokens, width) with x first^T in its first columns and each coefficient product in its own.

    x: (tokens, d_in), first: (rows, d_in). Columns that no product fills are left as they are.
    """
    z = x.new_empty(len(x), width)
    if len(x) <= SMALL_BATCH and (triton := fast_kernels(x)) is not None:
        triton.small_products(x, [Coefficients(first, 0, 0)], z, scratch=scratch)
        if coefficients:
            triton.small_products(z, coefficients, z, scratch=scratch)
        return z
    # products into slices of one buffer: cuBLAS takes the row stride, so nothing is copied
    torch.mm(x, first.T, out=z[:, : len(first)])
    for weight, start, column in coefficients:
        torch.mm(z[:, start : start + weight.shape[1]], weight.T, out=z[:, column : column + len(weight)])
    return z


def in_order(z: Tensor, layout: Layout) -> Tensor:
    """All outputs in the modules' own order, bias added: (tokens, sum of sizes). A view where that is enough."""
    starts = layout.starts
    if starts is not None and len(starts) == 1:
        y = z[:, starts[0] : starts[0] + layout.sizes[0]]
    else:
        y = z.index_select(1, layout.columns)
    return y if layout.bias is None else y + layout.bias


def add_and_norm(
    hidden: Tensor, update: tuple[Tensor, Layout] | None, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden += outputs; returns the sum and its RMSNorm, weight * sum / rms(sum). hidden: (tokens, d), in place."""
    if (triton := fast_kernels(hidden)) is not None:
        return triton.add_and_norm(hidden, update, weight, eps=eps)
    if update is not None:
        hidden += in_order(*update)
    return hidden, _rms_norm(hidden, weight, eps)


def silu_product(z: Tensor, layout: Layout) -> Tensor:
    """silu(gate) * up for a stack of gate and up: (tokens, d_mlp)."""
    if (triton := fast_kernels(z)) is not None:
        return triton.silu_product(z, layout)
    gate, up = in_order(z, layout).split(layout.sizes, dim=1)
    return functional.silu(gate) * up


def rotate_and_store(z: Tensor, layout: Layout, state: AttentionState) -> Tensor:
    """Queries with rotary embedding, (batch, length, queries, size); keys with it and values go into the cache.

    z: (batch * length, width) of a stack of q, k and v.
    """
    if (triton := fast_kernels(z)) is not None:
        return triton.rotate_and_store(z, layout, state)
    heads, cache = state.heads, state.cache
    batch = len(cache[0])
    length = len(z) // batch
    q, k, v = (part.view(batch, length, -1, heads.size) for part in in_order(z, layout).split(layout.sizes, dim=1))
    if heads.query_norm is not None and heads.key_norm is not None:
        q, k = _rms_norm(q, heads.query_norm, heads.eps), _rms_norm(k, heads.key_norm, heads.eps)
    places = state.position + torch.arange(length, device=z.device)
    cos, sin = (table[places, None] for table in state.rotary)
    for store, part in zip(cache, (_rotate(k, cos, sin), v), strict=True):
        store.index_copy_(2, places, part.transpose(1, 2))
    return _rotate(q, cos, sin)


def decode_attention(z: Tensor, layout: Layout, state: AttentionState, *, scratch: Scratch) -> Tensor:
    """`rotate_and_store` for one token a sequence, then its attention over the cache: (batch, queries * size)."""
    if (triton := fast_kernels(z)) is not None:
        return triton.decode_attention(z, layout, state, scratch=scratch)
    q = rotate_and_store(z, layout, state)
    length = int(state.position) + 1
    return attention(q, tuple(part[:, :, :length] for part in state.cache), scale=state.scale, causal=False)


def attention(q: Tensor, cache: tuple[Tensor, ...], *, scale: float, causal: bool) -> Tensor:
    """softmax(scale q k^T) v: (batch * length, queries * size). Keys and values: (batch, keys, length, size)."""
    keys, values = cache
    grouped = q.shape[2] != keys.shape[1]
    y = functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return y.transpose(1, 2).reshape(q.shape[0] * q.shape[1], -1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float() if x.dtype.itemsize < 4 else x
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)


def fast_kernels(x: Tensor) -> Any:
    """The package runner/gpu where x is on a GPU and Triton is there, else None."""
    if not (x.is_cuda and HAS_TRITON):
        return None
    from component.runner import gpu

    return gpu
