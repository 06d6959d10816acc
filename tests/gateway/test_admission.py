"""What a draft becomes, the limit on open requests, and which model a name means."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from common.card import ModelCard
from common.errors import NotFound, Overloaded, StoreUnavailable, Unavailable
from common.job import Adapter, Job, JobState, Priority
from common.settings import GatewaySettings
from common.store.replies import AdapterEntry, Submission
from common.text.template import ChatTemplate
from gateway.admission import LONG_BODY, Admission, hash_of
from gateway.formats import parse_chat, parse_generate
from gateway.formats.base import Limits
from gateway.models import ModelRegistry, ServedModel
from tests.gateway.support import TOKENIZER, adapter, card
from tests.support.tiny_model import byte_tokenizer_json


class Cards:
    """A fleet store of cards."""

    def __init__(self, *cards: ModelCard) -> None:
        self.now = list(cards)
        self.adapted: dict[str, list[AdapterEntry]] = {}
        self.is_away = False
        self.num_tokenizers_read = 0
        self.tokenizers: dict[str, bytes] = {"digest": byte_tokenizer_json()}

    async def cards(self) -> list[ModelCard]:
        if self.is_away:
            raise StoreUnavailable("away")
        return self.now

    async def adapters(self, lane: str) -> list[AdapterEntry]:
        return self.adapted.get(lane, [])

    async def tokenizer(self, digest: str) -> bytes | None:
        self.num_tokenizers_read += 1
        return self.tokenizers.get(digest)


class Jobs:
    """A job store that remembers what was submitted."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Job, dict[str, Any]]] = []

    async def submit(self, job: Job, **terms: Any) -> Submission:
        self.submitted.append((job, terms))
        return Submission(job.job_id, False, JobState.QUEUED)


async def registry(*cards: ModelCard) -> ModelRegistry:
    found = ModelRegistry(Cards(*cards))
    await found.refresh()
    return found


async def admission(**settings: Any) -> tuple[Admission, Jobs]:
    jobs = Jobs()
    return Admission(GatewaySettings(**settings), jobs, await registry(card())), jobs  # type: ignore[arg-type]


async def test_a_draft_becomes_a_job_of_its_tenant() -> None:
    gate, jobs = await admission(max_queued_tokens=77, max_jobs_per_tenant=5)
    draft = await gate.parse(parse_generate, {"inputs": "hello", "parameters": {"max_new_tokens": 4}}, 10, None, "t")
    submission = await gate.admit(
        draft, gateway_id="g1", tenant="t1", idempotency_key="k", body_hash="h", request_id="r"
    )
    [(job, terms)] = jobs.submitted
    assert submission.job_id == job.job_id and job.job_id.startswith("abcdef") and len(job.job_id) == 28
    assert (job.tenant, job.cache_salt, job.cost, job.prompt_ids) == ("t1", "t1", 9, list(b"hello"))
    assert (job.idempotency_key, job.body_hash, job.orphan_grace_s, job.result_ttl_s) == ("k", "h", None, 120)
    assert job.priority is Priority.INTERACTIVE
    assert (job.view["via"], job.view["request_id"], job.view["metadata"]) == ("request", "r", {})
    assert terms == {"gateway": "g1", "max_queued_tokens": 77, "tenant_max_jobs": 5}


async def test_metadata_of_the_body_stays_in_the_view() -> None:
    gate, jobs = await admission()
    body = {"messages": [{"role": "user", "content": "x"}], "metadata": {"a": "b"}}
    await gate.admit(await gate.parse(parse_chat, body, 10, None, "t"), tenant="t")
    assert jobs.submitted[0][0].view["metadata"] == {"a": "b"}


@pytest.mark.parametrize(("ephemeral", "time_to_live"), [(False, 3600), (True, 60)])
async def test_an_ephemeral_fleet_forgets_soon(ephemeral: bool, time_to_live: int) -> None:
    gate, jobs = await admission(ephemeral=ephemeral)
    draft = await gate.parse(parse_generate, {"inputs": "x"}, 10, None, "t")
    await gate.admit(draft, tenant="t", result_ttl_s=3600)
    assert jobs.submitted[0][0].result_ttl_s == time_to_live


