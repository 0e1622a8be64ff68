"""`quantization_config` of config.json: the forms of quantised weights that are read."""

from __future__ import annotations

from adafuse_jax.checkpoints.weight_forms import GPTQ, PackQuantized, WeightForm, act_order, asymmetric
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.tables import Table
from pallas_kernels.quantised import QuantLayout

KEYS = ("quantization_config", "compression_config", "quantization")
"""Names of the description, the older ones last."""
BASE_IDENTITY = "adafuse_base_identity"
"""Key of config.json: the identity of the weights that were quantised, whose adapters these take."""
HEAD = ("lm_head", "re:.*lm_head", "re:.*lm_head.*")
"""Names of the head in `ignore`."""
GROUP_SIZES = (32, 64, 128)
UNQUANTISED = "give the unquantised model (bf16, fp16 or fp32), with --quantize if it is to be quantised"


def parse_weight_form(table: Table, *, tied: bool) -> WeightForm | None:
    """The form that a config.json describes; None for plain weights. `tied`: the head is the embedding.

    Raises:
      UserError: another method, or one that is read with settings that are not: act-order, zero points, other bits or
        groups, quantised activations, a quantised head, linears that are not quantised.
    """
    found = [name for name in KEYS if table.get(name)]
    if not found:
        return None
    config = table.table(found[0])
    assert config is not None
    method = config.text("quant_method", "none")
    if method == "compressed-tensors":
        return _pack_quantized(config, tied=tied)
    if method == "gptq":
        return _gptq(config)
    raise config.error(
        "quant_method",
        f"supported: compressed-tensors (pack-quantized) and gptq, symmetric, of 4 bits in groups or 8 bits; {UNQUANTISED}",
    )


def _pack_quantized(config: Table, *, tied: bool) -> PackQuantized:
    groups = config.table("config_groups")
    group = groups.table(next(iter(groups.values))) if groups is not None and len(groups.values) == 1 else None
    weights = None if group is None else group.table("weights")
    if group is None or weights is None:
        raise config.error("config_groups", f"supported: one group, of all linears; {UNQUANTISED}")
    config.choice("format", ("pack-quantized",))
    group.choice("format", ("pack-quantized",), None)
    if group.items("targets") != ["Linear"]:
        raise group.error("targets", f"supported: ['Linear']; {UNQUANTISED}")
    for place, name in ((group, "input_activations"), (group, "output_activations"), (config, "kv_cache_scheme")):
        if place.get(name):
            raise UserError(f"{place.where}: {name} is quantised; supported: weights alone; {UNQUANTISED}")
    for name in ("sparsity_config", "transform_config"):
        values = config.table(name)
        if values is not None and values.values and values.get("format") != "dense":
            raise config.error(name, f"it is not supported; {UNQUANTISED}")
    ignored = config.items("ignore", [])
    others = [name for name in ignored if name not in HEAD]
    if others or (not tied and not ignored):
        fault = f"{quoted(others[0])} is not quantised" if others else "the head is quantised"
        raise UserError(f"{config.where}: {fault}; supported: all linears but the head, ignore: lm_head; {UNQUANTISED}")
    weights.choice("type", ("int",), "int")
    if not weights.boolean("symmetric", True):
        raise UserError(asymmetric(weights.where))
    if weights.get("actorder") in ("group", "dynamic", True):
        raise UserError(act_order(weights.where))
    weights.choice("actorder", ("weight", "static", False), None)  # orders of rounding, not of columns
    strategy = weights.choice("strategy", ("channel", "group"), "group")
    size = weights.integer("group_size", low=1) if strategy == "group" else None
    return PackQuantized(_layout(weights, "num_bits", size))


def _gptq(config: Table) -> GPTQ:
    if config.boolean("desc_act", False) and not config.boolean("static_groups", False):
        raise UserError(act_order(config.where))
    if not config.boolean("sym", True):
        raise UserError(asymmetric(config.where))
    if config.boolean("lm_head", False):
        raise UserError(f"{config.where}: the head is quantised; supported: all linears but the head; {UNQUANTISED}")
    size = config.integer("group_size", low=-1)
    layout = _layout(config, "bits", None if size == -1 else size)
    version = config.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    return GPTQ(layout, layout.offset - (version == "gptq"))


def _layout(config: Table, name: str, size: int | None) -> QuantLayout:
    bits = config.integer(name, low=1)
    if (bits == 8 and size is None) or (bits == 4 and size in GROUP_SIZES):
        return QuantLayout(bits, size)
    form = f"{bits} bits in groups of {size}" if size else f"{bits} bits with a scale for each output"
    raise UserError(
        f"{config.where}: {form} is not supported; supported: 4 bits in groups of {', '.join(map(str, GROUP_SIZES))}, "
        f"8 bits with a scale for each output; {UNQUANTISED}"
    )
