"""The device, driven by the engine core's own loop and scheduler, against transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import pytest
import torch

from common.job import PenaltyKind, SamplingParams
from tests.support import tiny_models
from tests.support.kv_types import KV_TYPES, share_scales
from worker.attention.pages import read_pages
from worker.engine.device import TOKEN_ON_DEVICE, RowInit, StepPlan
from worker.engine.loop import EngineLoop
from worker.engine.pacing import PrefillPacer
from worker.engine.scheduler import Scheduler, limits_of
from worker.pipe import Step, Submit
from worker.runner.rows import TokenCounts

NUM_GREEDY = 48


def ints(values) -> np.ndarray:
    return np.array(list(values), dtype=np.int32)


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Engine:
    """Loop, scheduler and device in one thread, run until nothing is left."""

    device: object
    ready: object
    ids: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    largest_batch: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(limits_of(self.ready, prefix_caching=True))
        self.inbox: SimpleQueue = SimpleQueue()
        pacer = PrefillPacer(self.ready.max_batch_prefill_tokens, 0.0)
        self.loop = EngineLoop(self.device, self.scheduler, pacer, self.inbox, self._receive, lambda: 0.0)

    def submit(self, name: str, ids: list[int], output: list[int] | None = None, **params) -> None:
        fields = dict(max_new_tokens=NUM_GREEDY) | params
        self.ids[name] = list(output or [])
        self.inbox.put(
            Submit(
                request_id=name, epoch=1, prompt_ids=ids, output_ids=output or [],
                params=SamplingParams(**fields), eos_token_ids=[],
            )
        )  # fmt: skip

    def run(self) -> dict[str, list[int]]:
        while not self.inbox.empty() or self.loop._has_work():
            self.loop.take_messages()
            self.loop.run_pass()
            self.scheduler.check()
        return self.ids

    def _receive(self, step: Step) -> None:
        for run in step.runs:
            self.ids[run.request_id] += run.ids
            if run.error:
                self.errors[run.request_id] = run.error
        self.largest_batch = max(self.largest_batch, int(step.stats.get("batch_max", 0)))
        self.loop._uncommitted.commit(step.step)


def reference(name: str, ids: list[int], dtype=torch.float32) -> tuple[list[int], float]:
    """Transformers' greedy tokens, and the smallest margin between first and second over the largest logit."""
    model = tiny_models.build(name).to(dtype)
    with torch.no_grad():
        made = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=NUM_GREEDY,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.cat(made.logits)
    best = logits.topk(2).values
    return made.sequences[0, len(ids) :].tolist(), float((best[:, 0] - best[:, 1]).min() / logits.abs().max())


OF_EVERY_KIND = (
    *("llama", "mistral_window_head_dim", "qwen3", "gemma2", "gemma3", "mixtral", "qwen2_moe", "cohere"),
    *("gpt2", "bloom", "falcon_rw", "falcon_40b", "gpt_neox", "opt_350m", "mpt_12_heads_clip", "gptj"),
)
"""Windows, slopes, softcaps, learned positions, every form of residual: what a device might get wrong of a step."""
PROMPTS = {"long": prompt(1, 70), "short": prompt(2, 3), "middle": prompt(3, 21)}


@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_greedy_tokens_equal_transformers(load, name):
    engine = Engine(*load(name, dtype="float32", max_batch_prefill_tokens=32))
    for key, ids in PROMPTS.items():
        engine.submit(key, ids)
    got = engine.run()
    assert engine.largest_batch == 3
    assert engine.scheduler.snapshot()["chunked_prompts"] >= 1
    for key, ids in PROMPTS.items():
        expected, margin = reference(name, ids)
        if margin > 1e-4:
            assert got[key] == expected
        else:
            shared = next((i for i, (a, b) in enumerate(zip(got[key], expected)) if a != b), NUM_GREEDY)
            assert shared > 0, "the first token already differs"
    assert sum(reference(name, ids)[1] > 1e-4 for ids in PROMPTS.values()) >= 2


