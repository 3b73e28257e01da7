"""The values of a first recipe, each with its reason, and what could not be decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_stepkto.architectures.model_config import Entry, ModelConfig
from megatron_stepkto.architectures.sharding import model_parameters
from megatron_stepkto.base.processes import usable_cores
from megatron_stepkto.first_recipe.judge import Judge
from megatron_stepkto.first_recipe.machine import (
    Layout,
    Sampler,
    Target,
    cpu_build,
    cpu_layout,
    engines,
    gpu_layout,
)
from megatron_stepkto.first_recipe.pilot import Cut, Pilot
from megatron_stepkto.first_recipe.yaml_lines import Key, comment, yaml_lines
from megatron_stepkto.planning.times import Workload
from megatron_stepkto.recipe.keys import Prompt
from megatron_stepkto.recipe.templates import TEMPLATES

PAPER = "the paper (arXiv 2501.10799)"
K = 8
MATH_TRAIN = 7500
MINIATURE = 10e6  # parameters; the 0.6M of recipes/mini_cpu.yaml are the only size below that was tuned
SMALL = 1e9
DEFAULT_TOKENS, ROUND = 2048, 64
GPU_ITERATIONS, CPU_ITERATIONS = 3, 1
CPU_SAMPLING_S = 1200  # of an iteration
CPU_EVALUATION_S = 900  # of a model
CPU_PROBLEMS = (16, 256)
UNMEASURED_PROBLEMS = 32  # per iteration on processors whose speed was not measured
UPDATES = 16  # fewest per iteration, where there are problems enough
EVALUATED = 500  # problems
EVALUATED_CPU = (32, 200)
EVALUATED_UNMEASURED = 100
K_CPU = 4  # of an evaluation on processors


@dataclass(frozen=True)
class Found:
    """All that was looked up or measured.

    model: as the recipe names it. origin: ``hub:NAME@COMMIT``, or "". longest_prompt, positions: tokens. prompt_why:
    how the prompt was chosen. problems: files as the recipe names them, with their sizes; the first one trains, the
    others measure. test_why: where these come from. pilot: None where nothing was sampled, ``sampler`` says why.
    """

    name: str
    model: str
    origin: str
    config: ModelConfig
    entries: list[Entry]
    positions: int
    longest_prompt: int
    prompt: Prompt
    prompt_why: str
    problems: dict[str, int]
    train_why: str
    test_why: str
    target: Target
    sampler: Sampler
    pilot: Pilot | None
    judge: Judge

    @property
    def num_train(self) -> int:
        return next(iter(self.problems.values()))

    @property
    def num_tests(self) -> list[int]:
        """Of each file that measures."""
        return list(self.problems.values())[1:]


@dataclass
class Draft:
    """``text`` of the recipe. decided, undecided: lines to print."""

    text: str = ""
    decided: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)


def draft(found: Found) -> Draft:
    """Write the recipe. Raises UserError: no layout of the model fits the machine."""
    notes = Draft()
    max_tokens, tokens_why = _max_tokens(found, notes)
    cut = found.pilot.cut() if found.pilot else None
    gpu = found.target.cluster is not None
    train, *tests = found.problems
    per_iteration, problems_why = _per_iteration(found, notes)
    evaluated, evaluated_why = _evaluated(found)
    evaluated_k = K if gpu else K_CPU
    examples = per_iteration * K
    batch = _global_batch(examples)
    updates = math.ceil(examples / batch)
    longest = -(-(found.longest_prompt + max_tokens) // ROUND) * ROUND
    layout, hours = _layout(found, examples, batch, longest, notes)
    kl_share = 0.25 if gpu else 1.0
    keys = [
        Key("name", found.name),
        Key("seed", 0),
        Key("iterations", GPU_ITERATIONS if gpu else CPU_ITERATIONS,
            f"M1, M2, M3, as in {PAPER}" if gpu else f"{PAPER} trains M1 to M3"),
        Key("initial_model", found.model, found.origin),
        Key("problems", [
            Key("source", "files"),
            Key("train", train, f"{found.num_train:,} problems, {found.train_why}"),
            Key("test", tests[0] if len(tests) == 1 else tuple(tests),
                f"{' and '.join(f'{number:,}' for number in found.num_tests)} problems, {found.test_why}"),
            Key("per_iteration", per_iteration, problems_why),
        ]),
        Key("prompt", _prompt(found.prompt), found.prompt_why),
        Key("sample", _sample(found, max_tokens, tokens_why)),
        Key("judge", _judge(found, cut, notes)),
        Key("dataset", [
            Key("max_tokens", longest, "longest prompt and response, rounded up"),
            Key("kl_pair_share", kl_share, "a pair costs a forward pass; z needs a mean, not every example"
                if gpu else "every example: z is a mean over few of them"),
        ]),
        Key("train", _train(found, layout, batch, updates, notes)),
        Key("evaluate", [
            Key("split", "test"),
            Key("num_problems", evaluated, evaluated_why),
            Key("k", evaluated_k, f"maj@{evaluated_k} and pass@{evaluated_k} beside greedy pass@1"),
            Key("temperature", 0.7),
        ]),
    ]  # fmt: skip
    if not found.prompt.chat:
        notes.undecided.append(
            "prompt.template: the tokenizer has no chat template, so the model may expect another layout of the prompt"
        )
    if hours:
        time = f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(60 * hours))} min"
        notes.decided.append(f"an iteration takes about {time} without judging, by the assumptions of stepkto plan")
    notes.text = "\n".join([*_head(found, notes), *_spaced(yaml_lines(keys))]) + "\n"
    return notes


def _head(found: Found, notes: Draft) -> list[str]:
    size = model_parameters(found.entries)
    number = f"{size / 1e9:.2f}B" if size >= 1e8 else f"{size / 1e6:.1f}M"
    lines = [
        *comment(f"Step-KTO on {Path(found.model).name}, {number} parameters, for {_place(found.target)}. Written by "
                 "stepkto init from what it could look up or measure; a comment gives the reason for each value."),
        "#",
        "# Not decided, so look at it before a long run:",
    ]  # fmt: skip
    for note in notes.undecided:
        first, *more = comment(note, 2)
        lines += [f"# - {first.removeprefix('  # ')}", *(f"#   {line.removeprefix('  # ')}" for line in more)]
    return lines


def _place(target: Target) -> str:
    if target.cluster is None:
        return "this machine's processors"
    kind = target.cluster.name.upper()
    return f"{target.gpus} GPU{'s' if target.gpus > 1 else ''}" + (
        "" if target.here else f" ({kind}, planned, not run)"
    )


def _spaced(lines: list[str]) -> list[str]:
    """An empty line before each section."""
    spaced: list[str] = []
    for number, line in enumerate(lines):
        section = (
            not line.startswith((" ", "#")) and lines[number + 1 : number + 2] and lines[number + 1].startswith(" ")
        )
        above = number
        while section and above > 0 and lines[above - 1].startswith("#"):
            above -= 1
        if section:
            spaced.insert(len(spaced) - (number - above), "")
        spaced.append(line)
    return spaced


def _prompt(prompt: Prompt) -> list[Key]:
    named = next((name for name, text in TEMPLATES.items() if text == prompt.template), prompt.template)
    return [Key("chat", prompt.chat), Key("template", named)]


# --- sizes -----------------------------------------------------------------------------------------------------


def _max_tokens(found: Found, notes: Draft) -> tuple[int, str]:
    room = found.positions - found.longest_prompt
    pilot = found.pilot
    if pilot is None:
        tokens = min(DEFAULT_TOKENS, room)
        notes.undecided.append(
            f"sample.max_tokens is a default: no solution was sampled ({found.sampler.why}). Sample some and set it to "
            "twice what the longest ones take; truncated solutions are wrong"
        )
        return tokens, "a default: no solution was sampled"
    if not pilot.ends:
        tokens = min(max(pilot.limit, DEFAULT_TOKENS if found.target.cluster else 0), room)
        cut_off = pilot.count - len(pilot.finished)
        notes.undecided.append(
            f"sample.max_tokens: {cut_off} of {pilot.count} sampled solutions did not end within {pilot.limit} tokens. "
            "Either they are longer, or the model does not end them (prompt, end token); look at some"
        )
        return tokens, f"{cut_off} of {pilot.count} sampled solutions did not end within {pilot.limit}"
    longest = max(pilot.finished)
    tokens = min(-(-2 * longest // ROUND) * ROUND, room)
    return tokens, f"twice the longest of {len(pilot.finished)} sampled solutions that ended ({longest})"


def _per_iteration(found: Found, notes: Draft) -> tuple[int, str]:
    if found.target.cluster:
        if found.num_train <= MATH_TRAIN:
            return found.num_train, "all of them"
        return MATH_TRAIN, "MATH's training set; another iteration takes others"
    pilot = found.pilot
    if pilot and pilot.speed:
        count, minutes = _problems_in(CPU_SAMPLING_S, pilot, K, CPU_PROBLEMS, found.num_train)
        why = f"about {minutes} min of sampling at the {pilot.speed} tokens/s that one engine made"
    else:
        count, why = UNMEASURED_PROBLEMS, "few: the speed of sampling here was not measured"
    notes.undecided.append(
        "problems.per_iteration and iterations suit a first run on processors; the speed of training here was not "
        "measured, the run shows an estimate when it begins"
    )
    return min(count, found.num_train), why


def _evaluated(found: Found) -> tuple[int | None, str]:
    """Problems of an evaluation, of each file; one greedy solution and k others each."""
    smallest, files = min(found.num_tests), len(found.num_tests)
    if found.target.cluster:
        return (min(EVALUATED, smallest), "") if files == 1 else (None, "all of each file")
    available, time = smallest * files, ""
    count = min(EVALUATED_UNMEASURED, available)
    if (pilot := found.pilot) and pilot.speed:
        count, minutes = _problems_in(CPU_EVALUATION_S, pilot, 1 + K_CPU, EVALUATED_CPU, available)
        time = f"about {minutes} min for each model; "
    of_each, of_all = ("", "") if files == 1 else ("of each file; ", " of all")
    points = round(100 / math.sqrt(count))  # 1.96 standard deviations where half are right
    return max(1, count // files), f"{of_each}{time}pass@1{of_all} to within {points} points"


def _problems_in(
    seconds: float, pilot: Pilot, solutions: int, bounds: tuple[int, int], available: int
) -> tuple[int, int]:
    """How many problems, of ``solutions`` each, fit into ``seconds``, within ``bounds``; and the minutes they take."""
    speed = pilot.speed * _cpu_workers() / pilot.mean_tokens  # solutions per second
    count = int(seconds * speed / solutions) // 16 * 16
    count = min(max(count, bounds[0]), bounds[1], available)
    return count, max(1, round(count * solutions / speed / 60))


def _global_batch(examples: int) -> int:
    """A power of two, 8 to 256, of which an iteration has ``UPDATES`` or more."""
    return min(256, max(8, 2 ** int(math.log2(max(1, examples / UPDATES)))))


def _cpu_workers() -> int:
    return min(2, usable_cores())


# --- sections --------------------------------------------------------------------------------------------------


def _sample(found: Found, max_tokens: int, tokens_why: str) -> list[Key]:
    sampler, cluster = found.sampler.settings, found.target.cluster
    keys = [
        Key("num_samples", K, "K, per problem; the shipped recipes' value"),
        Key("temperature", 1.0, "with top_p 1: the model's own distribution, which the log-ratios speak of"),
        Key("max_tokens", max_tokens, tokens_why),
    ]
    if cluster is None:
        backend = sampler.backend if sampler else "vllm" if cpu_build() else "transformers"
        why = "" if backend == "vllm" else "vLLM is not installed here, or does not take this model; much slower"
        return [
            Key("backend", backend, why),
            *keys,
            Key("workers", _cpu_workers(), "an engine per core, two at most"),
            Key("dtype", "auto", "train.dtype; bfloat16 rounds away small updates, but is faster on some processors"),
        ]
    workers, each = engines(found.config, found.entries, cluster)
    weights = 2 * model_parameters(found.entries) / 1e9
    parallel = [Key("tensor_parallel", each, "GPUs of an engine")] if each > 1 else []
    return [
        Key("backend", "vllm"),
        *keys,
        Key(
            "workers", workers, f"engines of {each} GPU{'s' if each > 1 else ''} on a node: {weights:.1f} GB of weights"
        ),
        *parallel,
        Key("dtype", "bfloat16"),
        Key("reproducible", False, "engines stay full; a resumed run may sample other tokens"),
        Key("chunk_problems", 32, "256 solutions: what a killed engine samples again"),
    ]


def _judge(found: Found, cut: Cut | None, notes: Draft) -> list[Key]:
    judge, pilot = found.judge, found.pilot
    if cut is None or pilot is None:
        split, why = "blank_line", "a default: no solution was sampled"
        notes.undecided.append("judge.split is a default: look at how the model separates its steps")
    else:
        split = cut.split
        why = f"cuts {cut.share:.0%} of {pilot.count} sampled solutions, median {cut.steps:g} steps"
        if cut.share < 0.5:
            notes.undecided.append(
                f"judge.split: most of {pilot.count} sampled solutions are one step for every rule ({split} cuts "
                f"{cut.share:.0%}); ask for steps in prompt.template"
            )
    limits = judge.limits
    if judge.process == "equations" and pilot is not None and cut is not None:
        steps, right, wrong = pilot.judged(cut.split)
        limits = f"it labelled {right + wrong} of {steps} sampled steps, {wrong} of them wrong; {limits}"
    if limits:
        notes.undecided.append(f"judge.process: {limits}")
    if pilot is not None:
        share = f"{pilot.right} of {pilot.count} sampled answers are right"
        notes.decided.append(share)
        if not 0.1 <= pilot.right / pilot.count <= 0.9:
            notes.undecided.append(
                f"whether these problems suit the model: {share}. Step-KTO learns from right and wrong ones; take "
                f"{'easier' if pilot.right < pilot.count / 2 else 'harder'} problems if a larger sample confirms it"
            )
    return [
        Key("split", split, why),
        Key("process", judge.process, judge.why),
        Key("workers", 2 if found.target.cluster is None else 16),
    ]


def _layout(
    found: Found, examples: int, batch: int, longest: int, notes: Draft
) -> tuple[Layout, float]:  # fmt: skip
    cluster, pilot = found.target.cluster, found.pilot
    if cluster is None:
        return cpu_layout(found.config, found.entries, longest), 0.0
    prompt = max(1, found.longest_prompt // 2)
    tokens = min(longest, prompt + pilot.mean_tokens) if pilot else max(2, longest // 4)
    response = pilot.mean_tokens if pilot else max(1, int(0.85 * tokens))
    work = Workload(
        examples=examples, global_batch=batch, epochs=1, tokens=tokens, response_tokens=min(response, tokens),
        kl_share=0.25, uses_reference=True, samples=examples,
    )  # fmt: skip
    layout, plan = gpu_layout(found.config, found.entries, cluster, work, longest)
    if not found.target.here:
        notes.undecided.append(
            f"the GPUs: {found.target.source}. Layout and times are estimates; stepkto doctor checks the machine itself"
        )
    return layout, plan.times.iteration / 3600


def _train(found: Found, layout: Layout, batch: int, updates: int, notes: Draft) -> list[Key]:
    size = model_parameters(found.entries)
    gpu = found.target.cluster is not None
    warmup = Key("warmup_updates", max(1, updates // 10), "a tenth")
    if size < MINIATURE:
        optimizer = [
            Key("lr", 1e-4, "recipes/mini_cpu.yaml, tuned on its development problems"),
            Key("beta2", 0.98),
            warmup,
        ]
        loss = [Key("beta_outcome", 2.0), Key("beta_step", 2.0),
                Key("undesirable_weight_outcome", 0.5), Key("undesirable_weight_step", 0.5)]  # fmt: skip
        loss_why = "recipes/mini_cpu.yaml; at its size beta 0.1 with undesirable weights of 1 collapses (docs/loss.md)"
        notes.undecided.append(
            "train.optimizer.lr and train.loss come from a model of 0.6M parameters on another task; choose them on "
            "development problems (problems.dev, evaluate.split: dev)"
        )
    else:
        optimizer = [
            Key("lr", 1e-6, "KTO at beta 0.1: not above 1e-6 (TRL's documentation of KTOTrainer)"),
            Key("schedule", "cosine"),
            warmup,
            Key("min_lr_ratio", 0.1),
            Key("beta2", 0.95),
        ]
        loss = [Key("beta_outcome", 0.1), Key("beta_step", 0.1), Key("balance", "auto")]
        loss_why = "KTO paper (arXiv 2402.01306): beta 0.1, lambdas by the balance of classes"
        small = "; no source gives it for models this small, which usually bear a higher one" if size < SMALL else ""
        notes.undecided.append(
            "train.optimizer.lr and train.loss.beta_* are those of the literature on KTO, not tuned on your model: "
            f"the Step-KTO paper does not fix them{small}. Watch log_ratio_right (docs/loss.md), and choose on "
            "development problems (problems.dev, evaluate.split: dev)"
        )
    keys = layout.train
    return [
        Key("method", "step_kto"),
        Key("parallel", keys["parallel"] or {"ranks": 1}, layout.why),
        Key("micro_batch_tokens", keys["micro_batch_tokens"], "at least the longest prompt with its response"),
        *([Key("recompute", keys["recompute"], "stepkto plan")] if keys["recompute"] else []),
        Key("global_batch_size", batch, "OpenRLHF's iterative DPO of Llama-3-8B: 256, at beta 0.1" if batch == 256
            else f"a power of two that leaves {UPDATES} updates or more where there are problems enough"),
        Key("epochs", 1, f"about {updates} updates, fewer where solutions teach nothing"),
        Key("dtype", keys["dtype"]),
        Key("device", "cuda" if gpu else "cpu"),
        Key("optimizer", optimizer),
        Key("loss", loss, loss_why),
        Key("checkpoint_every", 20),
    ]  # fmt: skip


def summary(draft: Draft, found: Found, recipe: Path, rejected: Sequence[str]) -> list[str]:
    """What ``stepkto init`` prints at the end."""
    run = (
        [f"stepkto doctor {recipe}", f"stepkto run {recipe}"]
        if found.target.here
        else [f"stepkto plan {recipe}", f"stepkto slurm submit {recipe} --dry-run"]
    )
    return [
        f"{recipe}: written, for {_place(found.target)}",
        *(f"  {line}" for line in [*rejected, *draft.decided]),
        "not decided:",
        *(f"  - {line}" for line in draft.undecided),
        "next:",
        *(f"  {line}" for line in run),
    ]
