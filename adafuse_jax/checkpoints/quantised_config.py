"""`quantization_config` of config.json: the forms of quantised weights that are read."""

from __future__ import annotations

from adafuse_jax.checkpoints.weight_forms import GPTQ, PackQuantized, WeightForm, act_order, asymmetric
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.tables import Table
from adafuse_jax.models.quantised import HEAD_LAYOUT
from pallas_kernels.quantised import QuantLayout

KEYS = ("quantization_config", "compression_config", "quantization")
"""Names of the description, the older ones last."""
BASE_IDENTITY = "adafuse_base_identity"
"""Key of config.json: the identity of the weights that were quantised, whose adapters these take."""
HEAD = ("lm_head", "re:.*lm_head", "re:.*lm_head.*")
"""Names of the head in `ignore`."""
GROUP_SIZES = (32, 64, 128)
UNQUANTISED = "give the unquantised model (bf16, fp16 or fp32), with --quantize if it is to be quantised"


def parse_weight_forms(table: Table, *, tied: bool) -> tuple[WeightForm | None, WeightForm | None]:
    """The forms of the linears and of the head that a config.json describes; None for plain weights. `tied`: the head is the
    embedding.

    Raises:
      UserError: another method, or one that is read with settings that are not: act-order, zero points, other bits or
        groups, quantised activations, a head of 4 bits, linears that are not quantised.
    """
    found = [name for name in KEYS if table.get(name)]
    if not found:
        return None, None
    config = table.table(found[0])
    assert config is not None
    method = config.text("quant_method", "none")
    if method == "compressed-tensors":
        return _pack_quantized(config, tied=tied)
    if method == "gptq":
        return _gptq(config), None
    raise config.error(
        "quant_method",
        f"supported: compressed-tensors (pack-quantized) and gptq, symmetric, of 4 bits in groups or 8 bits; {UNQUANTISED}",
    )


def _pack_quantized(config: Table, *, tied: bool) -> tuple[PackQuantized, PackQuantized | None]:
    table = config.table("config_groups")
    groups = {} if table is None else {name: table.table(name) for name in table.values}
    of_head = [
        name for name, group in groups.items() if group is not None and group.items("targets")[:1] == ["lm_head"]
    ]
    linears = [group for name, group in groups.items() if name not in of_head]
    if len(linears) != 1 or len(of_head) > 1:
        raise config.error("config_groups", f"supported: one group, of all linears, and one of lm_head; {UNQUANTISED}")
    config.choice("format", ("pack-quantized",))
    layout = _group_layout(config, linears[0], ["Linear"])
    if config.get("kv_cache_scheme"):
        raise UserError(f"{config.where}: kv_cache_scheme is quantised; supported: weights alone; {UNQUANTISED}")
    for name in ("sparsity_config", "transform_config"):
        values = config.table(name)
        if values is not None and values.values and values.get("format") != "dense":
            raise config.error(name, f"it is not supported; {UNQUANTISED}")
    ignored = config.items("ignore", [])
    others = [name for name in ignored if name not in HEAD]
    head = None if ignored or (tied and not of_head) else layout
    if of_head and not ignored:
        head = _group_layout(config, groups[of_head[0]], ["lm_head"])
    fault = None if head in (None, HEAD_LAYOUT) else f"the head is {head.name}"
    if head is not None and tied:
        fault = "the head is quantised and tied to the embedding, which is not"
    if others or fault:
        fault = f"{quoted(others[0])} is not quantised" if others else fault
        raise UserError(
            f"{config.where}: {fault}; supported: all linears, the head plain or {HEAD_LAYOUT.name}; {UNQUANTISED}"
        )
    return PackQuantized(layout), None if head is None else PackQuantized(head)


def _group_layout(config: Table, group: Table | None, targets: list[str]) -> QuantLayout:
    """The layout of one of `config_groups`, which must be of weights of `targets` alone."""
    weights = None if group is None else group.table("weights")
    if group is None or weights is None:
        raise config.error("config_groups", f"a group has no weights; {UNQUANTISED}")
    group.choice("format", ("pack-quantized",), None)
    if group.items("targets") != targets:
        raise group.error("targets", f"supported: {targets}; {UNQUANTISED}")
    for name in ("input_activations", "output_activations"):
        if group.get(name):
            raise UserError(f"{group.where}: {name} is quantised; supported: weights alone; {UNQUANTISED}")
    weights.choice("type", ("int",), "int")
    if not weights.boolean("symmetric", True):
        raise UserError(asymmetric(weights.where))
    if weights.get("actorder") in ("group", "dynamic", True):
        raise UserError(act_order(weights.where))
    weights.choice("actorder", ("weight", "static", False), None)  # orders of rounding, not of columns
    strategy = weights.choice("strategy", ("channel", "group"), "group")
    size = weights.integer("group_size", low=1) if strategy == "group" else None
    return _layout(weights, "num_bits", size)


def _gptq(config: Table) -> GPTQ:
    if config.boolean("desc_act", False) and not config.boolean("static_groups", False):
        raise UserError(act_order(config.where))
    if not config.boolean("sym", True):
        raise UserError(asymmetric(config.where))
    if config.boolean("lm_head", False):
        raise UserError(
            f"{config.where}: the head is quantised; supported of gptq: all linears but the head; {UNQUANTISED}"
        )
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
