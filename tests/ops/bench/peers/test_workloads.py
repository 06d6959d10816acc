"""What is asked of all engines, and the least time that it can take."""

from __future__ import annotations

import pytest

from ops.bench.peers.checkpoints import NUM_UNSAID, SHAPES
from ops.bench.peers.pipe import Request
from ops.bench.peers.workloads import KV_TOKENS, TITLES, WORKLOADS, least_seconds, requests_of, shared_length
from ops.bench.roofline import Machine, step_work

CONFIG = SHAPES["125m"]
BYTES_ONLY, FLOPS_ONLY = Machine(1.0, 1e30), Machine(1e30, 1.0)


@pytest.mark.parametrize(
    ("name", "number", "inputs", "outputs"),
    [
        ("decode", 32, {64}, {128}),
        ("prefill", 16, {512}, {16}),
        ("shared", 32, {544}, {32}),
        ("single", 1, {64}, {128}),
    ],
)
def test_workloads_have_their_sizes(name: str, number: int, inputs: set[int], outputs: set[int]):
    requests = requests_of(name, "a")
    assert len(requests) == number
    assert {len(request.prompt) for request in requests} == inputs
    assert {request.num_output for request in requests} == outputs
    assert shared_length(requests) == (512 if name == "shared" else 0)


def test_mixed_lengths_are_even_between_their_ends_and_fit_the_cache_on_average():
    requests = [request for seed in range(20) for request in requests_of("mixed", str(seed))]
    inputs, outputs = [len(request.prompt) for request in requests], [request.num_output for request in requests]
    assert len(requests) == 20 * 64
    assert min(inputs) < 20 and max(inputs) > 508 and {min(outputs), max(outputs)} <= {*range(16, 20), *range(252, 257)}
    assert (sum(inputs) + sum(outputs)) / 20 < KV_TOKENS


def test_prompts_are_the_same_for_a_seed_and_share_nothing_with_those_of_another():
    assert set(TITLES) == set(WORKLOADS)
    assert requests_of("decode", "1") == requests_of("decode", "1")
    beginnings = {tuple(request.prompt[:8]) for seed in "123" for request in requests_of("decode", seed)}
    assert len(beginnings) == 3 * 32
    assert min(min(request.prompt) for request in requests_of("mixed", "1")) >= NUM_UNSAID


def test_the_least_time_is_that_of_one_step_for_all_prompts_and_one_for_each_further_token():
    requests = [Request([1, 2, 3], 3), Request([4, 5], 1)]
    steps = [
        step_work(CONFIG, [(3, 0), (2, 0)], 2),
        step_work(CONFIG, [(1, 3)], 1),
        step_work(CONFIG, [(1, 4)], 1),
    ]
    num_read = sum(step.weight_bytes + step.kv_bytes for step in steps)
    assert least_seconds(CONFIG, requests, BYTES_ONLY, 2) == num_read
    assert least_seconds(CONFIG, requests, BYTES_ONLY, 4) == 2 * num_read
    num_flops = sum(step.product_flops + step.attention_flops for step in steps)
    assert least_seconds(CONFIG, requests, FLOPS_ONLY, 2) == num_flops


def test_a_shared_beginning_is_computed_once():
    requests = [Request([1, 2, 3, 4], 1), Request([1, 2, 3, 5], 1)]
    once = step_work(CONFIG, [(3, 0), (1, 3), (1, 3)], 2)
    twice = step_work(CONFIG, [(4, 0), (4, 0)], 2)
    assert least_seconds(CONFIG, requests, FLOPS_ONLY, 2) == once.product_flops + once.attention_flops
    assert once.product_flops < twice.product_flops
    assert shared_length(requests[:1]) == 0, "one alone shares with nobody"
