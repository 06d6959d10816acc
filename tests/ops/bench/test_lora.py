"""The dry run of `python -m ops.bench.lora`: it measures what it says, whatever the figures are."""

from __future__ import annotations

import json

from ops.bench import lora
from ops.bench.lora import SHORT, main
from worker.model.lora import LoraSlots


def test_a_dry_run_deals_adapters_out_over_the_batch_and_over_nothing(monkeypatch, tmp_path, capsys):
    steps: list[tuple[int, int]] = []
    use = LoraSlots.use

    def watch(slots: LoraSlots, by_token) -> None:
        steps.append((len(by_token), len(set(by_token.tolist()) - {-1})))
        use(slots, by_token)

    monkeypatch.setattr(LoraSlots, "use", watch)
    assert main(["--short", "--rounds", "2", "--json", str(tmp_path / "found")]) == 0
    assert (SHORT.num_requests, SHORT.num_active) in steps and (SHORT.num_requests, 0) in steps
    found = json.loads((tmp_path / "found").read_text())
    assert len(found["base"]) == len(found["adapted"]) == 2
    assert found["largest_batch"] == SHORT.num_requests
    assert f"| {found['ratio']:.3f} | at least 0.85 |" in capsys.readouterr().out


def test_the_model_of_the_bar_has_443_million_parameters():
    config = lora.CONFIG
    shapes = [lora.shape_of(target, config) for target in lora.TARGETS["all"]]
    in_layers = config["num_hidden_layers"] * sum(rows * columns for rows, columns in shapes)
    assert round((in_layers + 2 * config["vocab_size"] * config["hidden_size"]) / 1e6) == 443
