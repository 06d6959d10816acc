"""docs/options.md says what the settings declare."""

from __future__ import annotations

from pathlib import Path

from common.settings import UpSettings
from ops.options import document

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == document(), "run: python -m ops.options > docs/options.md"


def test_every_option_has_a_help_text() -> None:
    assert len(UpSettings.model_fields) > 40
    assert [name for name, field in UpSettings.model_fields.items() if not field.description] == []
