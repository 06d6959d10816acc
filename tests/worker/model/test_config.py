from __future__ import annotations

import pytest

from common.errors import ConfigurationError
from worker.model import config
from worker.model.config import read_config


def test_a_folder_without_a_config_is_not_a_model(tmp_path):
    with pytest.raises(ConfigurationError, match=r"not a model folder.*config\.json"):
        read_config(tmp_path)
    with pytest.raises(ConfigurationError, match="not a model folder"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe{}", b"null"])
def test_a_config_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_config_has_a_largest_size(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"a": "bcdefghijk"}')
    assert read_config(tmp_path) == {"a": "bcdefghijk"}
    monkeypatch.setattr(config, "MAX_CONFIG_BYTES", 10)
    with pytest.raises(ConfigurationError, match="larger than"):
        read_config(tmp_path)
