"""Reading config.json so that nothing is overlooked: typed access, rope in one form, and a record of consumed keys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from common.errors import ConfigurationError
from worker.model.spec import Activation, Rope, RopeKind

MAX_CONFIG_BYTES = 4_000_000
MAX_SIZE = 1 << 24
"""A bound on every integer; contexts of ten million tokens are the largest of all sizes."""
LIMITS = dict.fromkeys(
    ("num_hidden_layers", "num_layers", "num_decoder_layers", "num_attention_heads", "num_heads", "num_experts"), 1024
)
"""Bounds on what is worked through one by one; the most that models have are hundreds of each."""
MIN_NUMBER, MAX_NUMBER = 1e-20, 1e20
"""Bounds on numbers, within which products and powers of a few are numbers too."""

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
gradient_checkpointing use_cache task_specific_params finetuning_task custom_pipelines num_labels _num_labels
_attn_implementation _attn_implementation_autoset _flash_attn_2_enabled unsloth_fixed unsloth_version
is_llama_config transformers.js_config max_sequence_length model_max_length max_new_tokens
bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
return_dict id2label label2id problem_type tokenizer_class prefix output_attentions output_hidden_states
chunk_size_feed_forward is_encoder_decoder is_decoder max_length min_length do_sample num_beams num_beam_groups
temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size diversity_penalty
early_stopping num_return_sequences encoder_no_repeat_ngram_size begin_suppress_tokens suppress_tokens
bad_words_ids forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
tf_legacy_loss use_bfloat16 torchscript output_past n_special predict_special_tokens
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
dropout activation_dropout layerdrop emb_pdrop embed_dropout embedding_dropout resid_dropout residual_dropout
classifier_dropout hidden_dropout_prob attention_probs_dropout_prob init_std attention_softmax_in_fp32
scale_attention_softmax_in_fp32 router_aux_loss_coef output_router_logits router_jitter_noise input_jitter_noise
cache_implementation
"""
"""Notes about the file, its training and tools that it went through; token ids, which the tokenizer and the generation
config decide; and defaults that old versions of transformers wrote into every file."""

HARMLESS = frozenset(HARMLESS_TEXT.split())
"""Keys that change nothing about the forward pass."""

STORAGE = ("quantization_config", "compression_config")
"""Keys about how weights are stored, which `worker.model.quant.stored` reads."""

NEUTRAL: dict[str, object] = {"partial_rotary_factor": 1.0, "attention_factor": 1.0}
"""Keys that a family may not consume, with the value at which they do nothing."""

ORIGINAL = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"
"""The kinds of layer in `layer_types`."""


