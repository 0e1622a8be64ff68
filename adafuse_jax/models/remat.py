"""Rematerialisation: which results of a layer its backward pass finds in memory, and which it computes again.

policy      kept of each layer, beside its input                            computed again
none        all that the derivatives use                                    norms, silu(gate) · up
products    q, k, v, attention's output, the layer's middle, gate, up, A x  also the inputs of the linears
attention   q, k, v, attention's output, the layer's middle, A x            also the feed-forward block
full        nothing                                                         the layer

Attention's output is kept where it is cuDNN's; XLA's attention is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from adafuse_jax.models.config import Remat

ATTENTION, FFN, LOW_RANK = "attention", "ffn", "low_rank"
"""Names of the kept results."""
KEPT: dict[Remat, tuple[str, ...]] = {
    "products": (ATTENTION, FFN, LOW_RANK),
    "attention": (ATTENTION, LOW_RANK),
    "full": (),
}


def kept[Tree](tree: Tree, name: str) -> Tree:
    """Arrays that the policies with this name in `KEPT` keep."""
    return jax.tree.map(lambda x: checkpoint_name(x, name), tree)


def rematerialized(function: Callable[..., Any], policy: Remat, *, in_scan: bool) -> Callable[..., Any]:
    """`function`, whose backward pass keeps what `policy` says.

    Raises:
      ValueError: unknown policy.
    """
    if policy == "none":
        return function
    if policy not in KEPT:
        raise ValueError(f"{policy=} must be none or one of {', '.join(KEPT)}")
    names = jax.checkpoint_policies.save_only_these_names(*KEPT[policy])

    def saves(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
        # cuDNN's output and statistics have no name outside its own derivative rule
        is_attention = ATTENTION in KEPT[policy] and "dot_product_attention_fwd" in primitive.name
        return is_attention or names(primitive, *arguments, **parameters)

    return jax.checkpoint(function, prevent_cse=not in_scan, policy=saves)
