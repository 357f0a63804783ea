"""What a plan says of a linear: a rank, channels that are left, or that it stays dense. None of them is a number."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Rank:
    """Two factors of this rank."""

    rank: int

    @classmethod
    def or_dense(cls, rank: int | None) -> Rank | Dense:
        """None is dense."""
        return DENSE if rank is None else cls(rank)

    @property
    def number(self) -> int:
        return self.rank


@dataclass(frozen=True)
class Channels:
    """left: how many channels are, of each head or of the MLP."""

    left: int

    @property
    def number(self) -> int:
        return self.left


class Dense(Enum):
    """As it was."""

    DENSE = "dense"

    @property
    def number(self) -> None:
        return None


DENSE = Dense.DENSE
Size = Rank | Channels | Dense
Plan = dict[str, Size]  # by full name of the module, in model order


def numbers_of(plan: Plan) -> dict[str, int | None]:
    """The bare ranks or channels, None where dense: what records and hashes say of a plan."""
    return {name: size.number for name, size in plan.items()}
