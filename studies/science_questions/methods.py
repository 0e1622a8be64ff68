"""The methods of the study and the ablations of AdaFuse: one line each, name → settings of its adapter.

All mixtures have E = 8 experts and k = 2, unless it is said below, and about as many trainable parameters as AdaFuse on all
linears (PESC through its width; MoLA's 2/4/6/8 experts and the methods on the FFN alone have fewer, and are listed with
their number). LoRA comes twice: with the rank of one expert, and with that of all eight together. No dropout and one
balance coefficient everywhere. AdaFuse's one router sees the token alone if q, k or v is adapted, and after Llama's first
norm its input is so small that the gates stay equal and the slightest step changes who is chosen. The balance loss cannot
be met, as a frequent token is one expert's or another's as a whole, and so it moves the most frequent ones back and forth
to the end: the line break among them, after which comes the answer. A token that changes its experts loses what they have
learned for it. Hence these recipes, all AdaFuse: `adafuse-settled` freezes its router after a tenth of the steps, when the
load is even; `adafuse-tied` does so too, and its experts learn as one LoRA until half of the steps are done, and then each
on its own. `adafuse-tied-4` has four experts of twice the rank, as many parameters. An ablation of it found a longer tie to
be no worse: `adafuse-late-4` has it, and `adafuse-late-2` with two experts of four times the rank, one for each token.
`adafuse-pair` has two of that rank, both for every token and never tied: a LoRA of all the parameters, scale included where
gates are 1/2, whose halves the router weighs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.registry import num_parameters
from adafuse_jax.models.config import FFN_LINEARS, LINEARS
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.training.initial import initial_weights
from studies.training import SETTLED, TIED, USUAL

BALANCE = 0.01
_MIXTURE: dict[str, Any] = {"rank": 16, "alpha": 32.0, "top_k": 2, "dropout": 0.0, "balance_coefficient": BALANCE}
_ADAFUSE: dict[str, Any] = {**_MIXTURE, "adapter": "adafuse", "targets": LINEARS, "num_experts": 8}
_LORA: dict[str, Any] = {"adapter": "lora", "targets": LINEARS, "dropout": 0.0}

METHODS: dict[str, dict[str, Any]] = {
    "none": {"adapter": "none"},
    "full": {"adapter": "full"},
    "lora": {**_LORA, "rank": 16, "alpha": 32.0},
    "lora-matched": {**_LORA, "rank": 128, "alpha": 256.0},
    "moral": {**_MIXTURE, "adapter": "moral", "targets": FFN_LINEARS, "num_experts": 8},
    "mola": {**_MIXTURE, "adapter": "mola", "targets": LINEARS, "experts_per_layer": (2, 4, 6, 8)},
    "pesc": {**_MIXTURE, "adapter": "pesc", "num_experts": 8, "rank": 128, "alpha": 128.0},
    "adafuse": _ADAFUSE,
    "adafuse-ffn": _ADAFUSE | {"targets": FFN_LINEARS},
    "adafuse-settled": _ADAFUSE | {SETTLED: 0.1},
    "adafuse-tied": _ADAFUSE | {SETTLED: 0.1, TIED: 0.5},
    "adafuse-tied-4": _ADAFUSE | {"num_experts": 4, "rank": 32, "alpha": 64.0, SETTLED: 0.1, TIED: 0.5},
    "adafuse-late-4": _ADAFUSE | {"num_experts": 4, "rank": 32, "alpha": 64.0, SETTLED: 0.1, TIED: 0.75},
    "adafuse-late-2": _ADAFUSE | {"num_experts": 2, "top_k": 1, "rank": 64, "alpha": 128.0, SETTLED: 0.1, TIED: 0.75},
    "adafuse-pair": _ADAFUSE | {"num_experts": 2, "rank": 64, "alpha": 256.0, SETTLED: 0.1},
}


REMAT_ABOVE = 2000
"""Low-rank activations of a token and layer above which layers are recomputed in the backward pass, to save memory."""
RATE_SCALE = {"full": 0.04}
"""Factor on the grid's learning rates: training all weights of a backbone needs smaller ones than an adapter that starts
from B = 0. In a first grid, of two epochs, the adapters were best at 1.2e-3, its top, and the full backbone at 6e-5."""


VARIANTS = ("adafuse", "adafuse-settled", "adafuse-tied", "adafuse-tied-4")
"""AdaFuse on all linears, by its recipe. The ablations change the one that is best on the validation questions; those that
were added after the ablations are not among them."""
ON_ALL = [name for name, own in METHODS.items() if own["adapter"] == "adafuse" and own["targets"] == LINEARS]
"""AdaFuse on all linears; the study reports the use of their experts."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "k=1": {"top_k": 1, "renormalize": False},
    "k=4": {"top_k": 4},
    "E=4": {"num_experts": 4},
    "E=8": {"num_experts": 8},
    "E=16": {"num_experts": 16},
    "R=8": {"rank": 8, "alpha": 16.0},
    "R=16": {"rank": 16, "alpha": 32.0},
    "R=32": {"rank": 32, "alpha": 64.0},
    "R=64": {"rank": 64, "alpha": 128.0},
    "R=128": {"rank": 128, "alpha": 256.0},
    "balance=0": {"balance_coefficient": 0.0},
    "balance=0.1": {"balance_coefficient": 0.1},
    "settled=1": {SETTLED: 1.0},
    "tied=0.75": {TIED: 0.75},
    "targets=q,v": {"targets": ("q_proj", "v_proj")},
    "targets=o,FFN": {"targets": ("o_proj", *FFN_LINEARS)},
}
"""Changes of settings in each ablation; an ablation that changes nothing of the AdaFuse in question is left out. k = 1 is
without renormalising, or its router would get no gradient. With q, k or v among the targets the router sees the token
alone; with o and FFN linears, the context. Where the experts are tied until after the router is frozen, it never learns
from the task, so balance = 0 leaves it nearly as it was drawn; and k = 1, whose gates are about 1/E, learns as much
slower."""


def ablated(validation: Mapping[str, Mapping[Any, float]]) -> str:
    """The variant with the best validation accuracy, of {method: {learning rate: accuracy}}; the first of equal ones."""
    found = [name for name in VARIANTS if validation.get(name)]
    return max(found, key=lambda name: max(validation[name].values()), default=VARIANTS[0])


def changes(ablation: str, base: str) -> bool:
    """True if an ablation is another adapter or recipe than `base`."""
    return USUAL | settings_of(ablation, base) != USUAL | METHODS[base]


def settings_of(name: str, base: str = VARIANTS[0]) -> dict[str, Any]:
    """Settings of a method, or of an ablation of `base`."""
    return METHODS[name] if name in METHODS else METHODS[base] | ABLATIONS[name]


def make(settings: dict[str, Any], model: Backbone, key: jax.Array) -> Any:
    """Trainable parameters of a method, with initial values drawn from `key`."""
    config = AdapterConfig(**{name: value for name, value in settings.items() if name not in USUAL})
    return initial_weights(config, model, None, key)


def trainable_parameters(settings: dict[str, Any], model: Backbone) -> int:
    if settings["adapter"] == "none":
        return 0
    return num_parameters(jax.eval_shape(partial(make, settings), model, jax.random.key(0)))


def needs_remat(settings: dict[str, Any]) -> bool:
    """True if the experts of a layer have more than REMAT_ABOVE activations for a token: E · R, summed over the target
    linears."""
    experts = max(settings.get("experts_per_layer", (settings.get("num_experts", 1),)))
    return experts * settings.get("rank", 0) * len(settings.get("targets", ("ffn",))) > REMAT_ABOVE
