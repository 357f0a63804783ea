"""Run by torchrun in test_parallel.py: a process of a team compresses the tiny model and saves what it saw and got."""

import sys
from pathlib import Path

import torch

from component.flow.means import Flows, Means
from component.flow.streaming import Compression, compress_layers
from component.flow.team import team_for
from component.ranks.sizes import Rank
from component.solve.moments import Moments
from component.solve.solvers import make_solver
from tests import tiny
from tests.solve.scripted import NEEDS, Scripted
from utils.layers import HeldLayers, describe_layers

WINDOWS = tiny.token_windows(7, 24)  # no number of processes but 7 divides them
WHITENING = 3  # fewer than the second of two processes begins with
SOLVERS = {"exact": ("svd-llm", None, 0.25), "whitened": ("svd-llm", 1, 0.25), "asvd": ("asvd", 0, 0.25)}


def compress(team, kind: str) -> tuple[dict[str, Moments], dict[str, torch.Tensor]]:
    """Moments by module, of those that this process solved, and the tensors of all new layers."""
    inner = make_solver(*SOLVERS[kind], drift_ratio=0.5 if kind == "exact" else 0.0)
    seen: dict[str, Moments] = {}

    def solve(weight, moments, rank, name):
        seen[name] = moments
        return inner.solve(weight, moments, rank, what=name)

    needs = {name: getattr(inner, name) for name in NEEDS}
    model = tiny.build()
    described = describe_layers(model)
    plan = {f"{layer.name}.{name}": Rank(8) for layer in described for name in layer.linears()}
    weights = torch.rand(7, 24, generator=torch.Generator().manual_seed(1))
    solver = Scripted(solve, **needs, token_weights=(lambda name: weights) if kind == "exact" else None)
    flows = Flows(WINDOWS, whitening=WHITENING, reconstruction=6)
    waiting = None if team.size == 1 else 1  # of a team, not all passes wait
    means = Means(torch.device("cpu"), HeldLayers(model), batch=2, team=team, waiting=waiting)
    compression = Compression(plan, solver, dtype=torch.float32)
    layers = compress_layers(model, described, compression, flows=flows, means=means)
    return seen, {f"{i}.{key}": t for i, layer in layers for key, t in layer.state_dict().items()}


def main(folder: Path) -> None:
    with team_for(torch.device("cpu")) as (team, _):
        found = {}
        for kind in SOLVERS:
            seen, tensors = compress(team, kind)
            found[kind] = {name: vars(moments) for name, moments in seen.items()}, tensors
        torch.save(found, folder / f"{team.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
