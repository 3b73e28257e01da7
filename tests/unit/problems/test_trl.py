"""TRL's layouts: what each row becomes, in every kind of file; compared with TRL's own readers where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import JudgedSample, Problem, read_records, write_records
from megatron_stepkto.judging.exported import export_samples
from megatron_stepkto.judging.imported import import_all, read_imports
from megatron_stepkto.problems.imported.formats import importer_of
from megatron_stepkto.problems.imported.trl import COLUMNS
from megatron_stepkto.recipe import keys as recipe

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}
WRONG = {"role": "assistant", "content": "It is 5."}
KTO = [
    {"prompt": "The sky is", "completion": " blue.\nYes.", "label": True},
    {"prompt": "The sky is", "completion": " green.", "label": False},
    {"prompt": [USER], "completion": [ANSWER], "label": None},
]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per byte, and the special tokens of a chat template."""
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=special[1:], chat_template=CHAT
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def write(kind: str, rows: list[dict[str, Any]], folder: Path) -> Path:
    """The rows as a file or folder of this kind."""
    import datasets

    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(rows))
        return folder / "rows.json"
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "rows.jsonl"
    data = datasets.Dataset.from_list(rows)
    if kind == "parquet":
        data.to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    if kind == "saved":
        data.save_to_disk(folder / "saved")
        return folder / "saved"
    (folder / "hub" / "data").mkdir(parents=True)
    for number in range(2):
        shard = data.shard(2, number, contiguous=True)
        shard.to_parquet(folder / "hub" / "data" / f"train-0000{number}-of-00002.parquet")
    (folder / "hub" / "README.md").write_text("---\n---\n")
    return folder / "hub"


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "saved", "hub"])
def test_every_kind_of_file_gives_the_same(kind: str, tmp_path: Path) -> None:
    rows = [{**row, "source": "web"} for row in KTO[:2]]
    item = recipe.Import(format="trl-kto", path=write(kind, rows, tmp_path))
    found = read_imports([item])
    assert [(s.problem, s.steps, s.labels, s.outcome) for s in found.solutions] == [
        ("The sky is", (" blue.\n", "Yes."), (None, None), 1),
        ("The sky is", (" green.",), (None,), 0),
    ]
    assert found.counts["sources"][str(item.path)]["ignored_columns"] == ["source"]


