"""Reading config.json so that nothing is overlooked: typed access, rope in one form, and a record of consumed keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from worker.model.spec import Activation, Rope, RopeKind

MAX_CONFIG_BYTES = 4_000_000

ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}

HARMLESS_TEXT = """
architectures auto_map model_type transformers_version torch_dtype dtype _name_or_path _commit_hash
initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp
gradient_checkpointing use_cache _attn_implementation_autoset task_specific_params finetuning_task
bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
return_dict id2label label2id problem_type tokenizer_class prefix output_attentions output_hidden_states
chunk_size_feed_forward is_encoder_decoder is_decoder max_length min_length do_sample num_beams num_beam_groups
temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size diversity_penalty
early_stopping num_return_sequences encoder_no_repeat_ngram_size begin_suppress_tokens suppress_tokens
bad_words_ids forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
tf_legacy_loss use_bfloat16 torchscript pruned_heads
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
dropout activation_dropout layerdrop emb_pdrop embed_dropout embedding_dropout resid_dropout residual_dropout
classifier_dropout hidden_dropout_prob attention_probs_dropout_prob init_std attention_softmax_in_fp32
scale_attention_softmax_in_fp32
"""
"""Notes about the file and its training; token ids, which the tokenizer and the generation config decide; and defaults
that old versions of transformers wrote into every file."""

HARMLESS = frozenset(HARMLESS_TEXT.split())
"""Keys that change nothing about the forward pass."""

NEUTRAL: dict[str, object] = {"partial_rotary_factor": 1.0, "attention_factor": 1.0}
"""Keys that a family may not consume, with the value at which they do nothing."""

ROPE_KEYS = {
    RopeKind.DEFAULT: frozenset[str](),
    RopeKind.LINEAR: frozenset({"factor"}),
    RopeKind.LLAMA3: frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    ),
}


class ConfigReader:
    """Typed access to the values of a config.json that remembers what was asked for.

    Every accessor raises ConfigurationError naming the key if the value has the wrong type or is missing without a
    default.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = dict(values)
        self._where = where
        self._consumed: set[str] = set()
        self._own_names: dict[str, str] = {}

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is; `default` only where the key is absent, since null means something of its own."""
        self._consumed.add(name)
        return self._values.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(f"{self._own_name(name)} must be a positive integer, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise self.error(f"{self._own_name(name)} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{self._own_name(name)} must be true or false, not {value!r}")
        return bool(value)

    def activation(self, name: str = "hidden_act", default: str = "silu") -> Activation:
        value = self.get(name, default)
        if value not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise self.error(f"{self._own_name(name)} {value!r} is not supported; supported are {known}")
        return ACTIVATIONS[value]

    def rename(self, **names: str) -> None:
        """Values under a key of `names` move to the key it stands for, unless that one has a value already."""
        for old, new in names.items():
            if new not in self._values:
                self._own_names[new] = old
            if old in self._values:
                self._values.setdefault(new, self._values[old])
                self._consumed.add(old)

    def assume(self, **values: Any) -> None:
        """What holds in files of this family that say nothing."""
        self._values = values | self._values

    def ignore(self, *names: str) -> None:
        """Keys that mean nothing in this family, whatever they say."""
        self._consumed.update(names)

    def require(self, **values: Any) -> None:
        """Accept keys at these values only: what else they may say in this family is not available."""
        for name, value in values.items():
            found = self.get(name, value)
            if found is not None and found != value:
                raise self.error(f"{self._own_name(name)} must be {value!r} in this version, not {found!r:.60}")

    def section(self, name: str) -> ConfigReader:
        """A reader of the object under a key, empty where there is none; it is the caller's to finish."""
        values = self.get(name)
        if values is not None and not isinstance(values, dict):
            raise self.error(f"{self._own_name(name)} must be an object, not {values!r:.60}")
        return ConfigReader(values or {}, f"{self._where}: {name}")

    def _own_name(self, name: str) -> str:
        """What the file calls the key that we call `name`."""
        return self._own_names.get(name, name)

    def rope(self, default_theta: float = 10_000.0, *, head_dim: int | None = None, default_share: float = 1.0) -> Rope:
        """Rope in one form out of `rope_parameters` (new files) or `rope_theta` and `rope_scaling` (older ones).

        With `head_dim` a `partial_rotary_factor` counts, `default_share` where there is none: the share of a head
        that turns.
        """
        max_positions = self.integer("max_position_embeddings")
        theta = self.number("rope_theta", default_theta)
        scaling, parameters = self.get("rope_scaling"), self.get("rope_parameters")
        inner = ConfigReader(scaling or parameters or {}, f"{self._where}: rope parameters")
        kind = inner.rope_kind()
        rotary_dim = None
        if head_dim is not None:
            share = inner.number("partial_rotary_factor", self.number("partial_rotary_factor", default_share))
            rotary_dim = self._rotary_dim(head_dim, share)
        rope = Rope(
            theta=inner.number("rope_theta", theta),
            kind=kind,
            rotary_dim=rotary_dim,
            **inner.rope_numbers(kind, max_positions),
        )
        inner.finish()
        return rope

    def _rotary_dim(self, head_dim: int, share: float) -> int | None:
        rotary_dim = int(head_dim * share)
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise self.error(
                f"partial_rotary_factor {share} of {head_dim} must be an even number of elements of a head"
            )
        return rotary_dim if rotary_dim < head_dim else None

    def rope_kind(self) -> RopeKind:
        name = self.get("rope_type") or self.get("type") or "default"
        self._consumed.add("type")
        if name not in list(ROPE_KEYS):
            known = ", ".join(ROPE_KEYS)
            raise self.error(f"rope_type {name!r} is not available in this version; available are {known}")
        return RopeKind(name)

    def rope_numbers(self, kind: RopeKind, max_positions: int) -> dict[str, Any]:
        numbers: dict[str, Any] = {name: self.number(name) for name in sorted(ROPE_KEYS[kind] - {ORIGINAL})}
        if kind is RopeKind.LLAMA3:
            numbers["original_positions"] = self.integer(ORIGINAL, max_positions)
        return numbers

    def error(self, message: str) -> ConfigurationError:
        return ConfigurationError(f"{self._where}: {message}")

    def finish(self) -> None:
        """Refuse what nobody asked for.

        Raises:
            ConfigurationError: if a key that was not consumed says something; it names all of those.
        """
        unknown = [name for name in self._values if name not in self._consumed and self._matters(name)]
        if unknown:
            found = ", ".join(f"{self._own_name(name)}={self._values[name]!r:.60}" for name in sorted(unknown))
            raise self.error(f"not supported for this model type: {found}")

    def _matters(self, name: str) -> bool:
        value = self._values[name]
        return name not in HARMLESS and bool(value) and value != NEUTRAL.get(name)


ORIGINAL = "original_max_position_embeddings"


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder.

    Raises:
        ConfigurationError: if it is missing, too large or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigurationError(f"{folder} is not a model folder: it has no config.json")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigurationError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes, which no model's config is")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} must hold a JSON object")
    return values
