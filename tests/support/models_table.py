"""The table of architectures in docs/models.md, as families, tiny models and tests have it.

python -m tests.support.models_table     writes it between the two marks of the page
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import transformers

from common.errors import ConfigurationError
from tests.serving import test_families, test_t5
from tests.support import tiny_llama, tiny_models, tiny_t5
from tests.worker.model import test_multimodal
from worker.model import families
from worker.model.families import FAMILIES, read_spec
from worker.model.families.base import Family, QkvLayout
from worker.model.families.t5 import T5_FAMILIES
from worker.model.spec import AnySpec, Norm, QkNorm, Residual, Spec, T5Spec
from worker.runner.load import check_shards

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- written by: python -m tests.support.models_table -->\n", "<!-- end of what is written -->\n"
RANKS = (1, 2, 4)
TABLES = ("_NAMES", "_KEYS")
"""How constants end that are part of what a family costs."""

KNOWN = {
    "llama": "Llama 1 to 3.3",
    "mistral": "Mistral 7B, Nemo, Small",
    "ministral": "Ministral 8B",
    "qwen2": "Qwen2, Qwen2.5, QwQ",
    "qwen3": "Qwen3",
    "phi3": "Phi-3, Phi-4",
    "granite": "Granite 3",
    "smollm3": "SmolLM3",
    "seed_oss": "Seed-OSS",
    "internlm3": "InternLM3",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "stablelm": "StableLM 3B, StableLM 2",
    "glm": "GLM-4 9B",
    "gemma": "Gemma, CodeGemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 1B",
    "glm4": "GLM-4-0414",
    "cohere": "Command R, Aya",
    "cohere2": "Command R7B, Command A",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "exaone4": "EXAONE 4.0",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2 57B",
    "qwen3_moe": "Qwen3 30B, 235B",
    "olmoe": "OLMoE",
    "gemma3": "Gemma 3 4B and larger",
    "mistral3": "Mistral Small 3.1",
    "bloom": "BLOOM, BLOOMZ",
    "falcon": "Falcon 7B, 40B, 11B, RW",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder",
    "gpt_neo": "GPT-Neo",
    "gpt_neox": "GPT-NeoX, Pythia",
    "gptj": "GPT-J",
    "mpt": "MPT 7B, 30B",
    "opt": "OPT",
    "phi": "Phi-1, 1.5, 2",
    "starcoder2": "StarCoder2",
    "t5": "T5, T5 1.1, FLAN-T5",
    "mt5": "mT5",
}
"""Models that say so in their config.json."""


@dataclass(frozen=True)
class Case:
    """A tiny model that is compared with transformers: on one rank, where it `is_divided` on all that are possible,
    and through the whole stack or not. `default` is what files of its kind say by themselves."""

    name: str
    spec: AnySpec
    default: AnySpec
    is_divided: bool = False
    is_streamed: bool = False
    text_type: str = ""

    def __str__(self) -> str:
        return f"**{self.name}**" if self.is_streamed else self.name


def cases() -> Iterator[Case]:
    for name in tiny_models.CASES:
        is_divided = name not in tiny_llama.SPLIT_LIKE_OTHERS
        yield Case(name, *specs_of(tiny_models.config_of(name)), is_divided, name in test_families.NAMES)
    for name, differences in test_multimodal.CASES.items():
        config = getattr(transformers, f"{name}Config")(**differences)
        yield Case(name, *specs_of(config), text_type=config.text_config.model_type)
    for name, (prefix, differences) in tiny_t5.CASES.items():
        config = getattr(transformers, f"{prefix}Config")(**tiny_t5.SIZES | differences)
        yield Case(name, *specs_of(config), is_divided=True, is_streamed=name in test_t5.NAMES)


def specs_of(config: Any) -> tuple[AnySpec, AnySpec]:
    """Of this configuration, and of one of its class in which nothing was said."""
    return read_spec(config.to_dict())[0], read_spec(type(config)().to_dict())[0]


def possible_ranks(spec: AnySpec) -> tuple[int, ...]:
    possible = []
    for size in RANKS:
        with suppress(ConfigurationError):
            check_shards(spec, size)
            possible.append(size)
    return tuple(possible)


def ranks_of(tested: list[Case]) -> str:
    """The numbers on which one is compared, and in brackets those on which they run besides."""
    possible = [size for size in RANKS if any(size in possible_ranks(case.spec) for case in tested)]
    compared = [size for size in possible if size == 1 or any(case.is_divided for case in tested)]
    besides = ", ".join(str(size) for size in possible if size not in compared)
    return ", ".join(map(str, compared)) + (f" ({besides})" if besides else "")


# What is special.


def special(tested: list[Case], family: Family) -> str:
    """What all of them have, then what only some have."""
    if tested[0].text_type:
        return f"the text part, a `{tested[0].text_type}`"
    each = [words(spec, family) for case in tested for spec in (case.spec, case.default)]
    either = list(dict.fromkeys(word for found in each for word in found))
    always = [word for word in either if all(word in found for found in each)]
    sometimes = [word for word in either if word not in always]
    parts = {"": always, "may have: ": sometimes}
    return "; ".join(begin + ", ".join(found) for begin, found in parts.items() if found)


def words(spec: AnySpec, family: Family) -> list[str]:
    """In what a model differs from Llama."""
    if isinstance(spec, T5Spec):
        mlp = "gated MLP" if spec.is_gated else "plain MLP"
        return ["encoder-decoder", "bias by distance", "scores not scaled", mlp]
    return norm_words(spec) + position_words(spec) + attention_words(spec) + mlp_words(spec) + weight_words(family)


def chosen(choices: Mapping[str, object]) -> list[str]:
    return [word for word, is_so in choices.items() if is_so]


def norm_words(spec: Spec) -> list[str]:
    choices = {
        f"layer norm{'' if spec.norm_bias else ' without bias'}": spec.norm is Norm.LAYER,
        "norm weights plus one": spec.norm_plus_one,
        f"residual {spec.residual}": spec.residual is not Residual.SEQUENTIAL,
        "norm behind the embedding": spec.embedding_norm,
        "no final norm": not spec.final_norm,
        "projected embedding": spec.embedding_size,
        "scaled embedding": spec.embedding_scale != 1,
        "scaled residual": spec.residual_scale != 1,
        "scaled logits": spec.logit_scale != 1,
        "softcapped logits": spec.logit_softcap,
        "head bias": spec.head_bias,
    }
    return chosen(choices)


def position_words(spec: Spec) -> list[str]:
    ropes = set(spec.ropes)
    turning = [rope for rope in ropes if rope]
    choices = {
        "learned positions": spec.position_offset is not None,
        "ALiBi": spec.alibi_scale,
        "rope in some layers": turning and None in ropes,
        "two ropes": len(turning) > 1,
        "rope in a part of the head": any(rope.rotary_dim for rope in turning),
        "window": None not in spec.windows,
        "window in some layers": len(set(spec.windows)) > 1,
    }
    return chosen(choices)


def attention_words(spec: Spec) -> list[str]:
    choices = {
        f"qk norm {spec.qk_norm}": spec.qk_norm is not QkNorm.NONE,
        "one head of keys": spec.num_kv_heads == 1,
        "scores scaled in its own way": spec.scale != spec.head_dim**-0.5,
        "softcapped scores": spec.attention_softcap,
        "clamped q, k, v": spec.clip_qkv,
    }
    return chosen(choices) + bias_words(spec)


def bias_words(spec: Spec) -> list[str]:
    has = {"qkv bias": spec.qkv_bias, "out bias": spec.out_bias, "mlp bias": spec.mlp_bias}
    return ["all biases"] if all(has.values()) else chosen(has)


def mlp_words(spec: Spec) -> list[str]:
    moe = spec.moe
    if moe is None:
        return [] if spec.is_gated else ["plain MLP"]
    choices = {
        "experts": all(moe.sparse_layers),
        "experts in some layers": not all(moe.sparse_layers),
        "a shared expert": moe.shared_ffn_size,
    }
    return chosen(choices)


def weight_words(family: Family) -> list[str]:
    """What is straightened while weights are read."""
    choices = {
        f"qkv {family.qkv}": family.qkv is not QkvLayout.SEPARATE,
        "gate and up fused": "gate_up" in family.names,
        "matrices transposed": family.is_transposed,
        "rope interleaved": family.is_interleaved,
    }
    return ["stored: " + ", ".join(found)] if (found := chosen(choices)) else []


# What it cost.


@dataclass(frozen=True)
class Definition:
    """A function, or a table of names or keys, in a module of the families. `uses` are the others it mentions."""

    module: str
    name: str
    num_lines: int
    uses: tuple[str, ...]

    @property
    def is_names(self) -> bool:
        return self.name.endswith(TABLES)


@cache
def definitions() -> dict[str, Definition]:
    """By name, which no two modules share unless one imports it from the other."""
    found = {}
    for _, name, _ in pkgutil.iter_modules(families.__path__, families.__name__ + "."):
        module = importlib.import_module(name)
        for node in ast.parse(inspect.getsource(module)).body:
            if definition := definition_of(module, node):
                assert definition.name not in found
                found[definition.name] = definition
    return found


def definition_of(module: ModuleType, node: ast.stmt) -> Definition | None:
    where, mentioned = module.__name__.rpartition(".")[2], mentioned_by(node, vars(module))
    if isinstance(node, ast.FunctionDef):
        return Definition(where, node.name, num_body_lines(vars(module)[node.name]), mentioned)
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id.endswith(TABLES):
            return Definition(where, target.id, num_entry_lines(node), mentioned)
    return None


def mentioned_by(node: ast.AST, namespace: Mapping[str, Any]) -> tuple[str, ...]:
    """Functions and tables of the families that are named there."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
    return tuple(sorted(name for name in names if name.endswith(TABLES) or is_ours(namespace.get(name))))


