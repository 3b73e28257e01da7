"""The work that both trainers do: rows, a random model with a tokenizer, and how a side is run and measured."""

from __future__ import annotations

import json
import os
import random
import resource
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
WORDS = 512
BATCH = 8
LEARNING_RATE = 1e-5
BETA = 0.1
END = 2


@dataclass(frozen=True)
class Row:
    """A solution with its outcome. Token ids; the completion ends in END."""

    prompt: list[int]
    completion: list[int]
    label: bool

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def test_rows() -> Path | None:
    """The fixed rows among the test data, where they are."""
    folder = Path(os.environ.get("STEPKTO_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    path = folder / "bench" / "kto_rows.jsonl"
    return path if path.is_file() else None


def read_rows(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Row(row["prompt_ids"], row["completion_ids"], row["label"]) for row in rows]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    with path.open("w") as file:
        for row in rows:
            file.write(
                json.dumps({"prompt_ids": row.prompt, "completion_ids": row.completion, "label": row.label}) + "\n"
            )
    return path


def made_rows(count: int, seed: int = 0) -> list[Row]:
    """Random tokens; prompts of 32 to 96, completions log-normal from 32 to 384, half of the labels right."""
    rng = random.Random(seed)

    def tokens(number: int) -> list[int]:
        return [rng.randrange(4, WORDS) for _ in range(number)]

    return [
        Row(
            tokens(rng.randint(32, 96)),
            [*tokens(min(384, max(32, round(rng.lognormvariate(4.6, 0.6)))) - 1), END],
            index % 2 == 0,
        )
        for index in range(count)
    ]


def write_model(directory: Path) -> Path:
    """A random Llama of 3.4M parameters with a tokenizer of one word per token (``t17``), so that text round-trips."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=64,
        num_key_value_heads=2,
        intermediate_size=768,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory)
    words = {"<pad>": 0, "<s>": 1, "</s>": END, "<unk>": 3, **{f"t{i}": i for i in range(4, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


def text_of(ids: Sequence[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB (2**20 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_side(
    module: str, arguments: Sequence[str], log: Path, *, distributed: bool, extra_path: Path | None = None
) -> dict[str, Any]:
    """Run ``python -m module`` on one core with one thread; its last line is JSON.

    Args:
        distributed: as the only rank of a process group. A trainer that does not ask for one runs faster without.
        extra_path: folder of packages that only this side needs.

    Raises:
        SystemExit: it failed; names its log.
    """
    core = sorted(os.sched_getaffinity(0))[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(REPOSITORY), *([str(extra_path)] if extra_path else [])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if distributed:
        env |= {
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
        }
    with log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    if done.returncode:
        raise SystemExit(f"{module} ended with status {done.returncode}; its log: {log}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
