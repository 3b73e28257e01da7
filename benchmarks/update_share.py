"""Share of an update spent outside the model: building micro-batches, the log, the agreement of ranks.

    python -m benchmarks.update_share                    # one thread computes, one builds: two cores at least

Real updates of Step-KTO on the data of benchmarks/data_scale.py: 16 solutions and as many KL pairs an update, 8,192
tokens a micro-batch, a Llama of two layers of width 256 with 4,096 words. Each update's seconds in the engine (forward,
backward, step) are taken apart from the rest, with batches built in the update (``inline``) and one update ahead by a
thread, as training does (``ahead``). The last line is JSON; each figure is the median over updates. A real model only
makes the share smaller: the time outside does not depend on the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.data_scale import dataset, write_judged
from megatron_stepkto.base.stage import package_versions
from megatron_stepkto.checkpoints.convert import hf_to_megatron
from megatron_stepkto.megatron import patches
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training import loop
from megatron_stepkto.training.job import Job

WORDS, BATCH = 4096, 16


class Inline(Iterator[Any]):
    """As ``OneAhead``, without its thread."""

    def __init__(self, make: Callable[[Any], Any], items: Any) -> None:
        self.made = map(make, items)

    def __next__(self) -> Any:
        return next(self.made)

    def settle(self) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def measure(folder: Path, updates: int, ahead: bool) -> list[tuple[float, float]]:
    """(seconds in the engine, seconds in all) of each update but the first."""
    from megatron_stepkto.training.rank import make_trainer

    settings = recipe.Training.model_validate({
        "method": "step_kto", "optimizer": {"lr": 1e-5}, "global_batch_size": BATCH, "micro_batch_tokens": 8192,
        "dtype": "float32", "device": "cpu", "max_updates": updates, "log": {"tensorboard": False},
    })  # fmt: skip
    directory = folder / ("ahead" if ahead else "inline")
    directory.mkdir()
    job = Job(settings=settings, seed=0, initial=folder / "initial", reference=None, train_examples=folder / "train",
              held_out_examples=None, directory=directory, fingerprint="benchmark")  # fmt: skip
    trainer = make_trainer(job, torch.device("cpu"))
    inside = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any, **named: Any) -> Any:
            nonlocal inside
            begun = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                inside += time.perf_counter() - begun

        return wrapper

    engine: Any = trainer.engine
    for name in ("accumulate", "score", "step"):
        setattr(engine, name, timed(getattr(engine, name)))
    found = []
    update = trainer._update

    def follow(number: int, prepared: Any) -> None:
        nonlocal inside
        inside = 0.0
        begun = time.perf_counter()
        update(number, prepared)
        found.append((inside, time.perf_counter() - begun))

    trainer._update = follow  # type: ignore[method-assign]
    if not ahead:
        loop.OneAhead = Inline  # type: ignore[misc, assignment]
    trainer.train()
    return found[1:]


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    patches.install()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_judged(folder / "judged.jsonl", 8 * BATCH * arguments.updates, WORDS)
        dataset(folder)
        config = LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=4096, vocab_size=WORDS,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        hf_to_megatron(folder / "model", folder / "initial", torch.float32)
        for ahead in (True, False):
            times = measure(folder, arguments.updates, ahead)
            summary["ahead" if ahead else "inline"] = {
                "update_seconds": statistics.median(whole for _, whole in times),
                "outside_ms": 1000 * statistics.median(whole - inside for inside, whole in times),
                "share_outside": statistics.median(1 - inside / whole for inside, whole in times),
            }
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
    print(json.dumps({**summary, "versions": package_versions()}))


if __name__ == "__main__":
    main()
