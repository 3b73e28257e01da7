"""Commands for a cluster: slurm, doctor."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_stepkto.cli.arguments import positive
from megatron_stepkto.cli.commands import Commands, add_recipe, recipe_of


def add_commands(commands: Commands) -> None:
    commands.group("a cluster")
    slurm = commands.add(
        "slurm", _slurm_submit, "submit a run as a chain of Slurm jobs; show or cancel it (docs/cluster.md)",
        "stepkto slurm submit recipes/llama3.1_8b_8xh100.yaml --dry-run",
    )  # fmt: skip
    verbs = slurm.add_subparsers(title="commands", required=True, metavar="COMMAND")
    submit = _add_verb(
        verbs, "submit", "submit what is neither done nor in the queue", "recipes/llama3.1_8b_8xh100.yaml --dry-run"
    )
    add_recipe(submit)
    submit.add_argument("--iterations", type=positive, metavar="N", help="instead of the recipe's number")
    submit.add_argument(
        "--site", type=Path, default=Path(os.environ.get("STEPKTO_SITE", "slurm/site.sh")), metavar="FILE",
        help="your cluster's settings, a copy of slurm/site.example.sh (default: $STEPKTO_SITE or slurm/site.sh)",
    )  # fmt: skip
    submit.add_argument("--dry-run", action="store_true", help="print the exact sbatch commands instead")
    submit.set_defaults(command=_slurm_submit, name="slurm submit")
    for name, text in (
        ("status", "show each job: state, attempts, progress, why it waits, its log"),
        ("cancel", "cancel this run's jobs and no others"),
    ):
        verb = _add_verb(verbs, name, text, "runs/mini_cpu")
        verb.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as runs/mini_cpu")
        verb.set_defaults(command=_slurm_of_run, verb=name)
    doctor = commands.add(
        "doctor", _doctor, "check that this machine (or each node, by srun) is fit for a recipe",
        "srun --nodes 8 --ntasks-per-node 1 stepkto doctor recipes/llama3.3_70b_64xh100_fp8.yaml",
    )  # fmt: skip
    add_recipe(doctor)
    doctor.add_argument(
        "--environment", choices=("train", "sample"),
        help="check only what the stages of this environment of a cluster need; default: both",
    )  # fmt: skip


def _add_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, example: str
) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  stepkto slurm {name} {example}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def _slurm_submit(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.slurm.commands import submit

    sys.stdout.write(submit(recipe_of(arguments), arguments.site, dry_run=arguments.dry_run) + "\n")


def _slurm_of_run(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.slurm.commands import cancel, status

    sys.stdout.write({"status": status, "cancel": cancel}[arguments.verb](arguments.run) + "\n")


def _doctor(arguments: argparse.Namespace) -> None:
    from megatron_stepkto.run.folder import Run
    from megatron_stepkto.slurm.doctor import report

    report(Run(recipe_of(arguments)), arguments.environment)
