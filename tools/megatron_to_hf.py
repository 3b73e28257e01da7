"""Convert a Megatron-Core torch_dist checkpoint to a Hugging Face folder: megatron_to_hf.py MEGATRON_DIR OUT_DIR."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_stepkto.checkpoints.convert import megatron_to_hf
from megatron_stepkto.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="MEGATRON_DIR")
    parser.add_argument("target", type=Path, metavar="OUT_DIR")
    arguments = parser.parse_args()
    try:
        if arguments.target.exists():
            raise UserError(f"{arguments.target}: already there; give a folder that does not exist, or remove it")
        megatron_to_hf(arguments.source, arguments.target)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
