"""The fast forward and backward of a pivoted layer: pure functions on tensors.

Z = [Y_p | Y_np], with Y_p = X W_p^T and Y_np = Y_p C^T, is two matrix products into one buffer. To put its columns in
order moves as many bytes as a small product does, so that is at most one gather, and none where the next operation can
read Z itself. One token on a GPU is two kernels that stream the weights and write in order.

To torch.compile the products are one operator, since `mm(out=slice)` breaks a graph; the gather is plain indexing,
which it fuses into what comes next. Triton is imported at the first call that needs it.

This file travels inside every checkpoint (see integration.py), so it imports nothing but torch and its neighbour.
"""

import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_TOKENS = 16  # up to which a CPU spends more on calls than on the copy that they spare
LARGE_RANK = 512  # from which the order of Z's numbers in memory decides how fast a CPU's products are
HALF = (torch.float16, torch.bfloat16)
ALIGNED = 8  # numbers of 2 bytes: for other sizes cuBLAS falls back on kernels that take 7 times as long
PADDED_RANK = 16  # what a rank that has to grow anyway grows to a multiple of: measured faster than 8, 32, 64 and 128
HAS_TRITON = importlib.util.find_spec("triton") is not None


def pivoted_product(x: Tensor, pivot: Tensor, coeff: Tensor, bias: Tensor | None = None) -> Tensor:
    """Z = [Y_p | Y_np] in pivot order: (..., d_out), not always contiguous.

    x: (..., d_in), pivot: (r, d_in), coeff: (d_out - r, r), bias: (d_out,) in pivot order or None. It is added to Z
    after both products: before, Y_p + b would reach Y_np through C.
    """
    if _are_few(x):
        y_p = F.linear(x, pivot)
        z = torch.cat([y_p, F.linear(y_p, coeff)], dim=-1)
    elif torch.compiler.is_compiling():
        z = torch.ops.pifa.product(x, pivot, coeff)
    else:
        z = (_Product.apply if _differentiated(x, pivot, coeff) else _product)(x, pivot, coeff)
    return z if bias is None else z + bias


def reorder(z: Tensor, perm: Tensor, residual: Tensor | None = None) -> Tensor:
    """out[..., j] = (residual[..., j] +) z[..., perm[j]]: (..., d_out).

    z: (..., d_out), perm: (d_out,), a permutation, int32 or int64, residual: broadcasts to z's shape, or None.
    """
    return _Reorder.apply(z, perm, residual) if _differentiated(z, residual) else _gather(z, perm, residual)


