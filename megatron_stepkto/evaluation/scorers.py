"""Token log-probs of given token ids, by three independent programs: transformers, Megatron-Core, a vLLM server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import parse_json
from megatron_stepkto.base.progress import ProgressBar
from megatron_stepkto.checkpoints.convert import MegatronSide
from megatron_stepkto.checkpoints.model_folder import check_model_folder
from megatron_stepkto.logprobs import log_softmax

HEAD_ROWS = 512  # tokens whose logits exist at one time: 512 x 128,256 words are 0.26 GB
SERVER_TIMEOUT_S = 600


class Scores(NamedTuple):
    """Of one text of n tokens. log_probs: [n - 1] float64, nats, of tokens 1 to n - 1. best: [n - 1], the likeliest
    token before each."""

    log_probs: Tensor
    best: Tensor


def open_scorer(place: str, dtype: torch.dtype) -> TransformersScorer | MegatronScorer | ServerScorer:
    """The scorer of a folder or of the URL of an OpenAI-compatible vLLM server.

    Its max_tokens and words are limits of the model; None where the model states none.

    Raises:
        UserError: it is neither.
    """
    if place.startswith(("http://", "https://")):
        return ServerScorer(place)
    folder = Path(place)
    if (folder / ".metadata").is_file():
        return MegatronScorer(folder, dtype)
    if (folder / "config.json").is_file():
        return TransformersScorer(folder, dtype)
    raise UserError(
        f"{place}: expected a Hugging Face folder (with config.json), a Megatron torch_dist folder (with .metadata) or "
        "the URL of a vLLM server, such as http://localhost:8000"
    )


def _read_head(hidden: Tensor, weight: Tensor, targets: Tensor, words: int) -> Scores:
    """From [n, H] hidden states that predict ``targets``, and the head's [V, H] weight."""
    log_probs, best = [], []
    for start in range(0, hidden.shape[0], HEAD_ROWS):
        logits = (hidden[start : start + HEAD_ROWS] @ weight.t())[:, :words].float()
        log_probs.append(log_softmax(logits).gather(1, targets[start : start + HEAD_ROWS, None])[:, 0])
        best.append(logits.argmax(-1))
    return Scores(torch.cat(log_probs).double().cpu(), torch.cat(best).cpu())


class TransformersScorer:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.name = f"transformers on {folder}"
        self._folder, self._dtype = folder, dtype
        config = check_model_folder(folder)
        self.max_tokens = getattr(config, "max_position_embeddings", None)
        self.words = config.vocab_size

    def score(self, texts: Sequence[Sequence[int]]) -> list[Scores]:
        from transformers import AutoModelForCausalLM

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                self._folder,
                dtype=self._dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{self._folder}: transformers cannot load it: {error}") from None
        # transformers fills missing weights with random numbers, and skips unknown ones
        faults = [
            f"{what.replace('_', ' ')}: {', '.join(sorted(map(str, loading[what])))}"
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if loading.get(what)
        ]
        if faults:
            raise UserError(f"{self._folder}: the weights are not those of its config; " + "; ".join(faults))
        model.eval().to(device)
        weight = model.get_output_embeddings().weight
        found = []
        with torch.no_grad(), ProgressBar(self.name, len(texts), "texts") as bar:
            for number, ids in enumerate(texts):
                tokens = torch.tensor([ids], device=device)
                hidden = model.base_model(tokens, use_cache=False).last_hidden_state[0, :-1]
                found.append(_read_head(hidden, weight, tokens[0, 1:], weight.shape[0]))
                bar.update(number + 1)
        return found


