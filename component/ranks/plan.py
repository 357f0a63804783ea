"""A plan as a JSON file that users can edit: {"format_version": 1, "layers": {module name: rank | "dense"}}.

One that left out whole channels has {"channels": how many are left} in place of a rank, which is written and not read.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from component.ranks.budget import Module
from component.ranks.sizes import DENSE, Channels, Dense, Plan, Rank, Size
from utils.errors import UsageError

FORMAT_VERSION = 1


def read_plan(path: Path, modules: Sequence[Module]) -> Plan:
    """The plan in a JSON file: {"format_version": 1, "layers": {module name: rank | "dense"}}.

    Raises: UsageError where it is no such file, or does not name exactly the model's modules with ranks they can have.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the plan {path}: {error}") from error
    if (
        not isinstance(content, dict)
        or content.get("format_version") != FORMAT_VERSION
        or not isinstance(content.get("layers"), dict)
    ):
        raise UsageError(f'{path} is no plan: it needs "format_version": 1 and "layers": {{module: rank or "dense"}}')
    layers = content["layers"]
    names = {module.name for module in modules}
    if odd := sorted(names.symmetric_difference(layers)):
        raise UsageError(f"{path} and the model differ in {len(odd)} modules, such as {odd[0]}")
    plan: Plan = {}
    for module in modules:
        rank = layers[module.name]
        if rank != "dense" and not (type(rank) is int and 1 <= rank <= min(module.d_out, module.d_in)):
            raise UsageError(f'{path}: {module.name} takes "dense" or 1..{min(module.d_out, module.d_in)}, not {rank}')
        plan[module.name] = DENSE if rank == "dense" else Rank(rank)
    return plan


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """What read_plan reads, unless it has channels."""

    return {"format_version": FORMAT_VERSION, "layers": {name: _as_json(size) for name, size in plan.items()}}


def _as_json(size: Size) -> int | str | dict[str, int]:
    match size:
        case Rank(rank):
            return rank
        case Channels(left):
            return {"channels": left}
        case Dense.DENSE:
            return "dense"
