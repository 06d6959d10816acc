"""Quantised checkpoints of every format against dense ones with the numbers that the format's definition gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import ConfigurationError
from tests.support import paged_t5, quantised, tiny_models, tiny_t5
from tests.support.paged import load_decoder, paged_logits, relative_error
from tests.support.quantised import Format
from tests.support.ranks import Ranks, ranks
from tests.worker.model.spoil import rewrite
from worker.model.checkpoint import Checkpoint
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.loading import load_weights, weight_bytes
from worker.model.quant.choice import choose_quantisation
from worker.model.quant.linear import CodedLinear, Int4Linear, Int8Linear
from worker.model.weights import DummySource
from worker.parallel.shard import WHOLE, Shard

SEQUENCES = [list(range(5, 45)), [3, 250, 17, 17], [200]]
BAR = 1e-5
"""Relative error of logits in float32."""

Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], object]
"""Changes what is stored as if somebody had read it wrongly."""


def each(ending: str, change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(tensors: Tensors) -> None:
        names = [name for name in tensors if name.endswith(ending)]
        assert names
        tensors.update({name: change(tensors[name]).contiguous() for name in names})

    return edit


def backwards(dimension: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.flip(dimension)


def other_half_first(tensor: Tensor) -> Tensor:
    """Of every byte."""
    octets = tensor.contiguous().view(torch.uint8)
    return (octets >> 4 | octets << 4).view(tensor.dtype)


def rounded_down_scales(tensor: Tensor) -> Tensor:
    return tensor * 127 / 128


def without_offset(tensor: Tensor) -> Tensor:
    values = json.loads(bytes(tensor.tolist())) | dict(nested_offset=0.0)
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def in_plain_order(tensor: Tensor) -> Tensor:
    """What AWQ's words would hold if the first neighbour stood in the lowest bits, the second in the next."""
    octets = tensor.contiguous().view(torch.uint8).view(*tensor.shape, 4)
    places = torch.stack((octets & 15, octets >> 4), -1).flatten(-2)
    moved = places[..., list(quantised.AWQ_ORDER)].view(*tensor.shape, 4, 2)
    return (moved[..., 0] | moved[..., 1] << 4).view(torch.int32).view(tensor.shape)


@dataclass(frozen=True)
class Case:
    """`wrong` are readings that the comparison must notice; `width` is that of the feed-forward network."""

    form: Format
    kinds: set[type]
    wrong: dict[str, Edit] = field(default_factory=dict)
    width: int = 104


