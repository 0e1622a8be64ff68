"""Products of the chosen experts against plain float64: interpreted here, with `-m gpu` compiled. The groups themselves; a
training step with grouped products against one with dense ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx
from random_models import random_adapter

from adafuse_jax.adapters.adafuse import choose_products
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone
from pallas_kernels.grouped_experts import TILE, gates_of_items, group_tokens, grouped_product, kernel_triton, saves
from pallas_kernels.grouped_experts.groups import max_items, num_passes

SCALE = 0.7
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")


@dataclass(frozen=True)
class Case:
    num_experts: int
    top_k: int
    tokens: int
    rank: int = 16
    widths: tuple[int, int] = (64, 64)
    skew: float = 0.0
    """Logits of expert 0 are higher by this."""

    def draw(self) -> dict[str, np.ndarray]:
        """x, a, b, gates and chosen, and the gradient of y."""
        rng, (into, out) = np.random.default_rng(self.tokens + self.num_experts), self.widths
        logits = rng.normal(size=(self.tokens, self.num_experts)) + self.skew * (np.arange(self.num_experts) == 0)
        chosen = np.argsort(-logits, axis=1)[:, : self.top_k].astype(np.int32)
        gates = np.exp(np.take_along_axis(logits, chosen, axis=1))
        return {
            "x": rng.normal(size=(self.tokens, into)), "a": rng.normal(size=(self.num_experts, self.rank, into)) / 8,
            "b": rng.normal(size=(self.num_experts, out, self.rank)) / 4,
            "gates": gates / gates.sum(1, keepdims=True), "chosen": chosen, "dy": rng.normal(size=(self.tokens, out)),
        }  # fmt: skip


CASES = {
    "few sets": Case(4, 2, 8 * TILE, widths=(128, 192)),
    "many sets": Case(16, 2, 2 * TILE, rank=32),
    "three choices": Case(12, 3, 2 * TILE, widths=(192, 64)),
    "one choice": Case(3, 1, 4 * TILE),
    "one expert has nearly all": Case(8, 2, 4 * TILE, skew=8.0),
    "more experts than tokens of a tile": Case(2 * TILE, 2, TILE),
}
LARGE_CASES = {
    "8 experts of rank 64": Case(8, 2, 8192, rank=64, widths=(512, 1536)),
    "64 of rank 16, 4 chosen": Case(64, 4, 4096, rank=16, widths=(576, 192)),
    "16 of rank 128": Case(16, 2, 2048, rank=128, widths=(256, 256)),
}


def in_float64(x, a, b, gates, chosen, dy) -> dict[str, np.ndarray]:
    """y and its gradients, token by token."""
    g = SCALE * gates[..., None]
    h = np.einsum("ti,tkri->tkr", x, a[chosen])
    u = np.einsum("to,tkor->tkr", dy, b[chosen])
    da, db = np.zeros_like(a), np.zeros_like(b)
    np.add.at(da, chosen, np.einsum("tkr,ti->tkri", g * u, x))
    np.add.at(db, chosen, np.einsum("to,tkr->tkor", dy, g * h))
    return {
        "y": np.einsum("tkr,tkor->to", g * h, b[chosen]), "x": np.einsum("tkr,tkri->ti", g * u, a[chosen]),
        "a": da, "b": db, "gates": SCALE * (h * u).sum(-1),
    }  # fmt: skip


def run(case: Case, dtype: str, *, interpret: bool) -> dict[str, np.ndarray]:
    given = case.draw()
    x, dy = (jnp.asarray(given[name], dtype) for name in ("x", "dy"))
    sums = jnp.promote_types(dtype, jnp.float32)
    a, b, gates = (jnp.asarray(given[name], sums) for name in ("a", "b", "gates"))
    chosen = jnp.asarray(given["chosen"])

    def product(x, a, b, gates):
        groups = group_tokens(chosen, case.num_experts)
        return grouped_product(x, a, b, gates_of_items(gates, chosen, groups), groups, SCALE, interpret)

    y, pull = jax.vjp(product, x, a, b, gates)
    found = dict(zip(("y", "x", "a", "b", "gates"), (y, *pull(dy)), strict=True))
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


def assert_equal(case: Case, found: dict[str, np.ndarray], tolerance: float) -> None:
    for name, wanted in in_float64(**case.draw()).items():
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=tolerance * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("name", quick.first(CASES, 2))
def test_product_and_gradients_in_float64(name):
    with jax.enable_x64(True):
        assert_equal(CASES[name], run(CASES[name], "float64", interpret=True), 1e-12)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", [*CASES, *LARGE_CASES])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compiled(name, dtype):
    case = (CASES | LARGE_CASES)[name]
    assert_equal(case, run(case, dtype, interpret=False), {"bfloat16": 3e-2, "float16": 4e-3}[dtype])


@pytest.mark.parametrize("name", CASES)
def test_every_choice_is_in_one_item_of_its_expert(name):
    """The rows of an item whose gate is not 0 are tokens that chose its expert, and every choice is found once."""
    case = CASES[name]
    given = case.draw()
    groups = group_tokens(jnp.asarray(given["chosen"]), case.num_experts)
    gates = np.asarray(gates_of_items(jnp.asarray(given["gates"]), jnp.asarray(given["chosen"]), groups))
    items, tiles = int(groups.start[-1]), case.tokens // TILE
    assert items == int(groups.expert_start[-1]) <= max_items(case.tokens, case.num_experts, case.top_k)
    found = np.zeros((case.tokens, case.num_experts))
    for item in range(items):
        tile, expert = int(groups.tile[item]), int(groups.expert[item])
        assert groups.start[tile] <= item < groups.start[tile + 1]
        assert item in groups.by_expert[groups.expert_start[expert] : groups.expert_start[expert + 1]]
        rows = np.asarray(groups.order[tile // tiles]).reshape(tiles, TILE)[tile % tiles]
        found[rows, expert] += gates[item]
    wanted = np.zeros_like(found)
    np.put_along_axis(wanted, given["chosen"], given["gates"], axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_passes():
    assert num_passes(8192, 8, 2) == 1, "28 sets, 256 tokens of a set"
    assert num_passes(8192, 64, 2) == 2, "2016 sets"


def test_model_with_grouped_products_equals_the_dense_one():
    """Outputs, and gradients of router and experts through the layers' scan."""
    config = ModelConfig(
        model_type="llama", vocab_size=64, embed_dim=32, hidden_dim=48, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=16, tie_word_embeddings=True, norm_eps=1e-5, max_position_embeddings=128,
    )  # fmt: skip
    model = Backbone(config, rngs=nnx.Rngs(0))
    adapter = random_adapter(config, targets=("v_proj",), num_experts=4, top_k=2, rank=16)
    tokens = jax.random.randint(jax.random.key(1), (2, TILE), 0, 64)

    @jax.jit
    def loss_and_gradient(adapter):
        def loss(adapter):
            return jnp.sum(jnp.sin(model.run(tokens, adapter=adapter, remat="products").hidden))

        return jax.value_and_grad(loss)(adapter)

    dense = loss_and_gradient(adapter)
    adapter = adapter.with_products("grouped")
    program = str(jax.make_jaxpr(loss_and_gradient)(adapter))
    assert program.count("name=grouped_project") == 2, "of one linear, forward and backward; none again"
    grouped = loss_and_gradient(adapter)
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(grouped), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(a).max()))


