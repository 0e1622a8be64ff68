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
QUANTIZE_HEAD_HELP = "keep the head in 8 bits, too, with a scale for each token; a tied one is then an array of its own"
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


RopeKind = Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"]
MAX_CONTEXT = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, see `models.rotary`.

    `attention_factor` is a factor of cos and sin. `partial_rotary_factor` is the share of a head that is rotated, in
    pairs of adjacent dimensions if `interleaved`. Queries at position p are multiplied by
    1 + β log(1 + ⌊p / original length⌋) with β = `query_scaling_beta`.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0
    partial_rotary_factor: float = 1.0
    interleaved: bool = False
    query_scaling_beta: float = 0.0

    def rotary_dim(self, head_dim: int) -> int:
        """Dimensions of a head that are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    @property
    def depends_on_length(self) -> bool:
        """True if angles depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")

    def canonical(self) -> RopeConfig:
        """The same function, with the defaults in fields that this kind does not read."""
        read = ROPE_FIELDS[self.kind] + ALWAYS_READ
        if self.query_scaling_beta:
            read += ("original_max_position_embeddings",)
        return RopeConfig(kind=self.kind, **{name: getattr(self, name) for name in read})


ALWAYS_READ = ("theta", "attention_factor", "partial_rotary_factor", "interleaved", "query_scaling_beta")
"""Fields of `RopeConfig` that every kind reads."""
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings"),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
"""Kind → the other fields that it reads."""


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

    @property
    def context_length(self) -> int:
        """Positions of a sequence, at most: those of config.json, or the original length times the factor where RoPE extends
        it (yarn, dynamic)."""
        extended = 0.0
        if self.rope.kind in ("yarn", "dynamic"):
            extended = self.rope.original_max_position_embeddings * self.rope.factor
        return min(MAX_CONTEXT, max(self.max_position_embeddings, int(extended)))

    @property
    def length_limits(self) -> dict[RopeKind, int]:
        """Kinds of RoPE whose angles depend on the length of the sequence → the smallest original length, up to which they
        do not."""
        limits: dict[RopeKind, int] = {}
        for rope in (self.rope, self.local_rope or self.rope):
            if rope.depends_on_length:
                length = rope.original_max_position_embeddings
                limits[rope.kind] = min(length, limits.get(rope.kind, length))
        return limits

    def context_after(self, prompt_tokens: int) -> int:
        """Positions of a sequence that decodes from a cache after a prompt of so many tokens. The angles of longrope are
        others in a sequence longer than the original length, so the cache of a shorter one is of no use from there on."""
        original = self.length_limits.get("longrope", 0)
        if prompt_tokens <= original:
            return min(original + 1, self.context_length)  # the last token is not read
        return self.context_length

    def norm_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's norms."""
        d, heads = (self.embed_dim,), (self.num_heads, self.num_kv_heads) if self.qk_norm_full else (1, 1)
        shapes: dict[str, tuple[int, ...]] = {}
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
            return f"the model has {name}{'' if is_dataclass(value) else f' {value!r}'}, which it does not take"
    return None
