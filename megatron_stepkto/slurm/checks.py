"""Refuses at submission what would otherwise fail after hours in the queue: faults of a recipe or a site file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe.keys import Recipe
from megatron_stepkto.slurm.chain import has_server, judge_needs, server_urls, train_nodes
from megatron_stepkto.slurm.options import check_options
from megatron_stepkto.slurm.site import Site

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# of `vllm serve`
SHORT = {"-tp": "tensor-parallel-size", "-pp": "pipeline-parallel-size", "-dp": "data-parallel-size"}


def check_site(recipe: Recipe, site: Site) -> None:
    """Check that the jobs of a recipe find on this site what they need.

    Raises:
        UserError: an input that is not there, time limits or flags that break sbatch or the jobs, ranks or engines that
            do not fit on a node, a path that no container sees, a server that no job starts.
    """
    _check_inputs(recipe)
    _check_limits(site)
    check_options(site.extra, os.environ)
    _check_devices(recipe, site)
    _check_nodes(recipe, site)
    _check_mounts(recipe, site)
    _check_server(recipe, site)


def _check_inputs(recipe: Recipe) -> None:
    for key, path in _paths(recipe.model_dump(exclude={"output"})):
        if not path.exists():
            raise UserError(
                f"{recipe.place(key)}: {key}: {path} does not exist; correct the path, or put the file there"
            )


def _check_limits(site: Site) -> None:
    """Check that a job has time to work before it is told to stop."""
    for field in fields(site):
        if not field.name.startswith("time_"):
            continue
        name, text = field.name.upper(), getattr(site, field.name)
        limit = _seconds(text)
        if limit is None:
            raise UserError(
                f"{name}={text}: expected minutes, [days-]HH:MM:SS or UNLIMITED; correct it in the site file"
            )
        if limit <= site.stop_lead:
            raise UserError(
                f"{name}={text} is not longer than STOP_LEAD={site.stop_lead} seconds: a job would be told to stop "
                "when it starts; raise it in the site file, or lower STOP_LEAD"
            )


def _seconds(text: str) -> float | None:
    """A time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; inf: no limit; None: not a time limit."""
    if text.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return math.inf
    if re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text) is None:
        return None
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or math.inf  # 0 asks for none


def _check_devices(recipe: Recipe, site: Site) -> None:
    """Refuse what needs a GPU, on a site whose jobs get none."""
    if site.gpus_per_node:
        return
    if recipe.train.device == "cuda":
        raise UserError("train.device is cuda, and GPUS_PER_NODE is 0; set it in the site file, or train.device: cpu")
    from megatron_stepkto.megatron.acceleration import Found, Machine, choose

    choose(recipe.train, Machine(Found("any"), Found("any"), None))


def _check_nodes(recipe: Recipe, site: Site) -> None:
    """Check that the ranks and the engines fit on the nodes that they get."""
    nodes, ranks, gpus = train_nodes(recipe, site), recipe.train.parallel.ranks, site.gpus_per_node
    if ranks % nodes or (gpus and ranks // nodes > gpus):
        raise UserError(
            f"train.parallel.ranks={ranks}: expected the same number on each of {nodes} nodes"
            + (f", at most {gpus} (GPUS_PER_NODE)" if gpus else "")
            + "; change TRAIN_NODES in the site file or the ranks"
        )
    if recipe.sample is not None and gpus and (need := recipe.sample.workers * recipe.sample.tensor_parallel) > gpus:
        raise UserError(
            f"sample.workers x sample.tensor_parallel: expected at most {gpus} (GPUS_PER_NODE), got {need}; lower "
            "sample.workers and raise SAMPLE_ELEMENTS in the site file: each element has its own node"
        )
    for judge in judge_needs(recipe):
        if gpus and judge.gpus > gpus and not judge.takes_fewer:
            raise UserError(
                f"{' x '.join(judge.gpu_keys)}: expected at most {gpus} (GPUS_PER_NODE), got {judge.gpus}; lower "
                f"{judge.gpu_keys[0]}: the judge's job has one node"
            )


def _check_mounts(recipe: Recipe, site: Site) -> None:
    """Check that all files that a recipe names are mounted: a container sees nothing else."""
    if site.container == "none":
        return
    seen = [Path(mount.split(":")[1] if ":" in mount else mount) for mount in site.mounts.split(",")]
    for what, path in [("this folder", Path.cwd()), *_paths(recipe.model_dump())]:
        if not any(path.is_relative_to(mount) for mount in seen):
            raise UserError(
                f"MOUNTS={site.mounts}: expected {what} ({path}) below one of them: a job's container would not see "
                "it; add it to MOUNTS in the site file"
            )


def _paths(value: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    """All files and folders that a recipe names, with their keys."""
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _paths(each, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for each in value:
            yield from _paths(each, key)


def _check_server(recipe: Recipe, site: Site) -> None:
    """Refuse a judge that asks a server at the job's own address, if the job does not start it there."""
    started = site.judge_url.rstrip("/") if has_server(recipe, site) else None
    own = [url for url in server_urls(recipe) if url != started and urlsplit(url).hostname in LOOPBACK]
    if not own:
        if started is not None:
            _check_served(recipe, site)
        return
    given = f"JUDGE_URL is {site.judge_url}" if site.judge_server else "JUDGE_SERVER is empty"
    raise UserError(
        f"judge.process.base_url: {own[0]}: the judge job must start the server at this address, but {given}; "
        "in the site file set JUDGE_SERVER, and JUDGE_URL to the recipe's address"
    )


def _check_served(recipe: Recipe, site: Site) -> None:
    """Refuse a server of vLLM that would not have the judge's model, or needs more GPUs than its node has. The job
    would find out only after the solutions are sampled. Servers of other programs are not read."""
    words = site.judge_server
    if not any("vllm" in word for word in words):
        return
    options = _options(words)
    if "config" in options:  # a file that says the rest
        return
    after = words[words.index("serve") + 1] if "serve" in words[:-1] else ""
    model = options.get("model") or ("" if after.startswith("-") else after)
    names = options.get("served-model-name", model)
    for need in judge_needs(recipe):
        if site.judge_url.rstrip("/") in need.servers and names and need.served not in names.split():
            raise UserError(
                f"JUDGE_SERVER serves {names}, and the recipe's judge asks for {need.served}; give the server "
                f"--served-model-name {need.served} in the site file, or correct judge.process"
            )
    if model.startswith("/") and not Path(model).is_dir():
        raise UserError(
            f"JUDGE_SERVER: expected the judge's model folder, found none at {model}; correct the site file"
        )
    sizes = [options.get(f"{name}-parallel-size", "1") for name in ("tensor", "pipeline", "data")]
    gpus = math.prod(int(size) for size in sizes if size.isdecimal())
    if site.gpus_per_node and gpus > site.gpus_per_node:
        raise UserError(
            f"JUDGE_SERVER needs {gpus} GPUs ({' x '.join(sizes)}), its node has {site.gpus_per_node} (GPUS_PER_NODE); "
            "lower --tensor-parallel-size or --data-parallel-size in the site file"
        )


def _options(words: Sequence[str]) -> dict[str, str]:
    """Long options of a command by name, with their values: all words up to the next option, joined by spaces."""
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        option, _, value = word.partition("=")
        if option.startswith("--") or option in SHORT:
            name = SHORT.get(option, option[2:].replace("_", "-"))  # vLLM takes either
            found[name] = [value] if value else []
        elif name is not None:
            found[name].append(word)
    return {name: " ".join(values) for name, values in found.items()}
