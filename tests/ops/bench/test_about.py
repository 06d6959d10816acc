"""How a measurement names the processor it was made on."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.bench.about import cpu_name

CASES = {
    "model name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\n": "AMD EPYC (family 26, model 2)",
    "model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 17\n": "AMD EPYC (family 25, model 17)",
    "model name\t: Some CPU\n": "Some CPU",
    "processor\t: 0\nBogoMIPS\t: 50.00\n": "unknown",
}


@pytest.mark.parametrize("text", CASES)
def test_generations_of_one_name_are_told_apart(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert cpu_name(path) == CASES[text]


def test_a_machine_that_hides_its_processor(tmp_path: Path) -> None:
    assert cpu_name(tmp_path / "missing") == "unknown"
