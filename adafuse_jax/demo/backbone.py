"""The demo's backbone, made on the spot: a byte-level tokenizer and a tiny Llama, pre-trained on raw lines.

loss = mean over the answers' bytes of −log p(x_t | x_<t); all weights train.
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

from adafuse_jax.configs import ModelConfig
from adafuse_jax.data.batches import Batch, Batches
from adafuse_jax.data.chat import Encoded, encode_all, load_tokenizer
from adafuse_jax.data.examples import Text
from adafuse_jax.data.packing import Rows, pack
from adafuse_jax.demo.skills import Case
from adafuse_jax.interop.huggingface import export_backbone
from adafuse_jax.model.backbone import Backbone
from adafuse_jax.training.step import token_losses

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '\n') }}{% endfor %}"
ROW_LENGTH, BATCH_SIZE, LEARNING_RATE = 64, int(__import__('os').environ.get('PBS', 16)), float(__import__('os').environ.get('PLR', 3e-3))
STEPS_PER_CALL = 25


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
        num_layers=int(__import__('os').environ.get('NL', 4)),
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
    lines: Sequence[Case], out: Path, *, steps: int, seed: int, say: Callable[[str], object] = lambda text: None
) -> Backbone:
    """Train a backbone on raw lines and leave it in `out`, a Hugging Face directory; `say` hears how the loss falls."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = write_tokenizer(Path(scratch))
        batches = Batches(rows=(_pack_lines(lines, tokenizer),), seed=seed, batch_size=BATCH_SIZE, grad_accum=STEPS_PER_CALL)
        model = _spread(Backbone(model_config(tokenizer), rngs=nnx.Rngs(seed)))
        schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(1, steps // 20), max(2, steps))
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), _OPT(schedule))
        moments = optimizer.init(model)
        for chunk in range(1, steps // STEPS_PER_CALL + 1):
            batch = batches.at(chunk - 1)
            model, moments, losses = _train(model, moments, batch, optimizer=optimizer)
            if chunk % max(1, steps // STEPS_PER_CALL // 8) == 0:
                say(f"step {chunk * STEPS_PER_CALL}/{steps}: loss {jnp.mean(losses):.2f} nats per byte of the answers")
        export_backbone(model, out, source=scratch)
    return model


import os
def _dims(params):
    return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(2, 1) if x.ndim == 3 else None, params)
def _OPT(schedule):
    if os.environ.get("OPT") == "muon":
        return optax.contrib.muon(schedule, ns_steps=int(os.environ.get("NS", 5)), adam_b2=0.98, adam_learning_rate=lambda t: schedule(t)*float(os.environ.get("AR", 0.3)), muon_weight_dimension_numbers=_dims)
    return optax.adamw(schedule, b2=0.98, weight_decay=0.01)

def _spread(model: Backbone) -> Backbone:
    """`model` with its linears drawn at 1/√in, the scale of so small a model; the default suits larger ones."""
    factor = lambda path, x: x.shape[-1] ** -0.5 / 0.02 if x.ndim == 3 else 1.0  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda path, x: x * factor(path, x), model)


def _pack_lines(lines: Sequence[Case], tokenizer: Any) -> Rows:
    """One segment a line; only the answers are targets, for the rest is random."""
    encoded, _ = encode_all([Text(line.prompt + line.answer) for line in lines], tokenizer, ROW_LENGTH)
    starts = [1 + len(line.prompt) for line in lines]  # BOS, then bytes
    masked = [
        Encoded(e.tokens, e.loss_mask & (np.arange(len(e.tokens)) >= n)) for e, n in zip(encoded, starts, strict=True)
    ]
    return pack(masked, ROW_LENGTH)


@partial(jax.jit, static_argnames="optimizer", donate_argnames=("model", "moments"))
def _train(
    model: Backbone, moments: optax.OptState, batch: Batch, *, optimizer: optax.GradientTransformation
) -> tuple[Backbone, optax.OptState, Float[Array, "A"]]:
    """One optimiser step for each micro-batch of `batch`."""

    def mean_loss(model: Backbone, rows: Batch) -> Array:
        out = model.run(rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids)
        total = token_losses(model, out.hidden, rows.tokens, rows.loss_mask).sum()
        return total / jnp.maximum(rows.loss_mask[:, 1:].sum(), 1)

    def step(carry: tuple, rows: Batch) -> tuple[tuple, Array]:
        model, moments = carry
        loss, grads = jax.value_and_grad(mean_loss)(model, rows)
        updates, moments = optimizer.update(grads, moments, model)
        return (optax.apply_updates(model, updates), moments), loss

    (model, moments), losses = jax.lax.scan(step, (model, moments), batch)
    return model, moments, losses
