"""Tokens to text while they come: incremental decoding and the search for stop strings. No model, no torch, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
NUM_CONTEXT_IDS = 6
MAX_WINDOW = 128


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """Gives every token the piece of text it completed, once nothing of it can change any more.

    Decodes a sliding window behind a few tokens of context, as TGI and vLLM do, because decoders treat the first token
    of a text in their own way. A token whose bytes end inside a character waits for those that complete it. The result
    depends on the sequence of tokens only, so a worker that takes over primes it with the tokens of the log.

    Without `context_ids` the text begins here, as an encoder-decoder's answer does. Special tokens in front of it are
    not part of it: the pieces of the others are what decoding without special tokens gives.
    """

    def __init__(self, decoder: Decoder, context_ids: Sequence[int]) -> None:
        self._decoder = decoder
        self._ends: list[int] = []
        self._done = 0
        self._restart(list(context_ids[-NUM_CONTEXT_IDS:]))

    def _restart(self, context: list[int]) -> None:
        self._window = context
        self._num_context = len(context)
        self._skip = len(self._decode())
        self._ends.clear()
        self._done = 0

    def _push_plain(self, token_id: int) -> list[str] | None:
        """What `push` does with a token that follows whole ones and is whole itself; None: it is not."""
        text = self._decoder.decode([*self._window, token_id], False)[self._skip :]
        if text.endswith(REPLACEMENT):
            return None
        self._restart([token_id])
        return [text]

    def _decode(self) -> str:
        return self._decoder.decode(self._window, False)

    def push(self, token_id: int) -> list[str]:
        """Add one token; the pieces of the tokens that are complete now, oldest first (often just this one)."""
        if 0 < self._num_context == len(self._window) and (pieces := self._push_plain(token_id)) is not None:
            return pieces
        self._window.append(token_id)
        text = self._decode()[self._skip :]
        is_open = text.endswith(REPLACEMENT)
        if not is_open or len(self._window) > MAX_WINDOW:
            self._settle_broken(text)
            self._ends.append(len(text))
            return self._release_all(text)
        settled = max(len(text.rstrip(REPLACEMENT)), self._ends[-1] if self._ends else self._done)
        self._ends.append(settled)
        return self._release(text, sum(1 for end in self._ends if end < settled))

    def _settle_broken(self, text: str) -> None:
        """Bytes that the new token did not complete stay broken, and belong to the tokens that brought them: the new
        one may be a special token, whose text is not shown."""
        if self._ends:
            before = self._decoder.decode(self._window[:-1], False)[self._skip :]
            if text.startswith(before):
                self._ends[-1] = len(before)

    def prime(self, token_ids: Sequence[int]) -> None:
        """Go through tokens whose pieces are already out, so that the next one gives the piece it would have given."""
        for token_id in token_ids:
            self.push(token_id)
        if self._ends:
            self._done = self._ends[-1]
            self._ends.clear()

    def flush(self) -> list[str]:
        """The pieces of the tokens still held, an unfinished character shown as U+FFFD."""
        if not self._ends:
            return []
        text = self._decode()[self._skip :]
        self._ends[-1] = len(text)
        return self._release_all(text)

    def _release(self, text: str, count: int) -> list[str]:
        pieces = []
        for end in self._ends[:count]:
            pieces.append(text[self._done : end])
            self._done = max(self._done, end)
        del self._ends[:count]
        return pieces

    def _release_all(self, text: str) -> list[str]:
        pieces = self._release(text, len(self._ends))
        self._restart([] if self._is_before_text(text) else self._window[self._num_context :])
        return pieces

    def _is_before_text(self, text: str) -> bool:
        return self._num_context == 0 and text != "" and self._decoder.decode(self._window, True) == ""


class StopChecker:
    """Looks for stop strings in pieces of text.

    With `keep` the stop text stays and only a text that ends with it, at the end of a token, stops, as in TGI. Without,
    it is found wherever it stands, cut off, and tokens that may begin one are held back until that is decided; when
    several match, the one that is complete first counts, then the longest.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        self._stops = [stop for stop in stops if stop]
        self._keep = keep
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._tail = ""
        self._held: list[str] = []
        self.is_matched = False

    def push(self, piece: str, *, may_stop: bool = True) -> list[str]:
        """Add the piece of one token; the pieces that may be shown now. Sets `is_matched` when this one ends a stop.

        `may_stop=False` passes the piece unseen (before a required number of tokens).
        """
        if not self._stops or not may_stop:
            return [*self.flush(), piece]
        return self._push_kept(piece) if self._keep else self._push_cut(piece)

    def flush(self) -> list[str]:
        """Give out what is held back: no stop string can follow any more."""
        held, self._held = self._held, []
        return held

    def _push_kept(self, piece: str) -> list[str]:
        self._tail = (self._tail + piece)[-self._longest :]
        self.is_matched = piece != "" and any(self._tail.endswith(stop) for stop in self._stops)
        return [piece]

    def _push_cut(self, piece: str) -> list[str]:
        self._held.append(piece)
        text = "".join(self._held)
        found = self._first_match(text)
        if found is not None:
            self.is_matched = True
            return self._cut(found)
        return self._release_before(self._possible_start(text))

    def _first_match(self, text: str) -> int | None:
        """Start of the stop string that is complete first, None when there is none."""
        places = [(text.find(stop), len(stop)) for stop in self._stops]
        found = [(start + length, start) for start, length in places if start >= 0]
        return min(found)[1] if found else None

    def _possible_start(self, text: str) -> int:
        """Where the longest end of `text` begins that a stop string may begin with."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)

    def _release_before(self, position: int) -> list[str]:
        count = end = 0
        for piece in self._held:
            end += len(piece)
            if end > position:
                break
            count += 1
        released, self._held = self._held[:count], self._held[count:]
        return released

    def _cut(self, position: int) -> list[str]:
        pieces = []
        for piece in self.flush():
            pieces.append(piece[: max(position, 0)])
            position -= len(piece)
        return pieces