def is_ours(value: object) -> bool:
    return isinstance(value, FunctionType) and value.__module__.startswith(families.__name__)


def num_body_lines(function: Callable[..., object]) -> int:
    """Without signature, docstring, comments and blank lines."""
    source = textwrap.dedent(inspect.getsource(function))
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    first = node.body[1 if ast.get_docstring(node) else 0]
    lines = [line.strip() for line in source.splitlines()[first.lineno - 1 :]]
    return len([line for line in lines if line and not line.startswith("#")])


def num_entry_lines(table: ast.AST) -> int:
    """Lines of entries of its own: those of the tables it is made of are not there."""
    values = [value for part in ast.walk(table) if isinstance(part, ast.Dict) for value in part.values]
    return len({line for value in values for line in range(value.lineno, (value.end_lineno or value.lineno) + 1)})


def needed_by(family: Family) -> set[str]:
    """The definitions that a family is made of."""
    # the builder of a model that also sees is made by a function
    needed, todo = set(), [family.build.__qualname__.partition(".")[0], *names_of(family)]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += definitions()[name].uses
    return needed


def names_of(family: Family) -> list[str]:
    """The table of a family, unless it was made of another one's."""
    return [each.name for each in definitions().values() if vars(module_of(each))[each.name] is family.names]


