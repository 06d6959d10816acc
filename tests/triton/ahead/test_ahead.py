"""What Triton's compiler makes of all kernels, for GPUs that need not be there."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

from ops.kernels import PATH, table
from worker.kernels.triton.ahead import TARGETS, Specimen, all_specimens, compile, instructions, modules

SPECIMENS = all_specimens()


@triton.jit
def greedy_kernel(x, y, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)
    tile = tl.load(x + places)
    tl.store(y + places, tl.dot(tile, tile) + tl.dot(tl.trans(tile), tile))


@pytest.mark.parametrize(
    ("specimen", "target"),
    [
        pytest.param(each, target, id=f"{each.kernel_name}, {each.name}, {target}")
        for each in SPECIMENS
        for target in each.targets
    ],
)
def test_a_kernel_compiles_and_none_of_decoding_spills(specimen, target):
    assert not knobs.runtime.interpret
    usage = compile(specimen, target)
    assert usage.registers > 0
    assert usage.spill_bytes == 0 or target != "sm_90" or not specimen.is_decode


@pytest.mark.parametrize("kernel", ["quantise_rows", "turn_and_write_heads", "select"])
def test_what_is_rounded_to_whole_codes_was_divided_to_the_nearest(kernel):
    """The interpreter divides so whatever a kernel says."""
    said = [instructions(each, "sm_90") for each in SPECIMENS if each.kernel_name == kernel]
    assert any("div.rn.f32" in each for each in said) and not any("div.full" in each for each in said)


def test_prompts_fit_into_gpus_with_little_memory():
    (small,) = (each for each in SPECIMENS if each.name == "prompt, 128, group 4, little memory")
    usage = compile(small, "sm_80")
    assert usage.shared_bytes <= 99 << 10 and not usage.spill_bytes
    spilling = replace(small, constexprs={**small.constexprs, "BLOCK_N": 64}, num_stages=2)
    assert compile(spilling, "sm_80").spill_bytes


def test_the_file_of_what_kernels_take_has_all_of_them():
    recorded = {(each["kernel"], each["variant"], each["target"]) for each in json.loads(PATH.read_text())}
    assert recorded == {(each.kernel_name, each.name, target) for each in SPECIMENS for target in each.targets}


def test_spilling_is_seen():
    wide = Specimen("wide", greedy_kernel, {"x": "*bf16", "y": "*fp32"}, {"SIZE": 128}, num_warps=1)
    assert compile(wide, "sm_90").spill_bytes > 0


def test_a_specimen_that_leaves_out_an_argument_is_refused():
    with pytest.raises(ValueError, match=r"greedy_kernel takes x, y, SIZE; short says otherwise"):
        compile(Specimen("short", greedy_kernel, {"x": "*bf16"}, {"SIZE": 128}), "sm_90")


def test_names_of_variants_tell_specimens_apart():
    names = [(each.kernel_name, each.name) for each in SPECIMENS]
    assert len(set(names)) == len(names)


def test_every_kernel_has_a_specimen():
    functions = {
        name: value for module in modules() for name, value in vars(module).items() if isinstance(value, JITFunction)
    }
    calls = {name for each in functions.values() for name in re.findall(r"(\w+)\(", each.src.split(":\n", 1)[1])}
    assert set(functions) - calls == {each.kernel_name for each in SPECIMENS}


def test_the_table_has_a_line_for_each_variant_and_nothing_where_it_is_not_for_a_target():
    found = [
        {"kernel": "add", "variant": v, "target": t, "registers": 40, "shared_bytes": 2048, "spill_bytes": 0}
        for v in ("plain", "wide")
        for t in (TARGETS if v == "plain" else ("sm_90", "sm_100"))
    ]
    lines = table(found).splitlines()
    assert lines[2] == "| `add` | plain | 40, 2,048, 0 | 40, 2,048, 0 | 40, 2,048, 0 |"
    assert lines[3] == "| `add` | wide |  | 40, 2,048, 0 | 40, 2,048, 0 |"
    assert len({line.count("|") for line in lines}) == 1
