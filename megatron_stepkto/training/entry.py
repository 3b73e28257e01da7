"""Entry point of one rank: ``torchrun -m megatron_stepkto.training.entry JOB``.

It imports little before it is started: saving a checkpoint starts a process that imports this module again, under
another name, to serve a queue. Torch and Megatron would take that process seconds.
"""

from __future__ import annotations

from megatron_stepkto.base.processes import child_main, die_with_parent, tie_forks


def main() -> None:
    tie_forks()
    from megatron_stepkto.training.rank import main as run

    run()


if __name__ == "__mp_main__":  # it would outlive a rank that is killed
    die_with_parent()
if __name__ == "__main__":
    child_main(main)
