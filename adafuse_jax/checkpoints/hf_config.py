"""config.json and generation_config.json → `ModelConfig`: the keys of all families; `models/families` reads the others.

Every key is read as transformers reads it, with its family's default where it is absent. A key that changes the function in
a way that the backbone does not have is an error; one that nothing reads, and that is not known to be inert, is named in the
log.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adafuse_jax.checkpoints.inert_keys import GENERATION_INERT, INERT, INERT_VALUES, SUPPORTED_VALUES
from adafuse_jax.checkpoints.quantised_config import BASE_IDENTITY, parse_weight_forms
from adafuse_jax.checkpoints.tensor_names import text_table
from adafuse_jax.checkpoints.weight_forms import WeightForm
from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.families.family import ACTIVATION_NAMES, Family
from adafuse_jax.models.families.rope import GLOBAL, LOCAL
from adafuse_jax.models.registry import FAMILIES

DTYPE_NAMES = {
    "float32": "float32", "float": "float32", "bfloat16": "bfloat16", "float16": "float16", "half": "float16",
    "float64": "float64", "double": "float64",
}  # fmt: skip
"""Spellings of `dtype` that transformers takes → the types that weights are stored in."""
MAX_LAYERS = 10_000
NOT_NULL = (
    "model_type", "hidden_act", "hidden_activation", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "use_sliding_window", "max_window_layers",
)  # fmt: skip
"""Keys that may be absent, but not null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HFConfig:
    """config.json and generation_config.json, each read once. `dtype` is the one that config.json names, None if it names
    none; `remarks` are log lines about keys that nothing uses; `table` and `generation` hold the files as they are, the
    latter empty if it is absent. Of a model of several parts (`is_part`) `table` is the text part's."""

    model: ModelConfig
    dtype: str | None
    remarks: tuple[str, ...]
    table: Table
    generation: Table
    is_part: bool = False
    form: WeightForm | None = None
    """The form of the linears' quantised weights; None: they are not."""
    head_form: WeightForm | None = None
    """The form of the head's; None: the head is plain."""
    base_identity: str | None = None
    """Identity of the weights that quantised ones were made of, if it is known."""


def parse_hf_config(directory: Path) -> HFConfig:
    """The two files in `directory`. Raises `UserError` for one that is missing (config.json) or corrupt, and as
    `parse_tables`."""
    table = Table.read(directory / "config.json", advice="give a complete directory, or restore the file")
    path = directory / "generation_config.json"
    return parse_tables(table, Table.read(path) if path.exists() else Table({}, str(path)))


def parse_tables(table: Table, generation: Table) -> HFConfig:
    """Parse the two files. Special tokens of generation_config.json win over config.json's; one that is no token of the
    model is left out.

    Raises:
      UserError: a missing key; a value of a wrong type or range; a model type, rope type, activation,
        quantisation or other key that is not supported.
    """
    part = text_table(table)
    table = part or table
    _refuse_null(table)
    model_type = table.choice("model_type", tuple(FAMILIES))
    family = FAMILIES[model_type]
    if part is not None:
        table.values = {"architectures": [family.architecture], **family.text_defaults, **table.values}
    activation = ACTIVATION_NAMES[table.choice(family.key("hidden_act"), tuple(ACTIVATION_NAMES), family.activation)]
    for name, supported in SUPPORTED_VALUES.items():
        if name in table and table.get(name) not in supported:
            raise table.error(name, f"supported: {', '.join(map(str, supported)) or 'none'}")

    num_layers = table.integer("num_hidden_layers", low=1, high=MAX_LAYERS)
    num_heads, embed_dim = table.integer("num_attention_heads", low=1), table.integer("hidden_size", low=1)
    absent = num_heads if "num_key_value_heads" in table.values else family.num_kv_heads or num_heads
    num_kv_heads = table.integer("num_key_value_heads", absent, low=1)
    if num_heads % num_kv_heads:
        raise UserError(
            f"{table.where}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    own = None if "head_dim" in table.values else family.head_dim
    head_dim = table.integer("head_dim", own or embed_dim // num_heads, low=2)
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"{table.where}: heads have {head_dim} dimensions; RoPE needs an even number of them")
    vocab_size = table.integer("vocab_size", low=1)
    max_positions = table.integer("max_position_embeddings", family.max_positions, low=1)
    layer_type = None if family.local_rope is None else GLOBAL
    rope, rope_unused = family.rope.read(table, max_positions, head_dim, layer_type=layer_type)
    local_rope = None
    if family.local_rope is not None:
        local_rope, unused = family.local_rope.read(table, max_positions, head_dim, layer_type=LOCAL)
        rope_unused = [*dict.fromkeys(rope_unused + unused)]
    tokens, remarks = _special_tokens(table, generation, family, vocab_size)
    own_fields = family.read(table, num_layers, max_positions)
    if own_fields.get("attention_multiplier") == head_dim**-0.5:
        own_fields["attention_multiplier"] = None
    model = ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        hidden_dim=table.integer("intermediate_size", low=1),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        norm_eps=table.number(family.key("rms_norm_eps"), family.norm_eps, low=0, high=1e6),
        activation=activation,
        rope=rope,
        local_rope=local_rope if any(own_fields["sliding_windows"]) and local_rope != rope else None,
        tie_word_embeddings=table.boolean("tie_word_embeddings", family.tied),
        bos_token_id=next(iter(tokens["bos_token_id"]), None),
        eos_token_ids=tokens["eos_token_id"],
        pad_token_id=next(iter(tokens["pad_token_id"]), None),
        **own_fields,
    )
    if original := model.length_limits.get("longrope"):
        remarks.append(
            f"{table.where}: longrope: an answer to a prompt of up to {original} tokens ends where both have "
            f"{original + 1}, as the angles change there"
        )
    dtype, (form, head_form) = _dtype(table), parse_weight_forms(table, tied=model.tie_word_embeddings)
    base = None if form is None else table.text(BASE_IDENTITY, None)
    unused = [*(name for name in table.unread() if not _is_inert(name, table.values[name])), *rope_unused]
    if unused:
        names = ", ".join(shortened(name, 60) for name in unused)
        remarks.insert(0, shortened(f"{table.where}: keys that are not used: {names}", 400))
    return HFConfig(
        model=model, dtype=dtype, remarks=tuple(remarks), table=table, generation=generation, is_part=part is not None,
        form=form, head_form=head_form, base_identity=base,
    )  # fmt: skip


