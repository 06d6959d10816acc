"""docs/performance.md has the tables that the files in docs/data give, and the plots beside it are theirs too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from ops.bench import tables
from ops.bench.tables import PAGE, PLOTS, TABLES, Table, changed, main, with_tables

DATA = PAGE.parent / "data"
SMALL = {"sizes": Table("sizes.json", lambda found: f"| {found['size']} |")}
MARKS = "before\n<!-- table sizes -->\nold\n<!-- end of table -->\nbehind\n"


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text()
    assert changed(page, with_tables(page, DATA)) == [], "run: python -m ops.bench.tables"
    assert main(["--check"]) == 0, "run: python -m ops.bench.tables"
    assert all(f"data/{table.file}" in page for table in TABLES.values()), "a reader finds the numbers"


def test_the_plots_are_on_the_page() -> None:
    page = PAGE.read_text()
    assert all(f"(plots/{name})" in page for name in PLOTS)


def test_other_numbers_in_a_file_show(tmp_path: Path) -> None:
    for table in TABLES.values():
        (tmp_path / table.file).write_text((DATA / table.file).read_text())
    found = json.loads((tmp_path / "lora.json").read_text())
    (tmp_path / "lora.json").write_text(json.dumps(found | {"base": [1.0, 1.0, 1.0]}))
    page = PAGE.read_text()
    assert changed(page, with_tables(page, tmp_path)) == ["lora"]


def test_only_what_is_between_the_marks_is_written(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text('{"size": 3}')
    page = with_tables(MARKS, tmp_path, SMALL)
    assert page == MARKS.replace("old", "| 3 |")
    assert with_tables(page, tmp_path, SMALL) == page


@pytest.mark.parametrize(
    ("page", "content", "complaint"),
    [
        (MARKS.replace("table sizes", "table colours"), "{}", "has marks for colours; there are sizes"),
        (MARKS + MARKS, "{}", "has marks for sizes, sizes; there are sizes"),
        (MARKS, "{", "no table can be made of .*sizes.json"),
        (MARKS, None, "no table can be made of .*sizes.json"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path: Path, page: str, content: str | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(ConfigurationError, match=complaint):
        with_tables(page, tmp_path, SMALL)


def test_the_command_tells_what_is_stale_and_writes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "performance.md"
    page.write_text(PAGE.read_text().replace("| int8 |", "| int9 |"))
    (tmp_path / "data").symlink_to(DATA)
    shutil.copytree(PAGE.parent / "plots", tmp_path / "plots")
    (tmp_path / "plots" / "scaling-batch.svg").write_text("another")
    (tmp_path / "plots" / "scaling-context.svg").unlink()
    monkeypatch.setattr(tables, "PAGE", page)
    stale = ["quant", "scaling-batch.svg", "scaling-context.svg"]
    assert main(["--check"]) == 1
    assert capsys.readouterr().out == "".join(f"{name} is not up to date\n" for name in stale)
    assert main([]) == 0 and page.read_text() == PAGE.read_text()
    assert all((tmp_path / "plots" / name).read_text() == (PAGE.parent / "plots" / name).read_text() for name in PLOTS)
    assert main(["--check"]) == 0 and capsys.readouterr().out == ""
