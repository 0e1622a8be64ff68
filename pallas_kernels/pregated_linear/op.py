"""Linears with pre-gated low-rank experts, unmerged, for a token or a batch in which every row has its own experts:

    y[b] = W[l] x[b] + Σ_u g[u, b] · B[l, e_u] (out×R) · (A[l, e_u] (R×in) · x[b])        for every linear that reads x

The experts are known before layer 0 (arXiv 2603.11873, Eq. 2), so their factors are read beside the backbone's weights, in
the same launch. Ids, gates and the layer are device arrays; no value of them is read on the host.

| implementation | where                    | how |
|---|---|---|
| `pallas`       | NVIDIA Hopper            | Mosaic GPU, one kernel launch: TMA, wgmma, partial sums, semaphores     |
| `triton`       | NVIDIA Ampere and newer  | Pallas' Triton backend, one launch for all linears |
| `xla`          | any device               | plain jnp, which copies the factors of the experts before it uses them |
"""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.megakernel.mixture import Mixture
from pallas_kernels.pregated_linear.reference import pregated_linear_xla
from pallas_kernels.sgmm.op import compute_capability

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("pallas", "triton", "xla")


def pregated_linear(
    x: Float[Array, "B in"],
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    mixture: Mixture | None,
    layer: int | Int[Array, ""],
    *,
    implementation: str | None = None,
) -> dict[str, Array]:
    """target name → y [B, out], in the type of x.

    Args:
      x: the input that the linears share, bf16, fp16 or fp32.
      weights: target name → W [L, out, in] of the type of x; `out` may differ among targets.
      a: target name → A [L, E, R, in]. b: target name → B [L, E, out, R]. Both of the type of x; a target without
        experts is in neither.
      mixture: the experts of the batch and the gates of its rows; None if no target has experts.
      layer: which of the L; a constant or a device scalar.
      implementation: one of `IMPLEMENTATIONS`; None takes `choose_implementation`'s.

    Raises:
      ValueError: shapes or types that do not fit together, or that the implementation asked for cannot do.
    """
    _validate(x, weights, a, b, mixture, layer)
    if implementation is None:
        implementation = choose_implementation(x, weights, a)
    if implementation == "xla":
        return {
            name: pregated_linear_xla(x, w, a.get(name), b.get(name), mixture, layer) for name, w in weights.items()
        }
    if implementation == "pallas":
        from pallas_kernels.pregated_linear.kernel_sm90 import pregated_linear_sm90

        return pregated_linear_sm90(x, weights, a, b, mixture, layer)
    if implementation == "triton":
        from pallas_kernels.pregated_linear.kernel_triton import pregated_linear_triton

        return pregated_linear_triton(x, weights, a, b, mixture, layer)
    raise ValueError(f"implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")


def choose_implementation(x: Array, weights: dict[str, Array], a: dict[str, Array]) -> str:
    """The fastest implementation that this device and these shapes allow; why a faster one is passed over is logged."""
    for name, unsupported_reason in (("pallas", _pallas_unsupported_reason), ("triton", _triton_unsupported_reason)):
        reason = unsupported_reason(x, weights, a)
        if reason is None:
            log.info("pregated_linear runs as %s", name)
            return name
        log.info("pregated_linear does not run as %s: %s", name, reason)
    return "xla"


def _pallas_unsupported_reason(x: Array, weights: dict[str, Array], a: dict[str, Array]) -> str | None:
    if not compute_capability().startswith("9."):
        return f"it needs a Hopper GPU, this is {jax.devices()[0].device_kind}"
    from pallas_kernels.pregated_linear.kernel_sm90 import unsupported_reason

    return unsupported_reason(x, weights, a)


def _triton_unsupported_reason(x: Array, weights: dict[str, Array], a: dict[str, Array]) -> str | None:
    if float(compute_capability() or 0) < 8:
        return f"it needs an Ampere or newer GPU, this is {jax.devices()[0].device_kind}"
    from pallas_kernels.pregated_linear.kernel_triton import unsupported_reason

    return unsupported_reason(x, a)


def _validate(
    x: Array,
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    mixture: Mixture | None,
    layer: int | Array,
) -> None:
    if not weights or a.keys() != b.keys() or not a.keys() <= weights.keys():
        raise ValueError(
            f"a and b must name the same targets, all of them in weights: {sorted(weights)}, {sorted(a)}, {sorted(b)}"
        )
    if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x is {x.dtype}{x.shape}; it must be [B, in] in bfloat16, float16 or float32")
    for label, arrays, dims in (("W", weights, "[L, out, in]"), ("A", a, "[L, E, R, in]"), ("B", b, "[L, E, out, R]")):
        for name, array in arrays.items():
            if array.ndim != dims.count(",") + 1:
                raise ValueError(f"{name}: {label} {array.shape} must be {dims}")
    (batch, in_dim), num_layers = x.shape, next(iter(weights.values())).shape[0]
    if isinstance(layer, int) and not 0 <= layer < num_layers:
        raise ValueError(f"layer {layer} is none of the {num_layers} of W")
    if jnp.ndim(layer) != 0:
        raise ValueError(f"layer {jnp.shape(layer)} must be a scalar")
    expected = [("W", name, w, (num_layers, *w.shape[1:-1], in_dim)) for name, w in weights.items()]
    if a:
        num_used = () if mixture is None else jnp.shape(mixture.experts)
        if mixture is None or len(num_used) != 1 or not num_used[0] or mixture.gates.shape != (*num_used, batch):
            given = None if mixture is None else (mixture.experts.shape, mixture.gates.shape)
            raise ValueError(f"mixture {given} must have experts [U] and gates [U, {batch}]")
        _, num_experts, rank, _ = next(iter(a.values())).shape
        for name in a:
            expected.append(("A", name, a[name], (num_layers, num_experts, rank, in_dim)))
            expected.append(("B", name, b[name], (num_layers, num_experts, weights[name].shape[1], rank)))
    for label, name, array, shape in expected:
        if array.shape != shape or array.dtype != x.dtype:
            raise ValueError(
                f"{name}: {label} is {array.dtype}{array.shape}; beside x and the others it must be {x.dtype}{shape}"
            )
