"""Names of keys: one lane, one slot; only identifiers of ours; Lua uses the same ones."""

from __future__ import annotations

import inspect
import re

import pytest
from redis.crc import key_slot

from common import keys
from common.card import lane_of
from common.job import DispatchClass
from common.store.connection import library
from common.store.jobs import lane_of_job, new_job_id

LANE_KEYS = [
    (name, function)
    for name, function in inspect.getmembers(keys, inspect.isfunction)
    if next(iter(inspect.signature(function).parameters), "") == "lane" and name != "tag"
]


def call(function: object, lane: str) -> str:
    parameters = list(inspect.signature(function).parameters)[1:]  # type: ignore[arg-type]
    return function(lane, *["1" for _ in parameters])  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(("name", "function"), LANE_KEYS)
def test_all_keys_of_a_lane_share_its_slot(name: str, function: object) -> None:
    key = call(function, "abcdef")
    assert key.startswith("{abcdef}:")
    assert key_slot(key.encode()) == key_slot(b"abcdef")


def test_no_two_functions_give_the_same_key() -> None:
    found = [call(function, "abcdef") for _, function in LANE_KEYS]
    assert len(found) > 30
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(("name", "function"), LANE_KEYS)
def test_the_atomic_functions_know_each_key(name: str, function: object) -> None:
    kind = call(function, "abcdef").split(":")[1]
    assert re.search(rf"':{kind}[:']", library()[0]), f"no Lua function uses {name}"


def test_a_job_id_carries_its_lane_and_110_random_bits() -> None:
    lane = lane_of("demo", "w", "t", "float32", "", "auto")
    assert keys.LANE.fullmatch(lane)
    ids = {new_job_id(lane) for _ in range(1000)}
    assert len(ids) == 1000
    for job_id in ids:
        assert keys.JOB_ID.fullmatch(job_id)
        assert lane_of_job(job_id) == lane
    assert keys.JOB_ID.fullmatch(new_job_id(lane) + ".7"), "the suffix of one of several choices"


def test_the_classes_are_those_of_jobs() -> None:
    assert keys.CLASSES == tuple(DispatchClass)


def test_a_client_s_text_never_enters_a_key() -> None:
    digest = keys.digest_of("{evil} key\r\n")
    assert re.fullmatch("[0-9a-f]{32}", digest)
    assert digest != keys.digest_of("{evil} key")