async def test_a_tenants_long_chat_has_the_tokens_of_the_whole_text_turn_after_turn() -> None:
    model = card(max_input_tokens=9_000, max_total_tokens=10_000)
    gate = Admission(GatewaySettings(), Jobs(), await registry(model))  # type: ignore[arg-type]
    asked: list[str | None] = []

    def parser(body: dict[str, Any], served: ServedModel, limits: Limits) -> list[int]:
        asked.append(served.tenant)
        return parse_chat(body, served, limits).prompt_ids

    template = ChatTemplate(model.chat_template, model.bos_token, model.eos_token)
    messages = [{"role": "user", "content": "once upon a time " * 100}]
    for turn in range(3):
        messages += [{"role": "assistant", "content": f"and {turn}<|end|>"}, {"role": "user", "content": f"{turn}é?"}]
        expected = TOKENIZER.encode(template.render(messages), add_special_tokens=False)
        for tenant in ("t1", "t2"):
            assert await gate.parse(parser, {"messages": messages}, 10, None, tenant) == expected
    assert asked == ["t1", "t2"] * 3


@pytest.mark.parametrize(("num_bytes", "in_thread"), [(LONG_BODY - 1, False), (LONG_BODY, True)])
async def test_long_bodies_are_parsed_off_the_event_loop(num_bytes: int, in_thread: bool) -> None:
    gate, _ = await admission()

    def parser(body: Any, served: Any, limits: Any) -> int:
        return threading.get_ident()

    assert (await gate.parse(parser, {}, num_bytes, None, "t") != threading.get_ident()) is in_thread


async def test_open_requests_are_limited_and_their_places_come_back() -> None:
    gate, _ = await admission(max_concurrent_requests=2)
    with gate.slot():
        with gate.slot():
            with pytest.raises(Overloaded, match="^Model is overloaded$") as caught:
                gate.slot().__enter__()
            assert caught.value.retry_after_s == 1.0
        with gate.slot():
            assert gate.num_open == 2
    with pytest.raises(KeyError), gate.slot():
        raise KeyError
    assert gate.num_open == 0


@pytest.mark.parametrize("name", ["demo", "alias/of-demo", "tgi", "dummy", "", None])
async def test_names_of_the_only_model(name: str | None) -> None:
    assert (await registry(card())).resolve(name).card.lane == "abcdef"


async def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(NotFound) as caught:
        (await registry(card())).resolve("gpt")
    assert caught.value.message == "unknown model 'gpt'; served here: demo, alias/of-demo"
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_of_several_models_one_must_be_named() -> None:
    found = await registry(card(), card(lane="bcdefg", served_name="other", aliases=()))
    assert found.resolve("other").card.lane == "bcdefg"
    with pytest.raises(NotFound, match="served here: demo, alias/of-demo, other"):
        found.resolve("tgi")


async def test_of_two_lanes_with_one_name_the_newer_counts() -> None:
    found = await registry(card(), card(lane="bcdefg", created=card().created + 1))
    assert found.resolve("demo").card.lane == found.resolve("tgi").card.lane == "bcdefg"


async def test_without_a_model_the_fleet_is_not_ready() -> None:
    with pytest.raises(Unavailable) as caught:
        (await registry()).resolve("demo")
    assert (caught.value.code, caught.value.retry_after_s) == ("no_worker", 5.0)


async def test_a_refresh_follows_the_cards_and_reads_each_tokenizer_once() -> None:
    cards = Cards(card())
    found = ModelRegistry(cards)
    await found.refresh()
    cards.now = [card(max_total_tokens=50), card(lane="bcdefg", served_name="other")]
    await found.refresh()
    assert found.resolve("demo").card.max_total_tokens == 50
    assert sorted(found.models) == ["abcdef", "bcdefg"] and cards.num_tokenizers_read == 1
    cards.now = cards.now[1:]
    await found.refresh()
    assert sorted(found.models) == ["bcdefg"]


async def test_a_model_announced_a_moment_ago_is_found_before_the_next_refresh() -> None:
    cards = Cards()
    found = ModelRegistry(cards)
    await found.refresh()
    with pytest.raises(Unavailable):
        await found.find("demo")
    cards.now = [card()]
    with pytest.raises(Unavailable):
        found.resolve("demo")
    assert (await found.find("demo")).card.lane == "abcdef"


async def test_a_name_that_is_not_known_is_looked_for_once_more_but_not_for_ever() -> None:
    now = [100.0]
    cards = Cards(card())
    found = ModelRegistry(cards, refresh_s=1.0, clock=lambda: now[0])
    await found.refresh()
    cards.now = [card(), card(lane="bcdefg", served_name="second")]
    assert (await found.find("second")).card.lane == "bcdefg"
    cards.now = [*cards.now, card(lane="cdefgh", served_name="third")]
    with pytest.raises(NotFound, match="third"):
        await found.find("third")
    now[0] += 0.2
    assert (await found.find("third")).card.lane == "cdefgh"


