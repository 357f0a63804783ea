"""Linears that share an input as one stack: their first factors as one product, coefficient products after it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from component.format.linear import FactoredLinear, LowRankLinear, PIFALinear
from component.format.narrow import PaddedHeads, PickedHeads
from component.runner.layout import Coefficients, Layout, Run, Scratch
from component.runner.ops import stacked_product
from utils.errors import UsageError

Stackable = nn.Linear | FactoredLinear | PaddedHeads | PickedHeads
ALIGNED = 16  # numbers; what starts at a multiple of it is read in whole vectors


class Stack:
    """Dense, low-rank and pivoted linears, and those with narrower heads, in any mix.

    Takes ownership: the modules' parameters become views of the stacked tensors, so nothing is stored twice and the
    model that they belong to still works. Ranks that are no multiple of 16 are filled up with zeros. What is zero in
    narrower heads is one more column of z, that of a row of zeros, which all of them share.

    Raises: UsageError for a module that is none of these, or for heads to be picked beside other linears.
    """

    def __init__(self, modules: Sequence[Stackable]):
        firsts, seconds = zip(*map(_factors, modules), strict=True)
        padded = any(isinstance(module, PaddedHeads) for module in modules)
        self.picked = _picked(modules)
        self.first, starts = _stack_rows(
            [linear.weight for linear in firsts], any(second is not None for second in seconds), padded
        )
        zero = len(self.first) - 1  # where there are padded heads
        for linear, start in zip(firsts, starts, strict=True):
            _rebind(linear, self.first[start : start + len(linear.weight)])
        self.width = _aligned(len(self.first))
        self.coefficients: list[Coefficients] = []
        places = []
        for module, second, start in zip(modules, seconds, starts, strict=True):
            places.append(_places(module, start=start, column=self.width, zero=zero))
            if second is not None:
                weight = _pad_columns(second.weight.detach())
                _rebind(second, weight[:, : second.weight.shape[1]])
                self.coefficients.append(Coefficients(weight, start, self.width))
                self.width += _aligned(len(weight))
        runs = [run for run in map(_run, places) if run is not None]
        self.layout = Layout(
            sizes=tuple(module.out_features for module in modules),
            runs=tuple(runs) if len(runs) == len(places) else None,
            columns=torch.cat(places).int(),
            bias=_bias(modules, self.first),
        )

    def __call__(self, x: Tensor, scratch: Scratch) -> Tensor:
        """x: (tokens, d_in) -> z: (tokens, width), outputs where `layout` says."""
        if self.picked is not None:
            heads, width = self.picked
            x = x.unflatten(-1, (heads, -1))[..., :width].flatten(-2)
        return stacked_product(x, self.first, self.coefficients, width=self.width, scratch=scratch)


def _picked(modules: Sequence[Stackable]) -> tuple[int, int] | None:
    """Heads and how many channels of each are read, where the one linear does not read all."""
    picking = [module for module in modules if isinstance(module, PickedHeads)]
    if not picking:
        return None
    if len(modules) > 1:
        raise UsageError("a linear that reads a part of each head shares its input here, which this runner does not do")
    return picking[0].heads, picking[0].width


def _factors(module: Stackable) -> tuple[Any, nn.Linear | None]:
    """The linear that reads the input and, where there is one, the linear that reads its output."""
    if isinstance(module, PIFALinear):
        return module.pivot, module.coeff if len(module.coeff.weight) else None
    if isinstance(module, LowRankLinear):
        return module.v, module.u
    if type(module) is nn.Linear or isinstance(module, PaddedHeads | PickedHeads):
        return module, None
    raise UsageError(f"{type(module).__name__} is no linear that this runner knows")


def _stack_rows(weights: list[Tensor], fill_up: bool, zeros: bool) -> tuple[Tensor, list[int]]:
    """One (rows, d_in) tensor and the first row of each weight; rows of zeros keep starts, and the end, aligned.

    zeros: whether the last row has to be one of them.
    """
    if not zeros and len(weights) == 1 and weights[0].is_contiguous() and not (fill_up and len(weights[0]) % ALIGNED):
        return weights[0].detach(), [0]
    starts, rows = [], 0
    for weight in weights:
        starts.append(rows)
        rows = _aligned(rows + len(weight))
    if zeros and starts[-1] + len(weights[-1]) == rows:
        rows += ALIGNED
    stacked = weights[0].new_zeros(rows, weights[0].shape[1])
    for weight, start in zip(weights, starts, strict=True):
        stacked[start : start + len(weight)] = weight.detach()
    return stacked, starts


def _pad_columns(weight: Tensor) -> Tensor:
    n, k = weight.shape
    if k == _aligned(k) and weight.is_contiguous():
        return weight
    padded = weight.new_zeros(n, _aligned(k))
    padded[:, :k] = weight
    return padded


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


def _rebind(linear: Any, weight: Tensor) -> None:
    if linear.weight.data_ptr() != weight.data_ptr():
        linear.weight = nn.Parameter(weight, requires_grad=False)


def _places(module: Stackable, *, start: int, column: int, zero: int) -> Tensor:
    """Column of z of each output: (d_out,) int64. First factor from column `start` on, second from `column` on.

    zero: a column of zeros.
    """
    if isinstance(module, PaddedHeads):
        stored = torch.arange(module.heads * module.width, device=module.weight.device) + start
        missing = module.head_dim - module.width
        return nn.functional.pad(stored.view(module.heads, -1), (0, missing), value=zero).flatten()
    if isinstance(module, PIFALinear):
        perm = module.perm.long()
        return torch.where(perm < module.rank, perm + start, perm - module.rank + column)
    origin = column if isinstance(module, LowRankLinear) else start
    return torch.arange(module.out_features, device=module.weight.device) + origin


def _run(places: Tensor) -> Run | None:
    """The two straight runs that places: (d_out,) consist of, or None where they are more."""
    shifts = places - torch.arange(len(places), device=places.device)
    changes = (shifts.diff() != 0).nonzero().flatten().tolist()
    if len(changes) > 1:
        return None
    split = changes[0] + 1 if changes else len(places)
    return Run(split, int(shifts[0]), int(shifts[-1]))


def _bias(modules: Sequence[Stackable], like: Tensor) -> Tensor | None:
    if all(module.bias is None for module in modules):
        return None
    biases = [m.dense_bias() if isinstance(m, PaddedHeads) else m.bias for m in modules]
    whole = [like.new_zeros(m.out_features) if b is None else b for m, b in zip(modules, biases, strict=True)]
    return torch.cat(whole).detach()
