"""Where the ranks of one machine meet."""

from __future__ import annotations

import errno
import socket

import pytest

from megatron_stepkto.base.nodes import this_node


def test_the_port_is_kept_for_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others cannot take it while the ranks still import; the store of torch, which sets SO_REUSEADDR, can."""
    monkeypatch.delenv("SLURM_STEP_NUM_NODES", raising=False)
    nodes = this_node()
    with socket.socket() as other, pytest.raises(OSError, match=r".") as caught:
        other.bind(("127.0.0.1", nodes.port))
    assert caught.value.errno == errno.EADDRINUSE
    with socket.socket() as store:
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind(("127.0.0.1", nodes.port))
        store.listen()
        with socket.create_connection(("127.0.0.1", nodes.port)) as rank, store.accept()[0] as accepted:
            assert rank.getsockname() == accepted.getpeername()
    assert nodes.environment(2, 1)["MASTER_PORT"] == str(nodes.port)
