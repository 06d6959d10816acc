"""The text stage of one job: tokens of the engine in, releasable columns and the true end out. No I/O, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from common.job import FinishReason, SamplingParams, TokenColumns, TopToken
from common.text.detokenize import Decoder, Detokenizer, StopChecker
from worker.pipe import TokenRun

NUM_PRIMING_IDS = 256


@dataclass(slots=True)
class Released:
    """Tokens whose text is decided, and why the job ends with them (None: it goes on)."""

    columns: TokenColumns
    finish_reason: FinishReason | None = None


class TopTexts:
    """Texts of single tokens, for alternatives that were not chosen. Remembers the most common ones."""

    def __init__(self, decoder: Decoder) -> None:
        self._text_of = lru_cache(maxsize=16384)(lambda token_id: decoder.decode([token_id], False))

    def row(self, tops: Sequence[tuple[int, float]]) -> list[TopToken]:
        return [TopToken(token_id, self._text_of(token_id), logprob) for token_id, logprob in tops]


class TextStage:
    """Turns the raw tokens of one run of a job into final columns.

    The engine knows the end by length and by EOS; here the stop strings are found, possibly several engine steps late:
    whatever the engine sent past the stop never leaves. Of two reasons at one token length wins over EOS over stop.
    The text goes on from that of `context_ids`, the prompt's, or stands alone if there are none.
    """

    def __init__(
        self,
        decoder: Decoder,
        top_texts: TopTexts,
        context_ids: Sequence[int],
        params: SamplingParams,
        logged: TokenColumns | None = None,
    ) -> None:
        self._top_texts, self._params = top_texts, params
        self._pending: list[tuple[int, float, list[TopToken]]] = []
        self._is_plain = not params.stop and not params.num_top_logprobs
        logged = logged or TokenColumns(0, [], [], [])
        self._next = logged.end
        self._checked = logged.end
        self.is_finished = False
        self._detokenizer = self._primed(decoder, context_ids, logged.ids)
        self._stops = StopChecker(params.stop, keep=params.include_stop)
        self.log_ends_with_stop = params.include_stop and self._prime_stops(logged)

    @staticmethod
    def _primed(decoder: Decoder, context_ids: Sequence[int], logged_ids: list[int]) -> Detokenizer:
        """A detokeniser in the state it had after the logged tokens; only the last ones can still matter."""
        recent = logged_ids[-NUM_PRIMING_IDS:]
        before = [*context_ids[-NUM_PRIMING_IDS:], *logged_ids[: len(logged_ids) - len(recent)]]
        detokenizer = Detokenizer(decoder, before)
        detokenizer.prime(recent)
        return detokenizer

    def _prime_stops(self, logged: TokenColumns) -> bool:
        """Give the checker the end of the logged text, where a stop string may have begun; whether one ends there."""
        first = max(logged.end - NUM_PRIMING_IDS, logged.start)
        for offset, piece in enumerate(logged.slice(first).pieces, start=first + 1):
            self._stops.push(piece, may_stop=offset > self._params.min_tokens)
        is_matched, self._stops.is_matched = self._stops.is_matched, False
        return is_matched

    @property
    def num_released(self) -> int:
        """Absolute offset of the next token that will be released."""
        return self._next

    def push(self, run: TokenRun) -> Released:
        """Take the tokens of one engine step; what may be shown now. Nothing more comes after a finish."""
        if self._is_plain and not run.finish and not self._pending and len(run.ids) == 1:
            return Released(self._plain_columns(run))
        released: list[str] = []
        reason: FinishReason | None = None
        for index, token_id in enumerate(run.ids):
            self._append(run, index)
            is_last = bool(run.finish) and index == len(run.ids) - 1
            reason = self._advance(is_last, run.finish, released, token_id)
            if reason is not None:
                break
        if run.finish == "error" or (run.finish and not run.ids):
            released += self._give_all([])
            reason = reason or _engine_reason(run.finish)
        self.is_finished = reason is not None or run.finish == "error"
        return Released(self._columns(released), reason)

    def _plain_columns(self, run: TokenRun) -> TokenColumns:
        """The usual case: one token which waits for nothing, or nothing but its own last bytes."""
        pieces = self._detokenizer.push(run.ids[0])
        self._checked += len(pieces)
        if not pieces:
            self._append(run, 0)
            return TokenColumns(self._next, [], [], [])
        self._next += 1
        return TokenColumns(self._next - 1, run.ids, pieces, run.logprobs)

    def _append(self, run: TokenRun, index: int) -> None:
        tops = self._top_texts.row(run.top_tokens[index]) if index < len(run.top_tokens) else []
        self._pending.append((run.ids[index], run.logprobs[index], tops))

    def _advance(self, is_last: bool, finish: str, released: list[str], token_id: int) -> FinishReason | None:
        """Run one token through both stages; the reason to end with it, None to go on."""
        # an unfinished character before EOS belongs to the token before: EOS itself is hidden from readers
        pieces = self._detokenizer.flush() if is_last and finish == FinishReason.EOS_TOKEN else []
        pieces += self._detokenizer.push(token_id)
        if is_last:
            pieces += self._detokenizer.flush()
        for piece in pieces:
            self._checked += 1
            released += self._stops.push(piece, may_stop=self._checked > self._params.min_tokens)
            if self._stops.is_matched and not (is_last and self._checked == self._num_seen):
                return FinishReason.STOP_SEQUENCE
        if not is_last:
            return None
        released += self._stops.flush()
        return _engine_reason(finish)

    def _give_all(self, pieces: list[str]) -> list[str]:
        pieces += self._detokenizer.flush()
        shown = [shown for piece in pieces for shown in self._stops.push(piece, may_stop=False)]
        return shown + self._stops.flush()

    @property
    def _num_seen(self) -> int:
        return self._next + len(self._pending)

    def _columns(self, pieces: list[str]) -> TokenColumns:
        taken, self._pending = self._pending[: len(pieces)], self._pending[len(pieces) :]
        tops = [row for _, _, row in taken] if self._params.num_top_logprobs else None
        start, self._next = self._next, self._next + len(pieces)
        return TokenColumns(start, [i for i, _, _ in taken], pieces, [p for _, p, _ in taken], tops)


def _engine_reason(finish: str) -> FinishReason | None:
    return FinishReason(finish) if finish in set(FinishReason) else None
