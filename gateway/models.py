"""Which models are served: the cards that workers announce, and the tokenizer, chat template and adapters of each."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from common.background import end
from common.card import ANY_MODEL, ModelCard
from common.errors import ConfigurationError, NotFound, StoreError, TemplateError, Unavailable, WireError
from common.job import Adapter
from common.store.replies import AdapterEntry
from common.text.template import ChatTemplate
from common.text.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

REFRESH_S = 1.0
LOOKS_PER_REFRESH = 10
RETRY_AFTER_S = 5.0
MAX_LISTED = 50


class CardStore(Protocol):
    """The part of the fleet store that is needed here."""

    async def cards(self) -> list[ModelCard]: ...

    async def adapters(self, lane: str) -> list[AdapterEntry]: ...

    async def tokenizer(self, digest: str) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A card with what text needs. `template` is None without a chat template, or when `template_error` says why.

    `adapters` are those that are ready, by name; `adapter` is the one that a client meant when it named the model, and
    `tenant` is that client's.
    """

    card: ModelCard
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    template_error: str = ""
    adapters: Mapping[str, AdapterEntry] = field(default_factory=dict)
    adapter: Adapter | None = None
    tenant: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.card.served_name, *self.card.aliases)

    def with_adapter(self, name: str) -> ServedModel:
        return replace(self, adapter=self.adapters[name].adapter)

    def asked_by(self, tenant: str) -> ServedModel:
        return replace(self, tenant=tenant)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt; of long ones the tenant's own are remembered in parts."""
        return self.tokenizer.encode(text, add_special_tokens, self.tenant)


def listed(names: Iterable[str]) -> str:
    """Names for a sentence: a model may have a thousand adapters."""
    found = list(names)
    more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    return (", ".join(found[:MAX_LISTED]) or "none") + more


class ModelRegistry:
    """Follows the cards on Redis: a model counts from the refresh after its announcement on."""

    def __init__(
        self, fleet: CardStore, *, refresh_s: float = REFRESH_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fleet, self._refresh_s, self._clock = fleet, refresh_s, clock
        self._models: dict[str, ServedModel] = {}
        self._task: asyncio.Task[None] | None = None
        self._looked_at = -math.inf
        self._is_closed = False

    async def start(self) -> None:
        """Read the cards once, then keep reading them in the background."""
        await self.try_refresh()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        self._is_closed = True
        if self._task is not None:
            await end(self._task)

    async def refresh(self) -> None:
        """Take over what Redis says now. Tokenizers are loaded in a thread, each digest once.

        Raises:
            StoreError: if Redis does not answer; what was known stays.
        """
        cards = {card.lane: card for card in await self._fleet.cards()}
        for lane, card in cards.items():
            known = self._models.get(lane)
            if known is None or known.card != card:
                await self._take_over(card)
            await self._follow_adapters(lane)
        self._models = {lane: model for lane, model in self._models.items() if lane in cards}

    async def _run(self) -> None:
        while not self._is_closed:
            await asyncio.sleep(self._refresh_s)
            await self.try_refresh()

    async def try_refresh(self) -> None:
        """As `refresh`, but a Redis that is away is only noted in the log."""
        try:
            await self.refresh()
        except (StoreError, WireError, ConfigurationError) as error:
            log.warning("cannot read the model cards", extra={"reason": str(error)})

    async def _take_over(self, card: ModelCard) -> None:
        tokenizer = await self._tokenizer(card)
        if tokenizer is None:
            log.warning("a model was announced without its tokenizer", extra={"model": card.served_name})
            return
        self._models[card.lane] = _served(card, tokenizer)

    async def _follow_adapters(self, lane: str) -> None:
        ready = {entry.name: entry for entry in await self._fleet.adapters(lane) if entry.state == "ready"}
        model = self._models.get(lane)
        if model is not None and model.adapters != ready:
            self._models[lane] = replace(model, adapters=ready)

    async def _tokenizer(self, card: ModelCard) -> TextTokenizer | None:
        for model in self._models.values():
            if model.card.tokenizer_digest == card.tokenizer_digest:
                return model.tokenizer
        data = await self._fleet.tokenizer(card.tokenizer_digest)
        return None if data is None else await asyncio.to_thread(TextTokenizer, data)

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """Served models by lane."""
        return self._models

    def newest_first(self) -> list[ServedModel]:
        """All models, the one announced last first; never empty.

        Raises:
            Unavailable: no worker has announced a model yet.
        """
        if not self._models:
            raise Unavailable("no model is served yet", code="no_worker", retry_after_s=RETRY_AFTER_S)
        return sorted(self._models.values(), key=lambda model: model.card.created, reverse=True)

    async def find(self, name: str | None, adapter: str | None = None) -> ServedModel:
        """As `resolve`, but what is not known is looked for once more: it may have been announced a moment ago.

        However many ask for what does not exist, Redis is asked ten times as often as without them at most.
        """
        try:
            found = self.resolve(name, adapter)
            if not adapter or adapter in found.adapters or not self._may_look():
                return found
        except (NotFound, Unavailable):
            if self._models and not self._may_look():
                raise
        self._looked_at = self._clock()
        await self.try_refresh()
        return self.resolve(name, adapter)

    def _may_look(self) -> bool:
        return self._clock() - self._looked_at >= self._refresh_s / LOOKS_PER_REFRESH

    def resolve(self, name: str | None, adapter: str | None = None) -> ServedModel:
        """The model a client means: by its own name, or by that of an adapter, which is then its `adapter`.

        Of two lanes with one name (a rollout) the newer card counts, or the newer of those that have `adapter`.

        Raises:
            NotFound: the name is unknown; the message lists the known ones.
            Unavailable: no worker has announced a model yet.
        """
        served = self.newest_first()
        found = [model for model in served if name in model.names]
        found = found or [model.with_adapter(name or "") for model in served if name in model.adapters]
        if not found and (name or "") in ANY_MODEL and len({model.card.served_name for model in served}) == 1:
            found = served
        if not found:
            known = [one for model in served for one in model.names]
            known += [one for model in served for one in model.adapters]
            message = f"unknown model {name or ''!r}; served here: {listed(dict.fromkeys(known))}"
            raise NotFound(message, code="model_not_found", param="model")
        return next((model for model in found if adapter in model.adapters), found[0])


def _served(card: ModelCard, tokenizer: TextTokenizer) -> ServedModel:
    if not card.chat_template:
        return ServedModel(card, tokenizer, None)
    try:
        return ServedModel(card, tokenizer, ChatTemplate(card.chat_template, card.bos_token, card.eos_token))
    except TemplateError as error:
        return ServedModel(card, tokenizer, None, error.message)
