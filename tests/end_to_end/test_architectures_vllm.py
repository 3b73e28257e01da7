"""Every architecture, through Megatron and back, served by vLLM: its greedy tokens are transformers' greedy tokens.

One of them has been trained on the way, by the trainer at tensor parallelism 2.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_stepkto.base.stage import Stage
from megatron_stepkto.checkpoints.adapter import merge_adapter
from megatron_stepkto.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_stepkto.evaluation.logprobs import DEFAULT_TEXT
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.run.bpe_tokenizer import train_byte_level_bpe
from megatron_stepkto.training.launch import train
from tests.builders import random_examples, write_adapter, write_examples
from tests.model_folders import FAMILIES, YARN_ROPE, write_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
TIME_LIMIT_S = 900  # on a busy machine
WORDS = 300
MAX_TOKENS = 40
# Two go on beyond the 32 positions that the scaled RoPEs were made for, one begins there.
PROMPTS = [[5, 9, 11], [3 + (i * i) % 290 for i in range(25)], [3 + (7 * i) % 290 for i in range(100)]]
TRAINED, ADAPTER = "qwen3", "adapter"
NEAR_TIE = 1e-3  # logits; another order of summation may choose the other word


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with FAMILY/hf, FAMILY/back (through Megatron) and FAMILY/tokens.json: vLLM's, or its error."""
    folder = tmp_path_factory.mktemp("served")
    cases = []
    for family, made in FAMILIES.items():
        # vLLM's CPU attention takes no head of 16
        wide: dict[str, Any] = {} if "head_dim" in made.settings else {"hidden_size": 128}
        # vLLM's table of YaRN angles ends at original x factor positions; beyond it reads what lies there, silently
        longer: dict[str, Any] = {"rope_parameters": {**YARN_ROPE, "factor": 8.0}} if family == "qwen2" else {}
        write_model(folder / family / "hf", family, vocab_size=WORDS, **wide, **longer)
        train_byte_level_bpe(DEFAULT_TEXT, WORDS, folder / family / "hf")
        hf_to_megatron(folder / family / "hf", folder / family / "megatron")
        megatron_to_hf(folder / family / "megatron", folder / family / "back")
        cases.append((str(folder / family / "back"), None, str(folder / family / "tokens.json")))
    # the trained one is judged by what transformers makes of the export: its weights are new
    megatron_to_hf(train_some(folder / TRAINED / "hf", folder / "training"), folder / "trained" / "back")
    (folder / "trained" / "hf").symlink_to(folder / "trained" / "back")
    cases.append((str(folder / "trained" / "back"), None, str(folder / "trained" / "tokens.json")))
    # served beside its base, judged by what transformers makes of both merged
    (folder / ADAPTER).mkdir()
    adapter = write_adapter(folder / ADAPTER / "peft", folder / TRAINED / "hf", 8, 16, scale=0.05)
    merge_adapter(folder / TRAINED / "hf", adapter, folder / ADAPTER / "hf")
    cases.append((str(folder / TRAINED / "hf"), str(adapter), str(folder / ADAPTER / "tokens.json")))
    job = folder / "job.json"
    job.write_text(json.dumps({"cases": cases, "prompts": PROMPTS, "max_tokens": MAX_TOKENS}))
    with (folder / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "tests.end_to_end.vllm_tokens", str(job)],
            stdout=log, stderr=subprocess.STDOUT, timeout=TIME_LIMIT_S, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    return folder


def train_some(model: Path, directory: Path) -> Path:
    """Three updates of the train stage on two ranks; the torch_dist checkpoint that it leaves."""
    data = write_examples(directory / "train", random_examples(24))
    settings = recipe.Training.model_validate({
        "parallel": {"ranks": 2, "tensor": 2}, "optimizer": {"lr": 3e-3}, "max_updates": 3, "global_batch_size": 8,
        "micro_batch_tokens": 200, "device": "cpu", "timeout_s": 60,
    })  # fmt: skip
    train(Stage("train", directory / "stage", {}, {"model": model, "train": data}), settings, seed=3)
    return directory / "stage" / "final"


def test_the_trained_model_is_another(served: Path) -> None:
    before, after = (load_file(served / name / "back" / "model.safetensors") for name in (TRAINED, "trained"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", [*FAMILIES, "trained", ADAPTER])
def test_greedy_tokens_are_those_of_transformers(family: str, served: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = json.loads((served / family / "tokens.json").read_text())
    assert "error" not in result, result["error"]
    model = AutoModelForCausalLM.from_pretrained(
        served / family / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    compared, words = 0, set[int]()
    for prompt, tokens in zip(PROMPTS, result["tokens"], strict=True):
        assert len(tokens) == MAX_TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        top = logits.topk(2)
        # Given the same tokens before, the greedy choice is the argmax: the first difference would show.
        for token, choice, (first, second) in zip(tokens, top.indices[:, 0].tolist(), top.values.tolist(), strict=True):
            if first - second < NEAR_TIE:
                break  # from here on both texts may differ
            assert token == choice, f"token {compared}: vLLM {token}, transformers {choice} by {first - second:.3g}"
            compared += 1
            words.add(token)
    assert compared > len(PROMPTS) * MAX_TOKENS * 0.6, compared
    assert len(words) > 8, words
