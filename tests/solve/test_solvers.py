"""component/solve/solvers.py: the names of the front door are those of the registry, and a new solver is one line."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from component.solve.moments import Moments
from component.solve.names import FACTORING, NARROWING
from component.solve.reconstructing import Alternating, Exact
from component.solve.solver import Factors, Solver
from component.solve.solvers import SOLVERS, make_solver
from component.solve.whitening import plain_factors
from tests.tiny import gram_of, rand

NAMES = Path(__file__).parents[2] / "component" / "solve" / "names.py"


def test_the_names_of_the_front_door_are_those_of_the_registry():
    assert tuple(SOLVERS) == FACTORING


def test_the_names_come_without_any_library():
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); print(*{'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(NAMES)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@dataclass(frozen=True)
class Half(Solver):
    """Half of the weight, from the inputs of the dense flow."""

    needs_dense_gram = True

    def solve(self, weight: torch.Tensor, moments: Moments, rank: int, *, what: str) -> Factors:
        assert moments.dense_gram is not None
        return plain_factors(weight / 2, rank)


def test_a_new_solver_is_a_class_and_a_line(monkeypatch):
    """It also serves as the start of the paper's steps, which read what it reads."""
    monkeypatch.setitem(SOLVERS, "half", Half)
    weight, x = rand(6, 8), rand(8, 40, seed=1)
    moments = Moments(gram=gram_of(x), dense_gram=gram_of(x))
    solver = make_solver("half", 0, 0.25)
    assert isinstance(solver, Half) and solver.needs_dense_flow and not solver.needs_low_rank_flow
    u, v = solver.solve(weight, moments, 6, what="a")
    torch.testing.assert_close(u @ v, weight / 2)
    alternating = make_solver("half", 1, 0.0)
    assert isinstance(alternating, Alternating) and alternating.needs_dense_gram and alternating.needs_gram
    u, v = alternating.solve(weight, moments, 6, what="a")
    torch.testing.assert_close(u @ v, weight)  # U makes up for the half
    assert isinstance(make_solver("half", None, 0.25), Exact)


def test_solvers_without_factors_or_a_target_say_so():
    weight, moments = rand(6, 8), Moments()
    with pytest.raises(TypeError, match="a: flatllm makes no factors"):
        make_solver(NARROWING, 0, 0.25).solve(weight, moments, 3, what="a")
    with pytest.raises(TypeError, match="Plain reconstructs nothing"):
        make_solver("svd", 0, 0.25).target(weight, moments)
    with pytest.raises(TypeError, match="no dense_gram was gathered"):
        make_solver("svd-llm", 0, 0.25).solve(weight, moments, 3, what="a")
