"""Integers for a product's two factors, or for the one matrix that they multiply to: which modules take the latter.

Coefficients sum outputs of many pivots that nearly cancel, so a module in 4 bits can lose several times what its dense
matrix loses there, and that matrix is not much larger than both factors: at rank r it has d_out d_in numbers for
r (d_in + d_out - r). Under a limit on all bytes the modules are merged that save most of their loss per byte.
"""

from collections.abc import Iterable
from typing import NamedTuple

from component.gptq import Grid

WORD = 4  # bytes
SHAPE = 16  # bytes of weight_shape


class Form(NamedTuple):
    """loss: expected error of the module's outputs, of their energy; size: bytes."""

    loss: float
    size: int


class Module(NamedTuple):
    """A module and the two forms that its integers can take."""

    name: str
    factors: Form
    matrix: Form

    @property
    def saved(self) -> float:
        return self.factors.loss - self.matrix.loss

    @property
    def added(self) -> int:
        return self.matrix.size - self.factors.size


def merged(modules: Iterable[Module], limit: int) -> set[str]:
    """Names of the modules to store as one matrix, so that the sizes of all come to at most `limit` bytes.

    They are taken in the order of loss saved per byte added; one for which there is no room any more is passed over.
    Where not even all factors as they are have room, only those merge that become smaller.
    """
    modules = list(modules)
    room = limit - sum(module.factors.size for module in modules)
    names = set()
    worthwhile = [module for module in modules if module.saved > 0]
    for module in sorted(worthwhile, key=lambda m: m.saved / m.added if m.added > 0 else float("inf"), reverse=True):
        if module.added <= max(room, 0):
            names.add(module.name)
            room -= module.added
    return names


def packed_bytes(rows: int, columns: int, grid: Grid) -> int:
    """Of a matrix as packed.py stores it: codes, zeros, scales and its shape."""
    groups = -(-columns // grid.group_size)
    words = rows * _words(columns, grid) + _words(rows, grid) * groups
    return WORD * words + 2 * rows * groups + SHAPE


def _words(count: int, grid: Grid) -> int:
    return -(-count * grid.bits // (8 * WORD))
