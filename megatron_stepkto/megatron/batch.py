"""Documents (prompt plus response) and the packed micro-batches that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_stepkto.base.examples import NONE, Examples, Indices
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.base.packing import pack, share_out
from megatron_stepkto.losses import UNJUDGED
from megatron_stepkto.megatron.packed import PackedDocuments


@dataclass(frozen=True)
class Document:
    """A prompt with a response to score.

    key: its name in logs, the sample's id; of a KL pair those of both samples, prompt <- response.
    prompt, response: tokens. step_ends: [S], one past each step's last response token.
    step_labels: [S]; with outcome RIGHT, WRONG or UNJUDGED. reference: [S] float64 reference log-prob per step, once
    known.
    """

    key: str
    prompt: NDArray[Any] | Sequence[int]
    response: NDArray[Any] | Sequence[int]
    step_ends: NDArray[Any] | Sequence[int]
    step_labels: NDArray[Any] | Sequence[int]
    outcome: int = UNJUDGED
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def num_steps(self) -> int:
        return len(self.step_ends)


def solution_document(examples: Examples, index: int, reference: Tensor | None = None) -> Document:
    own = examples.solution(examples.sample[index])
    return Document(own.sample_id, own.prompt, own.response, own.step_ends, own.step_labels, own.outcome, reference)


def kl_document(examples: Examples, index: int, reference: Tensor | None = None) -> Document:
    """(x_i, y_j): this example's prompt with another problem's solution, its KL partner."""
    own, other = (examples.solution(rows[index]) for rows in (examples.sample, examples.partner))
    key = f"{own.sample_id} <- {other.sample_id}"
    return Document(key, own.prompt, other.response, other.step_ends, other.step_labels, UNJUDGED, reference)


@dataclass(frozen=True)
class Part:
    """Documents of the examples with these ``indices``: their solutions, or their KL pairs."""

    examples: Examples
    indices: Indices
    kl: bool = False


class Documents(Sequence[Document]):
    """The documents of ``parts``, one after another, each made when it is read: a pass over all holds few in memory.

    lengths: [n] int32 tokens. num_steps: [n] int32.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part.indices) for part in self.parts)])
        lengths, steps = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for part in self.parts:
            own = part.examples.sample[part.indices]
            other = part.examples.partner[part.indices] if part.kl else own
            lengths.append(part.examples.prompt_tokens[own] + part.examples.response_tokens[other])
            steps.append(part.examples.num_steps[other])
        self.lengths, self.num_steps = np.concatenate(lengths), np.concatenate(steps)

    def digest(self) -> int:
        """Of which examples they are, by index."""
        return stable_hash(*((part.kl, sha256(part.indices.tobytes()).hexdigest()) for part in self.parts))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        part = self.parts[number]
        make = kl_document if part.kl else solution_document
        return make(part.examples, part.indices[index - self.starts[number]])

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


def with_partner(examples: Examples, indices: Indices) -> Indices:
    """Those of the examples that have a KL pair."""
    return indices[examples.partner[indices] != NONE]


@dataclass(frozen=True)
class MicroBatch:
    """Packed documents; T tokens, R response tokens, S steps, D documents.

    tokens, position_ids: [1, T] int64. rows, targets: [R] int64, the position whose hidden state predicts a
    response token, and that token. token_step: [R] int64, its step. step_document: [S]. step_label: [S].
    outcome: [D]. reference: [S] float64 (zeros where unknown).
    """

    tokens: Tensor
    position_ids: Tensor
    packed: PackedDocuments
    rows: Tensor
    targets: Tensor
    token_step: Tensor
    step_document: Tensor
    step_label: Tensor
    outcome: Tensor
    reference: Tensor
    documents: tuple[Document, ...]
    num_padding: int

    def step_sums(self, token_log_probs: Tensor) -> Tensor:
        """[S] float64: log-prob of each step from [R] token log-probs.

        A log-ratio of about a nat is the difference of two such sums of thousands: float32, added token by token,
        would be wrong by 0.01 nats at 8,000 tokens.
        """
        zeros = token_log_probs.new_zeros(self.step_document.shape[0], dtype=torch.float64)
        return zeros.index_add(0, self.token_step, token_log_probs.double())