def kernels(rank: int, tokens: int = 2048):
    """Name → function and shapes, of 8 experts."""
    of = jax.ShapeDtypeStruct
    groups = jax.eval_shape(lambda chosen: group_tokens(chosen, 8), of((tokens, 2), "int32"))
    items = len(groups.expert)
    x, a, b = (of(shape, "bfloat16") for shape in ((tokens, 512), (8, rank, 512), (8, 512, rank)))
    h, gates = of((items, TILE, rank), "bfloat16"), of((items, TILE), "float32")
    back = partial(kernel_triton.project, scale=1.0, rank_last=True)
    return {
        "project": (partial(kernel_triton.project, scale=1.0, rank_last=False), (x, a, gates, groups)),
        "project back": (lambda *operands: back(*operands), (x, b, gates, groups, h)),
        "expand": (partial(kernel_triton.expand, rank_last=True), (h, b, groups)),
        "outer": (partial(kernel_triton.outer, rank_last=True), (h, x, groups)),
    }


@pytest.mark.parametrize(
    ("capability", "memory"),
    [(89, 99), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((80, 163), (120, 99)))],
)
@pytest.mark.parametrize("name", ["project", "project back", "expand", "outer"])
def test_compiles_for_other_gpus(monkeypatch, tmp_path, name, capability, memory):
    """With tensor cores, and within the shared memory (KiB) that a program can have there."""
    pytest.importorskip("triton")
    from triton_compiler import kernel_of

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, shapes = kernels(rank=128)[name]
    compiled = kernel_of(function, *shapes).compile(capability, tmp_path)
    assert compiled.metadata.shared <= memory * 1024
    assert "mma" in compiled.asm["ptx"]
    assert ".local" not in compiled.asm["ptx"]