class ConfigReader:
    """Typed access to the values of a config.json that remembers what was asked for.

    Every accessor raises ConfigurationError naming the key if the value has the wrong type or is missing without a
    default.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = dict(values)
        self._where = where
        self._consumed: set[str] = set()
        self._sections: list[ConfigReader] = []
        self._own_names: dict[str, str] = {}

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is; `default` only where the key is absent, since null means something of its own."""
        self._consumed.add(name)
        return self._values.get(name, default)

    def names(self) -> list[str]:
        return list(self._values)

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value, most = self.get(name), LIMITS.get(name, MAX_SIZE)
        value = default if value is None else value
        if type(value) is not int or not least <= value <= most:
            raise self.error(f"{self._own_name(name)} must be an integer from {least} to {most}, not {value!r:.60}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        value = default if value is None else value
        if not _is_positive(value):
            raise self.error(f"{self._own_name(name)} must be a positive number, not {value!r:.60}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{self._own_name(name)} must be true or false, not {value!r:.60}")
        return bool(value)

    def choice(self, name: str, allowed: Sequence[int | str], default: int | str | None = None) -> Any:
        """One of `allowed`; strings count in lower case."""
        value = self.get(name)
        value = default if value is None else value.lower() if isinstance(value, str) else value
        if type(value) not in (int, str) or value not in allowed:
            known = ", ".join(map(str, allowed))
            raise self.error(f"{self._own_name(name)} {value!r:.60} is not supported; supported are {known}")
        return value

    def activation(self, name: str = "hidden_act", default: str = "silu") -> Activation:
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise self.error(f"{self._own_name(name)} {value!r:.60} is not supported; supported are {known}")
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
        """A reader of the object under a key, empty where there is none; it is finished together with this one."""
        values = self.get(name)
        if values is not None and not isinstance(values, dict):
            raise self.error(f"{self._own_name(name)} must be an object, not {values!r:.60}")
        self._sections.append(ConfigReader(values or {}, f"{self._where}: {name}"))
        return self._sections[-1]

    def _own_name(self, name: str) -> str:
        """What the file calls the key that we call `name`."""
        return self._own_names.get(name, name)

    # Rotary embeddings.

    def rope(self, default_theta: float = 10_000.0, *, head_dim: int | None = None, default_share: float = 1.0) -> Rope:
        """Rope in one form out of `rope_parameters` (new files) or `rope_theta` and `rope_scaling` (older ones).

        With `head_dim` a `partial_rotary_factor` counts, `default_share` where there is none: the share of a head
        that turns.
        """
        theta = self.number("rope_theta", default_theta)
        inner = self._rope_section()
        rotary_dim = None
        if head_dim is not None:
            share = inner.number("partial_rotary_factor", self.number("partial_rotary_factor", default_share))
            rotary_dim = self._rotary_dim(head_dim, share)
        return self._rope(inner, theta, rotary_dim)

    def _rope_section(self) -> ConfigReader:
        """Of files that say it twice either one; where the two differ, one is left over, and refused."""
        old, new = self.section("rope_scaling"), self.section("rope_parameters")
        if not old._values.items() <= new._values.items():
            return old
        old.ignore(*old._values)
        return new

    def ropes_by_kind(self, full_theta: float, sliding_theta: float) -> dict[str, Rope]:
        """Ropes by kind of layer, of models whose layers with a window turn differently.

        New files have both in `rope_parameters`. In older ones `rope_theta` and `rope_scaling` are for the layers that
        see everything, `rope_local_base_freq` for the others.
        """
        both, scaling = self.section("rope_parameters"), self.section("rope_scaling")
        full = both.section(FULL) if both.get(FULL) else scaling
        full_theta = self.number("rope_theta", full_theta)
        sliding_theta = self.number("rope_local_base_freq", sliding_theta)
        return {
            FULL: self._rope(full, full_theta, None),
            SLIDING: self._rope(both.section(SLIDING), sliding_theta, None),
        }

    def _rope(self, inner: ConfigReader, theta: float, rotary_dim: int | None) -> Rope:
        kind, theta = inner.rope_kind(), inner.number("rope_theta", theta)
        if theta <= 1.0:
            raise inner.error(f"rope_theta must be above 1, not {theta}")
        positions = self.integer("max_position_embeddings")
        # Phi's files have the length of pretraining beside the object instead of in it
        original = self.integer(ORIGINAL) if self.get(ORIGINAL) is not None else None
        return Rope(theta=theta, kind=kind, rotary_dim=rotary_dim, **inner.rope_numbers(kind, positions, original))

    def _rotary_dim(self, head_dim: int, share: float) -> int | None:
        rotary_dim = int(head_dim * share)
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            name = self._own_name("partial_rotary_factor")
            raise self.error(f"{name} {share} of {head_dim} must be an even number of elements of a head")
        return rotary_dim if rotary_dim < head_dim else None

    def rope_kind(self) -> RopeKind:
        name = self.get("rope_type") or self.get("type") or RopeKind.DEFAULT
        self._consumed.add("type")
        name = RopeKind.LONGROPE if name == "su" else name
        if name not in list(RopeKind):
            raise self.error(f"rope_type {name!r:.60} is not supported; supported are {', '.join(RopeKind)}")
        return RopeKind(name)

    def rope_numbers(self, kind: RopeKind, positions: int, original: int | None) -> dict[str, Any]:
        """What `kind` needs. `positions`: max_position_embeddings; `original`: the length of pretraining, if said
        elsewhere."""
        if kind is RopeKind.DEFAULT:
            return {}
        if kind is RopeKind.LINEAR:
            return {"factor": self.number("factor")}
        if kind is RopeKind.DYNAMIC:
            return {"factor": self.number("factor"), "original_positions": positions}
        inside = self.integer(ORIGINAL, positions)
        original = inside if original is None else original
        if kind is RopeKind.LLAMA3:
            numbers = {name: self.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
            if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
                raise self.error("low_freq_factor must be below high_freq_factor")
        else:
            stretch = self.number("factor", positions / original)
            numbers = self._yarn(stretch) if kind is RopeKind.YARN else self._longrope(stretch, original)
        return numbers | {"original_positions": original}

    def _yarn(self, factor: float) -> dict[str, Any]:
        """Peng et al., arXiv 2309.00071. The amplitude sharpens attention, which stretching blurs."""
        amplitude = _yarn_amplitude(factor, 1.0)
        if self.get("mscale") and self.get("mscale_all_dim"):
            whole = _yarn_amplitude(factor, self.number("mscale_all_dim"))
            amplitude = _yarn_amplitude(factor, self.number("mscale")) / whole
        self.ignore("finetuned")
        return {
            "factor": factor,
            "amplitude": self.number("attention_factor", amplitude),
            "beta_fast": self.number("beta_fast", 32.0),
            "beta_slow": self.number("beta_slow", 1.0),
            "is_truncated": self.flag("truncate", default=True),
        }

    def _longrope(self, stretch: float, original: int) -> dict[str, Any]:
        """Ding et al., arXiv 2402.13753."""
        amplitude = math.sqrt(1 + math.log(stretch) / math.log(max(original, 2))) if stretch > 1 else 1.0
        return {
            "amplitude": self.number("attention_factor", amplitude),
            "short_factors": self._factors("short_factor"),
            "long_factors": self._factors("long_factor"),
        }

    def _factors(self, name: str) -> tuple[float, ...]:
        values = self.get(name)
        if not isinstance(values, list) or not all(map(_is_positive, values)):
            raise self.error(f"{name} must be a list of positive numbers, not {values!r:.60}")
        return tuple(float(value) for value in values)

    def error(self, message: str) -> ConfigurationError:
        return ConfigurationError(f"{self._where}: {message}")

    def finish(self, why: str = "not supported for this model type") -> None:
        """Refuse what nobody asked for, and say `why`.

        Raises:
            ConfigurationError: if a key that was not consumed says something; it names all of those.
        """
        unknown = [name for name in self._values if name not in self._consumed and self._matters(name)]
        if unknown:
            found = ", ".join(f"{self._own_name(name)}={self._values[name]!r:.60}" for name in sorted(unknown))
            raise self.error(f"{why}: {found}")
        for section in self._sections:
            section.finish(why)

    def _matters(self, name: str) -> bool:
        value = self._values[name]
        return name not in HARMLESS and name not in STORAGE and bool(value) and value != NEUTRAL.get(name)


def _is_positive(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and MIN_NUMBER <= value <= MAX_NUMBER


def _yarn_amplitude(factor: float, mscale: float) -> float:
    return 1.0 + 0.1 * mscale * math.log(factor) if factor > 1 else 1.0


def stretch_rope(config: Mapping[str, Any], kind: str, factor: float) -> dict[str, Any]:
    """A parsed config whose rope is stretched in another way than it says, if at all.

    Raises:
        ConfigurationError: if its layers turn in several ways.
    """
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": stretch_rope(config["text_config"], kind, factor)}
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise ConfigurationError("--rope-scaling and --rope-factor need a model with the same rope in all its layers")
    kept = {name: found[name] for name in ("rope_theta", "partial_rotary_factor") if name in found}
    changed = {**config, "rope_parameters": None, "rope_scaling": kept | {"rope_type": kind, "factor": factor}}
    positions = config.get("max_position_embeddings")
    if kind == RopeKind.LINEAR and isinstance(positions, int):
        changed["max_position_embeddings"] = int(positions * factor)
    return changed


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder.

    Raises:
        ConfigurationError: if it is missing, too large or not a JSON object.
    """
    return read_object(folder / "config.json", f"{folder} is not a model folder")


def read_object(path: Path, why_missing: str) -> dict[str, Any]:
    """The parsed JSON object of a small file.

    Raises:
        ConfigurationError: if it is missing, which begins with `why_missing`, too large or not a JSON object.
    """
    if not path.is_file():
        raise ConfigurationError(f"{why_missing}: it has no {path.name}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigurationError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes, which no model's config is")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        # half a character, as JSON can spell it, could not be named in any message
        json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} must hold a JSON object")
    return values
