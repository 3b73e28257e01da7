"""transformers' ``generate``: for models that vLLM does not run. Much slower."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.sampling.interface import Completion, Report, Request
from megatron_stepkto.sampling.job import EngineSettings

VLLM_KEYS = (
    "gpu_memory_utilization", "max_num_seqs", "quantization", "kv_cache_dtype", "enable_prefix_caching", "speculative",
)  # fmt: skip
MAX_SEQUENCES = 64  # in one call of generate


def check_transformers(settings: Sampling) -> None:
    """Raises UserError for settings that this engine cannot do."""
    if settings.tensor_parallel != 1:
        raise UserError(
            f"sample.tensor_parallel is {settings.tensor_parallel}, but sample.backend: transformers "
            "runs one GPU per worker; set sample.tensor_parallel: 1 or sample.backend: vllm"
        )
    for key in VLLM_KEYS:
        if getattr(settings, key) != Sampling.model_fields[key].default:
            raise UserError(
                f"sample.{key} is a setting of vLLM, but sample.backend is transformers; leave the key out or set "
                "sample.backend: vllm"
            )


class TransformersEngine:
    def __init__(self, engine: EngineSettings, end_ids: Sequence[int]) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        check_transformers(engine.settings)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if self._device == "cpu":
            torch.set_num_threads(1)  # see vllm_engine: samples must not depend on the number of threads
        model = AutoModelForCausalLM.from_pretrained(
            engine.model, local_files_only=True, trust_remote_code=False, dtype=engine.settings.dtype
        )
        self._model = model.to(self._device).eval()
        # The folder's generation_config.json may hold a temperature or a repetition penalty of its own.
        self._model.generation_config = GenerationConfig()
        self._end_ids, self._max_tokens = list(end_ids), engine.settings.max_tokens
        self._waiting: dict[str, Request] = {}

    @property
    def wants_more(self) -> bool:
        return len(self._waiting) < MAX_SEQUENCES

    def add(self, requests: Mapping[str, Request]) -> None:
        self._waiting.update(requests)

    def step(self, report: Report) -> dict[str, Completion]:
        """Finish the next ``MAX_SEQUENCES`` requests, in the order in which they were added."""
        batch = {key: self._waiting.pop(key) for key in list(self._waiting)[:MAX_SEQUENCES]}
        completions = self._batch(list(batch.values()), report)
        return dict(zip(batch, completions, strict=True))

    def reset(self) -> None:
        pass  # each call of generate begins with an empty cache

    def _batch(self, requests: Sequence[Request], report: Report) -> list[Completion]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        width = max(len(request.token_ids) for request in requests)
        pad = self._end_ids[0]
        rows = [[pad] * (width - len(request.token_ids)) + request.token_ids for request in requests]
        mask = [[0] * (width - len(r.token_ids)) + [1] * len(r.token_ids) for r in requests]
        draw = _SeededDraw(requests, self._end_ids, self._device, report)
        with torch.inference_mode():
            output = self._model.generate(
                torch.tensor(rows, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
                logits_processor=LogitsProcessorList([draw]),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=self._max_tokens,
                    eos_token_id=self._end_ids,
                    pad_token_id=pad,
                ),
            )
        log_probs = torch.stack(draw.log_probs, dim=1).tolist()
        return [
            self._cut(row, values, request)
            for row, values, request in zip(output[:, width:].tolist(), log_probs, requests, strict=True)
        ]

    def _cut(self, tokens: list[int], log_probs: list[float], request: Request) -> Completion:
        """What stands after the end token is padding."""
        end = next((i for i, token in enumerate(tokens) if token in self._end_ids), None)
        length = len(tokens) if end is None else end + 1
        reason = "length" if end is None else "stop"
        return Completion(tokens[:length], reason, log_probs[:length] if request.log_probs else None)


class _SeededDraw:
    """A logits processor that makes each row's arg max a draw with the row's own seed.

    Gumbel: arg max over v of (log p(v) / T + g(v)), g independent standard Gumbel, is distributed as
    softmax(log p / T). Records the raw log-prob of what it chooses.
    """

    def __init__(self, requests: Sequence[Request], end_ids: Sequence[int], device: str, report: Report) -> None:
        import torch

        self._report = report
        self._requests = requests
        self._end_ids = torch.tensor(end_ids, device=device)
        self._generators = [torch.Generator(device).manual_seed(request.seed) for request in requests]
        self.log_probs: list[Any] = []  # per position: [rows]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        from megatron_stepkto.logprobs import log_softmax

        raw = log_softmax(scores.float())
        drawn = torch.stack([self._perturb(*row) for row in zip(raw, self._requests, self._generators, strict=True)])
        ended = int(torch.isin(input_ids[:, -1], self._end_ids).sum()) if self.log_probs else 0  # they get padding
        self.log_probs.append(raw.gather(1, drawn.argmax(dim=-1, keepdim=True)).squeeze(1))
        self._report(len(self._requests) - ended)
        return drawn

    @staticmethod
    def _perturb(log_probs: Any, request: Request, generator: Any) -> Any:
        import torch

        if request.temperature == 0:
            return log_probs
        scaled = torch.log_softmax(log_probs / request.temperature, dim=-1)
        if request.top_p < 1:
            ordered, order = scaled.sort(descending=True)
            before = ordered.exp().cumsum(-1) - ordered.exp()  # the most likely token always stays
            scaled[order[before >= request.top_p]] = -torch.inf
        noise = torch.empty_like(scaled).exponential_(generator=generator)
        return scaled - noise.log()