def pifa_linear(x: Tensor, pivot: Tensor, coeff: Tensor, perm: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer in natural order: (..., d_out).

    x: (..., d_in), pivot: (r, d_in), coeff: (d_out - r, r), perm: (d_out,), bias: (d_out,) in natural order or None.
    """
    if (
        _runs_triton(x)
        and x.shape[:-1].numel() == 1
        and _streamable(x, pivot, coeff, bias)
        and not _differentiated(x, pivot, coeff, bias)
    ):
        one_token = torch.ops.pifa.one_token if torch.compiler.is_compiling() else _one_token
        return one_token(x, pivot, coeff, perm, bias)
    if _differentiated(x, pivot, coeff) and not (_are_few(x) or torch.compiler.is_compiling()):
        return _Layer.apply(x, pivot, coeff, perm, bias)[0]
    return reorder(pivoted_product(x, pivot, coeff), perm, bias)


def inverse(perm: Tensor) -> Tensor:
    """inverse[perm[j]] = j: (d_out,), in perm's dtype."""
    order = torch.arange(len(perm), device=perm.device, dtype=perm.dtype)
    return torch.empty_like(perm).scatter_(0, perm.long(), order)


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _are_few(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and x.shape[:-1].numel() <= FEW_TOKENS


def _runs_triton(x: Tensor) -> bool:
    return HAS_TRITON and x.device.type == "cuda"


# ---------------------------------------------------------------- products


class _Padding(NamedTuple):
    """Zeros that put every row of the factors and of Z on a 16-byte boundary.

    `left` zero rows above W_p make as many zero columns left of Y_p, which as many zero columns left of C leave out;
    `right` zero rows below C end a row of Z. So Z stays one matrix: columns left .. left + d_out of its buffer.
    """

    left: int
    right: int

    @classmethod
    def of(cls, x: Tensor, rank: int, others: int) -> "_Padding":
        if x.device.type != "cuda" or x.dtype not in HALF:
            return cls(0, 0)
        return cls(-rank % PADDED_RANK if rank % ALIGNED else 0, -others % ALIGNED)

    def pivot(self, rows: Tensor) -> Tensor:
        """(r, k) -> (left + r, k)"""
        return F.pad(rows, (0, 0, self.left, 0)) if self.left else rows

    def coeff(self, rows: Tensor) -> Tensor:
        """(d_out - r, r) -> (d_out - r + right, left + r)"""
        return F.pad(rows, (self.left, 0, 0, self.right)) if self.left or self.right else rows

    def columns(self, z: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(T, d_out) -> (T, left + r), (T, d_out - r + right)"""
        y_p, y_np = z[:, :rank], z[:, rank:]
        return (
            F.pad(y_p, (self.left, 0)) if self.left else y_p,
            F.pad(y_np, (0, self.right)) if self.right else y_np,
        )


def _unset(x: Tensor, rank: int, others: int) -> tuple[Tensor, Tensor, _Padding]:
    """Z with nothing in it yet: (..., d_out), the matrix that it is a part of: (T, width), and the padding in that."""
    padding = _Padding.of(x, rank, others)
    tokens, width = x.shape[:-1].numel(), padding.left + rank + others + padding.right
    # a CPU's products of large matrices are faster with tokens running fastest, those in half precision far slower
    features_first = x.device.type == "cpu" and x.dtype not in HALF and rank >= LARGE_RANK
    whole = x.new_empty(width, tokens).t() if features_first else x.new_empty(tokens, width)
    z = whole[:, padding.left : padding.left + rank + others]
    return z.unflatten(0, x.shape[:-1]) if x.dim() > 1 else z[0], whole, padding


def _product(x: Tensor, pivot: Tensor, coeff: Tensor) -> Tensor:
    z, whole, padding = _unset(x, pivot.shape[0], coeff.shape[0])
    first = padding.left + pivot.shape[0]
    torch.mm(x.reshape(-1, x.shape[-1]), padding.pivot(pivot).t(), out=whole[:, :first])
    torch.mm(whole[:, :first], padding.coeff(coeff).t(), out=whole[:, first:])
    return z


def _operator(x: Tensor, pivot: Tensor, coeff: Tensor) -> Tensor:
    """The product for compilers, which take a result with padding around it for one without: it is copied out of it."""
    return _without_padding(_product(x, pivot, coeff), _Padding.of(x, len(pivot), len(coeff)))


def _operator_fake(x: Tensor, pivot: Tensor, coeff: Tensor) -> Tensor:
    z, _, padding = _unset(x, len(pivot), len(coeff))
    return _without_padding(z, padding)


def _without_padding(z: Tensor, padding: _Padding) -> Tensor:
    return z.contiguous() if any(padding) else z


def _product_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)


def _product_backward(ctx, dz: Tensor):
    x, pivot, coeff, z = ctx.saved_tensors
    return _gradients(x, pivot, coeff, z, dz, ctx.needs_input_grad, in_place=False)


def _gradients(x, pivot, coeff, z, dz, needed, in_place: bool) -> tuple[Tensor | None, ...]:
    """dX = (dY_p + dY_np C) W_p, dW_p = (dY_p + dY_np C)^T X, dC = dY_np^T Y_p; only what is needed.

    z, dz: (..., d_out). in_place: the sum may take dz's memory, which spares a copy of dY_p.
    """
    need_x, need_pivot, need_coeff = needed
    rank, others = pivot.shape[0], coeff.shape[0]
    padding = _Padding.of(x, rank, others)
    rows, dz, z = (t.reshape(-1, t.shape[-1]) for t in (x, dz, z))
    d_p, d_np = padding.columns(dz, rank)
    dx = d_pivot = d_coeff = None
    if need_x or need_pivot:
        d_all = (Tensor.addmm_ if in_place else torch.addmm)(d_p, d_np, padding.coeff(coeff))
        dx = (d_all @ padding.pivot(pivot)).view(x.shape) if need_x else None
        d_pivot = (d_all.t() @ rows)[padding.left :] if need_pivot else None
    if need_coeff:
        d_coeff = (d_np.t() @ padding.columns(z, rank)[0])[:others, padding.left :]
    return dx, d_pivot, d_coeff


class _Product(torch.autograd.Function):
    """The same without an operator, whose call takes the host up to a quarter of a millisecond more."""

    forward = staticmethod(_product)
    setup_context = staticmethod(_product_setup)
    backward = staticmethod(_product_backward)


class _Layer(torch.autograd.Function):
    """Products and gather as one: the gradient is gathered into memory of its own, where it can be added to."""

    @staticmethod
    def forward(x, pivot, coeff, perm, bias):
        z = _product(x, pivot, coeff)
        return _gather(z, perm, bias), z

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, pivot, coeff, perm, bias = inputs
        z = output[1]
        ctx.save_for_backward(x, pivot, coeff, perm, z)
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        ctx.shape = None if bias is None else bias.shape

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None, None, None
        x, pivot, coeff, perm, z = ctx.saved_tensors
        again = torch.is_grad_enabled()  # to be differentiated once more: then Z is a function of the inputs
        z = pivoted_product(x, pivot, coeff) if again else z
        *needed, _, need_bias = ctx.needs_input_grad
        dz = reorder(dy, inverse(perm)).to(z.dtype)  # of a wider bias, so are y and dy
        d_bias = dy.sum_to_size(ctx.shape) if need_bias else None
        return *_gradients(x, pivot, coeff, z, dz, needed, in_place=not again), None, d_bias


# ---------------------------------------------------------------- order


class _Reorder(torch.autograd.Function):
    """Its gradient is the gather by the inverse permutation, where that of indexing would be a sum by atomics."""

    @staticmethod
    def forward(z, perm, residual):
        return _gather(z, perm, residual)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, perm, residual = inputs
        ctx.save_for_backward(perm)
        ctx.shape = None if residual is None else residual.shape

    @staticmethod
    def backward(ctx, gradient):
        (perm,) = ctx.saved_tensors
        dz = reorder(gradient, inverse(perm)) if ctx.needs_input_grad[0] else None
        return dz, None, gradient.sum_to_size(ctx.shape) if ctx.needs_input_grad[2] else None


def _gather(z: Tensor, perm: Tensor, residual: Tensor | None) -> Tensor:
    if _runs_triton(z) and not torch.compiler.is_compiling():
        from .triton_kernels import take_columns

        add = None if residual is None else _rows(residual.expand(z.shape))
        return take_columns(_rows(z), perm, add).view(z.shape)
    y = z.index_select(-1, perm)
    return y if residual is None else y + residual


def _rows(x: Tensor) -> Tensor:
    """(..., d) -> (T, d) whose columns lie next to each other."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


# ---------------------------------------------------------------- one token


def _streamable(x: Tensor, pivot: Tensor, coeff: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels for one token read these as they are."""
    return (
        x.dtype == pivot.dtype == coeff.dtype == (coeff if bias is None else bias).dtype
        and x.dtype in (*HALF, torch.float32)
        and pivot.stride(-1) == coeff.stride(-1) == (1 if bias is None else bias.stride(0)) == 1
    )


def _one_token(x: Tensor, pivot: Tensor, coeff: Tensor, perm: Tensor, bias: Tensor | None) -> Tensor:
    from .triton_kernels import one_token

    return one_token(x.flatten().contiguous(), pivot, coeff, perm, bias).view(*x.shape[:-1], perm.shape[0])


def _one_token_fake(x: Tensor, pivot: Tensor, coeff: Tensor, perm: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], perm.shape[0])


def _register() -> None:
    if hasattr(torch.ops.pifa, "product"):
        return  # a checkpoint's copy of this file may come after the installed one
    product = torch.library.custom_op("pifa::product", _operator, mutates_args=())
    product.register_fake(_operator_fake)
    product.register_autograd(_product_backward, setup_context=_product_setup)
    one = torch.library.custom_op("pifa::one_token", _one_token, mutates_args=())
    one.register_fake(_one_token_fake)


_register()
