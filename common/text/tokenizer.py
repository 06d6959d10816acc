"""Text to tokens and back with the `tokenizers` library: what travels to gateways is the model's tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from common.errors import ConfigurationError
from common.text.segments import SegmentMemory, cuts_of

SHORTEST_REMEMBERED = 1024
"""Characters. A shorter text is tokenised in less time than it takes to think about it."""


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """One token of a text with the half-open range of UTF-8 bytes it covers; (0, 0) if it was added."""

    token_id: int
    text: str
    start: int
    stop: int


class TextTokenizer:
    """A fast tokenizer. Truncation and padding that a training run left in the file are switched off."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Raises ConfigurationError if the bytes are not a tokenizer.json."""
        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except ValueError as error:
            raise ConfigurationError(f"not a tokenizer.json that `tokenizers` can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        cuts = cuts_of(self._tokenizer)
        self._memory = SegmentMemory(cuts, self._encode_plain)
        self._added = self._around(cuts)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True, owner: str | None = None) -> list[int]:
        """Token ids of `text`; special tokens that are written out in it count as such, as in transformers.

        With an `owner` parts of a long text are remembered, and those that he sent before are not tokenised again.
        """
        added = self._added if add_special_tokens else ([], [])
        if owner is None or added is None or len(text) < SHORTEST_REMEMBERED:
            return self._encode_plain(text, add_special_tokens)
        before, behind = added
        return before + self._memory.encode(text, owner) + behind

    def _encode_plain(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _around(self, cuts: Sequence[str]) -> tuple[list[int], list[int]] | None:
        """The ids that are added before a text and behind it; None where no token tells which is which."""
        for text in cuts:
            (token_id,) = self._encode_plain(text)
            ids = self._encode_plain(text, add_special_tokens=True)
            if ids.count(token_id) == 1:
                place = ids.index(token_id)
                return ids[:place], ids[place + 1 :]
        return None

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> list[TokenSpan]:
        """Tokens of `text` with the bytes of it that each one stands for."""
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        position = _byte_positions(text)
        rows = zip(encoding.ids, encoding.offsets, strict=True)
        return [TokenSpan(token_id, text[start:end], position[start], position[end]) for token_id, (start, end) in rows]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


def _byte_positions(text: str) -> list[int]:
    """Byte offset of each character, and of the end."""
    positions = [0]
    for character in text:
        positions.append(positions[-1] + len(character.encode("utf-8", "surrogatepass")))
    return positions
