"""What a planner is: it turns a recipe into ranks or channels, and says who makes the layers. One for each --prune."""

from typing import Any, Protocol

from component.compress.recipe import Recipe
from component.flow.solving import LayerSolver
from component.ranks.sizes import Plan
from component.solve.solver import Solver


class Planner(Protocol):
    """Ready for any of the recipes that it was made for: what needs data has been measured."""

    def kinds(self, start: Recipe) -> list[Recipe]:
        """What held-out windows choose from before they choose constants; nothing where there is no such choice."""

    def plan(self, recipe: Recipe) -> Plan:
        """Module name -> rank, channels or dense. Raises: UsageError where the density pays for none."""

    def solver(self, recipe: Recipe) -> Solver:
        """What one linear is solved with."""

    def layer_solver(self, recipe: Recipe) -> LayerSolver | None:
        """What makes a whole layer; None where its linears are solved one by one."""

    def entries(self, plan: Plan) -> dict[str, dict[str, Any]]:
        """The `layers` of the quantization config."""
