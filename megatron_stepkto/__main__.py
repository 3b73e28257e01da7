"""The command ``stepkto`` and ``python -m megatron_stepkto``; Ctrl-C is handled before the long imports begin."""

from megatron_stepkto.cli.interrupts import leave_at_once


def main(arguments: list[str] | None = None) -> None:
    leave_at_once()  # not at import: processes that multiprocessing spawns import this module
    from megatron_stepkto.cli.main import main as run_command

    run_command(arguments)


if __name__ == "__main__":
    main()
