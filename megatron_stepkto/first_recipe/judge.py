"""Which judge of steps can be reached: a server in the environment, a reward model's folder, or the exact rule."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.judging.process.client import Service, served_models

URL, KEY, FOLDERS = "JUDGE_URL", "JUDGE_KEY", "STEPKTO_MODELS"
PRM = "Qwen2.5-Math-PRM-7B"


@dataclass(frozen=True)
class Judge:
    """``process``: the recipe's value. ``why``: what was found. ``limits``: what the user must know, "" for nothing."""

    process: str | dict[str, Any]
    why: str
    limits: str


def reachable_judge(gpus: int) -> Judge:
    """The first of: the server at ``$JUDGE_URL``, the reward model in ``$STEPKTO_MODELS`` (with a GPU), the rule.

    Args:
        gpus: that the run will have.
    """
    missed = []
    if (url := os.environ.get(URL, "")).strip(", "):
        try:
            return _server(url)
        except (UserError, ValueError) as error:  # ValueError: of an address that is none
            missed.append(f"${URL} is set, but {error}")
    else:
        missed.append(f"${URL} is not set")
    folder = Path(os.environ.get(FOLDERS, "")) / PRM if os.environ.get(FOLDERS) else None
    if gpus and folder and (folder / "config.json").is_file():
        process = {
            "kind": "prm",
            "model": str(folder.resolve()),
            "convention": "qwen_math_prm",
            "workers": min(gpus, 8),
        }
        return Judge(
            process, f"{PRM} in ${FOLDERS}, one per GPU", "measure it first: stepkto judge-eval (docs/judges.md)"
        )
    better = (
        f"a language model (kind: llm; set {URL} to its server) or {PRM} (kind: prm; in ${FOLDERS})"
        if gpus
        else f"a language model behind a server (kind: llm; set {URL})"
    )
    return Judge(
        "equations",
        f"{'; '.join(missed)}{f'; no {PRM} in ${FOLDERS}' if gpus else ''}",
        "the rule sees only the arithmetic of equations and finds almost none of the wrong steps of reasoning in right "
        f"answers; for other mathematics than arithmetic take {better}, as docs/judges.md shows",
    )


def _server(url: str) -> Judge:
    key = KEY if os.environ.get(KEY) else None
    service = Service(url, "", key, timeout_s=10.0, retries=0, max_outage_s=10.0, key=f"${URL}")
    names = asyncio.run(served_models(service))
    if not names:
        raise UserError("its server does not list models")
    process: dict[str, Any] = {"kind": "llm", "base_url": f"${{{URL}}}", "model": names[0], "votes": 5}
    if key:
        process["api_key_env"] = key
    others = f"; it also has {', '.join(names[1:4])}" if names[1:] else ""
    return Judge(
        process, f"the server at ${URL} answers{others}; more votes cost more and err less",
        "a model's verdicts must be measured before they are trusted: stepkto judge-eval (docs/judges.md)",
    )  # fmt: skip
