"""Encoder-decoders on the device, driven by the engine core's own loop and scheduler, against transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from common.errors import ConfigurationError
from common.job import PenaltyKind, SamplingParams
from common.settings import WorkerSettings
from tests.support import tiny_t5
from tests.support.engine_run import Engine, Run
from tests.support.lockstep import run_ranks
from worker.engine.device import TOKEN_ON_DEVICE, RowInit, StepPlan, StepResult
from worker.engine.scheduler import Scheduler
from worker.model.t5 import T5
from worker.parallel.group import Group
from worker.pipe import Ready, Submit
from worker.runner.load import load_device
from worker.runner.rows import Rows
from worker.runner.torch_device import TorchDevice

NUM_GREEDY = 48
BLOCK_SIZE = 16


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Callable[[str], str]:
    torch.set_num_threads(1)
    return cache(lambda name: str(tiny_t5.save(name, tmp_path_factory.mktemp(name))))


@pytest.fixture()
def load(folders) -> Callable[..., tuple[TorchDevice, Ready]]:
    """Load a tiny model, or a rank's part of it; options as in WorkerSettings."""

    def make(name: str = "t5", group: Group | None = None, **options) -> tuple[TorchDevice, Ready]:
        settings = dict(model_id=folders(name), threads=1, kv_tokens=2048, dtype="float64") | options
        return load_device(WorkerSettings(**settings), lambda *_: None, group)

    return make


def source(seed: int, length: int) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def submit(name: str, ids: list[int], output: list[int] | None = None, **params) -> Submit:
    fields = dict(max_new_tokens=NUM_GREEDY) | params
    return Submit(
        request_id=name, epoch=1, prompt_ids=ids, output_ids=output or [],
        params=SamplingParams(**fields), eos_token_ids=[],
    )  # fmt: skip


def run_all(loaded: tuple[TorchDevice, Ready], messages: list[Submit]) -> Run:
    run = Run(Engine(*loaded))
    for message in messages:
        run.submit(message)
    run.finish()
    return run


def reference(name: str, ids: list[int], dtype=torch.float32) -> tuple[list[int], float]:
    """Transformers' greedy tokens, and the smallest margin between first and second over the largest logit."""
    with torch.no_grad():
        made = tiny_t5.build(name, dtype).generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=NUM_GREEDY,
            do_sample=False,
            # its cache has as many layers as the encoder, which may be fewer than the decoder's
            use_cache=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.cat(made.logits)
    best = logits.topk(2).values
    return made.sequences[0, 1:].tolist(), float((best[:, 0] - best[:, 1]).min() / logits.abs().max())


SOURCES = {"long": source(1, 200), "short": source(2, 3), "middle": source(3, 33)}


@pytest.mark.parametrize("name", tiny_t5.CASES)
def test_greedy_tokens_equal_transformers(load, name):
    run = run_all(load(name, dtype="float32"), [submit(key, ids) for key, ids in SOURCES.items()])
    assert run.scheduler.stats.batch_max == 3
    num_sure = 0
    for key, ids in SOURCES.items():
        expected, margin = reference(name, ids)
        got, finish = run.outcome(key)
        assert len(got) == NUM_GREEDY and finish == "length"
        shared = next((i for i, (a, b) in enumerate(zip(got, expected)) if a != b), NUM_GREEDY)
        assert shared > 0, "the first token already differs"
        if margin > 1e-4:
            assert got == expected
            num_sure += 1
    assert num_sure >= 2


PARAMS = [
    dict(),
    dict(do_sample=True, temperature=1.3, seed=5),
    dict(do_sample=True, top_p=0.8, top_k=40, seed=2**63 + 5, repetition_penalty=1.3),
    dict(frequency_penalty=1.5, presence_penalty=0.5, penalty_kind=PenaltyKind.OPENAI),
]


def mixed_messages() -> list[Submit]:
    return [
        submit(str(number), source(number, 5 + 17 * number % 83), **PARAMS[number % len(PARAMS)])
        for number in range(12)
    ]


