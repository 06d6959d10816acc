"""Every family split over ranks that are processes, against transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.errors import ConfigurationError
from tests.support import tiny_llama, tiny_models
from tests.support.paged import relative_error
from tests.support.ranks import Ranks, ranks
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.spec import QkNorm
from worker.parallel.shard import is_even_split
from worker.runner.load import check_shards

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=[2, 4])
def group(request) -> Iterator[tuple[int, Ranks]]:
    with ranks(request.param) as started:
        yield request.param, started


@pytest.mark.parametrize("name", [name for name in tiny_models.CASES if name not in tiny_llama.SPLIT_LIKE_OTHERS])
def test_ranks_agree_with_transformers(group, tiny, tmp_path, name):
    size, started = group
    model = tiny(name)
    spec, _ = read_spec(read_config(model.folder))
    if not is_even_split(spec.num_heads, spec.num_kv_heads, size) or spec.qk_norm is QkNorm.FULL:
        with pytest.raises(ConfigurationError, match="num-shard"):
            check_shards(spec, size)
        return
    check_shards(spec, size)
    logits = started.logits(model.folder, model.sequences, tmp_path / "logits.safetensors")
    assert relative_error(logits, model.logits) <= TOLERANCE


def test_copies_of_key_heads_in_the_wrong_place_show(tiny, tmp_path):
    model = tiny("llama")
    with ranks(4) as started:
        logits = started.logits(model.folder, model.sequences, tmp_path / "logits.safetensors", is_wrong=True)
    assert relative_error(logits, model.logits) > 10 * TOLERANCE
