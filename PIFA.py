"""The front door: flags in, one mode called, one result record out. component/modes/ has a file for each mode."""

import importlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from component.modes import MODES, parser, shared
from component.modes.aliases import ALIASES, expand
from utils.errors import RunError, UsageError

HELP = {"-h", "--help"}


def modes() -> dict[str, ModuleType]:
    """Name -> the module of the mode. Light: a mode imports what it works with when it runs."""
    return {name: importlib.import_module(f"component.modes.{name}") for name in MODES}


def parse(argv: Sequence[str]) -> parser.Options:
    """Flags -> checked options with every default of the mode filled in. Raises: UsageError for what can't be.

    With --help: prints that and ends the process, as argparse does.
    """
    if HELP & set(argv):
        print(help_text(argv), end="")
        sys.exit(0)
    known = modes()
    options = parser.read(expand(argv), {name: mode.FLAGS for name, mode in known.items()}, argv)
    options.command = shlex.join(["python", "PIFA.py", *argv])
    mode = known[options.mode]
    mode.check(options)
    shared.fill_device(options)
    parser.fill(options, mode.FLAGS)
    return options


def help_text(argv: Sequence[str]) -> str:
    """The help of the mode that the command line names, or else of the tool."""
    known = modes()
    asked = parser.parser_of([parser.MODE]).parse_known_args(argv)[0].mode
    if asked in known:
        mode = known[asked]
        usage = f"python PIFA.py --mode {asked} [flags]"
        return parser.parser_of([parser.MODE, *mode.FLAGS], usage=usage, description=mode.SUMMARY).format_help()
    lines = "\n".join(f"  {name:10}{mode.SUMMARY}" for name, mode in known.items())
    common = parser.common([mode.FLAGS for mode in known.values()])
    return parser.parser_of(
        [parser.MODE, *common, *ALIASES],
        usage="python PIFA.py --mode MODE [flags]",
        description=f"Compress a language model without retraining, and use what comes of it.\n\nmodes:\n{lines}",
        epilog="`python PIFA.py --mode MODE --help` shows the flags that a mode reads.",
    ).format_help()


def run(argv: list[str]) -> dict[str, Any]:
    """One command as a function: flags in, result record out. Raises: UsageError, RunError."""
    options = parse(argv)
    return modes()[options.mode].run(options)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad usage, 1 for a run that can't go on."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # read when torch is imported: huge pages, where there are such, halve the time that the system itself takes;
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # of two libraries for a GPU, cuSOLVER factors tall matrices in a sixth of the time (H100, torch 2.11)
    os.environ.setdefault("TORCH_LINALG_PREFER_CUSOLVER", "1")
    try:
        record = run(sys.argv[1:] if argv is None else argv)
    except (UsageError, RunError) as error:
        print(f"PIFA.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, one answers
        print(json.dumps(record, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
