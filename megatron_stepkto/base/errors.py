"""The two kinds of failure that a user sees; neither ends in a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Input that cannot be used: says what was expected, what came, where, and what to do. Exit code 2."""


class StageFailed(Exception):
    """A child process of a stage died: names its log and shows the end of it. Exit code 1."""