def test_in_float64_company_and_preemption_change_no_token(load, monkeypatch):
    # without the forecast of memory more requests move in than can stay
    monkeypatch.setattr(Scheduler, "_fits_later", lambda *_: True)
    options = dict(kv_tokens=448, max_batch_prefill_tokens=100, max_num_seqs=8, max_total_tokens=200)
    together = run_all(load("flan", **options), mixed_messages())
    stats = together.scheduler.stats
    assert stats.batch_max >= 6
    assert stats.preemptions >= 2
    assert stats.encoder_passes == len(mixed_messages()) + stats.preemptions
    alone = load("flan")
    for message in mixed_messages():
        got = together.outcome(message.request_id)
        assert got == run_all(alone, [message]).outcome(message.request_id), message.params
        assert len(got[0]) == NUM_GREEDY
    assert together.outcome("0")[0] == reference("flan", mixed_messages()[0].prompt_ids, torch.float64)[0]


def test_a_row_that_keeps_its_last_encoders_output_shows(load, monkeypatch):
    move_in = Rows._move_in

    def forget(rows: Rows, init: RowInit) -> None:
        before = rows.cross_tables[init.row].copy(), int(rows.cross_lengths[init.row])
        move_in(rows, init)
        if before[1]:
            rows.cross_tables[init.row], rows.cross_lengths[init.row] = before

    messages = [submit("a", SOURCES["middle"]), submit("b", SOURCES["long"])]
    right = run_all(load(max_num_seqs=1), messages).outcome("b")
    monkeypatch.setattr(Rows, "_move_in", forget)
    assert run_all(load(max_num_seqs=1), messages).outcome("b") != right


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("cut", [1, 17, 47])
def test_a_migrated_request_goes_on_as_if_undisturbed(load, params, cut):
    tokens, _ = run_all(load(), [submit("a", SOURCES["middle"], **params)]).outcome("a")
    assert len(tokens) == NUM_GREEDY
    second = run_all(load(), [submit("a", SOURCES["middle"], tokens[:cut], **params)])
    assert second.outcome("a")[0] == tokens[cut:]


def test_penalties_count_the_answer_only(load):
    loaded, params = load(), dict(frequency_penalty=50.0, penalty_kind=PenaltyKind.OPENAI)

    def tokens(ids: list[int], **params) -> list[int]:
        return run_all(loaded, [submit("a", ids, **params)]).outcome("a")[0]

    sources = [source(seed, 200) for seed in range(20)]
    ids = next(ids for ids in sources if tokens(ids, max_new_tokens=1)[0] in ids)
    free, penalised = tokens(ids), tokens(ids, **params)
    assert penalised[0] == free[0]
    assert len(set(free)) < len(set(penalised)) == NUM_GREEDY


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_pick_the_tokens_of_one(load, size):
    messages = [submit(str(index), source(index, 20 + index), **params) for index, params in enumerate(PARAMS)]

    def outcomes(group: Group | None = None) -> list[list[int]]:
        run = run_all(load("flan", group), messages)
        return [run.outcome(message.request_id)[0] for message in messages]

    expected = outcomes()
    assert len({tuple(tokens) for tokens in expected}) == len(messages)
    assert run_ranks(size, outcomes) == [expected] * size


# Plans made by hand.


def ints(values) -> np.ndarray:
    return np.array(list(values), dtype=np.int32)


def plan(rows, num_tokens, starts, tokens, blocks=(), new_rows=()) -> StepPlan:
    return StepPlan(
        step=1, rows=ints(rows), num_tokens=ints(num_tokens), starts=ints(starts), tokens=ints(tokens),
        num_drafts=ints(0 for _ in rows), samples=np.ones(len(rows), np.bool_), block_rows=ints(b[0] for b in blocks),
        block_offsets=ints(b[1] for b in blocks), block_ids=ints(b[2] for b in blocks),
        new_rows=list(new_rows), freed_rows=ints([]),
    )  # fmt: skip


def init(row: int, encoder_ids: list[int], cross_blocks: list[int]) -> RowInit:
    return RowInit(
        row=row, request_id=str(row), params=SamplingParams(max_new_tokens=9), prompt_ids=ints([tiny_t5.START_ID]),
        output_ids=ints([]), stop_ids=ints([]), encoder_ids=ints(encoder_ids), cross_blocks=ints(cross_blocks),
    )  # fmt: skip


def first_step(device: TorchDevice, row: int, ids: list[int], cross_blocks: list[int], block: int) -> StepResult:
    made = plan([row], [1], [0], [tiny_t5.START_ID], [(row, 0, block)], [init(row, ids, cross_blocks)])
    device.forward(made)
    return device.collect(device.sample(made))


