"""Adapters beside the weights against transformers with the adapters merged into them, in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.support import tiny_models, tiny_t5
from tests.support.adapters import is_transposed, merged, shape_of, slots_of, write_adapter
from tests.support.lockstep import run_ranks
from tests.support.paged import load_decoder, paged_logits, relative_error
from worker.model import lora
from worker.model.config import read_config
from worker.model.decoder import Decoder
from worker.model.families import read_spec
from worker.model.lora import Change, LoraSlots, LoraStep, Target
from worker.model.peft import read_adapter
from worker.model.quant.choice import MADE
from worker.model.weights import num_bytes_of
from worker.parallel.group import Alone, Group

TOLERANCE = 2e-5
MAX_RANK = 64
BASE = -1
SLOT_OF_ROW = np.array([0, 1, BASE, 2, 0])
"""Three adapters and none in a batch of five."""

LAYOUTS = [
    *("llama", "llama_biases_llama3", "qwen3_biases_tied", "phi3", "ernie4_5", "glm4", "gemma3", "cohere", "mixtral"),
    *("qwen2_moe", "bloom", "falcon_40b", "falcon_7b", "gpt2", "gpt_bigcode_mqa", "gpt_neox", "gptj", "opt_350m"),
    *("mpt_12_heads_clip", "phi"),
]
"""Every way of storing matrices that there is: one tensor or three, grouped by heads, transposed, interleaved, gate and
up in one; with biases, norms, clamps and experts behind."""
SPLIT = ["llama", "phi3", "cohere", "bloom", "gpt2", "gpt_bigcode_mqa", "falcon_40b"]


@dataclass
class Case:
    """A tiny model, three adapters for it, and what transformers says with each of them merged and without."""

    folder: Path
    adapters: list[Path]
    sequences: list[list[int]]
    expected: list[torch.Tensor]
    without: list[torch.Tensor]


@pytest.fixture(scope="module")
def cases(tiny, tmp_path_factory) -> Callable[[str], Case]:
    @cache
    def get(name: str) -> Case:
        model, folder = tiny(name), tmp_path_factory.mktemp(name)
        modules = [module for module, _ in model.reference.named_modules() if module in slots_of(name).targets]
        attention = [module for module in modules if "att" in module]
        adapters = [
            write_adapter(folder / "a", model.reference, attention, rank=2, seed=1),
            write_adapter(folder / "b", model.reference, modules[1::2], rank=5, seed=2, use_rslora=True),
            write_adapter(
                folder / "c",
                model.reference,
                modules,
                rank=3,
                ranks={modules[0]: 7},
                alpha_pattern={modules[-1]: 11},
                seed=3,
                dtype=torch.bfloat16,
            ),
        ]
        models = [*(merged(model.reference, adapter) for adapter in adapters), model.reference]
        sequences = [*model.sequences, model.sequences[0][:20]]
        with torch.no_grad():
            pairs = list(zip(SLOT_OF_ROW, sequences, strict=True))
            expected = [models[slot](torch.tensor([ids])).logits[0] for slot, ids in pairs]
            without = [model.reference(torch.tensor([ids])).logits[0] for ids in sequences]
        return Case(model.folder, adapters, sequences, expected, without)

    return get


def load(
    case: Case, group: Group | None = None, order: tuple[int, ...] = (0, 1, 2), **options
) -> tuple[Decoder, LoraSlots]:
    """The model with the adapters in slots in this order."""
    dtype = options.setdefault("dtype", torch.float32)
    slots = LoraSlots(read_spec(read_config(case.folder))[1], dtype)
    decoder = load_decoder(case.folder, group=group or Alone(), adapters=slots, **options)
    for slot, number in enumerate(order):
        put(slots, slot, case.adapters[number])
    return decoder, slots


def put(slots: LoraSlots, slot: int, folder: Path) -> None:
    stored = read_adapter(folder, slots.targets, MAX_RANK)
    slots.put(slot, stored.rank, stored.targets, stored.changes(slots.dtype))


def run(decoder: Decoder, slots: LoraSlots, case: Case) -> tuple[list[torch.Tensor], list[LoraStep | None]]:
    """Logits of all sequences in mixed steps, each with the adapter of its row, and how the steps went."""
    steps: list[LoraStep | None] = []

    def begin(rows: np.ndarray) -> None:
        slots.use(SLOT_OF_ROW[rows])
        if len(set(rows.tolist())) >= 4:
            steps.append(slots.step)

    return paged_logits(decoder, case.sequences, on_step=begin)[0], steps


def error_of(case: Case, order: tuple[int, ...] = (0, 1, 2)) -> float:
    return relative_error(run(*load(case, order=order), case)[0], case.expected)


@pytest.fixture(params=["together", "together, part by part", "by adapter"])
def way(request, monkeypatch) -> str:
    if request.param == "by adapter":
        monkeypatch.setattr(lora, "FEW_COLUMNS", 0)
        monkeypatch.setattr(lora, "NARROW_SLOTS", 0)
    elif request.param == "together, part by part":
        monkeypatch.setattr(lora, "MOST_WITH_ZEROS", 0)
    return request.param


@pytest.mark.parametrize("name", LAYOUTS)
def test_three_adapters_and_none_in_one_batch_give_what_the_merged_models_give(cases, name, way):
    case = cases(name)
    decoder, slots = load(case)
    num_shared = sum(layer.shape[0] - len(layer._runs) for layer in slots._layers)
    has_parts = any(layer.shape[0] > 1 for layer in slots._layers)
    assert (num_shared > 0) == (has_parts and way != "together, part by part")
    logits, steps = run(decoder, slots, case)
    assert len(steps) >= 5, "steps of four rows and more, with all adapters and none in them"
    assert all(step is not None and (step.others is None) == (way == "by adapter") for step in steps)
    assert relative_error(logits, case.expected) <= TOLERANCE
    for row, slot in enumerate(SLOT_OF_ROW):
        difference = relative_error([case.without[row]], [case.expected[row]])
        assert (difference > 0.05) == (slot != BASE), "an adapter that changes nothing would show nothing"


def test_swapped_slots_show(cases):
    assert error_of(cases("llama"), order=(1, 0, 2)) > 10 * TOLERANCE


@torch.no_grad()
def test_a_forgotten_scale_shows(cases, monkeypatch):
    case = cases("llama")
    monkeypatch.setattr("worker.model.peft.LoraConfig.scale", lambda config, module, rank: 1.0)
    assert error_of(case) > 10 * TOLERANCE


def test_the_merge_is_the_definition_and_nothing_near_it(cases, tiny):
    case = cases("llama")
    slightly_more = merged(tiny("llama").reference, case.adapters[0], factor=1.001)
    with torch.no_grad():
        logits = slightly_more(torch.tensor([case.sequences[0]])).logits[0]
    assert relative_error([logits], case.expected[:1]) > TOLERANCE


def in_stored_order(target: Target, b: torch.Tensor) -> torch.Tensor:
    """The rows of B as they are stored, whatever the layout."""
    first = target.pieces[0].part.rows[0].start
    return b[first : first + sum(piece.part.num_rows for piece in target.pieces)]


@pytest.mark.parametrize("name", ["ernie4_5", "cohere", "gptj", "bloom", "falcon_40b", "gpt_neox"])
def test_rows_of_b_in_the_order_they_are_stored_in_show(cases, monkeypatch, name):
    monkeypatch.setattr(Target, "part_of_b", in_stored_order)
    assert error_of(cases(name)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_where_layouts_are_as_stored_that_order_is_right(cases, monkeypatch, name):
    """So that the test above shows the order and nothing else."""
    monkeypatch.setattr(Target, "part_of_b", in_stored_order)
    assert error_of(cases(name)) <= TOLERANCE


def test_an_adapter_lies_in_few_layers_when_it_says_so(cases, tiny, tmp_path):
    reference = tiny("llama").reference
    modules = [f"model.layers.1.self_attn.{which}_proj" for which in "qv"]
    folder = write_adapter(tmp_path, reference, modules, layers_to_transform=[1], target_modules=["q_proj", "v_proj"])
    case = cases("llama")
    decoder, slots = load(case, order=())
    put(slots, 0, folder)
    logits, _ = paged_logits(decoder, case.sequences[:1], on_step=lambda rows: slots.use(rows * 0))
    with torch.no_grad():
        expected = merged(reference, folder)(torch.tensor(case.sequences[:1])).logits[0]
    assert relative_error(logits, [expected]) <= TOLERANCE


# Ranks.


def split_logits(case: Case, size: int) -> list[torch.Tensor]:
    """Of ranks that are threads, side by side."""

    def work(group: Group) -> list[torch.Tensor]:
        return run(*load(case, group), case)[0]

    return [torch.cat(parts, 1) for parts in zip(*run_ranks(size, work), strict=True)]


@pytest.mark.parametrize("name", SPLIT)
def test_two_ranks_give_what_one_gives(cases, name, way):
    case = cases(name)
    assert relative_error(split_logits(case, 2), case.expected) <= TOLERANCE


def test_columns_of_another_rank_show(cases, monkeypatch):
    case = cases("llama")
    monkeypatch.setattr(Target, "part_of_a", lambda target, a: a[:, : len(target.pieces[0].part.columns)])
    assert relative_error(split_logits(case, 2), case.expected) > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_stay_within_their_error_bar(cases, way, dtype):
    case = cases("qwen3_biases_tied")
    logits, steps = run(*load(case, dtype=dtype), case)
    assert logits[0].dtype is dtype and len(steps) >= 5
    bar = 20 * torch.finfo(dtype).eps
    assert relative_error(logits, case.expected) <= bar
    assert relative_error(run(*load(case, order=(1, 0, 2), dtype=dtype), case)[0], case.expected) > bar


# Few bits below.


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere"])
@pytest.mark.parametrize("quantize", ["bitsandbytes", "bitsandbytes-nf4"])
def test_adapters_ride_beside_matrices_of_few_bits(cases, tiny, name, quantize):
    make = MADE[quantize].make
    case, reference = cases(name), copy.deepcopy(tiny(name).reference)
    with torch.no_grad():
        for target in set(slots_of(name).targets.values()):
            module = reference.get_submodule(target.name)
            upright = module.weight.t() if is_transposed(module) else module.weight
            upright.copy_(make(upright.contiguous()).dequantised())
        models = [*(merged(reference, adapter) for adapter in case.adapters), reference]
        pairs = zip(SLOT_OF_ROW, case.sequences, strict=True)
        expected = [models[slot](torch.tensor([ids])).logits[0] for slot, ids in pairs]
    logits, steps = run(*load(case, quantize=quantize), case)
    assert len(steps) >= 5
    assert relative_error(logits, expected) <= TOLERANCE
    assert relative_error(logits, case.expected) > 10 * TOLERANCE, "eight bits would look like all bits"


# What slots hold over time.


def test_slots_are_replaced_widened_and_narrowed_and_the_others_stay(cases):
    case = cases("llama")
    wide, narrow = case.adapters[2], case.adapters[0]
    decoder, slots = load(case, order=(0, 1, 2))
    ranks = []
    for slot, folder in ((2, narrow), (2, wide), (0, wide), (2, narrow), (3, narrow), (0, narrow), (2, wide)):
        put(slots, slot, folder)
        ranks.append(max(slots._ranks))
    assert ranks == [5, 7, 7, 7, 7, 5, 7]
    assert relative_error(run(decoder, slots, case)[0], case.expected) <= TOLERANCE


@pytest.mark.parametrize("num_lost", [1, 10**6])
@pytest.mark.parametrize("num_had", [0, 1, 4, 9])
def test_an_adapter_that_some_layer_has_no_memory_for_leaves_the_others_as_they_are(
    cases, way, monkeypatch, num_had: int, num_lost: int
) -> None:
    """Whether or not there is some again to give back what it took."""
    case = cases("llama")
    decoder, slots = load(case, order=(0, 1, 0))
    before, asked, zeros = run(decoder, slots, case)[0], count(), torch.zeros

    def fail(*arguments, **options) -> torch.Tensor:
        if num_had <= next(asked) < num_had + num_lost:
            raise torch.OutOfMemoryError("no memory")
        return zeros(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lora.torch, "zeros", fail)
        with pytest.raises(torch.OutOfMemoryError):
            put(slots, 3, case.adapters[2])
        slots.clear(3)
    is_uneven = len({layer.shape[1:] for layer in slots._layers}) > 1
    assert is_uneven == (num_had > 1 and num_lost > 1)
    assert relative_error(run(decoder, slots, case)[0], before) <= TOLERANCE
    put(slots, 2, case.adapters[2])
    assert relative_error(run(decoder, slots, case)[0], case.expected) <= TOLERANCE
    assert len({layer.shape[1:] for layer in slots._layers}) == 1


def test_what_an_adapter_left_in_a_slot_is_gone_with_it(cases):
    case = cases("llama")
    decoder, slots = load(case, order=(2, 2, 2))
    for slot in range(3):
        put(slots, slot, case.adapters[slot])
    assert relative_error(run(decoder, slots, case)[0], case.expected) <= TOLERANCE


def test_without_adapters_nothing_is_taken_and_nothing_changes(cases):
    case = cases("llama")
    decoder, slots = load(case, order=())
    assert slots.growth(-1, 0, []) == 0
    slots.use(np.full(9, BASE))
    assert slots.step is None
    plain, _ = paged_logits(load_decoder(case.folder), case.sequences)
    logits, _ = paged_logits(decoder, case.sequences, on_step=lambda rows: slots.use(np.full(len(rows), BASE)))
    assert all(map(torch.equal, logits, plain))


def test_growth_is_what_the_slots_then_take(cases):
    case = cases("llama")
    decoder, slots = load(case, order=())
    taken = 0
    for slot, number in enumerate((0, 2, 1, 0)):
        stored = read_adapter(case.adapters[number], slots.targets, MAX_RANK)
        growth = slots.growth(slot, stored.rank, stored.targets)
        put(slots, slot, case.adapters[number])
        before, tensors = taken, [each for layer in slots._layers for each in (layer._a, *(r.b for r in layer._runs))]
        taken = num_bytes_of(*tensors)
        assert growth == taken - before > 0


def spoiled(stored_changes: Iterator[Change]) -> Iterator[Change]:
    for change in stored_changes:
        change.a[0, 0] = float("inf")
        yield change


def test_numbers_that_overflow_in_one_adapter_stay_with_its_tokens(cases, way):
    case = cases("llama")
    decoder, slots = load(case)
    stored = read_adapter(case.adapters[1], slots.targets, MAX_RANK)
    slots.put(1, stored.rank, stored.targets, spoiled(stored.changes(slots.dtype)))
    logits = run(decoder, slots, case)[0]
    others = [row for row, slot in enumerate(SLOT_OF_ROW) if slot != 1]
    assert not logits[1].isfinite().all()
    assert relative_error([logits[row] for row in others], [case.expected[row] for row in others]) <= TOLERANCE


# Names.


@pytest.mark.parametrize("name", [*tiny_models.CASES, *tiny_t5.CASES])
def test_adapters_find_every_matrix_under_the_name_that_transformers_gives_it(name):
    """Which is what PEFT writes; checkpoints may have others."""
    if name in tiny_t5.CASES:
        model = tiny_t5.build(name)
    else:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(tiny_models.config_of(name))
    targets = slots_of(name).targets
    found = {targets[module]: module for module, _ in model.named_modules() if module in targets}
    assert set(found) == set(targets.values())
    for target, module in found.items():
        assert target.shape == shape_of(model.get_submodule(module))
