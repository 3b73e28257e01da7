"""``stepkto init``: from a model and a file of problems to a recipe that ``stepkto run`` accepts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import atomic_writer, stable_hash
from megatron_stepkto.base.model_folder import read_config
from megatron_stepkto.base.progress import ProgressBar, say, warn
from megatron_stepkto.base.records import Problem, set_aside, write_records
from megatron_stepkto.base.tables import splits_of
from megatron_stepkto.checkpoints.convert import read_model_config
from megatron_stepkto.checkpoints.hub import HUB, fetch_model
from megatron_stepkto.first_recipe.draft import Found, draft, summary
from megatron_stepkto.first_recipe.judge import reachable_judge
from megatron_stepkto.first_recipe.machine import Sampler, find_target, sampler_here
from megatron_stepkto.first_recipe.pilot import Pilot, sample_some
from megatron_stepkto.methods.registry import load_recipe
from megatron_stepkto.problems.datasets import set_names
from megatron_stepkto.problems.published import Published, hold_out, read_published, without
from megatron_stepkto.recipe.keys import RUN_NAME, Prompt
from megatron_stepkto.recipe.prompts import BadText, Prompts, load_tokenizer
from megatron_stepkto.recipe.templates import TEMPLATES

HELD_OUT_SHARE, HELD_OUT = 0.1, 500
PILOT_TOKENS = {True: 2048, False: 512}  # of a response, on a GPU or not
LONGEST = 200  # problems, the longest in UTF-8, whose prompts are measured in tokens
SHOWN = 3
STEPS = "Solve the problem step by step, a blank line between steps. Put the final answer in \\boxed{}.\n\n{problem}"
DEFAULT_POSITIONS = 4096  # where config.json does not say


@dataclass(frozen=True)
class Wish:
    """What the command line says. model: a folder or ``hub:NAME[@REVISION]``. gpus None: those of this machine.

    tests: files or folders to measure on; none: a part of ``problems``.
    """

    model: str
    problems: Path
    tests: Sequence[Path]
    output: Path | None
    gpus: int | None
    cluster: str
    samples: int
    force: bool


def make_recipe(wish: Wish) -> list[str]:
    """Write the recipe, and beside it a folder of problem files; returns the lines to print.

    Nothing is written before everything is decided, but for the files of a model that is downloaded.

    Raises:
        UserError: no such model or problems, the recipe exists, or the model fits nowhere.
    """
    name = _name(wish)
    path = wish.output or Path(f"{name}.yaml")
    folder = path.with_name(f"{path.stem}_problems")
    _check_name(path)
    _check_free(path, folder, wish)
    target = find_target(wish.gpus, wish.cluster)
    model, origin = _model(wish.model, path.parent)
    config, entries = read_model_config(model)
    positions = int(read_config(model).get("max_position_embeddings") or DEFAULT_POSITIONS)
    prompts = _candidates(model)
    problems = _problems(wish, Prompts.of(prompts[0][0], model), positions)
    everything = [problem for each in problems.files.values() for problem in each]
    longest = max(_longest(Prompts.of(prompt, model), everything) for prompt, _ in prompts)
    room = min(PILOT_TOKENS[target.cluster is not None and target.here], positions - longest)
    sampler = sampler_here(model, entries, room, target) if wish.samples else Sampler(None, "--samples 0")
    (prompt, why), pilot, sampler = _try_prompts(model, prompts, problems.files["train"], wish.samples, sampler)
    found = Found(
        name=path.stem if wish.output else name,
        model=_written(model, path.parent), origin=origin, config=config, entries=entries, positions=positions,
        longest_prompt=longest, prompt=prompt, prompt_why=why,
        problems={f"{folder.name}/{name}.jsonl": len(each) for name, each in problems.files.items()},
        train_why=f"from {wish.problems}", test_why=problems.test_why, target=target, sampler=sampler, pilot=pilot,
        judge=reachable_judge(target.gpus),
    )  # fmt: skip
    made = draft(found)
    _check_free(path, folder, wish)
    _write(path, folder, made.text, problems)
    return summary(made, found, path, _rejected_lines(problems.read, folder / "quarantine.jsonl"))


def _name(wish: Wish) -> str:
    """Of the run: model and problems, in the characters that a recipe's name may have."""
    model = wish.model.removeprefix(HUB).split("@")[0].rstrip("/").split("/")[-1] or Path.cwd().name
    text = f"{model}_{wish.problems.resolve().stem}".lower()
    return re.sub(r"[^a-z0-9._-]+", "_", text).strip("._-") or "recipe"


def _check_name(path: Path) -> None:
    if path.suffix not in (".yaml", ".yml") or not re.fullmatch(RUN_NAME, path.stem):
        raise UserError(
            f"--output {path}: expected a name of letters, digits, dots, hyphens and underscores that ends in .yaml; "
            "name another"
        )


