"""What a recipe's judges cost in an iteration: tokens, hours, memory.

Nothing here was measured on a GPU. Reading (prompts, and all that a reward model does) runs at ``sampling_mfu`` of the
peak, writing as sampling does (times.py). A server has all GPUs of one node.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_stepkto.architectures.families import find_architecture
from megatron_stepkto.architectures.flops import forward_flops
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.architectures.sharding import model_parameters
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.model_folder import CONFIG, read_config
from megatron_stepkto.judging.process.interface import ProcessJudge, Typical, Work, Workplace
from megatron_stepkto.judging.process.registry import process_judge
from megatron_stepkto.planning.memory import OVERHEAD_BYTES
from megatron_stepkto.planning.times import ENGINE_SHARE, Scenario, decoding_rate, engine_gpus
from megatron_stepkto.recipe.keys import Judging

# Means of MATH, by Qwen2.5's tokenizer: a step of ProcessBench's model solutions; a solution of the training problems.
STEP_TOKENS, REFERENCE_TOKENS = 80, 271
# Decoders whose head is another one: their layers are those of the architecture named here.
DECODERS = {"Qwen2ForProcessRewardModel": "Qwen2ForCausalLM"}


@dataclass(frozen=True)
class JudgeCost:
    """Of one judge and one iteration. Rates: tokens per second of all ``gpus``. Bytes per GPU: weights of the model's
    weights, memory of all that it takes (an engine: its fixed share, which it fills with its cache).

    unknown: why nothing else is known; empty where it is.
    """

    judge: str
    unknown: str = ""
    gpus: int = 0
    weights: float = 0
    memory: float = 0
    read: float = 0
    read_rate: float = 0
    written: float = 0
    write_rate: float = 0
    seconds: float = 0

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.seconds / 3600

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gpu_hours": self.gpu_hours}


def judge_costs(
    settings: Judging, case: Scenario, per_problem: int, sampler: Path, served: Path | None = None
) -> list[JudgeCost]:
    """The cost of each process judge of a recipe; they work one after another.

    Args:
        per_problem: solutions of one problem. sampler: folder of the model that samples.
        served: folder of the model behind a judge's server; None: one of its name beside ``sampler``.
    """
    work = case.work
    prompt = work.tokens - work.response_tokens
    typical = Typical(work.samples, per_problem, prompt, work.response_tokens, STEP_TOKENS, REFERENCE_TOKENS)
    judge = process_judge(settings.process, Workplace(model=sampler))
    members = judge.members() or {judge.name: judge}
    return [_cost(name, member, typical, case, sampler, served) for name, member in members.items()]


def _cost(
    name: str, judge: ProcessJudge[Any], typical: Typical, case: Scenario, sampler: Path, served: Path | None
) -> JudgeCost:
    try:
        work = judge.work(typical)
        if work is None:
            return JudgeCost(name, "it has no model: CPU only")
        return _cost_of(name, work, *_model(work, sampler, served), case)
    except UserError as error:
        return JudgeCost(name, str(error))


def _model(work: Work, sampler: Path, served: Path | None) -> tuple[ModelConfig, float]:
    """Its config and the bytes of its weights in bfloat16, from config.json alone.

    Raises:
        UserError: there is none, or it is of an unknown architecture.
    """
    name = work.model.name
    folder = work.model if work.model.is_dir() else sampler.parent / name
    if served is not None and (not work.gpus or (served.name == name and not work.model.is_dir())):
        folder = served
    if not (folder / CONFIG).is_file():
        named = f" (it must be called {name})" if work.gpus else ""
        raise UserError(f"found no {CONFIG} of {name} at {folder}: give its folder by --judge-model{named}")
    raw = read_config(folder)
    names = [DECODERS.get(name, name) for name in raw.get("architectures") or []]
    architecture = find_architecture({**raw, "architectures": names}, str(folder / CONFIG))
    try:
        config = architecture.read_config(raw)
    except KeyError as error:
        raise UserError(f"{folder / CONFIG}: key {error} is missing; it is needed to count the weights") from None
    return config, 2.0 * model_parameters(architecture.entries(config))


def _cost_of(name: str, work: Work, config: ModelConfig, weights: float, case: Scenario) -> JudgeCost:
    cluster, assumed = case.cluster, case.assumed
    gpus = min(work.gpus or cluster.gpus_per_node, cluster.gpus_per_node, cluster.gpus)
    flops = config.num_layers * forward_flops(config, 1, 0, work.length)[0]
    read_rate = gpus * cluster.bf16_tflops * 1e12 * assumed.sampling_mfu / flops
    write_rate = decoding_rate(config, weights, gpus, work.length, case) if work.written else 0.0
    each = weights if work.batch_tokens else weights / engine_gpus(weights, gpus, cluster)
    memory = each + OVERHEAD_BYTES
    if work.batch_tokens:  # a layer's hidden states and its MLP, of one batch
        memory += 2.0 * work.batch_tokens * (4 * config.hidden_size + 3 * config.ffn_size)
    else:
        memory = max(memory, ENGINE_SHARE * cluster.memory_gb * 1e9)
    return JudgeCost(
        name, "", gpus, each, memory, work.read, read_rate, work.written, write_rate,
        work.read / read_rate + (work.written / write_rate if work.written else 0.0),
    )  # fmt: skip
