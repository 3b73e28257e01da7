"""Packed micro-batches of small documents, every tensor by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_stepkto.base.examples import Examples
from megatron_stepkto.base.records import KLPartner, TrainExample, TrainStep, write_records
from megatron_stepkto.losses import UNJUDGED
from megatron_stepkto.megatron import patches

# Before Megatron-Core is imported, as in a run; not beside a GPU, whose tests may share this process.
if not torch.cuda.is_available():
    patches.install()

from megatron_stepkto.megatron.batch import (
    Document,
    Documents,
    MicroBatch,
    Part,
    Slot,
    kl_document,
    make_micro_batch,
    pack_units,
    solution_document,
)
from megatron_stepkto.methods.dataset import build_dataset
from megatron_stepkto.methods.objective import solutions_of
from megatron_stepkto.recipe.keys import Dataset
from tests.builders import random_examples
from tests.unit.methods.test_select import sample

DEVICE = torch.device("cpu")


def steps(*parts: tuple[int, int, int | None]) -> list[TrainStep]:
    return [TrainStep(token_start=start, token_end=end, label=label) for start, end, label in parts]


# Prompt 10 11 12 with response 20 21 22 23 in steps [20 21] right, [22 23] not judged; outcome wrong.
A = TrainExample(
    example_id="a",
    problem_id="p",
    prompt_token_ids=[10, 11, 12],
    token_ids=[20, 21, 22, 23],
    steps=steps((0, 2, 1), (2, 4, None)),
    outcome=0,
)
# Prompt 30 with response 40 41 42 in steps [40] wrong, [] right (no token of its own), [41 42] right; no outcome.
B = TrainExample(
    example_id="b",
    problem_id="q",
    prompt_token_ids=[30],
    token_ids=[40, 41, 42],
    steps=steps((0, 1, 0), (1, 1, 1), (1, 3, 1)),
    outcome=None,
)


AB = Examples.of(
    [A.model_copy(update={"kl_partner": KLPartner(example_id="b", token_ids=B.token_ids, steps=B.steps)}), B]
)


def batch(multiple: int = 1) -> MicroBatch:
    documents = [solution_document(AB, 0, torch.tensor([-1.5, -2.5])), solution_document(AB, 1)]
    return make_micro_batch(documents, multiple, DEVICE)


def test_two_documents_by_hand() -> None:
    made = batch()
    assert made.tokens.tolist() == [[10, 11, 12, 20, 21, 22, 23, 30, 40, 41, 42]]
    assert made.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]]
    # the hidden state of 12 (row 2) predicts 20, ..., that of 30 (row 7) predicts 40
    assert made.rows.tolist() == [2, 3, 4, 5, 7, 8, 9]
    assert made.targets.tolist() == [20, 21, 22, 23, 40, 41, 42]
    assert made.token_step.tolist() == [0, 0, 1, 1, 2, 4, 4]
    assert made.step_document.tolist() == [0, 0, 1, 1, 1]
    assert made.step_label.tolist() == [1, -1, 0, 1, 1]
    assert made.outcome.tolist() == [0, -1]
    assert made.reference.tolist() == [-1.5, -2.5, 0.0, 0.0, 0.0]
    assert [document.key for document in made.documents] == ["a", "b"]
    assert made.num_padding == 0
    assert {
        made.tokens.dtype,
        made.position_ids.dtype,
        made.rows.dtype,
        made.targets.dtype,
        made.token_step.dtype,
        made.step_document.dtype,
        made.step_label.dtype,
        made.outcome.dtype,
    } == {torch.int64}
    assert made.reference.dtype == torch.float64


def test_bounds_of_attention() -> None:
    packed = batch().packed
    assert packed.bounds == (0, 7, 11)
    assert packed.qkv_format == "thd"
    for offsets in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert offsets.tolist() == [0, 7, 11]
        assert offsets.dtype == torch.int32
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (7, 7)


def test_what_a_row_predicts_is_the_token_behind_it() -> None:
    made = batch(multiple=8)
    assert made.tokens[0, made.rows + 1].tolist() == made.targets.tolist()


def test_documents_padded_to_a_multiple_keep_their_tokens_and_bounds() -> None:
    """7 and 4 tokens to multiples of 8: rows of equal length, whose padding has no row, target or step."""
    plain = batch()
    made = make_micro_batch(plain.documents, 8, DEVICE, document_multiple=8)
    assert made.tokens.tolist() == [[10, 11, 12, 20, 21, 22, 23, 0, 30, 40, 41, 42, 0, 0, 0, 0]]
    assert made.position_ids.tolist() == [[*range(8), *range(8)]]
    assert made.packed.bounds == (0, 8, 16)
    assert made.num_padding == 5
    assert made.tokens[0, made.rows + 1].tolist() == made.targets.tolist() == plain.targets.tolist()
    assert made.token_step.tolist() == plain.token_step.tolist()


def test_capacity_counts_the_padding_of_documents() -> None:
    slot = Slot(0, 1, 16, multiple=1, bins_multiple=1, device=DEVICE, document_multiple=8)
    units = [[solution_document(AB, index)] for index in (0, 1, 0)]
    assert [[d.key for d in made.documents] for made in pack_units(units, slot)] == [["a", "b"], ["a"]]


def test_padding_is_a_document_of_its_own() -> None:
    """11 tokens to a multiple of 8: 5 of padding, with positions of their own and no row, target or step."""
    made, plain = batch(multiple=8), batch()
    assert made.tokens.tolist() == [[*plain.tokens[0].tolist(), 0, 0, 0, 0, 0]]
    assert made.position_ids.tolist() == [[*plain.position_ids[0].tolist(), 0, 1, 2, 3, 4]]
    assert made.packed.bounds == (0, 7, 11, 16)
    assert made.packed.cu_seqlens_q.tolist() == [0, 7, 11, 16]
    assert made.num_padding == 5
    for name in ("rows", "targets", "token_step", "step_document", "step_label", "outcome", "reference"):
        assert torch.equal(getattr(made, name), getattr(plain, name)), name


def test_padding_longer_than_every_document_sets_the_longest() -> None:
    made = make_micro_batch([solution_document(AB, 1)], 32, DEVICE)
    assert made.packed.bounds == (0, 4, 32)
    assert made.packed.max_seqlen_q == 28


def test_no_padding_where_it_fits() -> None:
    made = batch(multiple=11)
    assert (made.num_padding, made.packed.bounds) == (0, (0, 7, 11))


def test_nothing_but_padding() -> None:
    made = make_micro_batch([], 4, DEVICE)
    assert made.tokens.tolist() == [[0, 0, 0, 0]]
    assert made.position_ids.tolist() == [[0, 1, 2, 3]]
    assert made.packed.bounds == (0, 4)
    assert (made.num_padding, made.documents) == (4, ())
    for name in ("rows", "targets", "token_step", "step_document", "step_label", "outcome", "reference"):
        assert getattr(made, name).shape == (0,), name
    assert made.step_sums(torch.zeros(0)).shape == (0,)


def test_step_sums_by_hand() -> None:
    """[20 21], [22 23], [40], [], [41 42]; a step without a token sums to 0."""
    log_probs = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0], requires_grad=True)
    sums = batch(multiple=8).step_sums(log_probs)
    assert sums.tolist() == [-3.0, -12.0, -16.0, 0.0, -96.0]
    (sums * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 5.0, 5.0]


def test_a_long_solution_keeps_its_log_ratio() -> None:
    """8,000 tokens of -1 nat each, in one step. float32, added token by token, is wrong by 0.009 nats."""
    generator = torch.Generator().manual_seed(0)
    base = torch.empty(8000).exponential_(generator=generator).neg()
    policy = base + 0.01 * torch.randn(8000, generator=generator)
    document = Document("long", [1], [2] * 8000, [8000], [1], 1)
    blank = make_micro_batch([document], 1, DEVICE)
    made = make_micro_batch([replace(document, reference=blank.step_sums(base))], 1, DEVICE)
    solutions = solutions_of(made, policy)
    expected = math.fsum(policy.tolist()) - math.fsum(base.tolist())
    assert solutions.log_ratio().item() == pytest.approx(expected, abs=1e-9)


def test_kl_document_is_this_prompt_with_the_other_solution() -> None:
    document = kl_document(AB, 0, torch.tensor([1.0, 2.0, 3.0]))
    assert (document.key, document.outcome, len(document)) == ("a <- b", UNJUDGED, 6)
    made = make_micro_batch([document], 1, DEVICE)
    assert made.tokens.tolist() == [[10, 11, 12, 40, 41, 42]]
    assert made.rows.tolist() == [2, 3, 4]
    assert made.step_label.tolist() == [0, 1, 1]
    assert made.outcome.tolist() == [-1]
    assert made.reference.tolist() == [1.0, 2.0, 3.0]


def test_documents_are_named_by_their_samples(tmp_path: Path) -> None:
    """An example of a pair has an id of its own, which is in no file that the user could look it up in."""
    rows = [sample("p", 0, 1, [1]), sample("p", 1, 0, [0])]
    write_records(tmp_path / "judged.jsonl", rows)
    build_dataset(tmp_path / "judged.jsonl", tmp_path / "train", None, Dataset(), "dpo", 0.0, seed=0)
    examples = Examples.open(tmp_path / "train")
    assert [examples.example_id(n) for n in range(2)] == ["p/pair/0/chosen", "p/pair/0/rejected"]
    assert [solution_document(examples, n).key for n in range(2)] == ["p/0", "p/1"]


@pytest.mark.parametrize("kl", [False, True])
def test_documents_are_those_of_their_parts_in_order(kl: bool) -> None:
    examples = Examples.of(random_examples(30))
    indices = np.array([7, 2, 11, 5])
    made = Documents([Part(examples, np.arange(3)), Part(examples, indices, kl=kl)])
    make = kl_document if kl else solution_document
    by_hand = [solution_document(examples, i) for i in range(3)] + [make(examples, i) for i in indices]
    assert [one.key for one in made] == [one.key for one in by_hand]
    assert made.lengths.tolist() == [len(one) for one in by_hand]
    assert made.num_steps.tolist() == [one.num_steps for one in by_hand]
    assert [one.response.tolist() for one in made] == [one.response.tolist() for one in by_hand]
    assert made.digest() != Documents([Part(examples, np.arange(3)), Part(examples, indices[::-1], kl=kl)]).digest()


# --- packing units -------------------------------------------------------------------------------------------


def document(key: str, length: int) -> Document:
    return Document(key, [1], [2] * (length - 1), [length - 1], [1], 1)


def keys(batches: list[MicroBatch]) -> list[list[str]]:
    return [[one.key for one in made.documents] for made in batches]


def slot(rank: int = 0, ranks: int = 1, capacity: int = 20, multiple: int = 1, bins_multiple: int = 1) -> Slot:
    return Slot(rank, ranks, capacity, multiple, bins_multiple, DEVICE)


def test_a_pair_stays_together() -> None:
    """Pairs of 4 + 8, 5 + 5 and 6 + 2 tokens in bins of 20: 12 + 8, then 10."""
    units = [
        [document(f"{name}/chosen", first), document(f"{name}/rejected", second)]
        for name, first, second in (("x", 4, 8), ("y", 5, 5), ("z", 6, 2))
    ]
    assert keys(pack_units(units, slot())) == [
        ["x/chosen", "x/rejected", "z/chosen", "z/rejected"],
        ["y/chosen", "y/rejected"],
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_document_on_exactly_one_rank(ranks: int) -> None:
    units = [[document(f"d{n}", 3 + n % 9)] for n in range(17)]
    shares = [pack_units(units, slot(rank, ranks, bins_multiple=2)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) % 2 == 0
    found = [key for share in shares for members in keys(share) for key in members]
    assert sorted(found) == sorted(f"d{n}" for n in range(17))
    assert all(made.tokens.shape[1] <= 20 for share in shares for made in share)


def test_a_rank_with_nothing_gets_padding_alone() -> None:
    shares = [pack_units([[document("only", 5)]], slot(rank, 2, multiple=4)) for rank in range(2)]
    assert keys(shares[0]) == [["only"]]
    assert keys(shares[1]) == [[]]
    assert shares[0][0].tokens.shape == (1, 8)
    assert shares[1][0].tokens.tolist() == [[0, 0, 0, 0]]


def test_steps_must_cover_the_response() -> None:
    broken = Document("broken", [1], [2, 3, 4], [2], [1], 1)
    with pytest.raises(AssertionError, match="steps must cover the response"):
        make_micro_batch([broken], 1, DEVICE)


@pytest.mark.parametrize(("multiple", "limit"), [(1, 1e-4), (8, 2e-3), (64, 0.08)])
@pytest.mark.parametrize("seed", range(3))
def test_share_of_padding_that_is_really_processed(seed: int, multiple: int, limit: float) -> None:
    """Log-normal lengths of 32 to 384 tokens, micro-batches of 4,096, two ranks: only alignment is padded, and a
    micro-batch of padding alone where the ranks' shares are uneven."""
    rng = random.Random(seed)
    lengths = [min(384, max(32, round(rng.lognormvariate(5.0, 0.6)))) for _ in range(256)]
    units = [[document(f"d{n}", length)] for n, length in enumerate(lengths)]
    made = [one for rank in range(2) for one in pack_units(units, slot(rank, 2, capacity=4096, multiple=multiple))]
    processed = sum(one.tokens.numel() for one in made)
    padding = sum(one.num_padding for one in made)
    assert processed - padding == sum(lengths)
    assert padding <= limit * processed
    assert all(one.tokens.numel() % multiple == 0 for one in made)