class MegatronScorer:
    """Megatron-Core's GPTModel in this process: no tensor or pipeline parallelism, whatever layout saved it."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.name = f"Megatron-Core on {folder}"
        self._folder, self._dtype = folder, dtype
        self._config = MegatronSide(folder).config
        self.max_tokens, self.words = self._config.max_positions, self._config.vocab_size

    def score(self, texts: Sequence[Sequence[int]]) -> list[Scores]:
        from megatron_stepkto.losses import UNJUDGED
        from megatron_stepkto.megatron.acceleration import choose_device
        from megatron_stepkto.megatron.batch import Document, make_micro_batch
        from megatron_stepkto.megatron.ranks import one_rank

        device = choose_device("auto")
        found = []
        with one_rank(device), torch.no_grad(), ProgressBar(self.name, len(texts), "texts") as bar:
            policy = self._load(device)
            weight = (
                policy.shared_embedding_or_output_weight()
                if policy.share_embeddings_and_output_weights
                else policy.output_layer.weight
            )
            for number, ids in enumerate(texts):
                document = Document(str(number), ids[:1], ids[1:], [len(ids) - 1], [UNJUDGED])
                batch = make_micro_batch([document], 1, device)
                hidden = policy(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed)
                found.append(_read_head(hidden[:, 0].index_select(0, batch.rows), weight, batch.targets, policy.words))
                bar.update(number + 1)
        return found

    def _load(self, device: torch.device) -> Any:
        from megatron_stepkto.megatron.acceleration import PLAIN
        from megatron_stepkto.megatron.model import build_model_chunks, transformer_config
        from megatron_stepkto.megatron.state import Checkpoints
        from megatron_stepkto.recipe.keys import Parallel

        megatron = transformer_config(
            self._config, Parallel.model_validate({}), self._dtype, on_cpu=device.type == "cpu"
        )
        (policy,) = build_model_chunks(self._config, megatron)
        policy.eval().to(device, self._dtype)
        Checkpoints([policy], [policy], None, self._dtype, PLAIN).load_weights(self._folder)
        return policy


class ServerScorer:
    """A vLLM server with OpenAI's API, asked for the log-probs of prompts given as token ids."""

    words: int | None = None

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        models = self._ask("/v1/models", None).get("data") or []
        if not models:
            raise UserError(f"{url}: the server has no model; start it with one")
        self._model = models[0]["id"]
        self.max_tokens = models[0].get("max_model_len")
        if self.max_tokens:
            self.max_tokens -= 1  # it must sample one token after the prompt
        self.name = f"vLLM's {self._model} at {self._url}"

    def score(self, texts: Sequence[Sequence[int]]) -> list[Scores]:
        found = []
        with ProgressBar(self.name, len(texts), "texts") as bar:
            for number, ids in enumerate(texts):
                request = {"model": self._model, "prompt": list(ids), "max_tokens": 1, "temperature": 0,
                           "prompt_logprobs": 1}  # fmt: skip
                answer = self._ask("/v1/completions", request)
                found.append(self._read(answer, ids))
                bar.update(number + 1)
        return found

    def _read(self, answer: Any, ids: Sequence[int]) -> Scores:
        """One dict per prompt token: its own log-prob and that of the likeliest, by id; None for the first."""
        try:
            given = answer["choices"][0]["prompt_logprobs"]
            if len(given) != len(ids):
                raise UserError(f"{self._url}: expected {len(ids)} log-probs, got {len(given)}; is it a vLLM server?")
            scores = [float(entries[str(token)]["logprob"]) for entries, token in zip(given[1:], ids[1:], strict=True)]
            best = [int(next(t for t, entry in entries.items() if entry["rank"] == 1)) for entries in given[1:]]
        except (KeyError, TypeError, IndexError, StopIteration) as error:
            raise UserError(
                f"{self._url}: no prompt_logprobs in the answer ({error!r}); is it a vLLM server?"
            ) from None
        return Scores(torch.tensor(scores, dtype=torch.float64), torch.tensor(best))

    def _ask(self, path: str, content: dict[str, Any] | None) -> dict[str, Any]:
        data = json.dumps(content).encode() if content is not None else None
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=SERVER_TIMEOUT_S) as answer:
                found: dict[str, Any] = parse_json(answer.read())
                return found
        except urllib.error.HTTPError as error:
            raise UserError(f"{self._url}{path}: {error}: {error.read(500).decode(errors='replace')}") from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._url}{path}: expected the answer of a vLLM server: {error}; start it, or correct the URL"
            ) from None
