"""The kinds of failure that a user sees; none ends in a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Input that cannot be used: says what was expected, what came, where, and what to do. Exit code 2.

    An ``except ValueError`` around code of this package catches it too: put ``except UserError: raise`` before it.
    """


class StageFailed(Exception):
    """A child process of a stage died: names its log and shows the end of it. Exit code 1."""


class MachineFault(Exception):
    """The machine refuses (a full disk, a file server without an answer). Exit code 1: a batch system tries again."""
