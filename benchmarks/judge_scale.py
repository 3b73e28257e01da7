"""The judge stage at many solutions of real length: seconds, and peak memory of the stage and of its workers.

python -m benchmarks.judge_scale SOLUTIONS.jsonl [--solutions 60000] [--workers 2] [--rule equations]

SOLUTIONS.jsonl has the layout of import format gsm8k_solutions. Solutions of real text are joined until they have about
900 tokens; the last of them belongs to the problem and gives the answer. The tokenizer is a byte-level BPE of the same
texts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_stepkto.judging.stage import judge_file
from megatron_stepkto.recipe.keys import Judging
from megatron_stepkto.recipe.prompts import load_tokenizer
from megatron_stepkto.run.bpe_tokenizer import train_byte_level_bpe

TOKENS = 900
PER_PROBLEM = 8


def write_inputs(source: Path, tokenizer_dir: Path, count: int, folder: Path) -> None:
    """problems.jsonl and samples.jsonl of ``count`` solutions, no two alike."""
    rows = [json.loads(line) for line in source.open()]
    tokenizer = load_tokenizer(tokenizer_dir)
    lengths = [len(ids) for ids in tokenizer([row["response"] for row in rows])["input_ids"]]
    choice = random.Random(0)
    with (folder / "problems.jsonl").open("w") as problems, (folder / "samples.jsonl").open("w") as samples:
        for number in range(count):
            problem, place = divmod(number, PER_PROBLEM)
            asked = rows[problem * PER_PROBLEM % len(rows)]
            if place == 0:
                row = {"problem_id": f"p{problem}", "problem": asked["problem"], "answer": asked["answer"]}
                problems.write(json.dumps(row) + "\n")
            parts, length = [asked["response"]], 0
            while length < TOKENS:
                other = choice.randrange(len(rows))
                parts.insert(0, rows[other]["response"])
                length += lengths[other]
            text = f"Attempt {number}.\n" + "\n".join(parts)
            sample: dict[str, Any] = {
                "problem_id": f"p{problem}", "sample_id": f"s{number}", "prompt_token_ids": [1], "text": text,
                "token_ids": tokenizer(text, add_special_tokens=False)["input_ids"], "finish_reason": "length",
            }  # fmt: skip
            samples.write(json.dumps(sample) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--solutions", type=int, default=60_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rule", default="equations")
    arguments = parser.parse_args()
    settings = Judging.model_validate({"split": "line", "process": arguments.rule, "workers": arguments.workers})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer"
        texts = [json.loads(line)["response"] for line in arguments.source.open()]
        train_byte_level_bpe(texts, 4000, tokenizer)
        write_inputs(arguments.source, tokenizer, arguments.solutions, folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        counts = judge_file(
            folder / "problems.jsonl", folder / "samples.jsonl", folder / "judged.jsonl", tokenizer, settings
        )
        seconds = time.monotonic() - began
    found = {
        "solutions": counts["samples"],
        "steps": counts["steps_right"] + counts["steps_wrong"] + counts["steps_unjudged"],
        "seconds": round(seconds, 1),
        "solutions_per_second": round(counts["samples"] / seconds, 1),
        "memory_before_gb": round(before / 2**20, 2),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_worker_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
