"""Judged samples -> data sets in TRL's layouts, with a dataset card."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast, get_args

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import flush
from megatron_stepkto.base.progress import ProgressBar
from megatron_stepkto.base.records import JudgedSample, Problem, read_records
from megatron_stepkto.base.whole_folder import whole_folder
from megatron_stepkto.problems.imported.trl import STEP_END
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import Prompts

Layout = Literal["trl_kto", "trl_dpo", "trl_stepwise"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
FileType = Literal["parquet", "jsonl"]
ROWS = 1000  # of one write
Row = dict[str, Any]


def layout_of(name: str) -> Layout:
    """A layout by its name, where ``-`` and ``_`` are the same. Raises UserError for an unknown one."""
    plain = name.lower().replace("-", "_")
    if plain not in LAYOUTS:
        raise UserError(f"unknown layout {name!r}; expected {', '.join(LAYOUTS)}")
    return cast(Layout, plain)


def export_samples(
    layout: Layout, judged: Path, output: Path, tokenizer_dir: Path, prompt: recipe.Prompt, *,
    problems: Path | None = None, file_type: FileType = "parquet", name: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Write a run's judged samples as a data set for TRL and ``datasets``; the folder appears whole or not at all.

    With prompt.chat, prompts and answers are messages, made of the problems; otherwise texts: the prompt tokens,
    decoded, without the BOS token that tokenizers add by themselves.

    Args:
        judged: JudgedSample records; they are read once and not held.
        problems: their Problem records, which prompts of messages need.
        name: of the run, for the card.

    Returns:
        "rows" and what was left out: "undecided" and "unfinished" samples, "unpaired" ones (trl_dpo);
        "unjudged_steps" that stay as null.

    Raises:
        UserError: a bad record, a problem that is not known, or nothing to write.
    """
    if not judged.is_file():
        raise UserError(f"{judged}: expected the samples of the judge stage, found none; run `stepkto judge` first")
    with judged.open("rb") as lines:
        total = sum(1 for _ in lines)
    prompts = Prompts.of(prompt, tokenizer_dir)
    texts = _problem_texts(problems) if prompt.chat else None
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise UserError(f"{output}: exists already; choose another --output, or remove it")
    counts: Counter[str] = Counter()

    def asked(sample: JudgedSample) -> Any:
        if texts is None:
            return _prompt_text(prompts, sample)
        if sample.problem_id not in texts:
            raise UserError(
                f"{judged}: problem {sample.problem_id} of sample {sample.sample_id} is not in {problems}, so its "
                "messages are not known; set prompt.chat=false to export the prompts as texts"
            )
        return prompts.turns(texts[sample.problem_id])

    def answered(sample: JudgedSample) -> Any:
        return sample.text if texts is None else [{"role": "assistant", "content": sample.text}]

    def samples() -> Iterator[JudgedSample]:
        with ProgressBar("exporting", total, "samples") as bar:
            for done, sample in enumerate(read_records(judged, JudgedSample), 1):
                bar.update(done)
                yield sample

    rows = {"trl_kto": _kto, "trl_dpo": _dpo, "trl_stepwise": _stepwise}[layout](samples(), asked, answered, counts)
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output, judged.stat().st_size) as folder:
        file = folder / "data" / f"train.{file_type}"
        file.parent.mkdir()
        counts["rows"] = (_write_parquet if file_type == "parquet" else _write_lines)(file, rows)
        if not counts["rows"]:
            said = ", ".join(f"{name}: {value}" for name, value in counts.items()) or "no samples"
            raise UserError(f"{judged}: no row of {layout} comes of it ({said}); check the labels")
        flush(file)
        card = folder / "README.md"
        card.write_text(_card(layout, file_type, name or judged.stem, counts), encoding="utf-8")
        flush(card)
    return dict(counts)


def _problem_texts(path: Path | None) -> dict[str, str]:
    if path is None:
        raise UserError("prompts of messages (prompt.chat) need the problems; set prompt.chat=false to export texts")
    return {problem.problem_id: problem.problem for problem in read_records(path, Problem)}


def _prompt_text(prompts: Prompts, sample: JudgedSample) -> str:
    """The prompt's tokens as text, without the BOS token, which TRL's tokenizer adds again."""
    tokenizer, ids = prompts.tokenizer, sample.prompt_token_ids
    added = tokenizer("", verbose=False)["input_ids"][:1]
    if added and ids[:1] == added:
        ids = ids[1:]
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


