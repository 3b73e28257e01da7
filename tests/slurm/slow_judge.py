"""A judge's server that takes its time: ``python -m tests.slurm.slow_judge PORT``. Every step is right."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tests.scripted_server import Reply, ScriptedServer, chat


def answer(body: dict[str, Any], _: int) -> Reply:
    steps = body["response_format"]["json_schema"]["schema"]["properties"]
    reply = chat(dict.fromkeys(steps, "right"))
    reply.hang_s = 0.5
    return reply


if __name__ == "__main__":
    with ScriptedServer(answer, port=int(sys.argv[1])):
        threading.Event().wait()
