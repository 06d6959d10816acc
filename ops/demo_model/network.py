"""The network that is trained: a plain Llama in torch whose weight names are those of the checkpoint.

Source: Touvron et al. 2023 (LLaMA), with grouped-query attention (Ainslie et al. 2023) and tied embeddings.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network, under the names of the configuration file."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def config(self, bos_id: int, eos_id: int, pad_id: int) -> dict[str, Any]:
        """The `config.json` of a Llama checkpoint with this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "pad_token_id": pad_id,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


def rope_table(shape: Shape, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [num_positions, head_dim] of rotary position embedding (Su et al. 2021), halves layout."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), shape.rope_theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the table [length, head_dim] to states [batch, heads, length, head_dim]."""
    cosine, sine = (part.to(states.dtype) for part in table)
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        key_size = shape.num_key_value_heads * shape.head_dim
        query_size = shape.num_attention_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = hidden.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (p(hidden).view(batch, length, -1, self.head_dim).transpose(1, 2) for p in projections)
        query, key = rotate(query, table), rotate(key, table)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, hidden: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), table)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


class Trunk(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(self, ids: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        hidden = self.embed_tokens(ids)
        for layer in self.layers:
            hidden = layer(hidden, table)
        return self.norm(hidden)  # type: ignore[no-any-return]


class Llama(nn.Module):
    """`loss(ids, weights)` is all the training needs; the state dict has the names of LlamaForCausalLM."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        self._initialize()

    def _initialize(self) -> None:
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                spread = 0.02 / (2 * self.shape.num_hidden_layers) ** 0.5 if is_output else 0.02
                nn.init.normal_(weight, std=spread)

    def loss(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum of the cross entropies of the tokens of ids [batch, length], each times its weight [batch, length]."""
        hidden = self.model(ids[:, :-1], rope_table(self.shape, ids.shape[1] - 1))
        chosen = weights[:, 1:] > 0
        logits = F.linear(hidden[chosen], self.model.embed_tokens.weight)
        losses = F.cross_entropy(logits.float(), ids[:, 1:][chosen], reduction="none")
        return (losses * weights[:, 1:][chosen]).sum()
