"""Small models and training examples that several tests need; values are random but fixed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_stepkto.base import examples as examples_on_disk
from megatron_stepkto.base.records import KLPartner, TrainExample, TrainStep

VOCABULARY = 99


def write_llama(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama folder with large weights, so that small mistakes show."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_adapter(
    directory: Path, model: Path, rank: int, alpha: float, targets: Sequence[str] | None = None, scale: float = 0.1
) -> Path:
    """A PEFT folder by hand: random A and B of every matrix of a Hugging Face folder's layers, or of those named."""
    generator = torch.Generator().manual_seed(7)
    tensors, found = {}, set[str]()
    for name, weight in load_file(model / "model.safetensors").items():
        target = name.removesuffix(".weight").rpartition(".")[2]
        if ".layers." not in name or weight.dim() < 2 or target == "gate" or (targets and target not in targets):
            continue
        found.add(target)
        for letter, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{letter}.weight"
            tensors[key] = scale * torch.randn(shape, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(found), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def random_examples(count: int, seed: int = 0) -> list[TrainExample]:
    """Solutions of unequal length, step number and labels; some unjudged, some without a KL partner."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 5))]
        steps, position = [], 0
        for length in lengths:
            steps.append(
                TrainStep(token_start=position, token_end=position + length, label=rng.choice([1, 1, 0, None]))
            )
            position += length
        made.append(
            TrainExample(
                example_id=f"e{number}",
                problem_id=f"p{number}",
                prompt_token_ids=[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(2, 12))],
                token_ids=[rng.randrange(3, VOCABULARY) for _ in range(position)],
                steps=steps,
                outcome=rng.choice([1, 0, 0, None]),
            )
        )
    partners = [
        KLPartner(example_id=other.example_id, token_ids=other.token_ids, steps=other.steps)
        for other in made[1:] + made[:1]
    ]
    return [
        example.model_copy(update={"kl_partner": partner if number % 3 else None})
        for number, (example, partner) in enumerate(zip(made, partners, strict=True))
    ]


def write_examples(folder: Path, examples: list[TrainExample]) -> Path:
    examples_on_disk.write_examples(folder, examples)
    return folder


def evaluation_row(name: str, **changes: Any) -> dict[str, Any]:
    """What a table shows of ``metrics.json``: 3 of 4 problems solved, nothing judged."""
    shares = ("maj_at_k", "wrong_step_share_of_correct", "wrong_step_rate_in_correct")
    unknown = {key: None for share in shares for key in (share, f"{share}_interval")}
    solved = {"pass_at_1": 0.75, "pass_at_1_interval": [0.3, 0.95]}
    return {"name": name, "k": 8, "num_problems": 4, **solved, **unknown, **changes}