def _check_free(path: Path, folder: Path, wish: Wish) -> None:
    for given in (wish.problems, *wish.tests):
        if any(given.resolve().is_relative_to(place.resolve()) for place in (path, folder)):
            raise UserError(f"{given}: would be overwritten by {path.name} or {folder.name}; name another --output")
    for existing in (path, folder):
        if existing.exists() and not wish.force:
            raise UserError(
                f"{existing}: already exists; name another recipe with --output, or pass --force to replace "
                f"{path.name} and {folder.name}"
            )


def _model(source: str, below: Path) -> tuple[Path, str]:
    if source.startswith(HUB):
        return fetch_model(source, below / "models")
    model = Path(source)
    if not (model / "config.json").is_file():
        found = "no config.json in it" if model.is_dir() else "a file" if model.exists() else "no such folder"
        hint = f"; to download it, write {HUB}{source}" if not model.exists() and source.count("/") == 1 else ""
        raise UserError(
            f"{source}: expected a Hugging Face folder (config.json, tokenizer, weights), found {found}{hint}"
        )
    return model, ""


def _written(model: Path, folder: Path) -> str:
    """The model as the recipe names it: relative to its folder where it is inside, else absolute."""
    inside = model.resolve().is_relative_to(folder.resolve())
    return str(model.resolve().relative_to(folder.resolve()) if inside else model.resolve())


# --- problems --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problems:
    """files: by name without suffix, ``train`` first. test_why: where the others are from. read: what was read."""

    files: dict[str, list[Problem]]
    test_why: str
    read: Published


def _problems(wish: Wish, prompts: Prompts, positions: int) -> _Problems:
    if not wish.problems.exists():
        raise UserError(f"{wish.problems}: expected a file or folder of problems, found none")
    splits = splits_of(wish.problems)
    train_files = splits.get("train") or splits.get("") or []
    if "train" in splits and (unnamed := splits.get("")):
        warn(f"left out, as their names tell no split: {', '.join(map(str, unnamed))}; name each with --problems")
    held_out = _held_out(splits)
    if not train_files:
        raise UserError(f"{wish.problems}: holds {' and '.join(sorted(splits))} problems alone; name those that train")
    check = _checker(prompts, positions)
    read = _read(train_files, check, "problems")
    if wish.tests:
        names = ["test"]
        if len(wish.tests) > 1:
            names = [f"test/{name}" for name in set_names([str(test) for test in wish.tests], "--test")]
        test_files = dict(zip(names, map(_test_files, wish.tests), strict=True))
        why = f"from {' and '.join(map(str, wish.tests))}"
    elif held_out is not None:
        test_files, why = {"test": splits[held_out]}, f"split {held_out} of {wish.problems}"
    else:
        count = max(1, min(HELD_OUT, int(HELD_OUT_SHARE * len(read.problems))))
        if len(read.problems) <= count:
            raise UserError(f"{wish.problems}: expected two problems or more, to train on and to test on, found one")
        train, test = hold_out(read.problems, count)
        return _Problems(
            {"train": train, "test": test}, f"held out of {wish.problems} by the hash of their texts", read
        )
    tested = {name: _read(files, check, "test problems") for name, files in test_files.items()}
    train = without(read.problems, [problem for each in tested.values() for problem in each.problems])
    if overlapping := len(read.problems) - len(train):
        warn(f"{overlapping} training problems are also test problems, and were left out of training")
    if not train:
        raise UserError(f"{wish.problems}: all its problems are test problems; nothing is left to train on")
    every = [read, *tested.values()]
    everything = replace(
        read, rejected=[row for each in every for row in each.rejected],
        repeated=[row for each in every for row in each.repeated], renamed=any(each.renamed for each in every),
    )  # fmt: skip
    return _Problems({"train": train, **{name: each.problems for name, each in tested.items()}}, why, everything)


def _test_files(source: Path) -> list[Path]:
    """The files of a folder's split that measures, or all of them."""
    splits = splits_of(source)
    split = _held_out(splits)
    return list(splits[split]) if split else [file for files in splits.values() for file in files]


def _held_out(splits: Mapping[str, Sequence[Path]]) -> str | None:
    """The split that measures."""
    return next((split for split in ("test", "validation", "valid", "val", "dev", "eval") if split in splits), None)


def _read(files: Sequence[Path], check: Any, title: str) -> Published:
    with ProgressBar(f"reading {title}", len(files), "files") as bar:
        done = 0

        def report(rows: int) -> None:
            nonlocal done
            if rows % 1000 == 0:
                bar.update(done, f"{rows:,} rows")

        found = read_published(files, check, report)
        bar.update(len(files), f"{len(found.problems):,} problems")
    return found


