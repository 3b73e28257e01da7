"""Documents (prompt plus response) and the packed micro-batches that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_stepkto.base.packing import pack, share_out
from megatron_stepkto.base.records import KLPartner, TrainExample, TrainStep
from megatron_stepkto.losses import UNJUDGED
from megatron_stepkto.megatron.packed import PackedDocuments


@dataclass(frozen=True)
class Document:
    """A prompt with a response to score.

    key: its name in logs and in the reference file.
    reference: [S] float64 reference log-prob per step, once known.
    """

    key: str
    prompt: Sequence[int]
    response: Sequence[int]
    steps: Sequence[TrainStep]
    outcome: int | None
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def solution_document(example: TrainExample, reference: Tensor | None = None) -> Document:
    return Document(
        example.example_id, example.prompt_token_ids, example.token_ids, example.steps, example.outcome, reference
    )


def kl_document(example: TrainExample, partner: KLPartner, reference: Tensor | None = None) -> Document:
    """(x_i, y_j): this example's prompt with another problem's solution."""
    key = f"{example.example_id} <- {partner.example_id}"
    return Document(key, example.prompt_token_ids, partner.token_ids, partner.steps, None, reference)


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
    tokens: list[int] = []
    positions: list[int] = []
    bounds = [0]
    rows: list[int] = []
    targets: list[int] = []
    token_step: list[int] = []
    step_document: list[int] = []
    step_label: list[int] = []
    references = [torch.zeros(0, dtype=torch.float64)]  # the dtype, also of no document
    num_padding = 0
    for number, document in enumerate(documents):
        first = len(tokens) + len(document.prompt)
        gap = -len(document) % document_multiple
        tokens += [*document.prompt, *document.response, *[0] * gap]
        positions += range(len(document) + gap)
        num_padding += gap
        bounds.append(len(tokens))
        rows += range(first - 1, first - 1 + len(document.response))
        targets += document.response
        for step in document.steps:
            token_step += [len(step_label)] * (step.token_end - step.token_start)
            step_document.append(number)
            step_label.append(UNJUDGED if step.label is None else step.label)
        references.append(document.reference if document.reference is not None else torch.zeros(len(document.steps)))
    assert len(token_step) == len(targets), "steps must cover the response"
    padding = -len(tokens) % multiple if tokens else multiple
    if padding:
        tokens += [0] * padding
        positions += range(padding)
        bounds.append(len(tokens))

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    scored = integers(rows)
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
        integers(targets),
        integers(token_step),
        integers(step_document),
        integers(step_label),
        integers([UNJUDGED if d.outcome is None else d.outcome for d in documents]),
        torch.cat(references).to(device),
        tuple(documents),
        num_padding + padding,
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

    def size(self, documents: Sequence[Document]) -> int:
        """Tokens that they take in a micro-batch."""
        step = self.document_multiple
        return sum(-(-len(document) // step) * step for document in documents)

    def micro_batch(self, documents: Sequence[Document]) -> MicroBatch:
        return make_micro_batch(documents, self.multiple, self.device, self.document_multiple)


def pack_units(units: Sequence[Sequence[Document]], slot: Slot) -> list[MicroBatch]:
    """This rank's micro-batches of one global batch; the documents of a unit (a pair) stay together."""
    sizes = [slot.size(unit) for unit in units]
    shares = share_out(pack(sizes, slot.capacity), sizes, slot.ranks, slot.bins_multiple)
    return [slot.micro_batch([d for index in members for d in units[index]]) for members in shares[slot.rank]]
