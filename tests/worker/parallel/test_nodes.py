"""A model on two nodes: processes of this machine that know of each other only an address."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from ops.cli.worker import main as worker_command
from tests.support.fleet import free_port
from tests.worker.parallel.fake_ranks import SENTENCE
from tests.worker.parallel.running import DEADLINE_S, Group, Node, wait_until_gone
from tests.worker.parallel.test_ranks import expected_ids
from worker.parallel import rendezvous
from worker.parallel.rendezvous import come_to_node_0, gather_nodes, host_and_port, welcome
from worker.pipe import Progress

Start = Callable[..., tuple[Group, Node]]


@pytest.fixture()
def start() -> Iterator[Start]:
    """Start node 0 and node 1, which share four ranks."""
    things: list[Group | Node] = []

    def make(mode: str, num_shard: int = 4) -> tuple[Group, Node]:
        address = f"127.0.0.1:{free_port()}"
        settings = {"num_shard": num_shard, "num_nodes": 2, "rendezvous": address, "threads": 1}
        node = Node(mode, settings | {"node_rank": 1})
        things.append(node)
        group = Group(mode, **settings)
        things.append(group)
        return group, node

    yield make
    for thing in things:
        thing.close()


def again(group: Group) -> Group:
    """Another life of node 0, as its agent starts it."""
    return Group("good", **group.settings)


def test_ranks_of_two_nodes_serve_and_leave_together(start: Start) -> None:
    group, node = start("good")
    group.start()
    assert group.progress[0] == Progress("waiting for the other nodes", 0, 1)
    assert {progress.total for progress in group.progress[1:]} == {10 + 11 + 12 + 13}
    pids = node.wait_for_pids()
    assert group.serve() == expected_ids()
    assert node.wait_for("rank ([23]) step 100") in "23"
    assert group.stop() == 0
    assert node.process.wait(DEADLINE_S) == 0
    wait_until_gone(pids)


def test_ranks_of_two_nodes_compute_together(start: Start) -> None:
    group, node = start("collective", num_shard=2)
    group.start()
    assert group.serve() == expected_ids()
    assert node.wait_for("rank (1) adds 100")


def test_a_killed_rank_of_another_node_ends_the_group_which_then_meets_again(start: Start) -> None:
    group, node = start("good")
    group.start()
    pids = node.wait_for_pids()
    os.kill(pids[0], signal.SIGKILL)
    assert group.last_words() in ("rank 2 was killed by signal 9", "rank 3 was killed by signal 9")
    wait_until_gone([*pids, group.process.pid])
    second = again(group)
    try:
        second.start()
        assert second.serve() == expected_ids()
        pids = node.wait_for_pids()
        second.process.kill()
        wait_until_gone(pids)
        assert node.process.poll() is None
    finally:
        second.close()


def test_a_killed_leader_of_a_node_ends_the_group(start: Start) -> None:
    group, node = start("good")
    group.start()
    pids = [*node.wait_for_pids(), *group.wait_for_pids()]
    node.process.kill()
    assert group.last_words() == "the connection to node 1 ended"
    wait_until_gone(pids)


def test_a_node_can_be_told_to_leave(start: Start) -> None:
    group, node = start("good")
    group.start()
    pids = node.wait_for_pids()
    node.process.terminate()
    assert node.process.wait(DEADLINE_S) == 0
    assert group.last_words() == "the connection to node 1 ended"
    wait_until_gone(pids)


def test_what_cannot_work_on_one_node_ends_both_with_the_same_sentence(start: Start) -> None:
    group, node = start("refuses on 3")
    assert group.last_words() == SENTENCE
    assert node.wait_for(f"({SENTENCE})")
    assert node.process.wait(DEADLINE_S) == 2


# The meeting itself.


def settings_of(node_rank: int, port: int, **changes: object) -> WorkerSettings:
    fields = {"num_shard": 4, "num_nodes": 2, "node_rank": node_rank, "rendezvous": f"127.0.0.1:{port}"}
    return WorkerSettings(**(fields | changes))


def test_strangers_and_nodes_with_other_options_are_sent_away() -> None:
    port = free_port()
    found: dict[int, socket.socket] = {}
    waiting = threading.Thread(target=lambda: found.update(gather_nodes(settings_of(0, port))), daemon=True)
    waiting.start()
    with pytest.raises(ConfigurationError) as refused:
        come_to_node_0(settings_of(1, port, dtype="float64"))
    assert str(refused.value) == "--dtype is float64 on node 1 but auto on node 0; give all nodes the same options"
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x01\x00\x00\x00\x07", b"\xff\xff\xff\x7f"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(garbage)
            with suppress(OSError):
                # a connection that is closed before all was read is reset
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(100) == b""
    assert waiting.is_alive() and not found
    came: list[tuple[socket.socket, int]] = []
    coming = threading.Thread(target=lambda: came.append(come_to_node_0(settings_of(1, port, threads=3))), daemon=True)
    coming.start()
    waiting.join(DEADLINE_S)
    with found[1] as connection:
        welcome(connection, 4711)
        coming.join(DEADLINE_S)
        with came[0][0]:
            assert came[0][1] == 4711


def test_a_node_of_another_version_is_sent_away() -> None:
    refusal = rendezvous._refusal(settings_of(0, 1), "0.0.0", 1, {})
    assert refusal.startswith("node 1 runs version 0.0.0 but node 0 runs ")


def test_waiting_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "JOIN_LIMIT_S", 0.1)
    monkeypatch.setattr(rendezvous, "RETRY_S", 0.01)
    port = free_port()
    address = f"127.0.0.1:{port}"
    with pytest.raises(ConfigurationError, match=f"node 1 did not come to {address} within 0.1 s; start it with"):
        gather_nodes(settings_of(0, port))
    with pytest.raises(ConfigurationError, match=f"node 0 does not answer at {address}: .*; check --rendezvous"):
        come_to_node_0(settings_of(1, port))


def test_node_0_needs_a_free_port_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigurationError, match=f"cannot listen on --rendezvous 127.0.0.1:{port}: Address already"
        ):
            gather_nodes(settings_of(0, port))
    with pytest.raises(ConfigurationError, match="it must be an address of this machine"):
        gather_nodes(settings_of(0, port, rendezvous="no-such-host.invalid:4711"))


def test_addresses() -> None:
    assert host_and_port("node-0.example:4711") == ("node-0.example", 4711)
    assert host_and_port("[::1]:4711") == ("::1", 4711)


def test_a_further_node_needs_no_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    options = ["--num-nodes", "2", "--num-shard", "2", "--rendezvous", "127.0.0.1:1", "--model-id", "./no-model"]
    with pytest.raises(ConfigurationError, match="a worker needs --redis-url"):
        worker_command(options)
    with pytest.raises(ConfigurationError, match=r"there is no folder \./no-model"):
        worker_command([*options, "--node-rank", "1"])
