"""Adapters on the device, driven by the engine core's own loop and scheduler, against transformers with them merged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigurationError
from common.job import Adapter, SamplingParams
from common.settings import WorkerSettings
from tests.support import tiny_models, tiny_t5
from tests.support.adapters import merged, slots_of, write_adapter
from tests.support.engine_run import Engine, Run
from tests.support.lockstep import run_ranks
from worker.model.lora import LoraSlots
from worker.parallel.group import Group
from worker.pipe import Ready, Submit
from worker.runner import adapters as runner_adapters
from worker.runner import hardware
from worker.runner.adapters import RowAdapters
from worker.runner.load import load_device
from worker.runner.memory import readable
from worker.runner.torch_device import TorchDevice

NUM_GREEDY = 24
MIN_MARGIN = 1e-4
NUM_ADAPTERS = 5


@dataclass
class Served:
    """A tiny model and adapters for it; `models` are transformers' with each of them merged, and without at the end."""

    folder: Path
    adapters: list[Path]
    models: list[Any]
    known: dict[tuple[Any, ...], tuple[list[int], float]] = field(default_factory=dict)

    def load(self, group: Group | None = None, **options) -> tuple[TorchDevice, Ready]:
        fields = dict(model_id=str(self.folder), threads=1, kv_tokens=2048, dtype="float32") | options
        return load_device(WorkerSettings(**fields), lambda *_: None, group)

    def adapter(self, device: TorchDevice, number: int | None) -> Adapter | None:
        """As a job would carry it."""
        if number is None:
            return None
        checked = device.check_adapter(f"a{number}", str(self.adapters[number]))
        assert not checked.error
        return Adapter(checked.name, checked.source, checked.digest)

    def expected(self, number: int | None, ids: list[int]) -> tuple[list[int], float]:
        """Greedy tokens, and the smallest margin between first and second over the largest logit."""
        key = (number, *ids)
        if key not in self.known:
            self.known[key] = self._expected(number, ids)
        return self.known[key]

    def _expected(self, number: int | None, ids: list[int]) -> tuple[list[int], float]:
        model = self.models[-1 if number is None else number]
        is_t5 = model.config.is_encoder_decoder
        with torch.no_grad():
            made = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids)),
                max_new_tokens=NUM_GREEDY,
                do_sample=False,
                # T5's cache has as many layers as the encoder, which may be fewer than the decoder's
                use_cache=not is_t5,
                eos_token_id=None,
                pad_token_id=None if is_t5 else 0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.cat(made.logits)
        best = logits.topk(2).values
        tokens = made.sequences[0, 1 if is_t5 else len(ids) :].tolist()
        return tokens, float((best[:, 0] - best[:, 1]).min() / logits.abs().max())


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Callable[[str], Served]:
    torch.set_num_threads(1)

    @cache
    def get(name: str) -> Served:
        folder, kind = tmp_path_factory.mktemp(name), tiny_t5 if name in tiny_t5.CASES else tiny_models
        kind.save(name, folder / "model")
        model = kind.build(name)
        modules = [module for module, _ in model.named_modules() if module in slots_of(name).targets]
        chosen = [modules[::2], modules[1::2], modules, modules[:3], modules[-3:]]
        adapters = [
            write_adapter(folder / str(number), model, chosen[number], rank=2 + 3 * number, seed=number)
            for number in range(NUM_ADAPTERS)
        ]
        return Served(folder / "model", adapters, [*(merged(model, adapter) for adapter in adapters), model])

    return get


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def submit(name: str, ids: list[int], adapter: Adapter | None, **params) -> Submit:
    fields = dict(max_new_tokens=NUM_GREEDY) | params
    return Submit(
        request_id=name, epoch=1, prompt_ids=ids, output_ids=[], params=SamplingParams(**fields), eos_token_ids=[],
        adapter=adapter,
    )  # fmt: skip


def run_all(loaded: tuple[TorchDevice, Ready], messages: list[Submit], max_loras: int = 8) -> Run:
    run = Run(Engine(*loaded), max_loras=max_loras)
    for message in messages:
        run.submit(message)
    run.finish()
    return run


def error_of(run: Run, request_id: str) -> str:
    return run.runs[request_id][-1].error


@pytest.fixture()
def used(monkeypatch) -> list[tuple[set[int], int]]:
    """The slots and the number of tokens of every step."""
    steps: list[tuple[set[int], int]] = []
    use = LoraSlots.use

    def watch(slots: LoraSlots, by_token) -> None:
        steps.append((set(by_token.tolist()) - {-1}, len(by_token)))
        use(slots, by_token)

    monkeypatch.setattr(LoraSlots, "use", watch)
    return steps


# What each gets.

NUMBERS = [0, 1, 2, None, 0, 2]
"""The adapter of each request of a batch."""


