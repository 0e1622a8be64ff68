"""Drift of *switch* from the exact weights, and its effect on the distribution of the next token.

    python -m studies.drift --model SMOLLM2_DIR --adapter ADAPTER_DIR --out OUT

writes drift.json, drift.md and drift.png. After 1, 10, 100, … switch steps over the gates of real tokens, in bfloat16 and
float32:

    weight error   ‖W − W_exact‖ / ‖W_exact‖ over all adapted weights, W_exact = W⁰ + Δ(g) in float64
    KL             KL(exact ‖ drifted) of the next-token distributions, mean over held-out tokens, in nats

For the KL the weights are unmerged, as after a generation, and every held-out token runs with its own experts merged into
them. *exact* is the unmerged float32 forward pass of the same weights. *golden* merges every token into the pristine weights
and *unmerged* writes none: neither depends on the number of steps, and what they show is the rounding of one token.

The tokens are sampled from the adapted model at temperature 1 (every one is new, so no sequence of gates repeats), or come
from `--text`, repeated where it is too short.
"""
