"""The sampler by transformers: what it reports of its speed is what it generates."""

from __future__ import annotations

from pathlib import Path

from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.sampling.interface import Request
from megatron_stepkto.sampling.job import EngineSettings
from megatron_stepkto.sampling.transformers_engine import TransformersEngine
from tests.builders import write_llama


def test_padding_after_the_end_token_counts_as_no_token(tmp_path: Path) -> None:
    """Completions of unequal length in one batch, some ended by one of the end tokens and some by the limit."""
    model = write_llama(tmp_path / "model", num_hidden_layers=1, initializer_range=0.01)  # near to uniform draws
    settings = Sampling(backend="transformers", num_samples=1, max_tokens=40, dtype="float32")
    ends = list(range(2, 6))
    engine = TransformersEngine(EngineSettings(model, settings, sequences_per_chunk=16, max_length=43), ends)
    # the last prompt ends with an end token: what it generates counts from the first token on
    prompts = [[1, 9], [1, 8, 7], [1, 6], [1, 10, ends[0]]]
    engine.add({
        f"{number}/{seed}": Request(prompt, seed=7 * number + seed, temperature=1.0, top_p=1.0, log_probs=False)
        for number, prompt in enumerate(prompts) for seed in range(4)
    })  # fmt: skip
    reported: list[int] = []
    lengths = [len(completion.token_ids) for completion in engine.step(reported.append).values()]
    assert sum(reported) == sum(lengths)
    assert len(set(lengths)) > 5 and max(lengths) == 40 > min(lengths)
    assert reported[0] == 16
