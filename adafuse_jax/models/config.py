"""Shapes of a decoder, its linears and their names."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

DType = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["int8", "int4", "int4-g64"]
QUANTIZE_HELP = (
    "keep the linears' weights in 8 bits with a scale for each output, or in 4 bits with one for each 128 (int4) or 64 "
    "(int4-g64) inputs; embeddings, head, norms and adapters stay; default: as the model's files have them"
)
Remat = Literal["none", "products", "attention", "full"]
"""Rematerialisation policies of training, see `models.remat`."""

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + FFN_LINEARS
"""The seven linear layers of a block, in execution order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. `kind` is `default`, `linear` (positions divided by `factor`) or `llama3`."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes of a Llama-family decoder. `sliding_windows[l]` is layer l's attention window in tokens, None for all."""

    model_type: str
    vocab_size: int
    embed_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of one of the seven linears."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, f = self.embed_dim, self.hidden_dim
        shapes = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        return (shapes | {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)})[name]

    def has_bias(self, name: str) -> bool:
        if name == "o_proj":
            return self.o_bias
        return self.qkv_bias if name in ATTENTION_LINEARS else self.mlp_bias


def flat_fields(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, default) of every field; those of an inner dataclass as `rope.theta`."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from ((f"{field.name}.{name}", *rest) for name, *rest in flat_fields(value))
        else:
            yield field.name, value, field.default


def unsupported_field(config: ModelConfig, supported: Collection[str]) -> str | None:
    """The reason why code that knows only the fields `supported` cannot compute this model: another field, of `ModelConfig`
    or of one derived from it, that differs from its default. None if there is none."""
    for name, value, default in flat_fields(config):
        if name not in supported and value != default:
            return f"the model has {name} {value!r}, which it does not take"
    return None
