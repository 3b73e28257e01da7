"""One scoring process: ``python -m megatron_stepkto.judging.process.prm_worker JOB --worker I``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json, write_json
from megatron_stepkto.base.processes import child_main
from megatron_stepkto.judging.process.prm import HEAD, PRMJob, PRMRow


class Scorer(torch.nn.Module):
    """A decoder, and what ``read`` makes of its hidden states at given positions."""

    def __init__(
        self, model: torch.nn.Module, decoder: torch.nn.Module, read: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.model, self.decoder, self.read = model, decoder, read  # ``model``: all that a device must hold

    def forward(
        self, token_ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, at: torch.Tensor
    ) -> torch.Tensor:
        """Scores at (row, position) pairs, fp32 [pairs]."""
        states = self.decoder(input_ids=token_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return self.read(states[rows, at])


def process_reward_model(model: Path, dtype: str) -> Scorer:
    """Qwen2ForProcessRewardModel: the decoder, then Linear - ReLU - Linear to two classes; the probability of the
    second, "right". transformers lacks the class, and the model's own code is never run."""
    from transformers import AutoModel

    decoder = _load(AutoModel, model, dtype)
    weights = _tensors(model, HEAD)
    hidden = weights[HEAD[0]].shape
    if weights[HEAD[2]].shape != (2, hidden[0]) or hidden[1] != decoder.config.hidden_size:
        raise UserError(f"{model}: expected a head of two classes, got score.2 {tuple(weights[HEAD[2]].shape)}")
    head = torch.nn.Sequential(torch.nn.Linear(hidden[1], hidden[0]), torch.nn.ReLU(), torch.nn.Linear(hidden[0], 2))
    head.load_state_dict({name.removeprefix("score."): weight for name, weight in weights.items()})
    head.to(decoder.dtype)
    both = torch.nn.ModuleList([decoder, head])
    return Scorer(both, decoder, lambda states: head(states).float().softmax(-1)[:, 1])


def candidate_model(model: Path, dtype: str, candidates: tuple[int, int]) -> Scorer:
    """A language model whose logits of two tokens are compared; the probability of the first."""
    from transformers import AutoModelForCausalLM

    lm = _load(AutoModelForCausalLM, model, dtype)
    head = lm.get_output_embeddings()
    return Scorer(lm, lm.base_model, lambda states: head(states)[:, list(candidates)].float().softmax(-1)[:, 0])


def solution_reward_model(model: Path, dtype: str) -> Scorer:
    """A sequence classifier with one label; its logit. The last token is given, not found by a pad token that may also
    end the text."""
    from transformers import AutoModelForSequenceClassification

    classifier = _load(AutoModelForSequenceClassification, model, dtype)
    if not hasattr(classifier, "score"):
        raise UserError(f"{model}: expected a decoder with a head called score, got {type(classifier).__name__}")
    return Scorer(classifier, classifier.base_model, lambda states: classifier.score(states).float()[:, 0])


def _load(kind: Any, model: Path, dtype: str) -> Any:
    """Of a class of transformers, which fills missing weights with random numbers: refused."""
    found, loading = kind.from_pretrained(
        model, local_files_only=True, trust_remote_code=False, dtype=dtype, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise UserError(f"{model}: the reward model lacks {', '.join(sorted(loading['missing_keys'])[:5])}")
    return found


def _tensors(model: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in names if name in file.keys()})  # noqa: SIM118
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{model}: expected a Qwen2ForProcessRewardModel, its safetensors lack {', '.join(missing)}")
    return found


def batches(rows: Sequence[PRMRow], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows, short ones together; a padded batch holds at most ``batch_tokens``, or one row."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index].token_ids)):
        if batch and len(rows[index].token_ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def score_rows(model: Any, rows: Sequence[PRMRow], batch_tokens: int, device: str) -> list[list[float]]:
    """Probabilities of "right", one per step. Padding is on the right, where causal attention never looks."""
    scores: list[list[float]] = [[] for _ in rows]
    for batch in batches(rows, batch_tokens):
        lengths = [len(rows[index].token_ids) for index in batch]
        token_ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(token_ids)
        for line, index in enumerate(batch):
            token_ids[line, : lengths[line]] = torch.tensor(rows[index].token_ids)
            mask[line, : lengths[line]] = 1
        pairs = [(line, position) for line, index in enumerate(batch) for position in rows[index].positions]
        where = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
        with torch.inference_mode():
            found = model(*(t.to(device) for t in (token_ids, mask, where[:, 0], where[:, 1]))).tolist()
        for (line, _), score in zip(pairs, found, strict=True):
            scores[batch[line]].append(score)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--worker", type=int, required=True)
    arguments = parser.parse_args()
    job = PRMJob.model_validate(read_json(arguments.job))
    chunks = job.chunks(arguments.worker)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the parent shows each worker one GPU
    if device == "cpu":
        torch.set_num_threads(1)  # more cores are used by more workers
    if job.whole_solutions:
        model = solution_reward_model(job.model, job.dtype)
    elif job.candidates is None:
        model = process_reward_model(job.model, job.dtype)
    else:
        model = candidate_model(job.model, job.dtype, job.candidates)
    model.to(device).eval()
    for start, rows in job.rows_of(set(chunks)):
        write_json(job.chunk_path(start), score_rows(model, rows, job.batch_tokens, device))


if __name__ == "__main__":
    child_main(main)