PARAMS = [
    dict(),
    dict(do_sample=True, temperature=1.3, seed=5),
    dict(do_sample=True, top_p=0.8, top_k=40, seed=2**63 + 5, repetition_penalty=1.3),
    dict(frequency_penalty=1.5, presence_penalty=0.5, penalty_kind=PenaltyKind.OPENAI),
    dict(do_sample=True, typical_p=0.7, frequency_penalty=0.8, seed=9),
    dict(do_sample=True, min_p=0.05, temperature=0.7, seed=11, repetition_penalty=0.8),
]


def mixed_requests() -> dict[str, tuple[list[int], dict]]:
    shared = prompt(50, 40)
    return {
        str(number): (shared[: 8 * (number % 5)] + prompt(number, 5 + 7 * number % 43), PARAMS[number % len(PARAMS)])
        for number in range(24)
    }


def test_in_float64_company_preemption_and_prefixes_change_no_token(load, monkeypatch):
    # without the forecast of memory more requests move in than can stay
    monkeypatch.setattr(Scheduler, "_fits_later", lambda *_: True)
    crowd = Engine(*load("qwen2_late_window", dtype="float64", kv_tokens=640, max_batch_prefill_tokens=48,
                         max_num_seqs=16, max_total_tokens=200))  # fmt: skip
    for name, (ids, params) in mixed_requests().items():
        crowd.submit(name, ids, **params)
    together, stats = crowd.run(), crowd.scheduler.snapshot()
    assert crowd.largest_batch >= 8
    assert stats["preemptions"] >= 3
    assert stats["prefix_hits"] >= 3
    assert stats["chunked_prompts"] >= 3
    for name, (ids, params) in mixed_requests().items():
        alone = Engine(*load("qwen2_late_window", dtype="float64"))
        alone.submit(name, ids, **params)
        assert together[name] == alone.run()[name], params
    ids = mixed_requests()["0"][0]
    assert together["0"] == reference("qwen2_late_window", ids, torch.float64)[0]


def crowd_of_ten(load) -> dict[str, list[int]]:
    engine = Engine(*load("llama", dtype="float64", kv_cache_dtype="int8", kv_tokens=384, max_batch_prefill_tokens=48,
                          max_num_seqs=16, max_total_tokens=200))  # fmt: skip
    for name in TEN:
        ids, params = mixed_requests()[name]
        engine.submit(name, ids, **params)
    tokens, stats = engine.run(), engine.scheduler.snapshot()
    assert engine.device.pages.dtype is torch.int8
    assert engine.largest_batch >= 5
    assert min(stats["preemptions"], stats["prefix_hits"], stats["chunked_prompts"]) >= 3
    return tokens


TEN = [str(number) for number in range(10)]


def test_in_8_bits_company_preemption_and_prefixes_change_no_token(load, monkeypatch):
    monkeypatch.setattr(Scheduler, "_fits_later", lambda *_: True)
    together, alone = crowd_of_ten(load), {}
    for name in TEN:
        ids, params = mixed_requests()[name]
        engine = Engine(*load("llama", dtype="float64", kv_cache_dtype="int8"))
        engine.submit(name, ids, **params)
        alone |= engine.run()
    assert together == alone
    moved = Engine(*load("llama", dtype="float64", kv_cache_dtype="int8"))
    for name in TEN:
        ids, params = mixed_requests()[name]
        moved.submit(name, ids, alone[name][:17], **params)
    assert moved.run() == alone, "a migrated request went on in another way"
    share_scales(monkeypatch)
    assert crowd_of_ten(load) != alone, "a token's bytes depended on its company, and nobody noticed"


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("cut", [1, 17, 47])
def test_a_migrated_request_goes_on_as_if_undisturbed(load, params, cut):
    whole = Engine(*load("llama", dtype="float64"))
    whole.submit("a", PROMPTS["middle"], **params)
    tokens = whole.run()["a"]
    assert len(tokens) == NUM_GREEDY
    second = Engine(*load("llama", dtype="float64"))
    second.submit("a", PROMPTS["middle"], tokens[:cut], **params)
    assert second.run()["a"] == tokens


