"""One process of ``row_tasks``: ``python -m megatron_stepkto.judging.row_worker '[TASK, OPTIONS]'``.

A chunk of rows per line in, its answers per line out, until the input ends.
"""

from __future__ import annotations

import json
import os
import sys

from megatron_stepkto.judging.row_tasks import TASKS, answer


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the replies
    task, options = json.loads(sys.argv[1])
    function = TASKS[task][0](options)
    try:
        for line in sys.stdin.buffer:
            replies.write(json.dumps([answer(function, row) for row in json.loads(line)]).encode() + b"\n")
            replies.flush()
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # the stage that reads the replies is gone


if __name__ == "__main__":
    main()