GROUPS = dict(strategy="group", group_size=32)
NEIGHBOURS = each(".g_idx", lambda order: torch.arange(len(order), dtype=torch.int32) // 32)
FAST_AND_SLOW = {Int4Linear, CodedLinear}
"""Groups of 32 do not divide the width of the feed-forward network."""

CASES = {
    "gptq": Case(
        quantised.gptq(4, 32),
        FAST_AND_SLOW,
        {
            "no one is added to zeros": each(".qzeros", lambda words: words - 0x11111111),
            "groups backwards": each(".scales", backwards(0)),
            "high bits first": each(".qweight", other_half_first),
        },
    ),
    "gptq_v2": Case(
        quantised.gptq(4, 32, is_v2=True),
        FAST_AND_SLOW,
        {"one is added to zeros": each(".qzeros", lambda words: words + 0x11111111)},
    ),
    "gptq_order": Case(quantised.gptq(4, 32, has_order=True), FAST_AND_SLOW, {"order ignored": NEIGHBOURS}),
    "gptq_2_bits": Case(quantised.gptq(2, 16), {CodedLinear}, width=80),
    "gptq_8_bits": Case(quantised.gptq(8, -1), {CodedLinear}),
    "gptq_8_bits_around_128": Case(quantised.gptq(8, -1, is_symmetric=True), {Int8Linear}),
    "awq": Case(
        quantised.awq(32),
        FAST_AND_SLOW,
        {
            "neighbours side by side": each(".qweight", in_plain_order),
            "zeros side by side": each(".qzeros", in_plain_order),
            "groups backwards": each(".scales", backwards(0)),
            "one is added to zeros": each(".qzeros", lambda words: words + 0x11111111),
        },
    ),
    "awq_rows": Case(quantised.awq(-1), {Int4Linear, CodedLinear}),
    "fp8": Case(quantised.fp8(), {CodedLinear}),
    "fp8_rows": Case(quantised.fp8(has_scale_of_rows=True, method="fbgemm_fp8"), {CodedLinear}),
    "fp8_e5m2": Case(quantised.fp8(dtype=torch.float8_e5m2, fmt="e5m2"), {CodedLinear}),
    "fp8_blocks": Case(
        quantised.fp8((24, 48)),
        {CodedLinear},
        {
            "rows backwards": each(".weight_scale_inv", backwards(0)),
            "columns backwards": each(".weight_scale_inv", backwards(1)),
            "divided by scales": each(".weight_scale_inv", torch.reciprocal),
        },
    ),
    "packed": Case(
        quantised.compressed("pack-quantized", num_bits=4, **GROUPS),
        FAST_AND_SLOW,
        {
            "groups backwards": each(".weight_scale", backwards(1)),
            "high bits first": each(".weight_packed", other_half_first),
        },
    ),
    "packed_zeros": Case(
        quantised.compressed("pack-quantized", num_bits=4, symmetric=False, **GROUPS),
        FAST_AND_SLOW,
        {"one is added to zeros": each(".weight_zero_point", lambda words: words + 0x11111111)},
    ),
    "packed_order": Case(
        quantised.compressed("pack-quantized", num_bits=4, has_order=True, **GROUPS),
        FAST_AND_SLOW,
        {"order backwards": each("g_idx", backwards(0))},
    ),
    "packed_8_bits": Case(quantised.compressed("pack-quantized"), {Int8Linear}),
    "int8": Case(
        quantised.compressed("int-quantized", inputs=dict(num_bits=8, dynamic=True, strategy="token")), {Int8Linear}
    ),
    "int8_zeros": Case(
        quantised.compressed("int-quantized", symmetric=False),
        {CodedLinear},
        {"zeros ignored": each(".weight_zero_point", torch.zeros_like)},
    ),
    "int4": Case(quantised.compressed("int-quantized", num_bits=4, **GROUPS), FAST_AND_SLOW),
    "float": Case(quantised.compressed("float-quantized", strategy="tensor"), {CodedLinear}),
    "float_blocks": Case(
        quantised.compressed("float-quantized", strategy="block", block_structure=[24, 48]), {CodedLinear}
    ),
    "nf4": Case(
        quantised.bitsandbytes(),
        {CodedLinear},
        {
            "low bits first": each(
                ".weight", lambda tensor: other_half_first(tensor) if tensor.shape[-1] == 1 else tensor
            ),
            "blocks backwards": each(".absmax", backwards(0)),
        },
    ),
    "fp4": Case(quantised.bitsandbytes("fp4"), {CodedLinear}),
    "nf4_nested": Case(
        quantised.bitsandbytes(is_nested=True),
        {CodedLinear},
        {"no offset": each("bitsandbytes__nf4", without_offset), "factors": each(".nested_absmax", backwards(0))},
    ),
    "llm_int8": Case(quantised.bitsandbytes("int8"), {Int8Linear}, {"128 steps": each(".SCB", rounded_down_scales)}),
}


@dataclass(frozen=True)
class Stored:
    """Folders of both checkpoints, and logits of the dense one."""

    stored: Path
    dense: Path
    logits: list[Tensor]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    torch.set_num_threads(1)

    @cache
    def base(width: int) -> Path:
        folder = tmp_path_factory.mktemp("base")
        tiny_models.build_from("Llama", intermediate_size=width, num_hidden_layers=2).save_pretrained(folder)
        return folder

    @cache
    def get(name: str) -> Stored:
        case = CASES[name]
        folder, dense = quantised.save(base(case.width), tmp_path_factory.mktemp(name), case.form)
        return Stored(folder, dense, logits_of(dense))

    return get


def logits_of(folder: Path, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return paged_logits(load_decoder(folder, dtype), SEQUENCES)[0]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_numbers_that_the_definition_gives(stored, name):
    model = stored(name)
    decoder = load_decoder(model.stored)
    kinds = {type(each) for layer in decoder.weights.layers for each in (layer.qkv, layer.mlp.down)}
    assert kinds == CASES[name].kinds
    assert relative_error(paged_logits(decoder, SEQUENCES)[0], model.logits) <= BAR


@pytest.mark.parametrize(("name", "how"), [(name, how) for name, case in CASES.items() for how in case.wrong])
def test_a_wrong_reading_shows(stored, name, how):
    model = stored(name)
    path = model.stored / "model.safetensors"
    whole = path.read_bytes()
    try:
        rewrite(model.stored, CASES[name].wrong[how])
        assert relative_error(logits_of(model.stored), model.logits) > 100 * BAR
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["gptq", "gptq_order", "awq", "fp8_blocks", "int8", "nf4_nested"])
def test_bfloat16_adds_its_own_rounding_only(stored, name):
    model = stored(name)
    rounding = relative_error(logits_of(model.dense, torch.bfloat16), model.logits)
    # as far as rounding takes the dense model from itself, or twice
    assert relative_error(logits_of(model.stored, torch.bfloat16), model.logits) <= 2 * rounding


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    with ranks(2) as started:
        yield started


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_read_their_parts(stored, pair, tmp_path, name):
    """Which begin in the middle of groups, blocks and words."""
    model = stored(name)
    got = pair.logits(model.stored, SEQUENCES, tmp_path / "logits")
    assert relative_error(got, model.logits) <= BAR


def test_parts_of_another_format_show_on_two_ranks(stored, pair, tmp_path):
    got = pair.logits(stored("gptq_v2").stored, SEQUENCES, tmp_path / "logits")
    assert relative_error(got, stored("nf4").logits) > 100 * BAR


@pytest.mark.parametrize("shard", [WHOLE, Shard(1, 2)], ids=["whole", "second"])
@pytest.mark.parametrize("name", CASES)
def test_what_will_be_taken_is_known_before(stored, name, shard):
    folder = stored(name).stored
    config = read_config(folder)
    spec, family = read_spec(config)
    quantisation = choose_quantisation(None, config)
    for source in (Checkpoint(folder), DummySource(is_tied=False, head_name="lm_head")):
        seen: list[tuple[int, int]] = []
        arguments = (spec, family, source, torch.bfloat16, shard)
        weights = load_weights(*arguments, lambda *done: seen.append(done), quantisation)
        said = weight_bytes(*arguments, quantisation)
        assert seen[-1] == (said, said)
        assert said < weight_bytes(spec, family, Checkpoint(stored(name).dense), torch.bfloat16, shard)
        x = weights.embed(torch.arange(3))
        assert torch.isfinite(weights.layers[0].qkv(x)).all()


# Other architectures: fused, transposed and interleaved matrices, experts, encoders.


def is_product(module: str) -> bool:
    return module.rsplit(".", 1)[-1] in ("q", "k", "v", "o", "wi", "wo")


@pytest.mark.parametrize(
    ("model", "form"),
    [
        ("phi3", quantised.gptq(4, 32)),
        ("phi3", quantised.fp8((24, 48))),
        ("gpt2", quantised.gptq(4, 32, has_order=True)),
        ("gpt2", quantised.bitsandbytes()),
        ("falcon_40b", quantised.awq(16)),
        ("gpt_neox", quantised.compressed("pack-quantized", num_bits=4, symmetric=False, **GROUPS)),
        ("ernie4_5", quantised.gptq(4, 32)),
        ("mixtral", quantised.awq(16)),
        ("qwen2_moe", quantised.bitsandbytes(is_nested=True)),
    ],
)
def test_every_layout_can_be_quantised(tiny, tmp_path, model, form):
    folder, dense = quantised.save(tiny(model).folder, tmp_path, form, is_transposed=model == "gpt2")
    assert relative_error(logits_of(folder), logits_of(dense)) <= BAR
    assert relative_error(logits_of(tiny(model).folder), logits_of(dense)) > 100 * BAR


def test_routers_and_heads_may_be_quantised_too(tiny, tmp_path):
    form = quantised.gptq(4, 32, lm_head=True)
    chosen = lambda module: module.endswith("_proj") or module.endswith(".gate") or module == "lm_head"  # noqa: E731
    folder, dense = quantised.save(tiny("qwen2_moe").folder, tmp_path, form, chosen)
    decoder = load_decoder(folder)
    assert isinstance(decoder.weights.head, Int4Linear)
    assert relative_error(paged_logits(decoder, SEQUENCES)[0], logits_of(dense)) <= BAR


def test_an_encoder_can_be_quantised(tmp_path):
    folder, dense = quantised.save(
        tiny_t5.save("flan", tmp_path / "t5"), tmp_path, quantised.bitsandbytes(), is_product
    )
    pairs = [paged_t5.Pair(list(range(3, 30)), [5, 6, 7])]
    got, expected = (paged_t5.paged_logits(paged_t5.load_t5(each), pairs)[0] for each in (folder, dense))
    assert isinstance(paged_t5.load_t5(folder).weights.encoder.layers[0].qkv, CodedLinear)
    assert relative_error(got, expected) <= BAR


# Files that differ from module to module.


def test_modules_that_were_left_out_are_read_as_they_are(tiny, tmp_path):
    chosen = lambda module: module.endswith("_proj") and ".layers.1." not in module and "k_proj" not in module  # noqa: E731
    folder, dense = quantised.save(tiny("llama").folder, tmp_path, quantised.awq(16), chosen)
    kinds = [type(layer.mlp.up).__name__ for layer in load_decoder(folder).weights.layers]
    assert kinds == ["CodedLinear", "DenseLinear", "CodedLinear"]
    assert relative_error(logits_of(folder), logits_of(dense)) <= BAR


def test_modules_may_have_bits_and_groups_of_their_own(tiny, tmp_path):
    rules = {"+:.*down_proj": dict(bits=8, group_size=16), "-:.*k_proj": {}}
    first = lambda module: module.endswith(("q_proj", "v_proj", "o_proj", "up_proj", "gate_proj"))  # noqa: E731
    folder, dense = quantised.save(tiny("llama").folder, tmp_path / "1", quantised.gptq(4, 32), first)
    second = quantised.gptq(8, 16, dynamic=rules, bits=4)
    down = lambda module: module.endswith("down_proj")  # noqa: E731
    folder, _ = quantised.save(folder, tmp_path / "2", second, down)
    _, dense = quantised.save(dense, tmp_path / "3", second, down)
    assert relative_error(logits_of(folder), logits_of(dense)) <= BAR


def test_groups_of_compressed_tensors_are_told_apart_by_their_tensors(tiny, tmp_path):
    four, eight = quantised.compressed("pack-quantized", num_bits=4, **GROUPS), quantised.compressed("int-quantized")
    groups = dict(
        four.config["config_groups"], other=eight.config["config_groups"]["group_0"] | dict(format="int-quantized")
    )
    groups["group_0"] = groups["group_0"] | dict(format="pack-quantized")
    both = dict(eight.config, config_groups=groups, format="mixed-precision")
    folder, dense = quantised.save(tiny("llama").folder, tmp_path / "1", four, lambda module: "mlp" in module)
    second = Format(both, eight.write)
    is_attention = lambda module: "self_attn" in module  # noqa: E731
    folder, _ = quantised.save(folder, tmp_path / "2", second, is_attention)
    _, dense = quantised.save(dense, tmp_path / "3", second, is_attention)
    decoder = load_decoder(folder)
    assert isinstance(decoder.weights.layers[0].qkv, Int8Linear)
    assert isinstance(decoder.weights.layers[0].mlp.up, Int4Linear)
    assert relative_error(paged_logits(decoder, SEQUENCES)[0], logits_of(dense)) <= BAR


def test_zeros_of_whole_words_are_carried_over(tiny, tmp_path):
    """A tool takes one off whole words, so that a zero of nought borrows from the next."""
    form = quantised.gptq(4, 32)
    folder, _ = quantised.save(tiny("llama").folder, tmp_path / "1", form)
    second, _ = quantised.save(tiny("llama").folder, tmp_path / "2", quantised.gptq(4, 32, is_v2=True))
    words = {}

    def zero(tensors):
        for name in tensors:
            if name.endswith(".qzeros"):
                tensors[name] &= ~0xF
                words[name] = tensors[name] - 0x11111111

    rewrite(second, zero)
    rewrite(folder, lambda tensors: tensors.update(words))
    assert all(bool(((word & 15) == 15).all()) for word in words.values())
    assert relative_error(logits_of(folder), logits_of(second)) == 0


def test_biases_of_zeros_for_products_that_have_none_are_passed_over(stored, tmp_path):
    folder, _ = quantised.save(stored("awq").dense, tmp_path, CASES["awq"].form)
    expected = logits_of(folder)
    name = "model.layers.1.self_attn.q_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(64, dtype=torch.float16)}))
    assert relative_error(logits_of(folder), expected) == 0
    rewrite(folder, lambda tensors: tensors[name].fill_(1e-3))
    with pytest.raises(ConfigurationError, match=f"no place in the model.*{name}"):
        logits_of(folder)


@pytest.mark.parametrize("number", [0, 3])
def test_an_order_that_says_nothing_is_none(stored, tmp_path, number):
    folder, dense = quantised.save(stored("gptq").dense, tmp_path, CASES["gptq"].form)
    rewrite(folder, each(".g_idx", lambda order: torch.full_like(order, number)))
    assert relative_error(logits_of(folder), logits_of(dense)) <= BAR
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(".g_idx")])
    assert relative_error(logits_of(folder), logits_of(dense)) <= BAR