def batch(served: Served, device: TorchDevice, numbers: list[int | None] = NUMBERS) -> dict[str, Submit]:
    return {
        str(row): submit(str(row), prompt(row, 4 + 9 * row % 40), served.adapter(device, number))
        for row, number in enumerate(numbers)
    }


def check_tokens(served: Served, run: Run, messages: dict[str, Submit], numbers: list[int | None] = NUMBERS) -> None:
    num_sure = 0
    for (name, message), number in zip(messages.items(), numbers, strict=True):
        expected, margin = served.expected(number, message.prompt_ids)
        if margin > MIN_MARGIN:
            assert run.outcome(name) == (expected, "length")
            num_sure += 1
    assert num_sure >= len(messages) - 1


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "t5"])
def test_greedy_tokens_of_three_adapters_and_none_in_one_batch_are_those_of_the_merged_models(served, used, name):
    model = served(name)
    device, ready = model.load()
    messages = batch(model, device)
    run = run_all((device, ready), list(messages.values()))
    assert run.scheduler.stats.batch_max == len(NUMBERS)
    assert ({0, 1, 2}, len(NUMBERS)) in used, "a step of one token each with all three adapters"
    check_tokens(model, run, messages)


def test_the_same_requests_with_each_others_adapters_get_other_tokens(served):
    """So that the comparison above would notice."""
    model = served("llama")
    tokens = [model.expected(number, prompt(1, 20))[0] for number in (0, 1, 2, None)]
    assert len(set(map(tuple, tokens))) == 4


def test_with_more_adapters_than_slots_some_wait_and_all_get_what_is_theirs(served, used):
    model, numbers = served("llama"), [0, 1, 2, 3, 4, None, 0, 3, 2, 1]
    device, ready = model.load()
    messages = batch(model, device, numbers)
    run = run_all((device, ready), list(messages.values()), max_loras=2)
    assert max(len(slots) for slots, _ in used) == 2
    assert run.scheduler.stats.batch_max < len(numbers)
    check_tokens(model, run, messages, numbers)


def test_keys_and_values_of_one_adapter_are_found_by_no_other(served):
    model, ids = served("llama"), prompt(7, 50)
    device, ready = model.load()
    run = Run(Engine(device, ready), max_loras=2)
    hits = []
    for name, number in (("a", 0), ("a again", 0), ("b", 1), ("none", None), ("none again", None), ("b again", 1)):
        run.submit(submit(name, ids, model.adapter(device, number)))
        run.finish()
        hits.append(int(run.scheduler.stats.prefix_hits))
        expected, margin = model.expected(number, ids)
        assert margin > MIN_MARGIN and run.outcome(name)[0] == expected
    assert hits == [0, 1, 1, 1, 2, 3]


def test_two_ranks_pick_the_tokens_of_one(served):
    model = served("llama")

    def outcomes(group: Group | None = None) -> list[list[int]]:
        device, ready = model.load(group)
        messages = batch(model, device)
        run = run_all((device, ready), list(messages.values()))
        check_tokens(model, run, messages)
        return [run.outcome(name)[0] for name in messages]

    assert run_ranks(2, outcomes) == [outcomes()] * 2


# What cannot be loaded.


@pytest.fixture()
def own(served, tmp_path) -> tuple[Served, Path]:
    """A model whose first adapter a test may spoil."""
    model = served("llama")
    folder = Path(shutil.copytree(model.adapters[0], tmp_path / "own"))
    return replace(model, adapters=[folder, *model.adapters[1:]]), folder


def spoil(folder: Path, how: str) -> None:
    if how == "changed":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    elif how == "gone":
        shutil.rmtree(folder)
    else:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])


SPOILED = [
    ("changed", "adapter a0 cannot be loaded any more: .*own changed since the job was accepted"),
    ("gone", "adapter a0 cannot be loaded any more: .*own is not an adapter in PEFT's format: it has no .*"),
    ("cut", "adapter a0 cannot be loaded any more: .*shorter than its header says; download it again"),
]


@pytest.mark.parametrize(("how", "words"), SPOILED)
def test_an_adapter_that_is_not_what_it_was_ends_its_own_requests_only(own, how, words):
    model, folder = own
    device, ready = model.load()
    messages = batch(model, device)
    spoil(folder, how)
    run = run_all((device, ready), list(messages.values()))
    for (name, message), number in zip(messages.items(), NUMBERS, strict=True):
        if number == 0:
            assert run.outcome(name) == ([], "error")
            assert re.fullmatch(words, error_of(run, name))
        else:
            assert run.outcome(name) == (model.expected(number, message.prompt_ids)[0], "length")


