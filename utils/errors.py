"""The errors that users are meant to see: the front door prints each as one line."""

from collections.abc import Collection


class UsageError(Exception):
    """Something that the user can put right before any work starts: exit code 2."""


class RunError(Exception):
    """A run that can't go on, such as numbers that stopped being finite: exit code 1."""


def check_choice(flag: str, value: object, choices: Collection) -> None:
    """Raises: UsageError where the flag was given and is none of its choices."""
    if value is not None and value not in choices:
        raise UsageError(f"unknown {flag} {value}: use one of {', '.join(map(str, choices))}")
