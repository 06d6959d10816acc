"""Who may import whom: the contracts in pyproject.toml hold, and one that must not hold is caught."""

from __future__ import annotations

import configparser
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_ERROR, EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def other_logs_go_on() -> Iterator[None]:
    """The linter turns off every logger but its own."""
    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    before = [each.disabled for each in loggers]
    yield
    for logger, was_disabled in zip(loggers, before, strict=True):
        logger.disabled = was_disabled


def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True, config_filename=str(ROOT / "pyproject.toml")) == EXIT_STATUS_SUCCESS


def test_a_broken_contract_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = configparser.ConfigParser()
    config["importlinter"] = {"root_packages": "common\ngateway"}
    config["importlinter:contract:1"] = {
        "name": "wrong on purpose",
        "type": "forbidden",
        "source_modules": "gateway",
        "forbidden_modules": "common",
    }
    path = tmp_path / "wrong.ini"
    with path.open("w") as file:
        config.write(file)
    assert lint_imports(no_cache=True, config_filename=str(path)) == EXIT_STATUS_ERROR