def test_penalties_that_forget_the_log_are_told_apart(load, monkeypatch):
    params = dict(frequency_penalty=1.5, presence_penalty=0.5, penalty_kind=PenaltyKind.OPENAI)
    whole = Engine(*load("llama", dtype="float64"))
    whole.submit("a", PROMPTS["middle"], **params)
    tokens = whole.run()["a"]
    start = TokenCounts.start
    monkeypatch.setattr(TokenCounts, "start", lambda self, row, ids, output: start(self, row, ids, output[:0]))
    second = Engine(*load("llama", dtype="float64"))
    second.submit("a", PROMPTS["middle"], tokens[:17], **params)
    assert second.run()["a"] != tokens


def test_another_seed_gives_another_text(load):
    texts = []
    for seed in (1, 2):
        engine = Engine(*load("llama", dtype="float64"))
        engine.submit("a", PROMPTS["short"], do_sample=True, seed=seed)
        texts.append(engine.run()["a"])
    assert texts[0] != texts[1]


# ------------------------------------------------------------------ plans written by hand


def plan(rows=(), counts=(), starts=(), tokens=(), samples=(), blocks=(), new=(), freed=(), drafts=()) -> StepPlan:
    return StepPlan(
        step=1,
        rows=ints(rows),
        num_tokens=ints(counts),
        num_drafts=ints(drafts or [0] * len(rows)),
        starts=ints(starts),
        tokens=ints(tokens),
        samples=np.array(samples, dtype=bool),
        block_rows=ints(row for row, _, _ in blocks),
        block_offsets=ints(offset for _, offset, _ in blocks),
        block_ids=ints(block for _, _, block in blocks),
        new_rows=list(new),
        freed_rows=ints(freed),
    )


def init(row: int, ids: list[int], **params) -> RowInit:
    return RowInit(
        row=row, request_id=str(row), params=SamplingParams(max_new_tokens=9, **params), prompt_ids=ints(ids),
        output_ids=ints([]), stop_ids=ints([]),
    )  # fmt: skip


def step(device, made: StepPlan):
    device.forward(made)
    return device.collect(device.sample(made))


def test_results_are_in_the_order_of_the_plan_and_only_of_sampling_rows(load):
    device, _ = load()
    assert device.depth == 0
    ids = {5: prompt(1, 4), 2: prompt(2, 6), 7: prompt(3, 3)}
    blocks = [(5, 0, 3), (2, 0, 1), (7, 0, 9)]
    new = [init(row, ids[row]) for row in ids]
    first = step(device, plan([5, 2, 7], [4, 5, 3], [0, 0, 0], ids[5] + ids[2][:5] + ids[7], [1, 0, 1], blocks, new))
    assert len(first.ids) == len(first.logprobs) == len(device._logits) == 2
    assert first.ids.dtype == np.int32
    assert first.top_tokens == []
    second = step(
        device,
        plan([2, 7, 5], [1, 1, 1], [5, 3, 4], [ids[2][5], TOKEN_ON_DEVICE, TOKEN_ON_DEVICE], [1, 1, 1]),
    )
    for row, token in ((5, first.ids[0]), (7, first.ids[1])):
        logits = tiny_models.build("llama")(torch.tensor([[*ids[row], token]])).logits[0, -1].detach()
        assert second.ids[{7: 1, 5: 2}[row]] == int(logits.argmax())
        assert second.logprobs[{7: 1, 5: 2}[row]] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)


