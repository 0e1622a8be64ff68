"""SGMM: merge the selected low-rank experts of all layers and all adapted linears into the stacked weights, in place.

    W[l, out, in] = base[l, out, in] + Σ_j c_j · B[l, e_j] (out×R) · A[l, e_j] (R×in)        for every segment (target, l)

`base` is W itself (*switch*, arXiv 2603.11873, Eq. 9) or a pristine copy that is only read (*golden*). Expert ids and
coefficients are device arrays; no value of them is read on the host.

| implementation | where                                   | how |
|---|---|---|
| `pallas`       | NVIDIA Hopper (compute capability 9.x)  | Mosaic GPU, one kernel launch: TMA, wgmma, SMEM pipelines |
| `triton`       | NVIDIA Ampere and newer                 | a Triton kernel through jax-triton, one kernel launch |
| `xla`          | any device                              | plain jnp, a loop over layers |
"""

from __future__ import annotations

import importlib.util
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.devices import is_recent
from pallas_kernels.sgmm.reference import sgmm_xla
from pallas_kernels.sgmm.terms import Terms

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("pallas", "triton", "xla")


def sgmm(
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    terms: Terms,
    *,
    pristine: dict[str, Array] | None = None,
    implementation: str | None = None,
) -> dict[str, Array]:
    """The merged weights, in the buffers of `weights` where the caller's jit donates them.

    Args:
      weights: target name → W [L, out, in], bf16, fp16 or fp32; `out` and `in` may differ among targets; L, E, R and
        the type may not.
      a: target name → A [L, E, R, in]. b: target name → B [L, E, out, R]. Both of the type of `weights`.
      terms: which experts, and how much of each; sums are in fp32 and rounded once.
      pristine: None adds to `weights`. Otherwise the weights to add to, of the same shapes; what `weights` holds is
        then overwritten, not read.
      implementation: one of `IMPLEMENTATIONS`; None takes `choose_implementation`'s.

    Raises:
      ValueError: shapes or types that do not fit together, or that the implementation asked for cannot do.
    """
    _validate(weights, a, b, terms, pristine)
    if implementation is None:
        implementation = choose_implementation(weights, a)
    if implementation == "xla":
        return sgmm_xla(weights, a, b, terms, pristine)
    if implementation == "pallas":
        from pallas_kernels.sgmm.kernel_sm90 import sgmm_sm90

        return sgmm_sm90(weights, a, b, terms, pristine)
    if implementation == "triton":
        from pallas_kernels.sgmm.kernel_triton import sgmm_triton

        return sgmm_triton(weights, a, b, terms, pristine)
    raise ValueError(f"implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")


def choose_implementation(weights: dict[str, Array], a: dict[str, Array]) -> str:
    """The fastest implementation that this device and these shapes allow; why a faster one is passed over is logged."""
    for name, unsupported_reason in (("pallas", _pallas_unsupported_reason), ("triton", _triton_unsupported_reason)):
        reason = unsupported_reason(weights, a)
        if reason is None:
            log.info("sgmm runs as %s", name)
            return name
        log.info("sgmm does not run as %s: %s", name, reason)
    return "xla"


def _pallas_unsupported_reason(weights: dict[str, Array], a: dict[str, Array]) -> str | None:
    if not compute_capability().startswith("9."):
        return f"it needs a Hopper GPU, this is {jax.devices()[0].device_kind}"
    from pallas_kernels.sgmm.kernel_sm90 import unsupported_reason

    return unsupported_reason(weights, a)


def _triton_unsupported_reason(weights: dict[str, Array], a: dict[str, Array]) -> str | None:
    if not is_recent(compute_capability()):
        return f"it needs an Ampere or newer GPU, this is {jax.devices()[0].device_kind}"
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed (pip install 'adafuse-jax[cuda]')"
    from pallas_kernels.sgmm.kernel_triton import unsupported_reason

    return unsupported_reason(weights)


def compute_capability() -> str:
    """Compute capability of the default device, such as '9.0'; empty if it is no NVIDIA GPU."""
    device = jax.devices()[0]
    return str(getattr(device, "compute_capability", "")) if device.platform == "gpu" else ""


def _validate(
    weights: dict[str, Array], a: dict[str, Array], b: dict[str, Array], terms: Terms, pristine: dict[str, Array] | None
) -> None:
    if not weights or not weights.keys() == a.keys() == b.keys() == (pristine or weights).keys():
        raise ValueError(
            f"weights, a, b and pristine name different targets: {sorted(weights)}, {sorted(a)}, {sorted(b)}"
        )
    if not terms.experts.shape == terms.coefficients.shape or terms.experts.ndim != 1 or not len(terms.experts):
        raise ValueError(
            f"terms: experts {terms.experts.shape} and coefficients {terms.coefficients.shape} must be [J]"
        )
    for name, w in weights.items():
        if w.ndim != 3 or a[name].ndim != 4:
            raise ValueError(f"{name}: W {w.shape} must be [L, out, in] and A {a[name].shape} [L, E, R, in]")
    first = next(iter(weights))
    (num_layers, *_), dtype, (_, num_experts, rank, _) = weights[first].shape, weights[first].dtype, a[first].shape
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"{first}: weights are {dtype}; bfloat16, float16 and float32 can be merged")
    for name, w in weights.items():
        _, out_dim, in_dim = w.shape
        for label, array, shape in (
            ("W", w, (num_layers, out_dim, in_dim)),
            ("A", a[name], (num_layers, num_experts, rank, in_dim)),
            ("B", b[name], (num_layers, num_experts, out_dim, rank)),
            ("pristine", (pristine or weights)[name], w.shape),
        ):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"{name}: {label} is {array.dtype}{array.shape}; beside {first} it must be {dtype}{shape}"
                )
