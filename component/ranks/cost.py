"""What a linear layer costs to store, and the largest rank that a density pays for. Numbers in, numbers out.

Density = numbers stored / d_out d_in. Both formats count every number in their tensors, the index included; a bias
is stored either way and counted in neither.
"""

from collections.abc import Callable
from typing import NamedTuple


def pivoted_numbers(rank: int, d_out: int, d_in: int) -> int:
    """r (m + n) - r^2 + m: pivot rows, coefficients and one index per output."""
    return rank * (d_out + d_in) - rank * rank + d_out


def low_rank_numbers(rank: int, d_out: int, d_in: int) -> int:
    """r (m + n): both factors."""
    return rank * (d_out + d_in)


class StorageFormat(NamedTuple):
    """Which format the ranks are meant for: `--use_pifa` pays by the pivoted cost, `--no-use_pifa` by that of U V."""

    name: str
    numbers: Callable[[int, int, int], int]

    def rank_for(self, budget: float, d_out: int, d_in: int) -> int | None:
        """The largest rank that costs at most `budget` numbers; None (keep dense) where dense fits, 0 where nothing.

        Bisection over 0..min(m, n) - 1, on which both costs rise.
        """
        if budget >= d_out * d_in:
            return None
        low, high = 0, min(d_out, d_in) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.numbers(middle, d_out, d_in) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def stored(self, rank: int | None, d_out: int, d_in: int) -> int:
        """Numbers that a module stores at this rank; None means dense."""
        return d_out * d_in if rank is None else self.numbers(rank, d_out, d_in)


PIVOTED = StorageFormat("pifa", pivoted_numbers)
LOW_RANK = StorageFormat("lowrank", low_rank_numbers)
