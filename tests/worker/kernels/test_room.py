from __future__ import annotations

import itertools

import torch

from worker.kernels.room import CHUNK_BYTES, LINE_BYTES, Room


def test_pieces_are_apart_of_what_was_asked_for_and_begin_with_a_cache_line():
    room = Room()
    sizes = [(1, torch.bfloat16), (33, torch.float32), (CHUNK_BYTES, torch.float32), (7, torch.float32)]
    pieces = [room.take(*size) for size in sizes]
    assert [(len(piece), piece.dtype) for piece in pieces] == sizes
    assert not any(piece.data_ptr() % LINE_BYTES for piece in pieces)
    assert not any(piece[:100].any() for piece in pieces)
    assert pieces[1].data_ptr() - pieces[0].data_ptr() == LINE_BYTES, "the first two are to lie side by side"
    spans = sorted((piece.data_ptr(), piece.data_ptr() + piece.nbytes) for piece in pieces)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
