"""Shapes of a decoder, its linears and their names."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

DType = Literal["float32", "bfloat16", "float16"]
Remat = Literal["none", "products", "attention", "full"]
"""Rematerialisation policies of training, see `models.remat`."""

Norm = Literal["rms", "rms_1p", "layer"]
"""Norms of x with weight w: w · x / rms(x), (1 + w) · x / rms(x), and w · (x − mean(x)) / std(x)."""
Placement = Literal["pre", "post", "both"]
"""Norms of a block b: x + b(norm(x)), x + norm(b(x)), and x + norm(b(norm(x)))."""
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]
"""Activation of the feed-forward block, by its name in transformers."""

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + FFN_LINEARS
"""The seven linear layers of a block, in execution order."""
BLOCK_NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
"""Norms in front of and behind attention, in front of and behind the feed-forward block."""


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
    """Shapes and equations of a decoder; defaults are Llama's.

    Attributes:
      local_rope: of the layers with a sliding window; None: `rope`, as the others.
      nope_layers: the layers without rotary embedding.
      qk_norm: norms of queries and keys, each head on its own or, with `qk_norm_full`, all heads together.
      sliding_windows: each layer's attention window in tokens, None for all; () is none in any layer.
      parallel_block: x + attention(h) + ffn(h) with one h = norm(x).
      embedding_multiplier, residual_multiplier, logit_multiplier: of embeddings, of what a block adds, of logits.
      attention_multiplier: of scores q · k; None: 1/√H.
      attention_softcap, logit_softcap: c in c · tanh(z / c), of scores and of logits; None: no cap.
    """

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
    norm: Norm = "rms"
    norm_placement: Placement = "pre"
    parallel_block: bool = False
    activation: Activation = "silu"
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    nope_layers: tuple[int, ...] = ()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_full: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logit_multiplier: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of one of the seven linears."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, f = self.embed_dim, self.hidden_dim
        shapes = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        return (shapes | {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)})[name]

    def norm_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's norms."""
        d, heads = (self.embed_dim,), (self.num_heads, self.num_kv_heads) if self.qk_norm_full else (1, 1)
        shapes = {}
        if self.norm_placement != "post":
            shapes["input_layernorm"] = d
            if not self.parallel_block:
                shapes["post_attention_layernorm"] = d
        if self.norm_placement != "pre":
            shapes |= {"post_self_attn_layernorm": d, "post_mlp_layernorm": d}
        if self.qk_norm:
            shapes |= {name: (n * self.head_dim,) for name, n in zip(("q_norm", "k_norm"), heads, strict=True)}
        return shapes

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of a layer, None if it has none."""
        if layer in self.nope_layers:
            return None
        is_local = self.local_rope is not None and self.sliding_windows and self.sliding_windows[layer] is not None
        return self.local_rope if is_local else self.rope

    def has_bias(self, name: str) -> bool:
        if name == "o_proj":
            return self.o_bias
        return self.qkv_bias if name in ATTENTION_LINEARS else self.mlp_bias


def flat_fields(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, default) of every field; those of a dataclass that is always there as `rope.theta`."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(field.default):
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
