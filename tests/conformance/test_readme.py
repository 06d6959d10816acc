"""Every shell and Python block of the README works as it stands, against `inferfleet up` on a free port."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conformance.conftest import Served
from tests.support.fleet import ROOT

BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
CLIENT_OF = {
    "from openai": "openai",
    "from huggingface_hub": "huggingface_hub",
    "from text_generation": "text-generation",
}


def run_block(served: Served, language: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    text = text.replace("localhost:8080", f"127.0.0.1:{served.port}").replace(".venv/bin", str(ROOT / ".venv" / "bin"))
    if language == "sh":
        command = ["bash", "-euo", "pipefail", "-c", text]
    else:
        client = next(name for line, name in CLIENT_OF.items() if line in text)
        command = [str(ROOT / ".venv" / "clients" / client / "bin" / "python"), "-c", text]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=90, env=served.environment())


def test_the_readme_has_blocks_of_both_kinds() -> None:
    languages = [language for language, _ in BLOCKS]
    assert languages.count("sh") >= 3
    assert languages.count("python") >= 3


@pytest.mark.parametrize(("language", "text"), BLOCKS, ids=range(len(BLOCKS)))
def test_block(served: Served, language: str, text: str, tmp_path: Path) -> None:
    done = run_block(served, language, text, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert re.search(r'"error": ?[{"]', done.stdout) is None


def test_a_wrong_block_fails(served: Served, tmp_path: Path) -> None:
    assert run_block(served, "sh", "curl -sf localhost:8080/no-such-route", tmp_path).returncode != 0
