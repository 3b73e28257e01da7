"""Where rank 0 listens."""

from __future__ import annotations

import socket
from pathlib import Path

from megatron_stepkto.training.nodes import this_node


def test_the_port_is_free_and_the_kernel_gives_it_to_nobody_else() -> None:
    low, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = {this_node().port for _ in range(20)}
    assert len(ports) > 10
    assert max(ports) < max(low, 32768)
    for port in ports:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