def test_an_encoder_writes_its_own_pages_only(load):
    device, _ = load()
    device.pages.fill_(3.0)
    first_step(device, 4, source(1, 20), [6, 2], 9)
    changed = (device.pages != 3.0).any(-1).any(-1).all(0).all(0)
    expected = torch.zeros_like(changed)
    expected[[6, 2, 9]] = True
    assert torch.equal(changed, expected)
    assert not device.pages[:, :, 2, 4:].any() and not device.pages[:, :, 9, 1:].any()


def test_rows_that_arrive_later_join_those_that_decode(load):
    device, _ = load()
    sources = {3: source(1, 40), 0: source(2, 5)}
    first = first_step(device, 3, sources[3], [7, 1, 4], 2)
    tokens, blocks = [tiny_t5.START_ID, TOKEN_ON_DEVICE], [(0, 0, 5)]
    made = plan([0, 3], [1, 1], [0, 1], tokens, blocks, [init(0, sources[0], [8])])
    device.forward(made)
    second = device.collect(device.sample(made))
    assert [first.ids[0], second.ids[1]] == reference("t5", sources[3], torch.float64)[0][:2]
    assert second.ids[0] == reference("t5", sources[0], torch.float64)[0][0]


def test_ids_outside_the_vocabulary_are_an_error_of_their_row_only(load):
    device, ready = load()
    good, bad = source(1, 6), [5, ready.vocab_size, 7]
    alone = first_step(device, 0, good, [1], 2)
    assert alone.errors == {}
    failed = first_step(device, 1, bad, [3], 4)
    assert list(failed.errors) == [0] and "vocabulary" in failed.errors[0]
    again = first_step(device, 1, good, [3], 4)
    assert (again.errors, again.ids[0], again.logprobs[0]) == ({}, alone.ids[0], alone.logprobs[0])


def test_what_others_left_in_pages_harms_nobody(load):
    device, _ = load()
    ids = source(1, 20)
    good = first_step(device, 0, ids, [1, 2], 3)
    device.pages[:, :, 1:] = math.nan
    again = first_step(device, 1, ids, [6, 5], 7)
    assert (again.errors, again.ids[0], again.logprobs[0]) == ({}, good.ids[0], good.logprobs[0])


# Loading.


def test_ready_says_how_answers_begin_and_that_distances_are_free(load):
    device, ready = load("mt5", dtype="float32")
    assert isinstance(device._model, T5)
    assert ready.decoder_start_id == tiny_t5.START_ID
    assert device.pages.shape == (1, 2, 129, BLOCK_SIZE, 4, 24)
    assert (ready.max_total_tokens, ready.max_input_tokens) == (512, 511)
    _, longer = load("mt5", max_total_tokens=1500)
    assert (longer.max_total_tokens, longer.max_input_tokens) == (1500, 1499)
    assert not any("instead" in reason for reason in [*ready.reasons, *longer.reasons])


def test_a_start_says_that_there_is_no_prefix_to_share(load):
    _, ready = load()
    assert [reason for reason in ready.reasons if reason.startswith("prefix caching off: ")] == ready.reasons[-1:]
    _, ready = load(prefix_caching=False)
    assert not any("prefix" in reason for reason in ready.reasons), "nobody thinks that there is"


def test_what_is_lowered_gets_a_reason(load):
    _, ready = load(max_batch_prefill_tokens=100)
    assert ready.max_input_tokens == 100
    assert any("max_input_tokens 100 instead of 511" in reason and "encoder" in reason for reason in ready.reasons)
    _, ready = load(kv_tokens=256)
    assert ready.max_total_tokens == 256 - 2 * BLOCK_SIZE
    with pytest.raises(ConfigurationError, match="at least 48, three blocks"):
        load(kv_tokens=32)
    with pytest.raises(ConfigurationError, match="--dtype float16"):
        load(dtype="float16")


def test_dummy_weights_need_a_config_only(load):
    _, ready = load(load_format="dummy", dtype="auto")
    assert ready.dtype == "bfloat16"
    run = run_all(load(load_format="dummy", dtype="auto"), [submit("a", SOURCES["short"])])
    assert len(run.outcome("a")[0]) == NUM_GREEDY
