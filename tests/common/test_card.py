"""Cards survive the way, also from a worker that knows fewer fields."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from common import wire
from common.card import ModelCard, decode_card, encode_card
from common.errors import WireError
from tests.support.protocol import make_card

CARDS = [make_card(), make_card(aliases=("a",), eos_token_ids=(1, 2), is_encoder_decoder=True)]


@pytest.mark.parametrize("card", CARDS)
def test_a_card_survives_the_way(card: ModelCard) -> None:
    assert decode_card(encode_card(card)) == card


def packed(fields: dict) -> bytes:
    return wire.pack([wire.VERSION, "card", fields])


def test_a_card_of_an_older_worker_is_that_of_a_decoder() -> None:
    fields = asdict(make_card()) | {"adapters": ["a field that cards once had"]}
    del fields["is_encoder_decoder"]
    assert decode_card(packed(fields)) == make_card()
    del fields["vocab_size"]
    with pytest.raises(WireError, match="not a model card"):
        decode_card(packed(fields))


@pytest.mark.parametrize("data", [b"", wire.pack(5), wire.pack([0, "card", {}]), wire.pack([wire.VERSION, "job", {}])])
def test_what_is_no_card_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_card(data)
