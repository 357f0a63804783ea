"""What the integers of a factored module are of: its two factors, or the one matrix that they multiply to.

Coefficients sum outputs of many pivots that nearly cancel, so a module in 4 bits can lose several times what its dense
matrix loses there. That matrix is not much larger than both factors (d_out d_in numbers for r (d_in + d_out - r)), and
where pivots are many the coefficients are few, so that 8 bits for them cost little. Under a limit on all bytes those
modules get more that save most of their loss per byte.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from component.format.packed import PackedLinear
from component.quantize.gptq import Grid

# both factors at the bits asked for; the one applied last in WIDE bits; the product of both
FACTORED, WIDE_OUTER, MATRIX = "factors", "wide_outer", "matrix"
WIDE = 8


class Form(NamedTuple):
    """kind: one of the above; loss: expected error of the module's outputs, of their energy; size: bytes."""

    kind: str
    loss: float
    size: int


def chosen(modules: Mapping[str, Sequence[Form]], limit: int) -> dict[str, str]:
    """The kind of every module's form, sizes adding up to at most `limit` bytes, or to the least that they can.

    Each begins with its smallest form. Then the change that saves most loss per byte is made, of those that still have
    room, again and again.
    """
    now = {name: min(forms, key=lambda form: (form.size, form.loss)) for name, forms in modules.items()}
    room = limit - sum(form.size for form in now.values())
    while True:
        changes = [
            ((now[name].loss - form.loss) / (form.size - now[name].size), name, form)
            for name, forms in modules.items()
            for form in forms
            if form.loss < now[name].loss and form.size - now[name].size <= room
        ]
        if not changes:
            return {name: form.kind for name, form in now.items()}
        _, name, form = max(changes, key=lambda change: change[0])
        room -= form.size - now[name].size
        now[name] = form


def packed_bytes(rows: int, columns: int, grid: Grid) -> int:
    """Of a matrix as packed.py stores it: codes, zeros, scales and its shape."""
    layer = PackedLinear(columns, rows, bits=grid.bits, group_size=grid.group_size, device="meta")
    return sum(tensor.nbytes for tensor in layer.buffers())
