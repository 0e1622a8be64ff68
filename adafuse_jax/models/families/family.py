"""The parts of config.json and of the weights' names in which families differ, and readers that several families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adafuse_jax.core.errors import UserError
from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ATTENTION_LINEARS, BLOCK_NORMS, FFN_LINEARS, Activation, ModelConfig
from adafuse_jax.models.families.rope import RopeKeys

ACTIVATION_NAMES: Mapping[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh", "relu": "relu",
}  # fmt: skip
"""Names of activations in config.json → those of `ModelConfig`."""

LAYER_TYPES = {"full_attention": False, "sliding_attention": True, "attention": False}
"""Values of config.json's `layer_types` → sliding window; the last one is an older name."""

TENSOR_NAMES: dict[str, str] = {
    "embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.{leaf}", "lm_head": "lm_head.{leaf}",
    **{name: f"model.layers.{{layer}}.{name}.{{leaf}}" for name in BLOCK_NORMS},
    **{name: f"model.layers.{{layer}}.self_attn.{name}.{{leaf}}" for name in (*ATTENTION_LINEARS, "q_norm", "k_norm")},
    **{name: f"model.layers.{{layer}}.mlp.{name}.{{leaf}}" for name in FFN_LINEARS},
}  # fmt: skip
"""Module of `Backbone` → the name of its tensors in Hugging Face's files: `leaf` is weight or bias."""

POST_NORM_NAMES: Mapping[str, str] = TENSOR_NAMES | {
    "post_self_attn_layernorm": "model.layers.{layer}.post_attention_layernorm.{leaf}",
    "post_attention_layernorm": "model.layers.{layer}.pre_feedforward_layernorm.{leaf}",
    "post_mlp_layernorm": "model.layers.{layer}.post_feedforward_layernorm.{leaf}",
}
"""The names where `post_attention_layernorm` is the norm behind attention, as it says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family's class in transformers, its values of keys that config.json leaves out, its own keys and its tensors' names.

    Attributes:
      architecture: the class.
      num_kv_heads: default; None: as many as query heads.
      head_dim: default; None: the hidden size over the heads.
      read: (config.json, number of layers, positions) → the fields of `ModelConfig` that the family decides, read from its
        own keys. Raises `UserError`.
      write: the inverse, config → the family's own keys.
      rope: how it reads RoPE's keys; `local_rope`: those of the layers with a window, where they have a RoPE of their own.
      keys: the family's names of keys of config.json that all have, where they differ.
      norm_eps, activation, tied: defaults.
      fused: linears that are one tensor in the files, one below the other.
      text_defaults: keys that all plain models have, and `text_config` of a larger model may leave out → the class's values.
    """

    architecture: str
    num_kv_heads: int | None
    max_positions: int
    read: Callable[[Table, int, int], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    head_dim: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    rope: RopeKeys = RopeKeys()
    local_rope: RopeKeys | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    norm_eps: float = 1e-6
    activation: str = "silu"
    tied: bool = False
    tensor_names: Mapping[str, str] = field(default_factory=lambda: TENSOR_NAMES)
    fused: tuple[tuple[str, ...], ...] = ()
    text_defaults: Mapping[str, Any] = field(default_factory=dict)

    def tensor_name(self, path: tuple[Any, ...]) -> str:
        """Hugging Face's name of a leaf of `Backbone`; that of a stacked leaf has `{}` for the layer."""
        module = path[1] if path[0] == "layers" else path[0]
        return self.tensor_names[module].format(layer="{}", leaf="weight" if path == ("lm_head",) else path[-1])

    def fused_rows(self, path: tuple[Any, ...], config: ModelConfig) -> slice | None:
        """The rows of its tensor that a leaf of `Backbone` is, None for all."""
        for names in self.fused:
            if path[0] == "layers" and path[1] in names:
                before = names[: names.index(path[1])]
                start = sum(config.linear_shape(name)[0] for name in before)
                return slice(start, start + config.linear_shape(path[1])[0])
        return None

    def key(self, name: str) -> str:
        """The family's name of a key that all families have."""
        return self.keys.get(name, name)


def read_layer_types(table: Table, num_layers: int) -> tuple[bool, ...] | None:
    """Booleans from `layer_types`, one per layer: whether it has a sliding window; None without `layer_types`."""
    kinds = table.items("layer_types", None)
    if kinds is None:
        return None
    if len(kinds) != num_layers or any(not isinstance(kind, str) or kind not in LAYER_TYPES for kind in kinds):
        raise UserError(
            f"{table.where}: layer_types must name {num_layers} layers, each {' or '.join([*LAYER_TYPES][:2])}; restore the "
            "file"
        )
    return tuple(LAYER_TYPES[kind] for kind in kinds)


def read_window(table: Table, *, used: bool) -> int | None:
    """The size of the window in tokens; absent: 4096, null: None. 0 is allowed where it is not `used`."""
    default = None if "sliding_window" in table.values else 4096
    return table.integer("sliding_window", default, low=1 if used else 0)


def layer_windows(
    table: Table, is_windowed: tuple[bool, ...] | None, window: int | None, num_layers: int, *, first: int
) -> tuple[int | None, ...]:
    """Each layer's window in tokens, None for all: of the layers `is_windowed`, else of those from `first` on."""
    if is_windowed is None:
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if any(is_windowed) and window is None:
        raise UserError(
            f"{table.where}: layer_types has sliding_attention but no sliding_window is in use; restore the file"
        )
    return tuple(window if windowed else None for windowed in is_windowed)


def no_windows(table: Table, num_layers: int, max_positions: int) -> tuple[None, ...]:
    """The layers of a family whose class has no windows. Raises `UserError` for keys of windows: with them, transformers
    windows the cache of such a model and not its prompt, so that its answers depend on their split."""
    is_windowed, used = read_layer_types(table, num_layers), table.boolean("use_sliding_window", True)
    window = read_window(table, used=used)
    table.integer("max_window_layers", 28, low=-(2**31))
    stated = used and "sliding_window" in table and window is not None and window < max_positions
    if stated or (is_windowed is not None and any(is_windowed)):
        key = "sliding_window" if stated else "layer_types"
        raise table.error(key, f"{table.get('model_type')} has no windows; leave it out")
    return (None,) * num_layers


def patterned_windows(table: Table, num_layers: int, pattern: int) -> tuple[int | None, ...]:
    """Each layer's window: of the layers that `layer_types` names, else of all but every `pattern`-th; 0 is none."""
    is_windowed = read_layer_types(table, num_layers)
    if is_windowed is None:
        is_windowed = tuple(pattern > 0 and (layer + 1) % pattern != 0 for layer in range(num_layers))
    window = read_window(table, used=any(is_windowed))
    return layer_windows(table, is_windowed, window, num_layers, first=0)


def write_pattern(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `patterned_windows`. Without windows their size is left out: transformers needs one, its default."""
    windows = config.sliding_windows or (None,) * config.num_layers
    keys = {"sliding_window": next(filter(None, windows), None), "layer_types": layer_types(windows)}
    return {name: value for name, value in keys.items() if value is not None}


def layer_types(windows: tuple[int | None, ...]) -> list[str]:
    """`layer_types` of config.json."""
    return ["sliding_attention" if window else "full_attention" for window in windows]
