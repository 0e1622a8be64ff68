"""Forward passes of the families whose blocks are not Llama's, over two devices and on one. Prints, as JSON, the largest
difference of each over the largest hidden state."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from goldens.family_models import CASES, write_model_dir
from random_models import random_adapter

from adafuse_jax import load_backbone
from adafuse_jax.parallel.mesh import make_mesh, shard

TOKENS = jnp.arange(3, 23)[None]

found = {}
for name in ("olmo2_0", "gemma3_text_0", "cohere2_0"):
    with tempfile.TemporaryDirectory() as folder:
        model = load_backbone(write_model_dir(CASES[name], Path(folder)))
    adapter = random_adapter(model.config, targets=("o_proj", "down_proj"))
    run = jax.jit(lambda model, adapter: model.run(TOKENS, adapter=adapter).hidden)
    alone = run(model, adapter)
    mesh = make_mesh(2, model.config)
    together = run(shard(model, mesh), shard(adapter, mesh))
    found[name] = float(jnp.abs(together - alone).max() / jnp.abs(alone).max())
print(json.dumps(found))
