"""Names of a checkpoint's tensors as they are stored → those of a plain language model: model.layers.…, lm_head.weight.

    layers.0.…                    saved from the model without its head
    language_model.model.…        the text part of a model that reads images too
    model.language_model.…        the same, as transformers 5 names it

The beginning of the names is what stands before `embed_tokens.weight`. A tied model may have its head alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.core.tables import Table

PLAIN, HEAD, EMBEDDING = "model.", "lm_head.weight", "embed_tokens.weight"
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", PLAIN)
"""Beginnings of the text part's names, where several parts have embeddings."""
INHERITED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "quantization_config", "quantization",
    "compression_config",
)  # fmt: skip
"""Keys that the text part takes from the whole model's config.json where it has none."""


@dataclass(frozen=True, slots=True)
class StoredNames:
    """`of`: plain name → stored name; `remarks`: log lines about names that are not plain."""

    of: Mapping[str, str]
    remarks: tuple[str, ...] = ()


def text_table(table: Table) -> Table | None:
    """The config.json of the text part of a model that has others too, as a plain model's; None of a plain model. Raises
    `UserError` for a `text_config` that is no object or has no `model_type`."""
    inner = table.table("text_config")
    if inner is None:
        return None
    if "model_type" not in inner:
        raise UserError(
            f"{table.where}: is of a model of several parts ({quoted(table.get('model_type'))}), and text_config has no "
            "model_type; give the text model alone"
        )
    values: dict[str, Any] = {name: table.get(name) for name in INHERITED if name in table} | inner.values
    if "tie_word_embeddings" in table:  # transformers ties the whole model's
        values["tie_word_embeddings"] = table.get("tie_word_embeddings")
    return Table(values, inner.where)


def stored_names(stored: Collection[str], where: str, *, is_part: bool, is_tied: bool) -> StoredNames:
    """The names of a model whose config.json ties its embeddings or not, and describes the text part alone if `is_part`: the
    tensors of other parts are then left out. Raises `UserError` if the beginning of the names is not clear."""
    prefix, remarks = _prefix(stored, where), []
    heads = [name for name in stored if name.endswith(HEAD) and name.removesuffix(HEAD) in _outer(prefix)]
    names, others = {}, []
    for name in stored:
        if name in heads:
            names[HEAD] = name
        elif name.startswith(prefix):
            names[PLAIN + name.removeprefix(prefix)] = name
        else:
            others.append(name)
    if prefix != PLAIN:
        remarks.append(f"{where}: the tensors' names begin with {quoted(prefix)}, not with {quoted(PLAIN)}")
    if is_part and others:
        parts = sorted({name.split(".")[1 if name.startswith(PLAIN) else 0] for name in others})
        remarks.append(f"{where}: the text part is used; {len(others)} tensors are left out, of {', '.join(parts)}")
    elif not is_part:
        names |= {name: name for name in others}  # which the model does not have
    if is_tied and PLAIN + EMBEDDING not in names and HEAD in names:
        names[PLAIN + EMBEDDING] = names.pop(HEAD)
        remarks.append(f"{where}: the embedding is read from {names[PLAIN + EMBEDDING]}, to which it is tied")
    return StoredNames(names, tuple(shortened(remark, 400) for remark in remarks))


def _outer(prefix: str) -> tuple[str, ...]:
    """Beginnings that the head's name may have."""
    return "", prefix, prefix.removesuffix(PLAIN), prefix.removesuffix("language_model.")


def _prefix(stored: Collection[str], where: str) -> str:
    for end in (EMBEDDING, "norm.weight"):
        found = {name.removesuffix(end) for name in stored if name.endswith(end)}
        found = {prefix for prefix in found if prefix == "" or prefix.endswith(".")}
        found = {prefix for prefix in found if any(name.startswith(f"{prefix}layers.0.") for name in stored)}
        known = [prefix for prefix in TEXT_PREFIXES if prefix in found]
        if len(found) == 1 or known:
            return known[0] if known else found.pop()
        if found:
            names = " and ".join(quoted(prefix) for prefix in sorted(found)[:4])
            raise UserError(f"{where}: has layers under {names}; give the text model alone")
    return PLAIN