def make_micro_batch(
    documents: Sequence[Document], multiple: int, device: torch.device, document_multiple: int = 1
) -> MicroBatch:
    """Pack documents one after another, padded (as a document of its own) to a multiple of ``multiple`` tokens.

    Each document is first padded after its end, which none of its tokens attends to, to a multiple of
    ``document_multiple``: with one as long as the longest document this is the usual batch of padded rows.
    The list may be empty: then the micro-batch is only padding, and contributes no gradient.
    """
    sizes = np.array([len(document) for document in documents], np.int64)
    padded = -(-sizes // document_multiple) * document_multiple
    bounds = [0, *np.cumsum(padded).tolist()]
    num_tokens = bounds[-1]
    padding = -num_tokens % multiple if num_tokens else multiple
    if padding:
        bounds.append(num_tokens + padding)
    tokens = np.zeros(bounds[-1], np.int64)
    positions = np.zeros(bounds[-1], np.int64)
    for start, end in pairwise(bounds):
        positions[start:end] = np.arange(end - start)
    rows: list[NDArray[Any]] = []
    token_step: list[NDArray[Any]] = []
    references = [torch.zeros(0, dtype=torch.float64)]  # the dtype, also of no document
    num_steps = 0
    for start, document in zip(bounds, documents, strict=False):
        first = start + len(document.prompt)
        end = first + len(document.response)
        tokens[start:first], tokens[first:end] = document.prompt, document.response
        rows.append(np.arange(first - 1, end - 1))
        steps = np.diff(document.step_ends, prepend=0)
        assert steps.sum() == len(document.response), "steps must cover the response"
        token_step.append(np.repeat(np.arange(num_steps, num_steps + len(steps)), steps))
        num_steps += len(steps)
        references.append(document.reference if document.reference is not None else torch.zeros(len(steps)))

    def integers(values: Sequence[Any] | NDArray[Any]) -> Tensor:
        return torch.tensor(np.asarray(values, np.int64), device=device)

    def joined(parts: Sequence[Any]) -> Tensor:
        return integers(np.concatenate(parts) if parts else ())

    scored = joined(rows)
    longest = max(b - a for a, b in pairwise(bounds))
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    packed = PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=tuple(bounds),
        rows=scored,
    )
    return MicroBatch(
        integers(tokens)[None],
        integers(positions)[None],
        packed,
        scored,
        joined([document.response for document in documents]),
        joined(token_step),
        integers(np.repeat(np.arange(len(documents)), [document.num_steps for document in documents])),
        joined([document.step_labels for document in documents]),
        integers([document.outcome for document in documents]),
        torch.cat(references).to(device),
        tuple(documents),
        bounds[-1] - int(sizes.sum()),
    )


@dataclass(frozen=True)
class Slot:
    """This rank's place among the data-parallel ranks, and what a micro-batch must satisfy.

    capacity: tokens of a micro-batch. multiple, document_multiple: of the tokens of a micro-batch, a document.
    """

    rank: int
    ranks: int
    capacity: int
    multiple: int
    bins_multiple: int
    device: torch.device
    document_multiple: int = 1

    def sizes(self, lengths: NDArray[np.int32] | Sequence[int]) -> Indices:
        """Tokens that documents of these lengths take in a micro-batch."""
        step = self.document_multiple
        return -(-np.asarray(lengths, np.int64) // step) * step

    def size(self, documents: Sequence[Document]) -> int:
        """Tokens that they take together."""
        return int(self.sizes([len(document) for document in documents]).sum())

    def micro_batch(self, documents: Sequence[Document]) -> MicroBatch:
        return make_micro_batch(documents, self.multiple, self.device, self.document_multiple)


def pack_units(units: Sequence[Sequence[Document]], slot: Slot) -> list[MicroBatch]:
    """This rank's micro-batches of one global batch; the documents of a unit (a pair) stay together."""
    sizes = [slot.size(unit) for unit in units]
    shares = share_out(pack(sizes, slot.capacity), sizes, slot.ranks, slot.bins_multiple)
    return [slot.micro_batch([d for index in members for d in units[index]]) for members in shares[slot.rank]]