def generation_remark(generation: Table) -> str | None:
    """A log line that names the settings of generation_config.json which would change what transformers generates; decoding
    follows its flags instead. None if there are none."""
    values = generation.values
    sampling = () if values.get("do_sample") else ("temperature", "top_k", "top_p", "min_p", "typical_p")
    names = [
        name
        for name, value in values.items()
        if value is not None
        and name not in INERT
        and name not in sampling
        and value not in GENERATION_INERT.get(name, ())
    ]
    text = f"{generation.where}: settings that are not used, as the flags decide: {', '.join(names)}"
    return shortened(text, 400) if names else None


def _is_inert(name: str, value: Any) -> bool:
    return name in INERT or name in GENERATION_INERT or value in INERT_VALUES.get(name, ())


def _refuse_null(table: Table) -> None:
    for name in NOT_NULL:
        if name in table.values and table.values[name] is None:
            supported = f"; supported: {', '.join(FAMILIES)}" if name == "model_type" else ""
            raise table.error(name, f"it must have a value, or be left out{supported}")


def _dtype(table: Table) -> str | None:
    old, new = (table.text(name, None) for name in ("torch_dtype", "dtype"))
    stored = new or old
    if stored is None:
        return None
    name = "dtype" if new else "torch_dtype"
    if stored.removeprefix("torch.") not in DTYPE_NAMES:
        raise table.error(name, f"supported: {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[stored.removeprefix("torch.")]


def _special_tokens(
    table: Table, generation: Table, family: Family, vocab_size: int
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """The BOS, EOS and padding ids, each as a tuple, and remarks about those that are no token of the model."""
    tokens, remarks = {}, []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        default = getattr(family, name)
        if not isinstance(default, tuple):
            default = () if default is None else (default,)
        own = _ids(table, name) if name in table.values else default
        ids, where = (_ids(generation, name), generation) if name in generation.values else (own, table)
        tokens[name] = tuple(i for i in ids if 0 <= i < vocab_size)
        wrong = [i for i in ids if i not in tokens[name]]
        if wrong and name in where.values:
            remarks.append(
                f"{where.where}: {name} {quoted(wrong[0])} is no token of the model, which has {vocab_size}; not used"
            )
    return tokens, remarks


def _ids(table: Table, name: str) -> tuple[int, ...]:
    """No, one or, of EOS, several token ids."""
    value, several = table.get(name), name == "eos_token_id"
    ids = value if isinstance(value, list) and several else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise table.error(name, f"it must be an integer{' or a list of them' if several else ''}")
    return tuple(ids)