def test_a_plan_in_which_nobody_samples_gives_an_empty_result(load):
    device, _ = load()
    result = step(device, plan([1], [4], [0], prompt(1, 4), [0], [(1, 0, 2)], [init(1, prompt(1, 8))]))
    assert len(result.ids) == 0
    assert result.errors == {}


def test_a_reused_row_remembers_nothing(load):
    device, _ = load()
    ids, params = prompt(4, 6), dict(repetition_penalty=3.0, frequency_penalty=2.0)
    fresh = step(device, plan([1], [6], [0], ids, [1], [(1, 0, 2)], [init(1, ids, **params)]))
    other = prompt(5, 6)
    step(device, plan([1], [6], [0], other, [1], [(1, 0, 3)], [init(1, other, **params)], [1]))
    again = step(device, plan([1], [6], [0], ids, [1], [(1, 0, 4)], [init(1, ids, **params)], [1]))
    assert again.ids.tolist() == fresh.ids.tolist()
    assert again.logprobs.tolist() == fresh.logprobs.tolist()
    spoiled = step(device, plan([1], [6], [0], ids, [1], [(1, 0, 4)], [init(1, ids)], [1]))
    assert spoiled.logprobs.tolist() != fresh.logprobs.tolist()


def test_ids_outside_the_vocabulary_are_an_error_of_their_row_only(load):
    device, ready = load()
    good, bad = prompt(1, 4), [5, ready.vocab_size, 7]
    alone = step(device, plan([0], [4], [0], good, [1], [(0, 0, 1)], [init(0, good)]))
    new = [init(0, good, repetition_penalty=1.0), init(1, bad, repetition_penalty=2.0)]
    both = step(device, plan([1, 0], [3, 4], [0, 0], bad + good, [1, 1], [(1, 0, 2), (0, 0, 1)], new))
    assert list(both.errors) == [0]
    assert "vocabulary" in both.errors[0]
    assert both.ids[1] == alone.ids[0]
    later = step(device, plan([1], [4], [0], good, [1], [(1, 0, 2)], [init(1, good)], [1]))
    assert later.errors == {}
    assert later.ids[0] == alone.ids[0]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", *KV_TYPES])
def test_what_others_left_in_pages_harms_nobody(load, kv_cache_dtype):
    """Whoever failed, was preempted or gave up in the middle of a prompt."""
    device, _ = load(kv_cache_dtype=kv_cache_dtype)
    ids, parts = prompt(1, 40), [(0, 20), (20, 19), (39, 1)]

    def tokens(row: int) -> list[int]:
        news, tables = [init(row, ids)], [(row, 0, 3), (row, 1, 1)]
        steps = []
        for start, size in parts:
            part = plan([row], [size], [start], ids[start : start + size], [1], tables, news)
            steps.append(step(device, part))
            news, tables = [], [(row, 2, 2)] if start == 0 else []
        assert not any(each.errors for each in steps)
        return [int(each.ids[0]) for each in steps]

    expected = tokens(0)
    device.pages[:, :, 1:].view(torch.uint8).fill_(255)
    assert not read_pages(device.pages[0, 0], torch.arange(1, 4), torch.float32).isfinite().any()
    assert tokens(1) == expected


@pytest.mark.parametrize("attention", ["auto", "cpu"])
def test_a_step_writes_its_own_pages_only(load, attention):
    device, _ = load(attention=attention)
    reads_whole_pages = device.model.attention.reads_whole_pages
    assert reads_whole_pages is (attention == "cpu")
    device.pages.fill_(3.0)
    ids = prompt(1, 20)
    step(device, plan([4], [20], [0], ids, [1], [(4, 0, 6), (4, 1, 2)], [init(4, ids)]))
    changed = (device.pages != 3.0).any(-1).any(-1).all(0).all(0)
    expected = torch.zeros_like(changed)
    expected[6], expected[2, : None if reads_whole_pages else 4] = True, True
    assert torch.equal(changed, expected)
    assert not reads_whole_pages or not device.pages[:, :, 2, 4:].any()
