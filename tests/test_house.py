"""The plan of the house (docs/code.md): who imports whom, who sees flags, what travels, and how calls are written."""

import ast
from collections.abc import Iterator
from pathlib import Path

import PIFA

REPOSITORY = Path(PIFA.__file__).parent
# a room may import those of later lines only
TIERS = [
    {"PIFA", "api"},
    {"modes"},
    {"compress"},
    {"channels", "quantize", "finetune", "pivot"},
    {"bench"},
    {"flow"},
    {"checkpoint"},
    {"runner", "ranks", "solve", "evaluater"},
    {"format"},
    {"utils"},
]
TIER = {room: number for number, rooms in enumerate(TIERS) for room in rooms}
STRICTER = {"runner": {"format", "utils"}, "format": set()}
MOST_BY_PLACE = 3
# calls that others define, or that mirror those of torch
MIRRORS = {"LowRankLinear", "PIFALinear", "PackedLinear", "PaddedHeads", "PickedHeads", "from_pivots", "from_packed"}
MIRRORS |= {"pifa_linear", "pivoted_product", "one_token"}  # of format/, as torch.nn.functional.linear
MIRRORS |= {"_attend", "poison"}  # called by transformers; takes shapes, as many as there are
TRAVELS = {"integration", "linear", "narrow", "packed", "kernels", "triton_kernels"}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for pattern in ("PIFA.py", "evaluater.py", "component/**/*.py", "utils/**/*.py"):
        for path in sorted(REPOSITORY.glob(pattern)):
            yield path.relative_to(REPOSITORY), ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str | None:
    """None for component/__init__.py, which asks for things by name and when they are used."""
    if path.parts[0] == "component":
        return path.parts[1] if len(path.parts) > 2 else None
    return path.parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of something of ours, inside functions too."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for first, *others in (name.split(".") for name in names):
            room = others[0] if first == "component" and others else first
            if room in TIER and first in {"component", "utils", "evaluater", "PIFA"}:
                yield node.lineno, room


def test_rooms_import_only_those_below():
    wrong = []
    for path, tree in sources():
        room = room_of(path)
        for line, other in imported(tree):
            below = room is None or other == room or TIER[other] > TIER[room]
            if not below or (room in STRICTER and other not in {room, *STRICTER[room]}):
                wrong.append(f"{path}:{line} {room} imports {other}")
    assert wrong == []


def test_every_file_has_a_room():
    loose = {path.name for path in (REPOSITORY / "component").glob("*.py")}
    rooms = {path.name for path in (REPOSITORY / "component").iterdir() if (path / "__init__.py").is_file()}
    assert loose == {"__init__.py"} and rooms == TIER.keys() - {"PIFA", "evaluater", "utils"}


def test_what_travels_imports_torch_transformers_and_its_neighbours():
    allowed = {"torch", "transformers"}
    for path in sorted((REPOSITORY / "component/format").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in TRAVELS, (path, node.lineno)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                for name in (str(module).split(".")[0] for module in modules):
                    triton = name == "triton" and path.stem == "triton_kernels"  # loaded by name, where it is installed
                    assert name in allowed or name in sys_names() or triton, (path, node.lineno)
    assert {path.stem for path in (REPOSITORY / "component/format").glob("*.py")} == {*TRAVELS, "__init__"}


def sys_names() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names


def test_only_modes_see_parsed_flags():
    seen = []
    for path, tree in sources():
        if room_of(path) in {"modes", "PIFA", "api", None}:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]]
                if "options" in names or "Namespace" in ast.unparse(node.args):
                    seen.append(f"{path}:{node.lineno} {node.name}")
    assert seen == []


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    """Ours, without kernels that Triton compiles and without what travels, which mirrors torch's layers."""
    for path, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or room_of(path) == "format":
                continue
            if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield path, node


def test_no_function_takes_more_than_three_arguments_by_place():
    many = []
    for path, node in functions():
        places = [a.arg for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ("self", "cls")]
        if len(places) > MOST_BY_PLACE and node.name not in MIRRORS:
            many.append(f"{path}:{node.lineno} {node.name}")
    assert many == []


def test_no_call_of_ours_gives_more_than_three_arguments_by_place():
    ours = {node.name for _, node in functions()}
    ours |= {node.name for _, tree in sources() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    many = []
    for path, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or room_of(path) == "format":
                continue
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
            if name in ours - MIRRORS and len(node.args) > MOST_BY_PLACE:
                many.append(f"{path}:{node.lineno} {name}")
    assert many == []
