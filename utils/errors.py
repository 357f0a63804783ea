"""The errors that users are meant to see: the front door prints each as one line."""


class UsageError(Exception):
    """Something that the user can put right before any work starts: exit code 2."""


class RunError(Exception):
    """A run that can't go on, such as numbers that stopped being finite: exit code 1."""
