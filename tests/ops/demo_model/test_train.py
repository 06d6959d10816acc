import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ops.demo_model.corpus import PARTS, Document, corpus
from ops.demo_model.network import Llama, Shape
from ops.demo_model.tokenizer import ASSISTANT, BOS, END, END_ID, PAD_ID, USER, train_tokenizer
from ops.demo_model.train import PHASES, Encoder, Phase, batches_of, export, learning_rate, padded, steps_of, train


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
    examples = [encoder.encode(document) for document in corpus(PARTS[0], 300)]
    batches = batches_of(examples, epoch=0, num_tokens=4096)
    assert len(batches) > 2
    assert sum(len(batch) for batch in batches) == len(examples)
    for batch in batches:
        ids, weights = padded(batch)
        assert not ((weights > 0) & (ids == PAD_ID)).any()
        assert weights.sum() == sum(sum(example.is_target) for example in batch)


def test_brevity_gives_a_token_of_a_short_answer_more_weight(tokenizer):
    encoder = Encoder(tokenizer)
    batch = [encoder.encode(Document((("a", "1" * length),))) for length in (3, 15)]
    _, weights = padded(batch, brevity=0.5)
    assert [sum(example.is_target) for example in batch] == [4, 16]
    assert weights.max(dim=1).values.tolist() == [0.5, 0.25]


def test_a_phase_has_its_number_of_steps_however_few_the_examples(tokenizer):
    encoder = Encoder(tokenizer)
    examples = [encoder.encode(document) for document in corpus(PARTS[1], 100)]
    phase = Phase(PARTS[1], 20, 20, 1e-3, num_batches=2, batch_tokens=2048, brevity=0.5)
    assert len(batches_of(examples, 0, 2048)) < 20
    assert [len(batches) for batches in steps_of(phase, examples)] == [2] * 20


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
    weights = torch.full(ids.shape, 1 / 46)
    assert torch.allclose(model.loss(ids, weights), expected, rtol=1e-5)
    model.model.layers[1].self_attn.k_proj.weight.data.mul_(1.5)
    assert not torch.allclose(model.loss(ids, weights), expected, rtol=1e-5)


def test_a_stopped_training_goes_on_to_the_same_weights(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("ops.demo_model.train.STEPS_PER_SAVE", 4)
    monkeypatch.setattr("ops.demo_model.train.Shape", lambda vocab_size: small_shape(tokenizer))
    phases = [Phase(PARTS[0], 3, 9, 1e-3, 1, 4096, 0.0), Phase(PARTS[1], 4, 4, 1e-3, 2, 2048, 0.5)]
    train(tmp_path / "whole", phases, num_documents=100)
    state_file = tmp_path / "stopped" / "state.pt"

    def stop_after_the_save(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr("ops.demo_model.train.time.strftime", stop_after_the_save)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", phases, num_documents=100)
    assert torch.load(state_file, weights_only=True)["step"] == 4
    train(tmp_path / "stopped", phases, num_documents=100)

    assert torch.load(state_file, weights_only=True)["step"] == 7
    whole, stopped = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(weight, stopped[name]) for name, weight in whole.items())

    train(tmp_path / "other", phases[:1], num_documents=100)
    other = load_file(tmp_path / "other" / "checkpoint" / "model.safetensors")
    assert not torch.equal(whole["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_learning_rate_rises_and_falls_to_zero():
    phase = PHASES[-1]
    assert phase.num_steps == phase.num_cosine_steps
    rates = [learning_rate(phase, step) for step in range(phase.num_steps + 1)]
    assert rates[0] < rates[50] < rates[99]
    assert rates[100] > rates[1000] > rates[phase.num_steps - 1]
    assert rates[phase.num_steps] == 0


def test_export_writes_bfloat16_and_the_end_of_sequence_tokens(tokenizer, tmp_path):
    export(Llama(small_shape(tokenizer)), tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [END_ID]
