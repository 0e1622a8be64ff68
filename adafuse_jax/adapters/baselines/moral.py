"""MoRAL (arXiv 2402.11260): a layer-wise mixture with the same number of experts in every layer, on gate, up and down.

Neither code nor hyper-parameters of it are public. This is our reading: `layerwise` with the E = 8, k = 2 of its text, and
the rank, scale and initial values of AdaFuse. AdaFuse with the same targets then differs in the router alone.
"""

from __future__ import annotations

from adafuse_jax.adapters.baselines.layerwise import LayerWise


class MoRAL(LayerWise):
    """Nothing but its presets is its own."""
