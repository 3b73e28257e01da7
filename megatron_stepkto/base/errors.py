"""Failures that are reported to the user without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Unusable input. The message says what was expected, what was found, where, and what to do. Exit code 2.

    An ``except ValueError`` around code of this package catches it too: put ``except UserError: raise`` before it.
    """


class StageFailed(Exception):
    """A child process of a stage died: names its log and shows the end of it. Exit code 1."""


class MachineFault(Exception):
    """A fault of the machine (a full disk, an unresponsive file server). Exit code 1: a batch system retries."""
