"""Convert a Hugging Face folder to a Megatron-Core torch_dist checkpoint: hf_to_megatron.py HF_DIR OUT_DIR."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_stepkto.checkpoints.convert import hf_to_megatron
from megatron_stepkto.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="HF_DIR")
    parser.add_argument("target", type=Path, metavar="OUT_DIR")
    arguments = parser.parse_args()
    try:
        if arguments.target.exists():
            raise UserError(f"{arguments.target}: already there; give a folder that does not exist, or remove it")
        hf_to_megatron(arguments.source, arguments.target)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
