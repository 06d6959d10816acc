"""Drafts on the device: tokens, log-probabilities and ends are those of single steps, and mistakes would show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.job import Adapter, LogprobKind, PenaltyKind, SamplingParams
from common.settings import WorkerSettings
from tests.support import tiny_models, tiny_t5
from tests.support.adapters import write_adapter
from tests.support.engine_run import Engine, Run
from tests.support.guesser import Guesser
from tests.support.lockstep import run_ranks
from worker.parallel.group import Group
from worker.pipe import Submit, TokenRun
from worker.runner import places
from worker.runner.load import load_device
from worker.runner.places import Places
from worker.runner.torch_device import TorchDevice

NUM_TOKENS = 24
MAX_DRAFTS = 6
PARAMS = [
    dict(),
    dict(num_top_logprobs=3),
    dict(min_tokens=18, stop_token_ids=tuple(range(60)), repetition_penalty=1.4),
    dict(do_sample=True, temperature=1.3, seed=5, num_top_logprobs=2, logprob_kind=LogprobKind.RAW),
    dict(do_sample=True, top_p=0.8, top_k=40, seed=2**63 + 5, repetition_penalty=1.3),
    dict(frequency_penalty=1.5, presence_penalty=0.5, penalty_kind=PenaltyKind.OPENAI),
    dict(do_sample=True, typical_p=0.7, frequency_penalty=0.8, seed=9),
    dict(do_sample=True, min_p=0.05, temperature=0.7, seed=11, repetition_penalty=0.8, stop_token_ids=tuple(range(9))),
]
OF_EVERY_KIND = ("llama", "mistral_window_head_dim", "gemma2", "mixtral", "bloom", "gpt2", "t5", "flan")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    torch.set_num_threads(1)
    known: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name)
            (tiny_t5 if name in tiny_t5.CASES else tiny_models).save(name, known[name])
        return known[name]

    return get


def load(folder: Path, group: Group | None = None, **options: object) -> Engine:
    fields = dict(model_id=str(folder), threads=1, kv_tokens=2048, dtype="float64", block_size=8) | options
    return Engine(*load_device(WorkerSettings(**fields), lambda *_: None, group))


def messages(adapter: Adapter | None = None) -> list[Submit]:
    prompts = [[(31 * number + 7 * place) % 250 for place in range(4 + 9 * number % 31)] for number in range(8)]
    fields = dict(epoch=1, output_ids=[], eos_token_ids=[])
    return [
        Submit(
            request_id=str(number),
            prompt_ids=prompts[number],
            params=SamplingParams(max_new_tokens=NUM_TOKENS, **PARAMS[number]),
            adapter=adapter if number % 2 else None,
            **fields,
        )
        for number in range(8)
    ]


@dataclass
class Answer:
    ids: list[int]
    finish: str
    logprobs: list[float]
    tops: list[list[tuple[int, float]]]


def answers(run: Run) -> dict[str, Answer]:
    return {name: _answer(runs) for name, runs in run.runs.items()}


def _answer(runs: list[TokenRun]) -> Answer:
    assert not any(run.error for run in runs), runs[-1].error
    columns = [[value for run in runs for value in getattr(run, name)] for name in ("ids", "logprobs", "top_tokens")]
    return Answer(columns[0], runs[-1].finish, *columns[1:])


def run_all(engine: Engine, submits: list[Submit], known: dict[str, Answer] | None = None) -> Run:
    """All requests together; with `known` answers there are drafts out of them."""
    run = Run(engine, max_drafts=MAX_DRAFTS if known else 0)
    if known:
        run.scheduler.speculator = Guesser(MAX_DRAFTS, lambda name: known[name].ids)
    for message in submits:
        run.submit(message)
    run.finish()
    if known:
        stats = run.scheduler.stats
        assert stats.batch_max == len(submits)
        assert stats.accepted_tokens >= 30
        assert stats.draft_tokens - stats.accepted_tokens >= 30
    return run


def assert_same(one: dict[str, Answer], other: dict[str, Answer]) -> None:
    for name, answer in one.items():
        assert (answer.ids, answer.finish) == (other[name].ids, other[name].finish), PARAMS[int(name)]
        assert answer.logprobs == pytest.approx(other[name].logprobs, abs=1e-6)
        assert [[token for token, _ in row] for row in answer.tops] == [
            [token for token, _ in row] for row in other[name].tops
        ]


@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_answers_are_those_of_single_steps(folder_of: Callable[[str], Path], name: str) -> None:
    engine = load(folder_of(name))
    single = answers(run_all(engine, messages()))
    assert {answer.finish for answer in single.values()} == {"length", "stop_sequence"}
    assert len(single["1"].tops) == len(single["1"].ids)
    assert_same(answers(run_all(engine, messages(), single)), single)


def test_adapters_go_through_drafts_too(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    engine = load(folder_of("llama"))
    modules = [f"model.layers.1.{name}_proj" for name in ("self_attn.q", "self_attn.o", "mlp.up", "mlp.down")]
    write_adapter(tmp_path / "adapter", tiny_models.build("llama"), modules)
    checked = engine.device.check_adapter("x", str(tmp_path / "adapter"))
    submits = messages(Adapter("x", checked.source, checked.digest))
    single = answers(run_all(engine, submits))
    assert single["1"].ids != answers(run_all(engine, messages()))["1"].ids
    assert_same(answers(run_all(engine, submits, single)), single)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_ranks_that_hold_parts_agree_on_what_is_kept(folder_of: Callable[[str], Path], name: str) -> None:
    single = answers(run_all(load(folder_of(name)), messages()))

    def on_rank(group: Group) -> dict[str, Answer]:
        return answers(run_all(load(folder_of(name), group), messages(), single))

    for found in run_ranks(2, on_rank):
        assert_same(found, single)


def keep_all(picks: np.ndarray, drafts: np.ndarray) -> int:
    return len(picks)


def keep_one_more(picks: np.ndarray, drafts: np.ndarray) -> int:
    is_wrong = np.flatnonzero(picks[:-1] != drafts)
    return min(int(is_wrong[0]) + 2, len(picks)) if len(is_wrong) else len(picks)


def same_position(self: Places) -> np.ndarray:
    return np.repeat(
        (self.plan.starts + self.plan.num_tokens - self.plan.num_drafts - 1)[self.plan.samples], self.counts
    )


WRONG = {
    "drafts are not compared": (places, "num_kept", keep_all),
    "a token behind a wrong draft is kept": (places, "num_kept", keep_one_more),
    "penalties forget drafts": (
        Places,
        "drafts_before",
        property(lambda self: [np.zeros(0, np.int32)] * len(self.rows)),
    ),
    "noise of one position for all": (Places, "positions", property(same_position)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_change_answers(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    engine = load(folder_of("llama"))
    single = answers(run_all(engine, messages()))
    monkeypatch.setattr(*WRONG[mistake])
    with pytest.raises(AssertionError):
        assert_same(answers(run_all(engine, messages(), single)), single)


class Spoiler(Guesser):
    """Always the one token behind a right one."""

    token = -1

    def drafts_of(self, request, most: int) -> list[int]:
        return [*self._answer_of(request.request_id)[request.num_output :][:1], self.token][:most]


@pytest.mark.parametrize("clears", [True, False])
def test_a_draft_that_makes_no_numbers_harms_nobody(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, clears: bool
) -> None:
    submits = [replace(message, params=replace(message.params, max_new_tokens=10)) for message in messages()[:1]]
    single = answers(run_all(load(folder_of("llama")), submits))
    token = next(each for each in range(250) if each not in [*submits[0].prompt_ids, *single["0"].ids])
    engine = load(folder_of("llama"))
    with torch.inference_mode():
        engine.device.model.weights.embed.weight[token] = torch.nan
    if not clears:
        monkeypatch.setattr(TorchDevice, "_clear_spoilt", lambda self, tokens: None)
    run = Run(engine, max_drafts=MAX_DRAFTS)
    run.scheduler.speculator = Spoiler(MAX_DRAFTS, lambda name: single[name].ids)
    run.scheduler.speculator.token = token
    run.submit(submits[0])
    run.finish()
    assert run.scheduler.stats.draft_tokens > 0
    assert (run.outcome("0")[0] == single["0"].ids) == clears