@pytest.mark.parametrize("labels", [("True", "False"), ("true", '"false"'), ("1", "0"), ("1.0", "0.0"), ("1", "")])
def test_a_csv_file_holds_texts_and_labels(labels: tuple[str, str], tmp_path: Path) -> None:
    """Completions that look like numbers are texts; labels are flags in any of the spellings that programs write."""
    path = tmp_path / "n.csv"
    path.write_text(f'prompt,completion,label\n1 + 1?,2,{labels[0]}\n2 + 1?,"4",{labels[1]}\n')
    found = read_imports([recipe.Import(format="trl-kto", path=path)])
    wrong = 0 if labels[1] else None
    assert [(s.problem, s.steps, s.outcome) for s in found.solutions] == [
        ("1 + 1?", ("2",), 1),
        ("2 + 1?", ("4",), wrong),
    ]
    path.write_text("prompt,completion,label\n1 + 1?,2,2\n")
    with pytest.raises(UserError, match=r'n\.csv:1: label: expected true, false or null, got "2"'):
        read_imports([recipe.Import(format="trl-kto", path=path)])


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "saved", "hub"])
def test_a_bad_row_is_named_and_loses_no_other(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": "P", "completions": ["a", "b"], "labels": [True, False]} for _ in range(3)]
    rows[1] = {"prompt": "P", "completions": ["a", "b"], "labels": [True]}
    rows[2] = {"prompt": "P", "completions": ["a", "c"], "labels": [True, None]}
    path = write(kind, rows, tmp_path)
    item, bad = [recipe.Import(format="trl_stepwise", path=path)], tmp_path / "bad.jsonl"
    with pytest.raises(UserError, match=rf"{path.name}:2: expected one label per step, got 1 labels for 2 completions"):
        read_imports(item)
    found = read_imports(item, quarantine=bad)
    assert [(s.text, s.labels, s.outcome) for s in found.solutions] == [
        ("a\nb", (1, 0), None),
        ("a\nc", (1, None), None),
    ]
    [row] = [json.loads(line) for line in bad.read_text().splitlines()]
    assert row["line"] == 2 and json.loads(row["row"])["labels"] == [True]


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("trl_kto", {"prompt": "P", "completion": "c", "label": "yes"}, "label: expected true, false or null"),
        ("trl_kto", {"prompt": "P", "completion": [USER], "label": 1}, "one message of the assistant"),
        ("trl_kto", {"prompt": [ANSWER], "completion": "c", "label": 1}, "end with a message of the user"),
        ("trl_kto", {"prompt": [{"role": "user"}], "completion": "c", "label": 1}, r"prompt\.0: expected a message"),
        ("trl_dpo", {"prompt": "P", "chosen": "c", "rejected": "c"}, "chosen and rejected are equal"),
        ("trl_dpo", {"chosen": "c", "rejected": "r"}, "do not begin with the same prompt"),
        ("trl_stepwise", {"prompt": "P", "completions": ["a"], "labels": [2]}, r"labels\.0: expected true"),
    ],
)
def test_bad_rows(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        importer_of(name)(row)


def test_a_pair_is_a_right_and_a_wrong_solution() -> None:
    """A solution that one pair prefers and another rejects is kept with both outcomes, as TRL would train on it."""
    rows = [{"prompt": "P", "chosen": "a", "rejected": "b"}, {"prompt": "P", "chosen": "b", "rejected": "c"}]
    sides = [solution for row in rows for solution in importer_of("trl_dpo")(row).solutions]
    assert [(s.text, s.outcome) for s in sides] == [("a", 1), ("b", 0), ("b", 1), ("c", 0)]
    assert len({s.solution_id for s in sides}) == 4


IMPLICIT: list[dict[str, Any]] = [
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": [USER, ANSWER], "rejected": [USER, WRONG]},
]


@pytest.mark.parametrize("row", IMPLICIT)
def test_an_implicit_prompt_is_what_both_sides_share(row: dict[str, Any]) -> None:
    chosen, rejected = importer_of("trl_dpo")(row).solutions
    expected = [("The sky is", " blue.", " green."), ("2 + 2?", "It is 4.", "It is 5.")]
    assert (chosen.problem, chosen.text, rejected.text) in expected
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed (requirements/bench.txt)")
    theirs = data_utils.maybe_extract_prompt(row)
    if isinstance(theirs["prompt"], str):
        assert (chosen.problem, chosen.text, rejected.text) == tuple(
            theirs[k] for k in ("prompt", "chosen", "rejected")
        )
    else:
        assert chosen.problem == theirs["prompt"][0]["content"]


def test_messages_go_through_the_chat_template(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Prompt tokens equal the template's for one question and for a longer conversation."""
    talk = [{"role": "system", "content": "Be brief."}, USER, ANSWER, {"role": "user", "content": "Sure?"}]
    rows = [
        {"prompt": [USER], "completion": [ANSWER], "label": True},
        {"prompt": talk, "completion": [WRONG], "label": False},
    ]
    prompt = recipe.Prompt(template="{problem}", chat=True)
    items = [recipe.Import(format="trl_kto", path=write("jsonl", rows, tmp_path))]
    import_all(items, tokenizer_dir, prompt, tmp_path / "p.jsonl", tmp_path / "j.jsonl")
    judged = list(read_records(tmp_path / "j.jsonl", JudgedSample))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    for row, sample in zip(rows, judged, strict=True):
        both = [*row["prompt"], *row["completion"]]  # type: ignore[misc]
        whole = tokenizer.apply_chat_template(both, tokenize=True, return_dict=True)["input_ids"]
        asked = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert sample.prompt_token_ids == asked
        assert [*sample.prompt_token_ids, *sample.token_ids] == whole
    with pytest.raises(UserError, match=r"rows.jsonl:2: the prompt has 4 messages.*prompt.chat: true"):
        import_all(items, tokenizer_dir, recipe.Prompt(template="{problem}"), tmp_path / "p", tmp_path / "j")


@pytest.mark.parametrize("file_type", ["parquet", "jsonl"])
@pytest.mark.parametrize("layout", ["trl_kto", "trl_dpo", "trl_stepwise"])
@pytest.mark.parametrize("chat", [False, True])
def test_export_and_import_again(layout: Any, file_type: Any, chat: bool, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Prompts, texts, tokens and labels come back; ``datasets`` loads the folder by its card."""
    steps = [
        {"prompt": "1 + 1?", "completions": ["One.", "So \\boxed{2}"], "labels": [1, None], "label": 1},
        {"prompt": "1 + 1?", "completions": ["Two.", "So \\boxed{3}"], "labels": [1, 0], "label": 0},
        {"prompt": "2 + 1?", "completions": ["So \\boxed{3}"], "labels": [True], "label": True},
        {"prompt": "3 + 1?", "completions": ["Hm."], "labels": [None], "label": None},
    ]
    prompt = recipe.Prompt(template="{problem}", chat=chat)
    problems, judged = tmp_path / "problems.jsonl", tmp_path / "judged.jsonl"
    items = [recipe.Import(format="trl_stepwise", path=write("jsonl", steps, tmp_path))]
    import_all(items, tokenizer_dir, prompt, problems, judged)
    before = list(read_records(judged, JudgedSample))
    texts = [
        Problem(problem_id=s.problem_id, problem=row["prompt"], answer=None)
        for s, row in zip(before, steps, strict=True)
    ]
    write_records(problems, {p.problem_id: p for p in texts}.values())
    output = tmp_path / "out"
    counts = export_samples(layout, judged, output, tokenizer_dir, prompt, problems=problems, file_type=file_type)
    assert (
        counts
        == {
            "trl_kto": {"undecided": 1, "rows": 3},
            "trl_dpo": {"undecided": 1, "unpaired": 1, "rows": 1},
            "trl_stepwise": {"steps_joined_otherwise": 0, "unjudged_steps": 2, "rows": 4},
        }[layout]
    )
    import datasets

    loaded = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert set(loaded.column_names) == COLUMNS[layout]
    again = tmp_path / "again.jsonl"
    items = [recipe.Import(format=layout, path=output)]
    import_all(items, tokenizer_dir, prompt, tmp_path / "p.jsonl", again)
    kept = {"trl_kto": before[:3], "trl_dpo": before[:2], "trl_stepwise": before}[layout]
    after = list(read_records(again, JudgedSample))
    assert len(after) == len(kept)
    for one, other in zip(kept, after, strict=True):
        assert (one.text, one.outcome, one.token_ids) == (other.text, other.outcome, other.token_ids)
        assert one.prompt_token_ids == other.prompt_token_ids
        if layout == "trl_stepwise":
            assert one.steps == other.steps
    _check_with_trl(layout, loaded, kept, tokenizer_dir, chat)


def _check_with_trl(layout: str, loaded: Any, kept: list[JudgedSample], tokenizer_dir: Path, chat: bool) -> None:
    """TRL's readers see the same conversations, unpair pairs to our solutions, and make our tokens."""
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed (requirements/bench.txt)")
    from transformers import AutoTokenizer

    if layout == "trl_stepwise":  # TRL 1.16 documents the layout and has no trainer for it
        return
    assert data_utils.is_conversational(loaded[0]) == chat
    rows = loaded if layout == "trl_kto" else data_utils.unpair_preference_dataset(loaded)
    assert [row["label"] for row in rows] == [bool(sample.outcome) for sample in kept]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    for row, sample in zip(rows, kept, strict=True):
        more = {"add_generation_prompt": True} if chat else {}
        assert data_utils._tokenize(tokenizer, row["prompt"], **more)["input_ids"] == sample.prompt_token_ids
        end = "" if chat else tokenizer.eos_token
        whole = data_utils._tokenize(tokenizer, row["prompt"] + row["completion"] + ([] if chat else end))["input_ids"]
        assert whole == [*sample.prompt_token_ids, *sample.token_ids]
