"""The command line that both conversion tools share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_stepkto.errors import UserError


def conversion_command(description: str | None, convert: Callable[[Path, Path], None]) -> None:
    """``TOOL SOURCE TARGET``; exit code 2 and one message for what the user can correct."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.target.exists():
            raise UserError(f"{arguments.target}: already there; give a folder that does not exist, or remove it")
        convert(arguments.source, arguments.target)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
