"""Which models are served: the cards that workers announce, and the tokenizer and chat template of each."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from common.background import end
from common.card import ModelCard
from common.errors import ConfigurationError, NotFound, StoreError, TemplateError, Unavailable, WireError
from common.text.template import ChatTemplate
from common.text.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

ANY_MODEL = frozenset({"tgi", "dummy", ""})
"""Names sent by clients that cannot know what is served: they mean the only model there is."""
REFRESH_S = 1.0
LOOKS_PER_REFRESH = 10
RETRY_AFTER_S = 5.0


class CardStore(Protocol):
    """The part of the fleet store that is needed here."""

    async def cards(self) -> list[ModelCard]: ...

    async def tokenizer(self, digest: str) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A card with what text needs. `template` is None without a chat template, or when `template_error` says why."""

    card: ModelCard
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    template_error: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.card.served_name, *self.card.aliases)


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
        await self._try_refresh()
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
        self._models = {lane: model for lane, model in self._models.items() if lane in cards}

    async def _run(self) -> None:
        while not self._is_closed:
            await asyncio.sleep(self._refresh_s)
            await self._try_refresh()

    async def _try_refresh(self) -> None:
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

    async def find(self, name: str | None) -> ServedModel:
        """As `resolve`, but what is not known is looked for once more: it may have been announced a moment ago.

        However many ask for what does not exist, Redis is asked ten times as often as without them at most.
        """
        try:
            return self.resolve(name)
        except (NotFound, Unavailable):
            now = self._clock()
            if self._models and now - self._looked_at < self._refresh_s / LOOKS_PER_REFRESH:
                raise
            self._looked_at = now
        await self._try_refresh()
        return self.resolve(name)

    def resolve(self, name: str | None) -> ServedModel:
        """The model a client means. Of two lanes with one name (a rollout) the newer card counts.

        Raises:
            NotFound: the name is unknown; the message lists the known ones.
            Unavailable: no worker has announced a model yet.
        """
        served = self.newest_first()
        for model in served:
            if name in model.names:
                return model
        if (name or "") in ANY_MODEL and len({model.card.served_name for model in served}) == 1:
            return served[0]
        known = ", ".join(dict.fromkeys(name for model in served for name in model.names))
        raise NotFound(f"unknown model {name or ''!r}; served here: {known}", code="model_not_found", param="model")


def _served(card: ModelCard, tokenizer: TextTokenizer) -> ServedModel:
    if not card.chat_template:
        return ServedModel(card, tokenizer, None)
    try:
        return ServedModel(card, tokenizer, ChatTemplate(card.chat_template, card.bos_token, card.eos_token))
    except TemplateError as error:
        return ServedModel(card, tokenizer, None, error.message)
