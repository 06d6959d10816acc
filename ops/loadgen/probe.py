"""What a server can do, found out before anything is measured: its model, ids as prompts, full lengths, counts."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import orjson
import uvloop

from common.errors import ConfigurationError
from ops.loadgen.answer import Answer
from ops.loadgen.http import ExchangeError, Pool
from ops.loadgen.prompts import SAFE_IDS, WORDS, Vocabulary
from ops.loadgen.run import Client
from ops.loadgen.target import Target
from ops.loadgen.workload import Ask

REFUSALS = ("HTTP 400", "HTTP 422", "HTTP 500", "error event")
"""What servers answer to a field or a prompt that they do not know."""
ABSENCES = ("connection refused", "cannot connect")
SHORT, LONG = 8, 136
NUM_TOKENS = 2
MOST_BYTES = 1 << 22
WITHOUT_IDS = "the server takes no token ids here: prompts are words, of about the wanted lengths"
WITHOUT_EOS = "the server refuses ignore_eos: answers may be shorter than asked for"
WITHOUT_USAGE = "the server refuses stream_options: tokens are counted by events"
WITHOUT_LENGTHS = "the server does not say how long prompts are: words count as one token each"
OTHER_WORDS = "the server counts {:.2f} tokens for a word that is one by --tokenizer: it has another tokenizer"


@dataclass(frozen=True, slots=True)
class Found:
    """The target with what it can do, what to make prompts of, and what a reader of figures must know."""

    target: Target
    vocabulary: Vocabulary
    notes: list[str]


def probe(target: Target, vocabulary: Vocabulary | None, *, timeout_s: float, longest: int) -> Found:
    """Ask a few short questions, none of more than `longest` units. `vocabulary`: words by the model's tokenizer; None:
    ids where the server takes them, else any words. With `longest` 0 prompts come from elsewhere.

    Raises:
        ConfigurationError: nobody is there, or answers no question.
    """
    return uvloop.run(_Probe(target, vocabulary, timeout_s, longest).run())


class _Probe:
    def __init__(self, target: Target, vocabulary: Vocabulary | None, timeout_s: float, longest: int) -> None:
        self.target, self.given, self.timeout_s = target, vocabulary, timeout_s
        self.short, self.long, self.has_prompts = min(SHORT, longest) or SHORT, min(LONG, longest), not longest
        self.randomness = random.Random(time.time_ns())
        self.notes: list[str] = []

    async def run(self) -> Found:
        if not self.target.model and self.target.api != "generate_stream":
            self.target = replace(self.target, model=await self._first_model())
        self.target, vocabulary, answer = await self._what_works()
        if not vocabulary.is_ids and not self.has_prompts:
            vocabulary = await self._measured(vocabulary, answer.prompt_tokens)
        return Found(self.target, vocabulary, self.notes)

    async def _first_model(self) -> str:
        """The server's first model; "" where it has no list."""
        found = bytearray()
        pool = Pool(self.target.host, self.target.port, is_secure=self.target.is_secure)
        try:
            async with asyncio.timeout(self.timeout_s):
                request = self.target.head("GET", "/v1/models")
                await pool.exchange(request, lambda _: lambda body, now: found.extend(body[: MOST_BYTES - len(found)]))
            return str(orjson.loads(found)["data"][0]["id"])
        except (ExchangeError, TimeoutError) as error:
            raise self._nobody(str(error) or "no answer") from None
        except (ValueError, LookupError, TypeError):
            return ""
        finally:
            pool.close()

    async def _what_works(self) -> tuple[Target, Vocabulary, Answer]:
        """With the first question that gets an answer, the one that asks for most coming first."""
        first_refusal: Answer | None = None
        for target, vocabulary in self._questions():
            answer = await self._ask(target, vocabulary, self.short)
            if answer.error not in ("", *REFUSALS):
                raise self._no_answer(answer)
            if not answer.error and _is_understood(vocabulary, answer, self.short):
                self._note(target, vocabulary)
                return target, vocabulary, answer
            first_refusal = first_refusal or answer
        assert first_refusal is not None
        raise self._no_answer(first_refusal)

    def _questions(self) -> Iterator[tuple[Target, Vocabulary]]:
        words = self.given or Vocabulary(WORDS)
        for vocabulary, eos, usage in itertools.product(
            [Vocabulary(SAFE_IDS), words] if self._may_take_ids else [words],
            _from(self.target.ignore_eos),
            _from(self.target.include_usage and self.target.api != "generate_stream"),
        ):
            yield replace(self.target, ignore_eos=eos, include_usage=usage), vocabulary

    @property
    def _may_take_ids(self) -> bool:
        return self.target.api == "completions" and self.given is None and not self.has_prompts

    def _note(self, target: Target, vocabulary: Vocabulary) -> None:
        if self._may_take_ids and not vocabulary.is_ids:
            self.notes.append(WITHOUT_IDS)
        if self.target.ignore_eos and not target.ignore_eos:
            self.notes.append(WITHOUT_EOS)
        if self.target.include_usage and not target.include_usage and self.target.api != "generate_stream":
            self.notes.append(WITHOUT_USAGE)

    async def _measured(self, vocabulary: Vocabulary, num_short: int | None) -> Vocabulary:
        """How many tokens its units have here, from prompts of two lengths."""
        answer = await self._ask(self.target, vocabulary, self.long)
        num_long = answer.prompt_tokens
        if num_short is None or num_long is None:
            self.notes.append(WITHOUT_LENGTHS)
            return vocabulary
        per_unit = (num_long - num_short) / (self.long - self.short) if self.long > self.short else 1.0
        if self.given is not None and per_unit != 1:
            self.notes.append(OTHER_WORDS.format(per_unit))
        return replace(vocabulary, per_unit=per_unit, overhead=num_short - per_unit * self.short)

    async def _ask(self, target: Target, vocabulary: Vocabulary, num_units: int) -> Answer:
        client = Client(target, self.timeout_s)
        prompt = vocabulary.prompt(self.randomness.choices(vocabulary.units, k=num_units))
        try:
            return await client.ask(Ask(prompt, NUM_TOKENS), time.perf_counter())
        finally:
            client.close()

    def _no_answer(self, answer: Answer) -> ConfigurationError:
        if answer.error in ABSENCES:
            return self._nobody(answer.message)
        return ConfigurationError(
            f"{self.target.url} gives no answer to a short question: {answer.error}, {answer.message}"
        )

    def _nobody(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"no server at {self.target.url} ({why}); --url or INFERFLEET_URL names another")


def _from(is_wanted: bool) -> Sequence[bool]:
    return (True, False) if is_wanted else (False,)


def _is_understood(vocabulary: Vocabulary, answer: Answer, num_units: int) -> bool:
    """A server may take a list of ids for a list of prompts."""
    return not vocabulary.is_ids or answer.prompt_tokens in (None, num_units)