def _checker(prompts: Prompts, positions: int) -> Any:
    """What refuses a problem: special tokens in its text, unknown words, or half of all positions and more."""
    tokenizer = prompts.tokenizer
    unknown = tokenizer.unk_token_id

    def check(problem: Problem) -> Problem:
        prompts.check_problem(problem.problem)
        text = problem.problem
        # a token is a character or more; and of byte-level tokenizers none is unknown
        if len(text) > positions // 2 or unknown is not None:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) > positions // 2:
                raise BadText(f"has {len(ids)} tokens; the model has {positions} positions, for prompt and response")
            if unknown in ids:
                raise BadText("has words that the model's tokenizer does not know")
        return problem

    return check


def _longest(prompts: Prompts, problems: Sequence[Problem]) -> int:
    """Tokens of the longest prompt."""
    longest = sorted(problems, key=lambda problem: -len(problem.problem.encode()))[:LONGEST]
    return max(len(prompts.token_ids(problem.problem)) for problem in longest)


def _rejected_lines(published: Published, quarantine: Path) -> list[str]:
    lines = []
    if published.rejected:
        lines.append(f"rows that cannot be used, written to {quarantine}: {len(published.rejected)}")
        lines += [f"  {row['file']}:{row['line']}: {row['error']}" for row in published.rejected[:SHOWN]]
        lines += [f"  and {len(published.rejected) - SHOWN} more"] if len(published.rejected) > SHOWN else []
    if published.repeated:
        shown = ", ".join(published.repeated[:SHOWN])
        more = ", ..." if len(published.repeated) > SHOWN else ""
        lines.append(f"repeated problems, left out: {len(published.repeated)} ({shown}{more})")
    if published.renamed:
        lines.append("ids are not unique in the files: all were replaced by hashes of the texts")
    return lines


# --- prompt ----------------------------------------------------------------------------------------------------


def _candidates(model: Path) -> list[tuple[Prompt, str]]:
    """Prompts worth trying, the likeliest first: one where there is a chat template."""
    tokenizer = load_tokenizer(model)
    if tokenizer.chat_template:
        qwen = str(read_config(model).get("model_type", "")).startswith("qwen")
        template, why = (
            (TEMPLATES["qwen_math"], "the sentence of Qwen2.5-Math's model card") if qwen
            else (STEPS, "asks for steps, which the judge labels, and for an answer that is easy to find")
        )  # fmt: skip
        return [(Prompt(chat=True, template=template), f"the model's own chat template; {why}")]
    known = []
    for name in ("boxed", "plain"):
        ids = tokenizer(TEMPLATES[name].replace("{problem}", ""), add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids:
            known.append((Prompt(template=TEMPLATES[name]), "no chat template"))
    return known or [(Prompt(), "no chat template")]


def _try_prompts(
    model: Path,
    prompts: Sequence[tuple[Prompt, str]],
    problems: Sequence[Problem],
    count: int,
    sampler: Sampler,
) -> tuple[tuple[Prompt, str], Pilot | None, Sampler]:
    """The prompt with the most right answers, then with the most solutions that end, of those worth trying."""
    if sampler.settings is None:
        return prompts[0], None, sampler
    asked = sorted(problems, key=lambda problem: stable_hash("pilot", problem.problem_id))[:count]
    tried = [(sample_some(model, asked, prompt, sampler.settings), (prompt, why)) for prompt, why in prompts]
    pilot, (prompt, why) = max(tried, key=lambda each: (each[0].right, len(each[0].finished)))
    if len(tried) > 1:
        why += f": of {len(tried)} templates the one with most right answers ({pilot.right} of {pilot.count})"
    return (prompt, why), pilot, sampler


# --- files -----------------------------------------------------------------------------------------------------


def _write(path: Path, folder: Path, text: str, problems: _Problems) -> None:
    """The problem files, then the recipe, which is read once before it appears under its name."""
    before = folder.exists()
    draft_path = path.with_name(f".{path.name}")
    try:
        quarantine = folder / "quarantine.jsonl"
        for earlier in (quarantine, folder / "test.jsonl", *(folder / "test").glob("*.jsonl")):
            earlier.unlink(missing_ok=True)
        for name, each in problems.files.items():
            write_records(folder / f"{name}.jsonl", each)
        rejected = problems.read.rejected
        for source in dict.fromkeys(row["file"] for row in rejected):
            set_aside(quarantine, Path(source), [row for row in rejected if row["file"] == source])
        with atomic_writer(draft_path) as file:
            file.write(text)
        load_recipe(draft_path)
        draft_path.replace(path)
    except BaseException:
        draft_path.unlink(missing_ok=True)
        if not before:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    train, *tests = map(len, problems.files.values())
    say(f"{folder}: {train:,} problems to train on, {sum(tests):,} to test on")
