"""One scoring process: ``python -m megatron_stepkto.judging.process.prm_worker JOB --worker I``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json, write_json
from megatron_stepkto.base.processes import child_main
from megatron_stepkto.judging.process.prm import ROWS_PER_CHUNK, PRMJob, PRMRow

HEAD = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")


class ProcessRewardModel(torch.nn.Module):
    """Qwen2ForProcessRewardModel: the decoder, then Linear - ReLU - Linear to two classes; wrong, right.

    transformers lacks the class, and the model's own code is never run.
    """

    def __init__(self, model: Path, dtype: str) -> None:
        super().__init__()
        from transformers import AutoModel

        self.decoder, loading = AutoModel.from_pretrained(
            model, local_files_only=True, trust_remote_code=False, dtype=dtype, output_loading_info=True
        )
        if loading["missing_keys"]:
            raise UserError(f"{model}: the reward model lacks {', '.join(sorted(loading['missing_keys'])[:5])}")
        weights = _tensors(model, HEAD)
        hidden = weights[HEAD[0]].shape
        if weights[HEAD[2]].shape != (2, hidden[0]) or hidden[1] != self.decoder.config.hidden_size:
            raise UserError(f"{model}: expected a head of two classes, got score.2 {tuple(weights[HEAD[2]].shape)}")
        self.score = torch.nn.Sequential(
            torch.nn.Linear(hidden[1], hidden[0]), torch.nn.ReLU(), torch.nn.Linear(hidden[0], 2)
        )
        self.score.load_state_dict({name.removeprefix("score."): weight for name, weight in weights.items()})
        self.score.to(self.decoder.dtype)

    def forward(
        self, token_ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, at: torch.Tensor
    ) -> torch.Tensor:
        """Probability of "right" at (row, position) pairs, fp32 [pairs]."""
        states = self.decoder(input_ids=token_ids, attention_mask=mask, use_cache=False).last_hidden_state
        scores: torch.Tensor = self.score(states[rows, at]).float().softmax(-1)[:, 1]
        return scores


class CandidateModel(torch.nn.Module):
    """A language model whose logits of two tokens are compared."""

    def __init__(self, model: Path, dtype: str, candidates: tuple[int, int]) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.lm = AutoModelForCausalLM.from_pretrained(
            model, local_files_only=True, trust_remote_code=False, dtype=dtype
        )
        self.candidates = list(candidates)

    def forward(
        self, token_ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, at: torch.Tensor
    ) -> torch.Tensor:
        """Probability of the first candidate at (row, position) pairs, fp32 [pairs]."""
        states = self.lm.base_model(input_ids=token_ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = self.lm.get_output_embeddings()(states[rows, at])[:, self.candidates]
        scores: torch.Tensor = logits.float().softmax(-1)[:, 0]
        return scores


class SolutionRewardModel(torch.nn.Module):
    """A sequence classifier with one label, read at given positions: the last token is given, not found
    by a pad token that may also end the text."""

    def __init__(self, model: Path, dtype: str) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        self.classifier, loading = AutoModelForSequenceClassification.from_pretrained(
            model, local_files_only=True, trust_remote_code=False, dtype=dtype, output_loading_info=True
        )
        if loading["missing_keys"]:
            raise UserError(f"{model}: the reward model lacks {', '.join(sorted(loading['missing_keys'])[:5])}")
        if not hasattr(self.classifier, "score"):
            raise UserError(
                f"{model}: expected a decoder with a head called score, got {type(self.classifier).__name__}"
            )

    def forward(
        self, token_ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, at: torch.Tensor
    ) -> torch.Tensor:
        """Logit at (row, position) pairs, fp32 [pairs]."""
        states = self.classifier.base_model(input_ids=token_ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits: torch.Tensor = self.classifier.score(states[rows, at]).float()[:, 0]
        return logits


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
    device = f"cuda:{arguments.worker % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # more cores are used by more workers
    model: torch.nn.Module
    if job.whole_solutions:
        model = SolutionRewardModel(job.model, job.dtype)
    elif job.candidates is None:
        model = ProcessRewardModel(job.model, job.dtype)
    else:
        model = CandidateModel(job.model, job.dtype, job.candidates)
    model.to(device).eval()
    for start in chunks:
        rows = job.rows[start : start + ROWS_PER_CHUNK]
        write_json(job.chunk_path(start), score_rows(model, rows, job.batch_tokens, device))


if __name__ == "__main__":
    child_main(main)
