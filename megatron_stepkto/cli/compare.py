"""``stepkto compare-logprobs A B`` and tools/compare_logprobs.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EPILOG = """\
A and B are each a Hugging Face folder (computed by transformers), a Megatron torch_dist folder (by Megatron-Core) or
the URL of a vLLM server (http://host:8000). Folders are computed in float32 unless --dtype says otherwise; a server in
the dtype that it was started with: give that one.

exit code 0: the same within rounding of the dtype; 1: different; 2: input to correct
"""


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="a folder, or the URL of a server (see below)")
    parser.add_argument("second", metavar="B", help="another folder or server")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="a file with one text a line (default: a few built-in texts)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="default: the tokenizer of the first folder given"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default float32"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")


def run_comparison(arguments: argparse.Namespace) -> None:
    """Exits with 1 when the two differ."""
    from megatron_stepkto.base.files import write_json
    from megatron_stepkto.evaluation.logprobs import compare

    found = compare(arguments.first, arguments.second, arguments.text, arguments.tokenizer, arguments.dtype)
    sys.stdout.write(found.text())
    if arguments.json:
        write_json(arguments.json, found.to_json())
    if not found.same:
        raise SystemExit(1)