async def adapted(**lanes: list[AdapterEntry]) -> tuple[ModelRegistry, Cards]:
    """Two lanes of one name, the second one newer, and a lane of another model."""
    cards = Cards(
        card(),
        card(lane="bcdefg", created=card().created + 1),
        card(lane="cdefgh", served_name="other", aliases=()),
    )
    cards.adapted = lanes
    found = ModelRegistry(cards)
    await found.refresh()
    return found, cards


async def test_an_adapter_is_found_by_its_name_where_it_is_ready() -> None:
    ready, loading = adapter("fr"), adapter("sql", state="loading")
    found, _ = await adapted(abcdef=[ready, loading], cdefgh=[adapter("demo"), adapter("sql")])
    served = found.resolve("fr")
    assert (served.card.lane, served.adapter) == ("abcdef", ready.adapter)
    assert served.adapter == Adapter("fr", "/real/fr", ready.found.digest)
    assert found.resolve("sql").card.lane == "cdefgh"
    assert found.resolve("demo").adapter is None, "a model's own name wins"
    with pytest.raises(NotFound) as caught:
        found.resolve("de")
    assert caught.value.message == "unknown model 'de'; served here: demo, alias/of-demo, other, fr, sql"


async def test_of_two_lanes_with_one_name_that_counts_which_has_the_adapter() -> None:
    found, cards = await adapted(abcdef=[adapter("fr")])
    assert found.resolve("demo").card.lane == "bcdefg"
    served = found.resolve("demo", "fr")
    assert (served.card.lane, served.adapter) == ("abcdef", None)
    cards.adapted = {"abcdef": [adapter("fr")], "bcdefg": [adapter("fr")]}
    await found.refresh()
    assert found.resolve("demo", "fr").card.lane == found.resolve("fr").card.lane == "bcdefg"
    cards.adapted = {}
    await found.refresh()
    with pytest.raises(NotFound):
        found.resolve("fr")


async def test_an_adapter_that_was_loaded_a_moment_ago_is_found_before_the_next_refresh() -> None:
    now = [100.0]
    cards = Cards(card())
    found = ModelRegistry(cards, refresh_s=1.0, clock=lambda: now[0])
    await found.refresh()
    cards.adapted = {"abcdef": [adapter("fr")]}
    assert "fr" in (await found.find(None, "fr")).adapters
    cards.adapted["abcdef"].append(adapter("sql"))
    assert "sql" not in (await found.find(None, "sql")).adapters, "who asks for nothing does not ask Redis each time"
    now[0] += 0.2
    assert (await found.find("sql")).adapter == adapter("sql").adapter


async def test_a_draft_with_an_adapter_becomes_a_job_that_brings_it() -> None:
    cards, jobs = Cards(card()), Jobs()
    cards.adapted = {"abcdef": [adapter("fr")]}
    found = ModelRegistry(cards)
    await found.refresh()
    gate = Admission(GatewaySettings(), jobs, found)  # type: ignore[arg-type]
    for body in ({"inputs": "x", "parameters": {"adapter_id": "fr"}}, {"inputs": "x", "model": "fr"}, {"inputs": "x"}):
        await gate.admit(await gate.parse(parse_generate, body, 10, body.get("model"), "t"), tenant="t")
    by_id, by_model, without = [job for job, _ in jobs.submitted]
    assert by_id.adapter == by_model.adapter == adapter("fr").adapter
    assert by_id.view["adapter"] == by_model.view["adapter"] == "fr"
    assert without.adapter is None and "adapter" not in without.view


async def test_a_model_waits_for_its_tokenizer() -> None:
    cards = Cards(card(tokenizer_digest="late"))
    found = ModelRegistry(cards)
    await found.refresh()
    assert not found.models
    cards.tokenizers["late"] = byte_tokenizer_json()
    await found.refresh()
    assert list(found.models) == ["abcdef"]


async def test_what_was_known_stays_while_redis_is_away() -> None:
    cards = Cards(card())
    found = ModelRegistry(cards, refresh_s=60)
    await found.start()
    cards.is_away = True
    with pytest.raises(StoreUnavailable):
        await found.refresh()
    assert found.resolve("demo").card.served_name == "demo"
    await found.close()


async def test_a_broken_template_is_told_when_someone_chats() -> None:
    found = await registry(card(chat_template="{% for %}"))
    served = found.resolve("demo")
    assert served.template is None and served.template_error.startswith("Template error: ")


def test_the_hash_is_of_the_bytes_as_they_came() -> None:
    assert hash_of(b'{"a":1}') != hash_of(b'{"a": 1}')
    assert hash_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
