"""``stepkto init``: from a model and a file of problems to a recipe that ``stepkto run`` accepts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import atomic_writer, stable_hash
from megatron_stepkto.base.model_folder import read_config
from megatron_stepkto.base.progress import say
from megatron_stepkto.base.records import Problem, set_aside, write_records
from megatron_stepkto.checkpoints.convert import read_model_config
from megatron_stepkto.checkpoints.hub import HUB, fetch_model
from megatron_stepkto.first_recipe.draft import Found, draft, summary
from megatron_stepkto.first_recipe.judge import reachable_judge
from megatron_stepkto.first_recipe.machine import Sampler, find_target, sampler_here
from megatron_stepkto.first_recipe.pilot import Pilot, sample_some
from megatron_stepkto.first_recipe.problems import TRAIN, Problems, choose_problems, problem_check
from megatron_stepkto.methods.registry import load_recipe
from megatron_stepkto.recipe.keys import RUN_NAME, Prompt
from megatron_stepkto.recipe.prompts import Prompts, load_tokenizer
from megatron_stepkto.recipe.templates import TEMPLATES

PILOT_TOKENS = {True: 2048, False: 512}  # of a response, on a GPU or not
LONGEST = 200  # problems, the longest in UTF-8, whose prompts are measured in tokens
QUARANTINE = "quarantine.jsonl"
STEPS = "Solve the problem step by step, a blank line between steps. Put the final answer in \\boxed{}.\n\n{problem}"
DEFAULT_POSITIONS = 4096  # where config.json does not say


@dataclass(frozen=True)
class Wish:
    """What the command line says. model: a folder or ``hub:NAME[@REVISION]``. gpus None: those of this machine.

    problems, tests: files or folders to train and to measure on; no tests: a part of ``problems``.
    """

    model: str
    problems: Sequence[Path]
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
    check = problem_check(Prompts.of(prompts[0][0], model), positions)
    problems = choose_problems(wish.problems, wish.tests, check)
    everything = [problem for each in problems.files.values() for problem in each]
    longest = max(_longest(Prompts.of(prompt, model), everything) for prompt, _ in prompts)
    room = min(PILOT_TOKENS[target.cluster is not None and target.here], positions - longest)
    sampler = sampler_here(model, entries, room, target) if wish.samples else Sampler(None, "--samples 0")
    (prompt, why), pilot, sampler = _try_prompts(model, prompts, problems.files[TRAIN], wish.samples, sampler)
    found = Found(
        name=path.stem if wish.output else name,
        model=_written(model, path.parent), origin=origin, config=config, entries=entries, positions=positions,
        longest_prompt=longest, prompt=prompt, prompt_why=why,
        problems={f"{folder.name}/{name}.jsonl": len(each) for name, each in problems.files.items()},
        train_why=problems.train_why, test_why=problems.test_why, target=target, sampler=sampler, pilot=pilot,
        judge=reachable_judge(target.gpus),
    )  # fmt: skip
    made = draft(found)
    _check_free(path, folder, wish)
    _write(path, folder, made.text, problems)
    return summary(made, found, path, problems.lines(folder / QUARANTINE))


def _name(wish: Wish) -> str:
    """Of the run: model and problems, in the characters that a recipe's name may have."""
    model = wish.model.removeprefix(HUB).split("@")[0].rstrip("/").split("/")[-1] or Path.cwd().name
    text = f"{model}_{wish.problems[0].resolve().stem}".lower()
    return re.sub(r"[^a-z0-9._-]+", "_", text).strip("._-") or "recipe"


def _check_name(path: Path) -> None:
    if path.suffix not in (".yaml", ".yml") or not re.fullmatch(RUN_NAME, path.stem):
        raise UserError(
            f"--output {path}: expected a name of letters, digits, dots, hyphens and underscores that ends in .yaml; "
            "name another"
        )


def _check_free(path: Path, folder: Path, wish: Wish) -> None:
    for given in (*wish.problems, *wish.tests):
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


# --- prompt ----------------------------------------------------------------------------------------------------


def _longest(prompts: Prompts, problems: Sequence[Problem]) -> int:
    """Tokens of the longest prompt."""
    longest = sorted(problems, key=lambda problem: -len(problem.problem.encode()))[:LONGEST]
    return max(len(prompts.token_ids(problem.problem)) for problem in longest)


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


def _write(path: Path, folder: Path, text: str, problems: Problems) -> None:
    """The problem files and the recipe, which is read once before anything appears under its name."""
    before = folder.exists()
    draft_path = path.with_name(f".{path.name}")
    files = {folder / f"{name}.jsonl": each for name, each in problems.files.items()}
    quarantine = folder / QUARANTINE
    try:
        with atomic_writer(draft_path) as file:
            file.write(text)
        load_recipe(draft_path)
        for file_path, each in files.items():
            write_records(file_path, each)
        for earlier in {quarantine, folder / "test.jsonl", *(folder / "test").glob("*.jsonl")} - files.keys():
            earlier.unlink(missing_ok=True)
        for source in dict.fromkeys(row["file"] for row in problems.rejected):
            set_aside(quarantine, Path(source), [row for row in problems.rejected if row["file"] == source])
        draft_path.replace(path)
    except BaseException:
        draft_path.unlink(missing_ok=True)
        if not before:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    train, *tests = map(len, problems.files.values())
    say(f"{folder}: {train:,} problems to train on, {sum(tests):,} to test on")
