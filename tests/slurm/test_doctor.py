"""``stepkto doctor`` on two nodes of which one is not like the other: each fault is one line that names the node."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, free_ports

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]


def doctor(cluster: Cluster, output: Path, repository: Path, python_bin: Path, on_n2: str) -> list[str]:
    """Lines that it prints, with some bash run on the second node before."""
    [port] = free_ports(1)
    script = output / "node.sh"
    script.write_text(
        f"""export PYTHONPATH={repository}
[[ $SLURMD_NODENAME != n2 ]] || {{ {on_n2}; }}
exec {python_bin}/python -m megatron_stepkto doctor {repository}/recipes/mini_cpu.yaml --set=output={output}
"""
    )
    environment = {
        **os.environ, **cluster.environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    done = subprocess.run(
        ["srun", "--nodes=2", "--ntasks-per-node=1", "unshare", "--mount", "bash", str(script)],
        capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=output,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    return sorted(set(done.stdout.splitlines()))


def test_a_node_with_other_packages_and_few_files(
    cluster: Cluster, tmp_path: Path, repository: Path, python_bin: Path
) -> None:
    package = tmp_path / "more" / "apex-9.9.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 9.9\n")
    on_n2 = f"ulimit -n 300; export PYTHONPATH=$PYTHONPATH:{package.parent}"
    first, second = doctor(cluster, tmp_path, repository, python_bin, on_n2)
    assert first.startswith("fault: n2: a process may open 300 files, checkpoints and data need 4096; put `ulimit")
    assert second.startswith("fault: n2: apex is 9.9, on n1 it is absent; use one environment")


@pytest.mark.long
def test_a_folder_that_the_nodes_do_not_share(
    cluster: Cluster, tmp_path: Path, repository: Path, python_bin: Path
) -> None:
    folder = tmp_path / "mini_cpu"
    folder.mkdir()
    [line] = doctor(cluster, tmp_path, repository, python_bin, f"mount -t tmpfs none {folder}")
    assert line.startswith("fault: only 1 of 2 nodes (n1) are seen in ")
    assert "it is not shared, or a node could not write there; set output to a folder that all nodes see" in line
