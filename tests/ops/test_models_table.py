"""docs/models.md says what families, tiny models and tests have."""

from __future__ import annotations

import pytest

from tests.serving import test_families
from tests.support import models_table, tiny_llama
from tests.support.models_table import PAGE, definitions, num_body_lines, with_table
from worker.model.families import FAMILIES
from worker.model.families.t5 import T5_FAMILIES


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "run: python -m tests.support.models_table"
    first_cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert all(any(f"`{name}`" in cell for cell in first_cells) for name in FAMILIES | T5_FAMILIES)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (test_families, "NAMES", test_families.NAMES[1:]),
        (tiny_llama, "SPLIT_LIKE_OTHERS", set()),
        (models_table, "KNOWN", models_table.KNOWN | {"llama": "Alpaca"}),
    ],
)
def test_a_change_shows(monkeypatch: pytest.MonkeyPatch, module: object, name: str, value: object) -> None:
    page = PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(module, name, value)
    assert with_table(page) != page


def counted(number: int) -> int:
    """Does little."""

    # a comment is no line of code
    number += 1
    return number


def test_lines_are_those_of_code_and_ones_own() -> None:
    assert num_body_lines(counted) == 2
    made = definitions()["PHI3_NAMES"]
    assert (made.num_lines, made.uses) == (1, ("FUSED_MLP_NAMES",))
