"""One launcher per node: this process's place among them, and how the first node tells the others to start.

``srun --ntasks-per-node=1 stepkto train ...`` runs the same command on every node of a job. The first node's does
the stage's work: it holds the lock, converts the weights, writes the job file and the manifest. The others wait for
its signal and start the ranks of their node.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json, write_json

POLL_S = 0.3


@dataclass(frozen=True)
class Nodes:
    """``number`` of ``count`` nodes, and rank 0's address and port.

    attempt: the same on all nodes, different for each launch.
    reserved: keeps the port from other processes while this object lives.
    """

    number: int = 0
    count: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    attempt: str = ""
    reserved: socket.socket | None = field(default=None, repr=False, compare=False)

    def ranks_here(self, ranks: int) -> int:
        if ranks % self.count:
            raise UserError(
                f"train.parallel.ranks is {ranks}, which {self.count} nodes cannot share evenly; "
                "change TRAIN_NODES in the site file or the ranks"
            )
        return ranks // self.count

    def environment(self, ranks: int, local: int) -> dict[str, str]:
        """Variables that ``init_process_group`` and the engine read, for one rank of this node."""
        here = self.ranks_here(ranks)
        return {
            "RANK": str(self.number * here + local),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(here),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def this_node() -> Nodes:
    """From Slurm's variables inside a step of more than one task; otherwise this machine alone.

    Raises:
        UserError: the step has several tasks per node, or MASTER_ADDR or MASTER_PORT is not set.
    """
    # not SLURM_NNODES: it is also set in a shell of salloc, where no other launchers are started
    count = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != count:
        raise UserError(
            f"expected one task per node (srun --ntasks-per-node=1), got {os.environ['SLURM_STEP_NUM_TASKS']} tasks "
            f"on {count} nodes: that task starts all ranks of its node"
        )
    if count == 1:
        reserved = _reserve_port()
        return Nodes(port=reserved.getsockname()[1], reserved=reserved)
    try:
        return Nodes(
            number=int(os.environ["SLURM_NODEID"]),
            count=count,
            address=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
            attempt=f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT') or 0}"
            f".{os.environ['SLURM_STEP_ID']}",
        )
    except KeyError as error:
        raise UserError(
            f"{error.args[0]} is not set, but training on several nodes needs it; see slurm/train.sbatch"
        ) from None


def _reserve_port() -> socket.socket:
    """A socket bound to a free port without listening. A port that is only looked up may be taken when rank 0 has
    imported torch. With SO_REUSEADDR, which torch sets too, rank 0 may listen on it beside this socket, and the kernel
    assigns it to no other process."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def _word(directory: Path, nodes: Nodes) -> Path:
    return directory / "logs" / f"launch-{nodes.attempt}.json"


def tell_others(directory: Path, nodes: Nodes, *, start: bool) -> None:
    """The first node's signal: start your ranks, or there is nothing to do. Only the first one counts."""
    if nodes.count > 1 and not _word(directory, nodes).is_file():
        write_json(_word(directory, nodes), {"start": start})


def wait_for_word(directory: Path, nodes: Nodes) -> bool:
    """Wait for the signal on another node. If the first node fails, srun kills this process (--kill-on-bad-exit)."""
    while not _word(directory, nodes).is_file():
        time.sleep(POLL_S)
    return bool(read_json(_word(directory, nodes))["start"])
