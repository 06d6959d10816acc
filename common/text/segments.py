"""Long texts that begin as others did: what was tokenised before is remembered, cut where a tokenizer cuts it itself.

A tokenizer takes the added tokens that are written out in a text (those of a chat template, say) out of it first;
normaliser, pre-tokeniser and model see what is between them piece by piece (`AddedVocabulary` and `PreTokenizedString`
of the tokenizers library). A segment is such a token with what follows it, up to the next one, so the ids of a text are
those of its segments one after another, whatever was said before and comes after:

    <|system|>You are …  │  <|user|>Hi  │  <|assistant|>Hello!  │  <|user|>And now?  │  <|assistant|>
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import pairwise
from threading import Lock

from tokenizers import AddedToken, Tokenizer

MAX_CUTS = 256
"""Added tokens that are looked for. Some models have thousands, those of their chat templates among the first."""

MAX_REMEMBERED = 1 << 20
"""Characters and ids in all: about ten megabytes."""

Encode = Callable[[str], list[int]]


def cuts_of(tokenizer: Tokenizer) -> list[str]:
    """Added tokens that a tokenizer finds wherever they are written, and that leave no trace in what is beside them.

    For that none may have a part in common with another added token, which could be found in its place, nor be looked
    for in normalised text, nor take in spaces before it or begin with some; spaces behind it are of its own segment.
    Words that count only where no word goes on beside them would look beyond a segment.
    """
    added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    if any(token.single_word for token in added) or getattr(tokenizer.model, "dropout", None):
        return []
    written = [token.content for token in added]
    ends = {text[start:] for text in written for start in range(1, len(text))}
    found = [token.content for token in added if _is_plain(token) and not ends & _beginnings(token.content)]
    joined = "\0".join(written)
    return [text for text in found[:MAX_CUTS] if joined.count(text) == 1 and _is_one(tokenizer, text)]


def _is_plain(token: AddedToken) -> bool:
    return not (token.normalized or token.lstrip or token.content[:1].isspace())


def _is_one(tokenizer: Tokenizer, text: str) -> bool:
    """Not where a template of the tokenizer writes every text twice."""
    return len(tokenizer.encode(text, add_special_tokens=False).ids) == 1


def _beginnings(text: str) -> set[str]:
    return {text[:end] for end in range(1, len(text) + 1)}


class SegmentMemory:
    """Tokenises texts by their segments, of which it remembers the ids for each owner by themselves: nobody learns from
    the time it takes what others have sent. Thread-safe."""

    def __init__(self, cuts: Iterable[str], encode: Encode, most: int = MAX_REMEMBERED) -> None:
        """`encode` gives the ids of a text without any that are not written in it."""
        self._cut = re.compile("|".join(map(re.escape, cuts)) or r"(?!)")
        self._encode, self._most = encode, most
        self._ids: OrderedDict[tuple[str, str], list[int]] = OrderedDict()
        self._size = 0
        self._lock = Lock()

    @property
    def size(self) -> int:
        """Characters and ids that are remembered."""
        return self._size

    def encode(self, text: str, owner: str) -> list[int]:
        segments = self._segments(text)
        if len(segments) == 1:
            return self._encode(text)
        found: list[int] = []
        for segment in segments:
            found += self._ids_of((owner, segment))
        return found

    def _segments(self, text: str) -> list[str]:
        starts = [match.start() for match in self._cut.finditer(text)]
        return [text[start:end] for start, end in pairwise([0, *starts, len(text)]) if start < end]

    def _ids_of(self, key: tuple[str, str]) -> list[int]:
        with self._lock:
            if key in self._ids:
                self._ids.move_to_end(key)
                return self._ids[key]
        ids = self._encode(key[1])
        self._remember(key, ids)
        return ids

    def _remember(self, key: tuple[str, str], ids: list[int]) -> None:
        with self._lock:
            if key in self._ids:
                return
            self._ids[key] = ids
            self._size += len(key[1]) + len(ids)
            while self._size > self._most:
                (_, segment), forgotten = self._ids.popitem(last=False)
                self._size -= len(segment) + len(forgotten)