def module_of(definition: Definition) -> ModuleType:
    return importlib.import_module(f"{families.__name__}.{definition.module}")


# The page.


def grouped() -> dict[str, Family]:
    """Families under their first name."""
    found: dict[str, Family] = {}
    for model_type, family in (FAMILIES | T5_FAMILIES).items():
        if not any(family is known for known in found.values()):
            found[model_type] = family
    return found


def row(model_type: str, family: Family, users: Mapping[str, int], tested: list[Case]) -> str:
    types = [name for name, known in (FAMILIES | T5_FAMILIES).items() if known is family]
    own = [definitions()[name] for name in needed_by(family) if users[name] == 1]
    cells = (
        ", ".join(f"`{name}`" for name in types),
        KNOWN[model_type],
        special(tested, family),
        ", ".join(map(str, tested)),
        ranks_of(tested),
        str(sum(each.num_lines for each in own if not each.is_names)),
        str(sum(each.num_lines for each in own if each.is_names)),
    )
    return f"| {' | '.join(cells)} |"


def document() -> str:
    """The table, and what is shared, as Markdown."""
    known, found = grouped(), list(cases())
    needs = {model_type: needed_by(family) for model_type, family in known.items()}
    users = {name: sum(name in needed for needed in needs.values()) for name in definitions()}
    lines = ["| model_type | such as | special | compared | on ranks | builder | names |", "|---" * 7 + "|"]
    lines += [
        row(model_type, family, users, [case for case in found if case.spec.model_type == model_type])
        for model_type, family in known.items()
    ]
    lines += ["", "Lines that several architectures share:", "", "| file | lines |", "|---|---|"]
    shared = [each for each in definitions().values() if users[each.name] > 1]
    for module in dict.fromkeys(each.module for each in shared):
        listed = [f"{each.name} {each.num_lines}" for each in shared if each.module == module]
        lines.append(f"| {module}.py | {', '.join(listed)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """`page` with this table between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{document()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
