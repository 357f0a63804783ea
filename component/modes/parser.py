"""Flags as modes declare them, and a command line read by them.

All modes' flags make one parser, so that a flag may stand on any command line. A mode's own declaration says its
default; what a mode does not read is named in a warning.
"""

import argparse
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import UsageError, check_choice

log = logging.getLogger("pifa")

WIDTH = 110  # of a line of help
Options = argparse.Namespace
Check = Callable[[str, Any], None]  # name and value; raises UsageError
Default = Callable[[Options, str], Any]  # all options and the flag's name; the value


@dataclass(frozen=True)
class Flag:
    """A flag of one mode. kind: of its value; bool is a switch without one, `negatable` gives it a --no- form.

    default: a value, or a function of all other options that is asked once the device is known; `shown`: the default in
    words, where it is no plain value. several: takes one value or more. check: of a value that is given, in any mode.
    only: refused, not warned of, in a mode that does not read it.
    """

    name: str
    help: str
    group: str
    kind: type = str
    default: Any = None
    shown: str = ""
    several: bool = False
    negatable: bool = False
    choices: tuple[Any, ...] = ()
    metavar: str | None = None
    check: Check | None = None
    only: bool = False

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Declare it; the default stays out of argparse, so that a value that is given can be told from it."""
        how: dict[str, Any] = {"help": self.described(), "dest": self.name}
        if self.negatable:
            how |= {"action": argparse.BooleanOptionalAction}
        elif self.kind is bool:
            how |= {"action": "store_true"}
        else:
            how |= {"type": self.kind, "metavar": self.metavar or ("N" if self.kind is int else "X")}
            how |= {"nargs": "+"} if self.several else {}
            how |= {"metavar": "{" + ",".join(map(str, self.choices)) + "}"} if self.choices else {}
        parser.add_argument(f"--{self.name}", **how)

    def described(self) -> str:
        """The help text with its default, percent signs doubled for argparse."""
        default = self.default_in_words()
        return (self.help + (f" Default: {default}." if default else "")).replace("%", "%%")

    def default_in_words(self) -> str:
        """Empty where the flag has none."""
        if self.shown or callable(self.default) or self.default in (None, ""):
            return self.shown
        if isinstance(self.default, bool):
            return ("on" if self.default else "off") if self.negatable else ""
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def verify_type(self, value: Any) -> None:
        """What argparse does with words. Raises: UsageError for a value of another type."""
        kinds = (int, float) if self.kind is float else (str, Path) if self.kind is str else (self.kind,)
        for one in value if self.several else [value]:
            if not isinstance(one, kinds) or isinstance(one, bool) != (self.kind is bool):
                raise UsageError(f"{self.name}={one!r}: this takes {self.kind.__name__}")

    def verify(self, value: Any) -> None:
        """Raises: UsageError where the value is none of the choices, or fails the check."""
        if self.choices:
            check_choice(f"--{self.name}", value, self.choices)
        if self.check:
            self.check(self.name, value)


class OneLineParser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser_of(flags: Sequence[Flag], **texts: Any) -> OneLineParser:
    """A parser with these flags in their groups. texts: usage, description, epilog of its help."""

    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=WIDTH)

    parser = OneLineParser(prog="PIFA.py", allow_abbrev=False, add_help=False, formatter_class=formatter, **texts)
    groups: dict[str, argparse._ActionsContainer] = {}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        flag.add_to(groups[flag.group])
    return parser


def common(declared: Sequence[Sequence[Flag]]) -> list[Flag]:
    """Those that most modes read, each as most of them declare it."""
    ways: dict[str, Counter[Flag]] = {}
    for flag in itertools.chain(*declared):
        ways.setdefault(flag.name, Counter()).update([replace(flag, group="flags that most modes read")])
    return [counts.most_common(1)[0][0] for counts in ways.values() if 2 * counts.total() > len(declared)]


class _Unset:
    """What an option holds until a command line gives it a value."""


def read(argv: Sequence[str], flags: Mapping[str, Sequence[Flag]], typed: Sequence[str]) -> Options:
    """The options of a command line, with the defaults of its mode where they are plain values.

    flags: of every mode. typed: the words that the user typed, before aliases were put into flags. A flag that the mode
    does not read is None where it is not given.

    Raises: UsageError for a flag or a value that no mode takes.
    """
    known = {flag.name: flag for mode in flags.values() for flag in mode}
    parser = parser_of([MODE, *known.values()])
    options = Options(mode=None, **dict.fromkeys(known, _Unset))
    parser.parse_args(argv, options)
    if options.mode is None:
        raise UsageError("the following arguments are required: --mode")
    check_choice("--mode", options.mode, flags)
    own = {flag.name: flag for flag in flags[options.mode]}
    unread = []
    for name, flag in known.items():
        value = getattr(options, name)
        if value is _Unset:
            plain = own[name].default if name in own and not callable(own[name].default) else None
            setattr(options, name, plain)
            continue
        flag.verify(value)
        if name not in own:
            unread.append(flag)
    _tell(unread, flags, mode=options.mode, typed=typed)
    return options


def _tell(unread: list[Flag], flags: Mapping[str, Sequence[Flag]], *, mode: str, typed: Sequence[str]) -> None:
    """Warn of flags that the mode does not read. Raises: UsageError for one that makes no sense in another mode."""
    for flag in unread:
        if flag.only:
            readers = [name for name, declared in flags.items() if flag in declared]
            raise UsageError(f"--{flag.name} is for --mode {' or '.join(readers)}")
    forms = {form: f"--{flag.name}" for flag in unread for form in (f"--{flag.name}", f"--no-{flag.name}")}
    words = [word.partition("=")[0] for word in typed]
    names = dict.fromkeys(forms[word] for word in words if word in forms)
    if names:
        log.warning("--mode %s does not read %s", mode, ", ".join(names))


def from_keywords(flags: Sequence[Flag], keywords: Mapping[str, Any]) -> Options:
    """The options that keyword arguments by the flags' names stand for, with the defaults that are plain values.

    Raises: UsageError for a name that is no flag of the mode, or a value that it does not take.
    """
    known = {flag.name: flag for flag in flags}
    options = Options(**{name: None if callable(flag.default) else flag.default for name, flag in known.items()})
    for name, value in keywords.items():
        if name not in known:
            raise UsageError(f"{name} is no flag of this mode: use some of {', '.join(known)}")
        if value is not None:
            known[name].verify_type(value)
            known[name].verify(value)
            setattr(options, name, value)
    return options


def fill(options: Options, flags: Sequence[Flag]) -> None:
    """Give flags of the mode whose default is a function of the others their value."""
    for flag in flags:
        if callable(flag.default) and getattr(options, flag.name) is None:
            setattr(options, flag.name, flag.default(options, flag.name))


# ---------------------------------------------------------------- checks of single values


def at_least(bound: int) -> Check:
    def check(name: str, value: int) -> None:
        if value < bound:
            raise UsageError(f"--{name} {value} is below {bound}")

    return check


def from_zero(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise UsageError(f"--{name} {value:g} is no number from 0 on")


def from_zero_to_any(name: str, value: float) -> None:
    """A size may be without bounds."""
    if value != float("inf"):
        from_zero(name, value)


def above_zero(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UsageError(f"--{name} {value:g} is no number above 0")


def within(low: str, high: str, note: str = "") -> Check:
    """low, high: the ends with their brackets, such as "(0" and "1]". note: added to the line."""
    least, most = float(low[1:]), float(high[:-1])

    def check(name: str, value: float) -> None:
        inside = (value > least or (low[0] == "[" and value == least)) and (
            value < most or (high[-1] == "]" and value == most)
        )
        if not inside:
            raise UsageError(f"--{name} {value:g} is outside {low},{high}{note}")

    return check


MODE = Flag("mode", "What to do; with --help: show the flags of that mode.", "mode", metavar="MODE")