class TestChoice:
    CONFIG = ModelConfig(
        model_type="llama", vocab_size=64, embed_dim=4096, hidden_dim=11008, num_layers=1, num_heads=32, num_kv_heads=32,
        head_dim=128, tie_word_embeddings=False, norm_eps=1e-5, max_position_embeddings=128,
    )  # fmt: skip

    def choice(self, tokens: int = 8192, dtype: str = "bfloat16", **settings) -> tuple[str, str]:
        return choose_products(AdapterConfig(**settings), self.CONFIG, tokens, dtype)

    @pytest.fixture
    def gpu(self, monkeypatch) -> SimpleNamespace:
        """The only device."""
        device = SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability="8.0")
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        return device

    def test_by_shape(self, gpu):
        assert self.choice()[0] == "grouped", "8 experts of rank 64, 8,192 tokens"
        reason = "E·R = 512 columns for 1024 tokens are few"
        assert self.choice(tokens=1024) == ("dense", reason)
        assert self.choice(rank=16)[0] == "dense"
        assert self.choice(num_experts=64, rank=16)[0] == "grouped"

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"dtype": "float32"}, "activations are float32, not bfloat16 or float16"),
            ({"tokens": 8200}, "8200 tokens are no multiple of 64"),
            ({"rank": 24}, "rank 24 is none of 16, 32, 64, 128"),
            ({"num_experts": 2}, "every token uses all experts"),
        ],
    )
    def test_reason(self, gpu, settings, reason):
        assert self.choice(**settings) == ("dense", reason)

    @pytest.mark.parametrize("capability", ["7.5", "gfx942"])
    def test_gpus_without_the_kernels(self, gpu, capability):
        gpu.compute_capability = capability
        reason = "they need an NVIDIA GPU of compute capability 8.0 or newer, this is a GPU"
        assert self.choice() == ("dense", reason)

    def test_no_gpu(self, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
        assert self.choice() == ("dense", "no GPU")

    def test_the_form_that_was_measured_to_be_faster(self):
        """Where they differ by more than 15%."""
        record = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia_h200" / "experts.json"
        gains = {}
        for row in json.loads(record.read_text())["rows"]:
            shape = row["tokens"], row["experts"], row["rank"], row["top_k"]
            gains[shape] = row["dense_ms"] / row["grouped_ms"]
        clear = {shape: gain > 1 for shape, gain in gains.items() if not 0.87 < gain < 1.15}
        assert {True, False} == set(clear.values())
        assert {shape: saves(*shape) for shape in clear} == clear
