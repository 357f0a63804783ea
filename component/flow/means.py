"""What a walk through the layers is given beside the model: the windows that it reads, and what it works with."""

from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from component.flow.team import Team
from component.solve.solver import Solver
from utils.layers import LayerSource
from utils.placement import Shelf


@dataclass(frozen=True)
class Flows:
    """How the calibration windows are used. windows: (count, length) int64.

    whitening and reconstruction count from the first window on: how many feed the moments of the dense flow alone, and
    how many the two-flow moments.
    """

    windows: Tensor
    _: KW_ONLY
    whitening: int
    reconstruction: int

    def needed_by(self, solver: Solver) -> Tensor:
        """The windows that go through the layers; a solver that looks at no data still needs a layer's keywords."""
        if solver.needs_low_rank_flow:
            return self.windows
        return self.windows[: self.whitening] if solver.needs_dense_flow else self.windows[:1, :1]


@dataclass(frozen=True)
class Means:
    """What the work is done with; nothing of it decides a result.

    source: of the dense layers. batch: windows that go through a layer at once. shelf: for the hidden states. team: the
    processes that share the windows and the solving. waiting: of the batches, those whose passes wait in mid-layer,
    None for all; it changes memory and time only (lockstep.py).
    """

    device: torch.device
    source: LayerSource
    _: KW_ONLY
    batch: int = 1
    shelf: Shelf = field(default_factory=Shelf)
    team: Team = field(default_factory=Team)
    waiting: int | None = None
