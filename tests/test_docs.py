"""README.md and docs/: no dead link, no command that the parser refuses, and a README that is short."""

import ast
import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

import PIFA
from component.modes import MODES
from component.modes.aliases import ALIASES
from component.modes.parser import Flag
from component.ranks.allocation import ALLOCATIONS, Allocation
from component.ranks.budget import Budget, Module
from component.ranks.cost import PIVOTED

REPOSITORY = Path(PIFA.__file__).parent
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
FLAGS = REPOSITORY / "docs" / "flags.md"
README_BYTES = 9216
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)
FLAG = re.compile(r"--(?:no-)?(\w+)")
READ_BY_PARSER = ("--dataset", "--allocation", "--model_path")  # their files have to exist when flags are parsed


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What `#...` can name on the page: its headings, as GitHub writes them in addresses."""
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(prose(page)))
    return {text.replace(" ", "-") for text in words}


def links(page: Path) -> list[str]:
    """Where the page's links lead, those to other sites left out."""
    return [target for target in LINK.findall(prose(page)) if "://" not in target]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `PIFA.py ...` command in the page's shell blocks, comments left out."""
    blocks = [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language == "sh"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    split = (shlex.split(line, comments=True) for line in lines)
    return [words[words.index("PIFA.py") + 1 :] for words in split if "PIFA.py" in words]


def section(page: Path, title: str) -> str:
    """The text under a heading of level 2, up to the next one."""
    parts = re.split(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def flags_in(text: str) -> set[str]:
    """The flags that a section's tables explain: the names in the rows' first cells, without dashes or `no-`."""
    rows = [line for line in text.splitlines() if line.startswith("| `--")]
    return {name for row in rows for name in FLAG.findall(row.split("|")[1])}


COMMANDS = [(name_of(page), shlex.join(words)) for page in PAGES for words in commands(page)]


def test_readme_is_short():
    assert README.stat().st_size <= README_BYTES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), target
        if anchor:
            assert anchor in anchors(goal), target


def test_every_page_is_linked():
    linked = {(page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in links(page)}
    assert set(PAGES) - linked == {README}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page, command, tmp_path, monkeypatch, caplog):
    words = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    for flag, value in itertools.pairwise(words):
        if flag in READ_BY_PARSER and Path(value).suffix:
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Path(value).touch()
    options = PIFA.parse([*words, "--DEV", "cpu"])
    assert options.mode in MODES
    unread = [message for message in caplog.messages if "does not read" in message]
    assert unread in ([], ["--mode export does not read --DEV"])


def test_commands_are_seen():
    pages = {name for name, _ in COMMANDS}
    assert {"README.md", "docs/results.md", "docs/svd-llm.md", "docs/flat-llm.md"} <= pages


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_are_python(page):
    for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(text)


def row_of(flag: Flag) -> str:
    """The flag's row in docs/flags.md, as the parser has it."""
    names = f"`--{flag.name}`" + f", `--no-{flag.name}`" * flag.negatable
    default = flag.default_in_words() or ("off" if flag.kind is bool else "none")
    choices = f" One of: {', '.join(map(str, flag.choices))}." if flag.choices else ""
    return f"| {names} | {default} | {flag.help}{choices} |"


@pytest.mark.parametrize("mode", MODES)
def test_flags_page_says_what_the_parser_says(mode):
    declared, shared = PIFA.modes()[mode].FLAGS, section(FLAGS, "Flags of every mode")
    text = section(FLAGS, f"--mode {mode}")
    own, names = flags_in(text), {flag.name for flag in declared}
    assert names - flags_in(shared) <= own <= names
    for flag in declared:
        assert row_of(flag) in (text if flag.name in own else shared).splitlines()


def test_flags_page_has_the_other_tools_flags():
    titles = ("Flags of SVD-LLM", "Flags of FLAT-LLM")
    assert set.union(*(flags_in(section(FLAGS, title)) for title in titles)) == {flag.name for flag in ALIASES}


def test_flags_in():
    text = "| flag | default |\n| --- | --- |\n| `--chat`, `--no-chat` | on |\n| `--bits` | 4, see `--seed` |\n`--tune`"
    assert flags_in(text) == {"chat", "bits"}


def test_flags_stand_in_one_place():
    assert [page for page in PAGES if "| flag | default |" in page.read_text(encoding="utf-8")] == [FLAGS]


def test_the_allocation_example_is_one_file_and_one_registration(arguments, tmp_path, monkeypatch):
    """The page's own code, in a file of its own, makes ranks and serves --mode m."""
    page = REPOSITORY / "docs" / "code.md"
    example = page.read_text(encoding="utf-8").split("<!-- allocation example -->")[1]
    code = next(text for language, text in FENCE.findall(example) if language == "python")
    (tmp_path / "front_loaded.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    share_out = importlib.import_module("front_loaded").front_loaded
    modules = [Module(f"layers.{layer}.up", 96, 64, False, layer) for layer in range(5)]
    budget = Budget(modules, 0.5, PIVOTED)
    plan = share_out(budget)
    ranks = [plan[module.name].number for module in modules]
    assert ranks[0] == ranks[1] > ranks[2] > ranks[3] == ranks[4]
    assert sum(budget.stored(module, plan[module.name].number) for module in modules) <= budget.numbers
    monkeypatch.setitem(ALLOCATIONS, "front_loaded", Allocation(share_out))
    record = PIFA.run(arguments("m", density=0.6, allocation="front_loaded", save_path=tmp_path / "out"))
    assert "_front_loaded_" in Path(record["path"]).name and record["density_pivoted"] <= 0.6
    first, second = (record["ranks"][f"model.layers.{layer}.mlp.up_proj"] for layer in (0, 1))
    assert first > second