def test_a_long_prompt_fails_with_its_first_chunk_and_leaves_nothing_to_find(own):
    model, folder = own
    device, ready = model.load(max_batch_prefill_tokens=16)
    ids, adapter = prompt(3, 60), model.adapter(device, 0)
    kept = folder.rename(folder.with_name("kept"))
    run = run_all((device, ready), [submit("a", ids, adapter)])
    assert run.outcome("a") == ([], "error") and run.scheduler.stats.steps == 1
    kept.rename(folder)
    run.submit(submit("b", ids, adapter))
    run.finish()
    assert run.scheduler.stats.prefix_hits == 0
    assert run.outcome("b")[0] == model.expected(0, ids)[0]


def test_an_adapter_for_which_there_is_no_memory_is_refused_with_the_numbers(served, monkeypatch):
    model = served("llama")
    device, ready = model.load()
    messages = batch(model, device)
    monkeypatch.setattr(runner_adapters, "available_bytes", lambda: 1000)
    run = run_all((device, ready), list(messages.values()))
    assert error_of(run, "0").endswith("of memory but only 1000 B is free; lower --max-loras")
    assert run.outcome("3")[1] == "length"


def test_memory_that_the_kv_cache_was_promised_is_not_free_for_adapters(served, monkeypatch):
    """The system gives it when it is written, and counts it as free until then."""
    model = served("llama")
    plain, _ = model.load()
    kv_bytes = plain.pages[:, :, 1:].nbytes
    monkeypatch.setattr(hardware, "available_bytes", lambda: kv_bytes + 20_000)
    device, ready = model.load()
    messages = batch(model, device)
    run = run_all((device, ready), list(messages.values()))
    assert runner_adapters.available_bytes() > 10**8
    taken = device._adapters._slots.num_bytes
    assert 0 < taken < 20_000, "one has room, and no room is made for those that have none"
    free = readable(20_000 - taken)
    for name in "12":
        assert error_of(run, name).endswith(f"of memory but only {free} is free; lower --max-loras")
    assert [run.outcome(name)[1] for name in "03"] == ["length", "length"]


def test_what_the_host_has_is_no_matter_where_adapters_lie_on_a_gpu(served, monkeypatch):
    model = served("llama")
    device, _ = model.load()
    adapters, adapter = device._adapters, model.adapter(device, 0)
    monkeypatch.setattr(runner_adapters, "available_bytes", lambda: 1000)
    assert "only 1000 B is free" in adapters._load(adapter, 0)
    adapters._slots.device = torch.device("meta")
    assert adapters._load(adapter, 0) == "" and adapters._slots.num_bytes > 1000
    adapters._max_bytes = adapters._slots.num_bytes + 500
    assert "only 500 B is free" in adapters._load(model.adapter(device, 1), 1)


def test_what_another_rank_cannot_read_is_an_error_of_the_row_on_all(served, monkeypatch):
    model, read = served("llama"), RowAdapters._read

    def fails_elsewhere(rows: RowAdapters, source: str) -> Any:
        if rows._group.shard.rank == 1 and source == str(model.adapters[0]) and rows.is_serving:  # type: ignore[attr-defined]
            raise ConfigurationError(f"{source} is not here")
        return read(rows, source)

    monkeypatch.setattr(RowAdapters, "_read", fails_elsewhere)

    def outcomes(group: Group) -> list[tuple[list[int], str, str]]:
        device, ready = model.load(group)
        device._adapters.is_serving = False
        messages = batch(model, device)
        device._adapters.is_serving = True
        run = run_all((device, ready), list(messages.values()))
        return [(*run.outcome(name), error_of(run, name)) for name in messages]

    first, second = run_ranks(2, outcomes)
    assert first[0] == ([], "error", "adapter a0 cannot be loaded by another rank")
    assert second[0][2].endswith("is not here")
    assert [row[:2] for row in first] == [row[:2] for row in second]
    assert [row[1] for row in first] == ["error" if number == 0 else "length" for number in NUMBERS]


# Checks.


def test_a_check_says_digest_and_rank_or_what_is_wrong_and_loads_nothing(own):
    model, folder = own
    device, _ = model.load(max_lora_rank=4)
    checked = device.check_adapter("x", str(folder))
    assert (checked.name, checked.source, checked.rank, checked.error) == ("x", str(folder), 2, "")
    assert len(checked.digest) == 32
    refused = device.check_adapter("y", str(model.adapters[1]))
    assert (refused.digest, refused.rank) == ("", 0)
    assert refused.error.startswith("adapter y: ") and refused.error.endswith("more than the 4 of --max-lora-rank")
    assert device._adapters._digests == {}
    assert not any(layer._targets for layer in device._adapters._slots._layers)


@pytest.mark.parametrize("source", ["", "/", "/dev/null", "no\0thing", "x" * 5000, "/proc/self/mem"])
def test_whatever_a_source_is_the_answer_is_a_sentence(served, source):
    device, _ = served("llama").load()
    checked = device.check_adapter("x", source)
    assert checked.error.startswith("adapter x: ") and "\n" not in checked.error
