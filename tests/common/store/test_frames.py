"""Subscriptions: order, lanes added later, lost connections, garbage."""

from __future__ import annotations

import asyncio

import pytest

from common import keys, wire
from common.errors import StoreUnavailable, WireError
from common.job import JobState
from common.store.connection import Connection
from common.store.frames import Ended, Frame, Reconnected, StatusChanged, decode_message
from common.store.jobs import JobStore
from tests.support.protocol import LANE, columns
from tests.support.redis_server import ServerUnderTest

FRAME = wire.encode_frame([("job", columns(0, 2))])


async def hear(subscription: object) -> object:
    return await asyncio.wait_for(anext(subscription), 5)  # type: ignore[call-overload]


async def test_messages_arrive_in_order_and_only_one_s_own(jobs: JobStore, redis_server: ServerUnderTest) -> None:
    async with jobs.frames("g1", [LANE]) as subscription:
        with redis_server.client() as client:
            assert client.publish(keys.channel(LANE, "g2"), FRAME) == 0
            for number in range(50):
                message = wire.pack([1, "E", f"job{number}", "completed", number])
                assert client.publish(keys.channel(LANE, "g1"), message) == 1
        for number in range(50):
            assert await hear(subscription) == Ended(f"job{number}", JobState.COMPLETED, number)


async def test_a_lane_can_be_added(jobs: JobStore, redis_server: ServerUnderTest) -> None:
    async with jobs.frames("g1", []) as subscription:
        await subscription.add_lane(LANE)
        await subscription.add_lane("bbbbbb")
        await subscription.add_lane(LANE)
        with redis_server.client() as client:
            for lane in (LANE, "bbbbbb"):
                assert client.publish(keys.channel(lane, "g1"), FRAME) == 1
        for _ in range(2):
            assert await hear(subscription) == Frame([("job", columns(0, 2))])


async def test_after_a_lost_connection_the_subscription_is_in_force_again(
    jobs: JobStore, redis_server: ServerUnderTest
) -> None:
    async with jobs.frames("g1", [LANE]) as subscription:
        with redis_server.client() as client:
            assert client.client_kill_filter(_type="pubsub") == 1
            assert await hear(subscription) == Reconnected()
            assert client.publish(keys.channel(LANE, "g1"), FRAME) == 1
        assert await hear(subscription) == Frame([("job", columns(0, 2))])


async def test_garbage_is_dropped_and_the_next_message_heard(
    jobs: JobStore, redis_server: ServerUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    garbage = [b"", b"\xc1", b"hello", wire.pack([1]), wire.pack([2, "T", []]), wire.pack([1, "E", 5])]
    async with jobs.frames("g1", [LANE]) as subscription:
        with redis_server.client() as client:
            for data in [*garbage, FRAME]:
                client.publish(keys.channel(LANE, "g1"), data)
        assert await hear(subscription) == Frame([("job", columns(0, 2))])
    assert sum("message dropped" in record.message for record in caplog.records) == len(garbage)


async def test_no_subscription_without_redis(own_redis: ServerUnderTest) -> None:
    connection = await Connection.open(own_redis.url, timeout_s=0.2)
    own_redis.kill()
    with pytest.raises(StoreUnavailable):
        async with JobStore(connection).frames("g1", [LANE]):
            pass
    await connection.close()


def test_each_kind_of_message_is_decoded() -> None:
    assert decode_message(FRAME) == Frame([("job", columns(0, 2))])
    assert decode_message(wire.pack([1, "S", "job", "queued", 3])) == StatusChanged("job", JobState.QUEUED, 3)
    for message in ([1, "S", "job", "asleep", 3], [1, "E", "job", "failed"], [1, "X", "job", "failed", 1], "text"):
        with pytest.raises(WireError):
            decode_message(wire.pack(message))
