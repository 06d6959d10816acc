import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ops.demo_model.corpus import Document, corpus
from ops.demo_model.network import Llama, Shape
from ops.demo_model.tokenizer import ASSISTANT, BOS, END, END_ID, PAD_ID, USER, train_tokenizer
from ops.demo_model.train import Encoder, Trainer, batches_of, export, learning_rate, padded, run


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_shape(tokenizer):
    return Shape(tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)


def test_a_chat_is_encoded_as_the_template_renders_it(tokenizer):
    example = Encoder(tokenizer).encode(Document((("hi", "hello"),)))
    expected = f"{BOS}{USER}hi{END}{ASSISTANT}hello{END}"
    assert example.ids == tokenizer.encode(expected, add_special_tokens=False).ids
    written = [token for token, is_target in zip(example.ids, example.is_target, strict=True) if is_target]
    assert tokenizer.decode(written, skip_special_tokens=False) == f"hello{END}"


def test_a_raw_prompt_is_encoded_as_plain_text(tokenizer):
    example = Encoder(tokenizer).encode(Document((("hi", "\nhello"),), is_raw=True))
    assert example.ids[: len(tokenizer.encode("hi").ids)] == tokenizer.encode("hi").ids
    assert tokenizer.decode(example.ids, skip_special_tokens=False) == f"{BOS}hi\nhello{END}"


def test_batches_hold_every_example_once_and_never_train_on_padding(tokenizer):
    encoder = Encoder(tokenizer)
    examples = [encoder.encode(document) for document in corpus(300)]
    batches = batches_of(examples, epoch=0)
    assert len(batches) > 2
    assert sum(len(batch) for batch in batches) == len(examples)
    for batch in batches:
        ids, is_target = padded(batch)
        assert not (is_target & (ids == PAD_ID)).any()
        assert is_target.sum() == sum(sum(example.is_target) for example in batch)


def test_the_network_is_the_llama_of_transformers(tokenizer, tmp_path):
    torch.manual_seed(1)
    model = Llama(small_shape(tokenizer))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((torch.randn_like(weight) * 0.3).bfloat16())
    export(model, tokenizer, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(6, tokenizer.get_vocab_size(), (2, 24))
    expected = reference(input_ids=ids, labels=ids).loss
    everything = torch.ones_like(ids, dtype=torch.bool)
    assert torch.allclose(model.loss(ids, everything), expected, rtol=1e-5)
    model.model.layers[1].self_attn.k_proj.weight.data.mul_(1.5)
    assert not torch.allclose(model.loss(ids, everything), expected, rtol=1e-5)


def test_a_stopped_training_goes_on_to_the_same_weights(tokenizer, tmp_path):
    encoder = Encoder(tokenizer)
    examples = [encoder.encode(document) for document in corpus(300)]
    num_steps = len(batches_of(examples, 0))
    assert num_steps >= 4

    def trainer(name, last_step):
        (tmp_path / name).mkdir(exist_ok=True)
        made = Trainer(small_shape(tokenizer), num_steps, tmp_path / name)
        made.restore()
        return made

    whole = trainer("whole", num_steps)
    run(whole, examples, 1)
    assert whole.step == num_steps

    half = trainer("halves", num_steps)
    for batch in batches_of(examples, 0)[: num_steps // 2]:
        half.learn(*padded(batch))
    half.save()
    resumed = trainer("halves", num_steps)
    assert resumed.step == num_steps // 2
    run(resumed, examples, 1)

    for name, weight in whole.model.state_dict().items():
        assert torch.allclose(weight, resumed.model.state_dict()[name], atol=1e-6)
        assert not torch.equal(weight, half.model.state_dict()[name])


def test_learning_rate_rises_and_falls_to_zero():
    rates = [learning_rate(step, 1000) for step in range(1001)]
    assert rates[0] < rates[50] < rates[99]
    assert rates[100] > rates[500] > rates[999]
    assert rates[1000] == 0


def test_export_writes_bfloat16_and_the_end_of_sequence_tokens(tokenizer, tmp_path):
    export(Llama(small_shape(tokenizer)), tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [END_ID]
