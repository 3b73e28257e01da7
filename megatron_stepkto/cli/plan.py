"""``stepkto plan`` and ``tools/plan.py``: a recipe's own layout, layouts to propose for a cluster, or a given one."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.words import counted
from megatron_stepkto.cli.arguments import positive, positive_number
from megatron_stepkto.methods.registry import METHODS, load_recipe, method_of
from megatron_stepkto.planning.cluster import PRESETS, Cluster
from megatron_stepkto.recipe.keys import Parallel, Recipe, Training
from megatron_stepkto.recipe.section import without_tags
from megatron_stepkto.recipe.yaml_text import BadYAML, read_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_stepkto.planning.judges import JudgeCost
    from megatron_stepkto.planning.search import Plan
    from megatron_stepkto.planning.times import Scenario

LONGEST = 4096
# Of the longest document, and of a document: only for a rough time, so a rough default.
MEAN_SHARE = 0.25
RESPONSE_SHARE = 0.85
EXAMPLES = 16_384
GLOBAL_BATCH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a Hugging Face folder or config.json, or a recipe (YAML)")
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--cluster", choices=sorted(PRESETS), default="h100", help="data-sheet values (default h100)")
    cluster.add_argument("--gpus", type=positive, help="all GPUs (default: the recipe's train.parallel.ranks)")
    cluster.add_argument("--gpus-per-node", type=positive, help="default 8")
    cluster.add_argument("--gpu-memory", type=positive_number, metavar="GB", help="of one GPU")
    cluster.add_argument(
        "--node-bandwidth", type=positive_number, metavar="GB/S", help="of a GPU inside its node, one direction"
    )
    cluster.add_argument(
        "--network-bandwidth", type=positive_number, metavar="GB/S", help="per GPU between nodes, one direction"
    )
    cluster.add_argument(
        "--pcie-bandwidth", type=positive_number, metavar="GB/S", help="between a GPU and its host, one direction"
    )
    cluster.add_argument(
        "--host-bandwidth", type=positive_number, metavar="GB/S", help="of the host's memory, one GPU's share"
    )
    cluster.add_argument("--peak", type=positive_number, metavar="TFLOP/S", help="dense bf16")
    work = parser.add_argument_group("work (a recipe's own values where it has them)")
    work.add_argument("--longest", type=positive, metavar="TOKENS", help=f"longest document (default {LONGEST})")
    work.add_argument("--tokens", type=positive, help="mean tokens of prompt and response (default: longest / 4)")
    work.add_argument("--response-tokens", type=positive, help="mean tokens of a response (default: 85%% of --tokens)")
    work.add_argument("--examples", type=positive, help=f"per iteration (default {EXAMPLES:,})")
    work.add_argument("--global-batch", type=positive, help=f"examples per update (default {GLOBAL_BATCH})")
    work.add_argument("--method", choices=METHODS, help="default step_kto")
    parser.add_argument(
        "--mfu", type=positive_number, help="share of the peak that arithmetic alone reaches (default 0.40)"
    )
    parser.add_argument(
        "--layout",
        metavar="KEY=VALUE,...",
        help="check this layout instead of proposing: keys of train.parallel, recompute, offload_layers, "
        "micro_batch_tokens, offload, moment_dtype and gradient_dtype of train.optimizer, lora (a rank)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="build the true shards of the layout shown first on the meta device and compare the parameter counts",
    )
    parser.add_argument(
        "--judge-model", type=Path, metavar="FOLDER",
        help="of the model behind the judge's server, or of a local reward model with this folder's name "
        "(default: the folder of its name beside initial_model)",
    )  # fmt: skip
    parser.add_argument("--top", type=positive, default=6, help="proposals to show (default 6)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(arguments: argparse.Namespace) -> None:
    """Raises UserError: no layout fits, or the given one is impossible (exit code 2)."""
    from megatron_stepkto.planning.search import nothing_fits, propose, propose_otherwise
    from megatron_stepkto.planning.table import report

    given: Path = arguments.model
    is_recipe = given.suffix in (".yaml", ".yml") or (given.is_file() and given.suffix != ".json")
    recipe = load_recipe(given) if is_recipe else None
    case, base, room = _scenario(arguments, recipe)
    own: Plan | None = None
    of_own = why = ""
    if arguments.layout is not None:
        plans = [_judge(case, _given_layout(arguments.layout, base, case.cluster, room))]
    else:
        if recipe is not None:
            own, of_own = _own_plan(case, base, room, recipe)
        plans = propose(case, base, room)[: arguments.top]
        if not plans:
            why = nothing_fits(case, base, room, "lower --longest")
            plans = propose_otherwise(case, base, room)
        if not plans and (own is None or not own.fits(case.cluster)):
            why += "; neither LoRA nor the optimizer's state on the host or in lower precision fits"
            raise UserError("\n".join(line for line in (of_own, why) if line))
    checks = _check(case, own or plans[0]) if arguments.check else None
    judges = _judges(arguments, case, recipe)
    if arguments.json:
        answer = {
            "model": str(arguments.model),
            "cluster": asdict(case.cluster),
            "work": asdict(case.work),
            "assumptions": asdict(case.assumed),
            "why": why,
            "recipe": {
                "said": of_own,
                "fits": own.fits(case.cluster) if own else None,
                "plan": own.as_dict() if own else None,
            },
            "plans": [plan.as_dict() for plan in plans],
            "judges": [cost.as_dict() for cost in judges],
            **({"check": [asdict(check) for check in checks]} if checks is not None else {}),
        }
        sys.stdout.write(json.dumps(answer) + "\n")
    else:
        because = why and _otherwise(why, plans)
        sys.stdout.write(report(arguments.model, case, plans, checks, judges, because, own, of_own) + "\n")


def _otherwise(why: str, plans: Sequence[Plan]) -> str:
    if not plans:
        return f"There is no proposal: {why}."
    return f"Full training does not fit: {why}.\nWhat fits instead, and what it costs:"


def _scenario(arguments: argparse.Namespace, recipe: Recipe | None) -> tuple[Scenario, Training, int]:
    """What is planned, the section train, and the tokens that a micro-batch must have room for."""
    from megatron_stepkto.checkpoints.convert import read_model_config
    from megatron_stepkto.planning.times import Assumptions, Scenario, Workload

    config, entries = read_model_config(_model_folder(arguments.model, recipe))
    train = recipe.train if recipe else None
    gpus = arguments.gpus or (train.parallel.ranks if train else None)
    if gpus is None:
        raise UserError("the number of GPUs is missing: give --gpus N")
    changes = {
        "gpus": gpus,
        "gpus_per_node": arguments.gpus_per_node,
        "memory_gb": arguments.gpu_memory,
        "node_gbs": arguments.node_bandwidth,
        "network_gbs": arguments.network_bandwidth,
        "pcie_gbs": arguments.pcie_bandwidth,
        "host_gbs": arguments.host_bandwidth,
        "bf16_tflops": arguments.peak,
    }
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    cluster = replace(PRESETS[arguments.cluster], **given)
    base = train or Training.model_validate({"optimizer": {"lr": 1e-6}, "global_batch_size": GLOBAL_BATCH})
    base = base.model_copy(
        update={
            "dtype": "bfloat16",
            "global_batch_size": arguments.global_batch or base.global_batch_size,
            "method": arguments.method or base.method,
        }
    )
    method = method_of(base.method)
    sides = 2 if method.paired else 1  # of a preference pair: both lie in one micro-batch
    longest = arguments.longest or (train.micro_batch_tokens // sides if train else LONGEST)
    tokens = arguments.tokens or max(1, int(longest * MEAN_SHARE))
    samples = _samples(recipe)
    uses_kl = method.estimator(base.loss) == "mismatched"
    work = Workload(
        examples=arguments.examples or samples or EXAMPLES,
        global_batch=base.global_batch_size,
        epochs=base.epochs,
        tokens=tokens,
        response_tokens=arguments.response_tokens or max(1, int(tokens * RESPONSE_SHARE)),
        kl_share=(recipe.dataset.kl_pair_share if recipe else 1.0) if uses_kl else 0.0,
        uses_reference=method.uses_reference,
        samples=samples or (0 if recipe else arguments.examples or EXAMPLES),
    )
    if work.response_tokens > work.tokens or work.tokens > longest:
        raise UserError(
            f"expected --response-tokens <= --tokens <= --longest, got {work.response_tokens}, {work.tokens}, {longest}"
        )
    assumed = Assumptions() if arguments.mfu is None else Assumptions(mfu=arguments.mfu)
    if not 0 < assumed.mfu <= 1:
        raise UserError(f"--mfu {assumed.mfu}: expected a share between 0 and 1")
    return Scenario(config, entries, cluster, work, assumed), base, longest * sides


def _model_folder(model: Path, recipe: Recipe | None) -> Path:
    if recipe is not None:
        given = recipe.given_model()
        if given is None:
            raise UserError(
                f"{model}: has no initial_model, whose config.json the plan needs; give the model's folder instead"
            )
        return given
    return model.parent if model.name == "config.json" else model


def _samples(recipe: Recipe | None) -> int:
    """Solutions that an iteration of the recipe samples; 0 where the recipe does not say."""
    if recipe is None or recipe.sample is None or recipe.problems.per_iteration is None:
        return 0
    return recipe.problems.per_iteration * recipe.sample.num_samples


def _judges(arguments: argparse.Namespace, case: Scenario, recipe: Recipe | None) -> list[JudgeCost]:
    """Empty where no recipe says how its solutions are judged."""
    from megatron_stepkto.planning.judges import judge_costs

    if recipe is None or recipe.judge is None or recipe.sample is None or not case.work.samples:
        return []
    sampler = _model_folder(arguments.model, recipe)
    return judge_costs(recipe.judge, case, recipe.sample.num_samples, sampler, arguments.judge_model)


def _given_layout(text: str, base: Training, cluster: Cluster, room: int) -> Training:
    from megatron_stepkto.planning.search import OPTIMIZER_KEYS

    keys: dict[str, Any] = {}
    for assignment in text.split(","):
        key, separator, value = assignment.partition("=")
        if not separator:
            raise UserError(f"--layout {assignment}: expected KEY=VALUE, such as tensor=8")
        try:
            keys[key.strip()] = read_yaml(value)[0]
        except BadYAML:
            raise UserError(f"--layout {assignment}: expected a number, true or false after =") from None
    beside = ("recompute", "micro_batch_tokens", "dtype", "offload_layers")  # keys of train itself
    outside: dict[str, Any] = {name: keys.pop(name) for name in beside if name in keys}
    of_optimizer = {name: keys.pop(name) for name in OPTIMIZER_KEYS if name in keys}
    outside["optimizer"] = base.optimizer.model_dump() | of_optimizer
    if "lora" in keys:
        outside["lora"] = {"rank": keys.pop("lora")}
    try:
        tree: dict[str, Any] = {**base.model_dump(), **outside, "parallel": {"ranks": cluster.gpus, **keys}}
        settings = Training.model_validate(tree)
    except ValidationError as error:
        faults = [
            f"--layout: {'.'.join(str(part) for part in ('train', *without_tags(item['loc'])))}: "
            f"{item['msg'].removeprefix('Value error, ')}"
            + (f"; keys: {', '.join(Parallel.model_fields)}" if item["type"] == "extra_forbidden" else "")
            for item in error.errors()
        ]
        raise UserError("\n".join(faults)) from None
    if settings.parallel.ranks != cluster.gpus:
        raise UserError(
            f"--layout: ranks is {settings.parallel.ranks}, but the plan is for {counted(cluster.gpus, 'GPU')} (--gpus)"
        )
    if settings.micro_batch_tokens < room:
        raise UserError(
            f"--layout: micro_batch_tokens is {settings.micro_batch_tokens}, the longest document (of DPO and IRPO: "
            f"the longest pair) has {room} tokens (--longest); add micro_batch_tokens={room}"
        )
    return settings


def _judge(case: Scenario, settings: Training) -> Plan:
    """The plan of a given layout. Raises UserError when it is impossible or does not fit."""
    from megatron_stepkto.architectures.layout import check_layout
    from megatron_stepkto.planning.search import make_plan

    check_layout(case.config, settings, None)
    plan = make_plan(case, settings)
    if not plan.fits(case.cluster):
        raise UserError(_too_large(case, plan))
    return plan


def _too_large(case: Scenario, plan: Plan) -> str:
    from megatron_stepkto.planning.search import ways_out

    fullest = max(plan.stages, key=lambda stage: stage.peak)
    return (
        f"pipeline stage {fullest.stage} needs {fullest.peak / 1e9:.1f} GB, a GPU has "
        f"{case.cluster.memory_gb:g} GB (state {fullest.state / 1e9:.1f}, activations "
        f"{fullest.activations / 1e9:.1f}, head {fullest.head / 1e9:.1f}, overhead {fullest.overhead / 1e9:.1f}); "
        f"{ways_out(case, plan)}"
    )


def _own_plan(case: Scenario, base: Training, room: int, recipe: Recipe) -> tuple[Plan | None, str]:
    """The plan of the recipe's own layout, recompute and offload as written, and whether it fits; or why there is none.

    Args:
        base: the recipe's section train with the command's own values.
    """
    from megatron_stepkto.architectures.layout import check_layout
    from megatron_stepkto.planning.search import make_plan

    ranks, dtype = recipe.train.parallel.ranks, recipe.train.dtype
    if dtype != "bfloat16":
        return None, f"The recipe's own layout is not planned: it trains in {dtype}, and plans are for bfloat16."
    if ranks != case.cluster.gpus:
        planned = counted(case.cluster.gpus, "GPU")
        return (
            None,
            f"The recipe's own layout is not planned: it is for {counted(ranks, 'GPU')}, the plan for {planned}.",
        )
    try:
        check_layout(case.config, base, recipe.place)
    except UserError as error:
        return None, f"The recipe's own layout is impossible: {error}"
    if base.micro_batch_tokens < room:
        return None, (
            f"The recipe's own layout is impossible: {recipe.place('train.micro_batch_tokens')}: "
            f"train.micro_batch_tokens is {base.micro_batch_tokens:,}, the longest example has {room:,} tokens "
            "(--longest)"
        )
    plan = make_plan(case, base)
    memory = f"{case.cluster.memory_gb:g} GB"
    if plan.fits(case.cluster):
        said = f"The recipe's own layout fits: its fullest GPU needs {plan.peak / 1e9:.1f} of {memory}."
    else:
        said = f"The recipe's own layout does not fit: {recipe.place('train.parallel')}: {_too_large(case, plan)}."
    return plan, said + (" Planned in bf16, without what train.fp8 changes." if base.fp8 else "")


def _check(case: Scenario, plan: Plan) -> list[Any]:
    import torch

    from megatron_stepkto.megatron.dry_run import check_plan

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core warns of every accelerator that is not installed,
        logging.getLogger("megatron").setLevel(logging.ERROR)  # and of our MLP once per shard
        settings = plan.settings
        checks = check_plan(case.config, case.entries, settings.parallel, torch.bfloat16, settings.lora)
    wrong = [check for check in checks if not check.agrees]
    if wrong:
        raise UserError(
            "the plan's parameter counts differ from the shards that were built (please report this): "
            + "; ".join(str(check) for check in wrong)
        )
    return checks
