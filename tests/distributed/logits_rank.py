"""Run by torchrun: ``JOB`` names models and layouts; rank 0 of the last stage writes the logits of each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_stepkto.base.processes import child_main, die_with_parent
from megatron_stepkto.checkpoints.convert import COMPANIONS, read_model_config
from megatron_stepkto.losses import UNJUDGED
from megatron_stepkto.megatron.batch import Document, MicroBatch, make_micro_batch
from megatron_stepkto.megatron.engine import Engine
from megatron_stepkto.megatron.ranks import join_ranks, lay_out
from megatron_stepkto.recipe import keys as recipe


def gathered_logits(engine: Engine, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[R, words] from the last stage's hidden states and each rank's part of the vocabulary."""
    policy = engine.policies[-1]
    group = parallel_state.get_tensor_model_parallel_group()
    weight = (
        policy.shared_embedding_or_output_weight()
        if policy.share_embeddings_and_output_weights
        else policy.output_layer.weight
    )

    def gather(part: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim)

    states = gather(hidden[:, 0], 0) if engine.megatron.sequence_parallel else hidden[:, 0]
    if not policy.keeps_scored_rows:
        states = states.index_select(0, rows)
    return gather(states @ weight.T, 1)[:, : policy.words]


def save_logits(model: Path, out: Path, parallel: recipe.Parallel, texts: list[list[int]]) -> None:
    settings = recipe.Training.model_validate(
        {"optimizer": {"lr": 0.1}, "parallel": parallel.model_dump(), "global_batch_size": 1, "device": "cpu",
         "micro_batch_tokens": 10_000}
    )  # fmt: skip
    config, _ = read_model_config(model / COMPANIONS)
    engine = Engine(config, settings, torch.device("cpu"), train=False)
    engine.checkpoints.load_weights(model)
    write_logits(engine, out, texts)
    engine.checkpoints.save_weights(out.with_suffix(""))
    dist.barrier()


def write_logits(engine: Engine, out: Path, texts: list[list[int]]) -> None:
    """[tokens of all texts, words] to ``out``, by one rank of the last stage."""
    # All but the first token are a response, and one more that nobody reads: then each position of the text is scored.
    documents = [Document(str(i), ids[:1], [*ids[1:], 3], [len(ids)], [UNJUDGED]) for i, ids in enumerate(texts)]
    slot = engine.slot()
    batches = [make_micro_batch(documents, slot.multiple, slot.device)] * slot.bins_multiple
    found: list[torch.Tensor] = []

    def collect(
        batch: MicroBatch, own: MicroBatch, mine: None, hidden: torch.Tensor, non_loss_data: bool = True
    ) -> None:
        found.append(gathered_logits(engine, hidden, own.rows))

    for chunk in engine.model:
        chunk.eval()
    with torch.no_grad():
        engine._run(batches, collect, forward_only=True)
    if engine.counts_once and parallel_state.get_data_parallel_rank() == 0:
        assert all(torch.equal(one, found[0]) for one in found)
        torch.save(found[0], out)


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    layouts = [recipe.Parallel.model_validate(layout) for layout in job["layouts"]]
    join_ranks(layouts[0], torch.device("cpu"), timeout_s=300)
    lay_out(layouts[0], timeout_s=300)
    for model, out, number in job["cases"]:
        save_logits(Path(model), Path(out), layouts[number], job["texts"])
    dist.destroy_process_group()


if __name__ == "__mp_main__":
    die_with_parent()
if __name__ == "__main__":
    child_main(main)
