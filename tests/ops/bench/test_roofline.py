"""The least time of a step: counted by hand for a small shape, and read from the machine."""

from __future__ import annotations

from typing import Any

from ops.bench.roofline import Machine, RateMeter, Work, best, decode_work, step_work
from ops.bench.speculation import CONFIG

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "intermediate_size": 10,
    "vocab_size": 100,
}
IN_LAYERS = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 10)


def test_a_step_reads_every_matrix_once_and_computes_with_it_for_every_token():
    work = step_work(SMALL, [(3, 5), (1, 0)], num_sampled=1)
    assert work.weight_bytes == 2 * (IN_LAYERS + 100 * 8)
    assert work.kv_bytes == 2 * (8 + 1) * 2 * 2 * 4
    assert work.product_flops == 2 * (4 * IN_LAYERS + 100 * 8)
    num_pairs = (6 + 7 + 8) + 1
    assert work.attention_flops == 2 * num_pairs * 2 * (2 * 8)
    assert step_work(SMALL, [(3, 5)], num_sampled=0).weight_bytes == 2 * IN_LAYERS, "no logits, no head"


def test_what_takes_longer_counts():
    work = Work(weight_bytes=600, kv_bytes=400, product_flops=70, attention_flops=30)
    assert work.seconds(Machine(1000, 1000)) == 1.0
    assert work.seconds(Machine(1000, 50)) == 2.0
    assert (work + work).seconds(Machine(1000, 50)) == 4.0


def test_the_shape_of_the_bars_has_125_million_parameters():
    work = decode_work(CONFIG, 1, 128)
    embedding = CONFIG["vocab_size"] * CONFIG["hidden_size"]
    assert round((work.weight_bytes / 2 + embedding) / 1e6) == 125
    assert decode_work(CONFIG, 8, 1024).kv_bytes == 8 * 1025 * 2 * 2 * 4 * 64 * 12


def test_rates_are_measured_and_the_best_of_each_kind_counts():
    for dtype in ("bfloat16", "float32"):
        machine = RateMeter(dtype, is_short=True)()
        assert machine.read_bytes_per_s > 0 and machine.flops_per_s > 0
    assert best([Machine(1, 5), Machine(3, 2)]) == Machine(3, 5)
