"""`--quantize` and what a checkpoint says of itself."""

from __future__ import annotations

import pytest

from common.errors import ConfigurationError
from worker.model.quant.choice import MADE, choose_quantisation
from worker.model.quant.scheme import NOT_QUANTISED

PLAIN = {"model_type": "llama"}
GPTQ = PLAIN | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}}


def test_without_the_option_the_checkpoint_decides():
    assert choose_quantisation(None, PLAIN) is NOT_QUANTISED
    assert choose_quantisation(None, GPTQ).name == "gptq"
    assert choose_quantisation("gptq", GPTQ) == choose_quantisation(None, GPTQ)


@pytest.mark.parametrize("option", [*MADE, "none"])
def test_what_needs_no_checkpoint_takes_any_that_is_not_quantised(option):
    found = choose_quantisation(option, PLAIN)
    assert found.name == option
    assert (found.make is None) is (option == "none")


@pytest.mark.parametrize("option", [*MADE, "none", "awq"])
def test_the_option_must_not_contradict_the_checkpoint(option):
    with pytest.raises(ConfigurationError) as caught:
        choose_quantisation(option, GPTQ)
    assert str(caught.value) == (
        f"--quantize {option} contradicts the checkpoint, which is quantised by gptq; leave it out"
    )


@pytest.mark.parametrize("option", ["gptq", "awq", "compressed-tensors"])
def test_formats_of_checkpoints_are_not_made_on_the_way(option):
    with pytest.raises(ConfigurationError) as caught:
        choose_quantisation(option, PLAIN)
    assert str(caught.value) == (
        f"--quantize {option} needs a checkpoint in that format and this one is not quantised; on the way in are "
        "possible int8, int4, fp8, bitsandbytes, bitsandbytes-nf4, bitsandbytes-fp4, and "
        "`inferfleet prepare --quantize gptq` writes a quantised one"
    )