Make = Callable[[JudgedSample], Any]


def _whole(samples: Iterator[JudgedSample], counts: Counter[str]) -> Iterator[JudgedSample]:
    """Samples with an outcome that end: TRL's trainers put the end token behind every completion."""
    for sample in samples:
        if sample.outcome is None:
            counts["undecided"] += 1
        elif sample.finish_reason == "length":
            counts["unfinished"] += 1
        else:
            yield sample


def _kto(samples: Iterator[JudgedSample], asked: Make, answered: Make, counts: Counter[str]) -> Iterator[Row]:
    for sample in _whole(samples, counts):
        yield {"prompt": asked(sample), "completion": answered(sample), "label": bool(sample.outcome)}


def _dpo(samples: Iterator[JudgedSample], asked: Make, answered: Make, counts: Counter[str]) -> Iterator[Row]:
    """Right and wrong samples of a problem in file order, each in at most one pair."""
    waiting: dict[str, list[JudgedSample]] = defaultdict(list)  # of one outcome: the others found a partner
    for sample in _whole(samples, counts):
        others = waiting[sample.problem_id]
        if not others or others[0].outcome == sample.outcome:
            others.append(sample)
            continue
        other = others.pop(0)
        chosen, rejected = (sample, other) if sample.outcome else (other, sample)
        if chosen.text == rejected.text:  # two judgements of one text say nothing
            counts["unpaired"] += 2
            continue
        yield {"prompt": asked(chosen), "chosen": answered(chosen), "rejected": answered(rejected)}
    counts["unpaired"] += sum(map(len, waiting.values()))


def _stepwise(samples: Iterator[JudgedSample], asked: Make, answered: Make, counts: Counter[str]) -> Iterator[Row]:
    """A step that no newline ends gets one from TRL and from an import: counted."""
    for sample in samples:
        steps = [sample.text[step.start : step.end] for step in sample.steps]
        counts["steps_joined_otherwise"] += sum(not step.endswith(STEP_END) for step in steps[:-1])
        steps = [*(step.removesuffix(STEP_END) for step in steps[:-1]), *steps[-1:]]
        labels = [None if step.label is None else bool(step.label) for step in sample.steps]
        counts["unjudged_steps"] += labels.count(None)
        outcome = None if sample.outcome is None else bool(sample.outcome)
        yield {"prompt": asked(sample), "completions": steps, "labels": labels, "label": outcome}


def _write_lines(path: Path, rows: Iterator[Row]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _schema(row: Row) -> Any:
    import pyarrow as pa

    text, truth = pa.string(), pa.bool_()
    messages = pa.list_(pa.struct([("role", text), ("content", text)]))
    kinds = {"label": truth, "labels": pa.list_(truth), "completions": pa.list_(text)}
    return pa.schema(
        [(key, kinds.get(key, text if isinstance(value, str) else messages)) for key, value in row.items()]
    )


def _write_parquet(path: Path, rows: Iterator[Row]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if (first := next(rows, None)) is None:
        return 0
    count, schema, rows = 0, _schema(first), itertools.chain([first], rows)
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(itertools.islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    return count


_COLUMNS = {
    "trl_kto": "`prompt`, `completion`, `label` (true: the final answer is right): TRL's unpaired preference, for KTO.",
    "trl_dpo": "`prompt`, `chosen` (right), `rejected` (wrong): TRL's preference layout, for DPO.",
    "trl_stepwise": "`prompt`, `completions` (steps), `labels` (true, false, or null where a step was not judged): "
    "TRL's stepwise supervision; `label` is the outcome of the final answer. TRL ignores that column.",
}


def _card(layout: Layout, file_type: FileType, name: str, counts: Counter[str]) -> str:
    """README.md of the data set, as the Hugging Face hub reads it."""
    front = [
        "configs:", "- config_name: default", "  data_files:", "  - split: train", f"    path: data/train.{file_type}",
        f"pretty_name: {json.dumps(name)}", "tags:", "- trl", "- step-kto",
    ]  # fmt: skip
    return "\n".join(
        ["---", *front, "---", "", f"# {name}", "", "Solutions sampled and judged by megatron-stepkto.", "",
         f"Columns: {_COLUMNS[layout]}", "", *(f"- {key}: {value}" for key, value in counts.items()), ""]
    )  # fmt: skip
