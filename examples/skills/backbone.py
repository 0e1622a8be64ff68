"""The demo's backbone, made on the spot: a byte-level tokenizer and a tiny Llama, pre-trained on raw lines.

loss = mean over the answers' bytes of −log p(x_t | x_<t); all weights train, the matrices by Muon, the rest by Adam.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.data.batches import Batch, Batches
from adafuse_jax.data.chat import Encoded, encode_all, load_tokenizer
from adafuse_jax.data.examples import Text
from adafuse_jax.data.packing import Rows, pack
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.loss import token_losses
from examples.skills.skills import Case

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '\n') }}{% endfor %}"
ROW_LENGTH, BATCH_SIZE, LEARNING_RATE, ADAM_SHARE = 64, 24, 0.02, 0.3
STEPS_PER_CALL = 20
"""Steps in one compiled loop: a call a step would hand the memory of its activations back and forth, a third of the time."""


def write_tokenizer(out: Path) -> Any:
    """Write a tokenizer whose tokens are the 256 bytes, BOS and EOS; returns it loaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)])
    special = [(BOS, tokenizer.token_to_id(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=special)
    tokenizer.save(str(out / "tokenizer.json"))
    table = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(out)


def model_config(tokenizer: Any) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=len(tokenizer),
        embed_dim=128,
        hidden_dim=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
    )


def pretrain(
    lines: Sequence[Case], out: Path, *, steps: int, seed: int, log: Callable[[str], object] = lambda text: None
) -> Backbone:
    """Train a backbone on raw lines and leave it in `out`, a Hugging Face directory; `log` receives lines about the loss."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = write_tokenizer(Path(scratch))
        per_call = min(steps, STEPS_PER_CALL)
        batches = Batches(rows=(_pack(lines, tokenizer),), seed=seed, batch_size=BATCH_SIZE, grad_accum=per_call)
        model = Backbone(model_config(tokenizer), rngs=nnx.Rngs(seed))
        optimizer = _optimizer(steps)
        moments = jax.jit(optimizer.init)(model)
        calls = steps // per_call
        for call in range(calls):
            model, moments, losses = _train(model, moments, batches.at(call), optimizer=optimizer)
            if (call + 1) % max(1, calls // 4) == 0:
                done = (call + 1) * per_call
                log(f"step {done} of {calls * per_call}: loss {jnp.mean(losses):.2f} nats per byte of the answers")
        export_backbone(model, out, source=scratch)
    return model


def _pack(lines: Sequence[Case], tokenizer: Any) -> Rows:
    """One segment a line; only the answers are targets, for the rest is random."""
    encoded, _ = encode_all([Text(line.prompt + line.answer) for line in lines], tokenizer, ROW_LENGTH)
    starts = [1 + len(line.prompt) for line in lines]  # BOS, then bytes
    masked = [
        Encoded(e.tokens, e.loss_mask & (np.arange(len(e.tokens)) >= n)) for e, n in zip(encoded, starts, strict=True)
    ]
    return pack(masked, ROW_LENGTH)


def _optimizer(steps: int) -> optax.GradientTransformation:
    """Muon for the stacked matrices [L, out, in]; Adam, at a share of the rate, for embeddings and norms."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(2, 1) if x.ndim == 3 else None, params)

    def slow_adam(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda x: x if x.ndim == 3 else ADAM_SHARE * x, updates)

    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(1, steps // 20), max(2, steps))
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(schedule, ns_steps=4, adam_b2=0.98, muon_weight_dimension_numbers=matrices),
        optax.stateless(slow_adam),
    )


@partial(jax.jit, static_argnames="optimizer", donate_argnames=("model", "moments"))
def _train(
    model: Backbone, moments: optax.OptState, batch: Batch, *, optimizer: optax.GradientTransformation
) -> tuple[Backbone, optax.OptState, Float[Array, " A"]]:
    """One optimiser step for each of the A micro-batches of `batch`."""

    def mean_loss(model: Backbone, rows: Any) -> Array:
        out = model.run(rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids)
        total = token_losses(model, out.hidden, rows.tokens, rows.loss_mask).sum()
        return total / jnp.maximum(rows.loss_mask[:, 1:].sum(), 1)

    def step(carry: tuple, rows: Any) -> tuple[tuple, Array]:
        model, moments = carry
        loss, grads = jax.value_and_grad(mean_loss)(model, rows)
        updates, moments = optimizer.update(grads, moments, model)
        return (optax.apply_updates(model, updates), moments), loss

    (model, moments), losses = jax.lax.scan(step, (model, moments), batch)
    return model, moments, losses
