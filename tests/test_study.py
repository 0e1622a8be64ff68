"""The accuracy study of pre-gated experts on a tiny model: its parts against independent ways to the same numbers, and the
whole from data files to the tables."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from study_data import write_gz, write_study

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.router import expert_load
from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.data.packing import Rows
from adafuse_jax.models.hooks import Routing
from studies.accuracy import arms, generation, made_up, mixture, pregated, scoring, tasks
from studies.accuracy.__main__ import main
from studies.accuracy.pregated import PreGated, Variant
from studies.accuracy.study import Plan, Run, Study, best_rate, grid, of_seeds
from studies.questions import Packed
from studies.runs import Runs, read_records
from studies.training import Trainer, optimizer_of, phases_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH, LIMIT = 192, 6
FEW: dict[str, Any] = {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "down_proj")}
SMALL = {
    "lora-32": arms.ARMS["lora-32"] | FEW,
    "adafuse-context": arms.ARMS["adafuse-context"] | FEW | {"num_experts": 4},
}
MIXTURE = FEW | {"adapter": "adafuse", "num_experts": 4, "top_k": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short questions of all sets in their files' forms."""
    folder = write_study(tmp_path_factory.mktemp("study")) / "data"
    for split, first, count in (("training", 0, 30), ("test", 27, 6)):
        sums = [(f"{i} + 2?", f"It is <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}") for i in range(first, first + count)]
        write_gz(folder / tasks.GSM8K[split], [{"question": q, "answer": a} for q, a in sums], lines=True)
    for name, file in tasks.INSTRUCTIONS.items():
        rows = [{"instruction": f"{name} {i}", "input": "x" * (i % 2), "output": f"y{i}"} for i in range(40)]
        write_gz(folder / file, rows, lines=False)
    return folder


@pytest.fixture(scope="module")
def file(data: Path, stories260k_dir: Path) -> Path:
    out = data.parent / "mixture.npz"
    flags = ["--prepare", "--model", str(stories260k_dir), "--data", str(data), "--mixture", str(out)]
    assert main([*flags, "--length", str(LENGTH), "--limit", str(LIMIT)]) == 0
    return out


@pytest.fixture(scope="module")
def mixed(file: Path) -> mixture.Mixture:
    return mixture.load(file)


@pytest.fixture(scope="module")
def model(stories260k_dir: Path) -> Any:
    return load_backbone(str(stories260k_dir), "float32")


def test_languages_contradict_each_other():
    assert made_up.in_language(47, "vel") == "nu ka"
    assert made_up.in_language(47, "dor") == "ta ka"
    for language in made_up.LANGUAGES:
        assert sorted(made_up.MEANING[language]) == list("0123456789")
    assert all(a != b for a, b in zip(*made_up.MEANING.values(), strict=True))
    questions = list(made_up.questions())
    assert len({q for q, _ in questions}) == len(questions)


def test_splits_share_no_question(data: Path):
    read = {name: tasks.read_task(name, data) for name in tasks.SETS}
    for task in read.values():
        parts = [{tasks._question(e) for e in getattr(task, split)} for split in tasks.SPLITS]
        assert len(set.union(*parts)) == sum(map(len, parts))
        assert all(parts)
    for split in tasks.SPLITS:
        vel, dor = ([tasks._key(e) for e in getattr(read[name], split)] for name in made_up.LANGUAGES)
        assert vel == dor
    gsm8k = read["gsm8k"]  # of 30 + 6 questions three are both
    assert len(gsm8k.training) + len(gsm8k.validation) == 27
    assert gsm8k.test[0].messages[1].content == "It is 29.\n#### 29"  # type: ignore[union-attr]


def test_final_number():
    cases = {"so 1,234.\n#### 1,200": 1200, "7 and -3.50": -3.5, "none": None, "5 ####": None, "#### 7.": 7}
    assert {text: tasks.final_number(text) for text in cases} == cases


def test_mixture_file_holds_every_example_once(mixed: mixture.Mixture, stories260k_dir: Path):
    tokenizer = load_tokenizer(stories260k_dir)
    rows, seen = mixed.training, np.zeros(len(tasks.SETS), int)
    assert mixed.split == "validation"
    for row in range(len(rows.tokens)):
        for segment in range(1, rows.segment_ids[row].max() + 1):
            here = rows.segment_ids[row] == segment
            (task,) = set(rows.tasks[row, here])
            seen[task] += 1
            text = tokenizer.decode(rows.tokens[row, here])
            assert (f"Answer in {tasks.SETS[task].title()}." in text) == (tasks.SETS[task] in made_up.LANGUAGES)
            inside = here & (rows.loss_mask[row] > 0)
            assert rows.loss_mask[row, inside].sum() == pytest.approx(1)
            assert np.ptp(rows.loss_mask[row, inside]) == 0
    assert seen.tolist() == [LIMIT] * len(tasks.SETS)
    packed = mixed.scored["vel"]
    row = packed.tokens[0]
    first = packed.owner[0] == 0
    words = tokenizer.decode([t for t in packed.wanted[0, first] if t not in mixed.stops])
    assert set(words.split()) <= set(made_up.WORDS)
    assert (row[packed.place[0, first][1:]] == packed.wanted[0, first][:-1]).all(), "a target follows its place"


def test_measures_by_hand():
    nothing = np.zeros((1, 6), int)
    form: dict[str, Any] = dict.fromkeys(("tokens", "positions", "segment_ids", "place", "wanted"), nothing)
    owner = np.array([[0, 0, 1, 2, 3, -1]])
    losses, hits = np.array([[1.0, 2.0, 1.5, 0.5, 3.0, 9.0]]), np.array([[1, 0, 1, 1, 1, 0]], bool)
    choices = Packed(**form, owner=owner, choices=[2, 2], answers=[0, 0], left_out=0)
    found = scoring.measured(choices, losses, hits)
    p = np.exp([-3.0, -1.5]), np.exp([-0.5, -3.0])
    assert found["accuracy"] == 50
    assert found["choice_loss"] == pytest.approx(-np.mean([np.log(q[0] / q.sum()) for q in p]))
    texts = Packed(**form, owner=owner, choices=[1] * 4, answers=[0] * 4, left_out=0)
    found = scoring.measured(texts, losses, hits)
    assert found == {"loss": pytest.approx(1.6), "likelihood": pytest.approx(100 * np.exp(-1.6)), "exact": 75}
    of_all = {name: dict.fromkeys(tasks.MEASURES[name], 10.0 * i) for i, name in enumerate(tasks.SETS)}
    of_all["gsm8k"] = {"exact": 8.0, "likelihood": 0.0}
    assert scoring.mixture_mean(of_all) == pytest.approx((4 + 10 * sum(range(1, 8))) / 8)


def adapter_of(model: Any, variant: Variant, seed: int = 0) -> PreGated:
    adapter = PreGated(AdapterConfig(**MIXTURE), model.config, variant, rngs=nnx.Rngs(seed))
    draw = np.random.default_rng(1).normal
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + draw(size=leaf.shape, scale=0.1), jnp.float32), adapter)


def test_a_plain_variant_is_adafuse(model: Any):
    """Routed before layer 0 or in it: the same, if nothing is changed."""
    plain = Variant(normalize_input=False, selection_bias=False)
    planned = adapter_of(model, plain)
    adafuse = AdaFuse(AdapterConfig(**MIXTURE), model.config, rngs=nnx.Rngs(0))
    adafuse.router, adafuse.experts = planned.router, planned.experts
    tokens = jnp.arange(24).reshape(2, 12)
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)

    @jax.jit
    def hidden(adapter: Any) -> jax.Array:
        view, context = pregated.seen(adapter, model, tokens, positions, tokens)
        assert context is None
        return model.run(tokens, adapter=view).hidden

    here, there, bare = (hidden(adapter) for adapter in (planned, adafuse, None))
    np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)
    assert not np.allclose(here, bare, atol=1e-2)


def test_shared_expert_is_a_lora_beside_the_routed(model: Any):
    adapter = adapter_of(model, Variant(shared_rank=3))
    x = jax.random.normal(jax.random.key(2), (1, 5, model.config.embed_dim))
    layer = jax.tree.map(lambda leaf: leaf[1], adapter.experts["q_proj"])
    routing = adapter.plan(model, jnp.arange(5)[None], jnp.arange(5)[None], jnp.zeros((1, 5), int))[0]
    a, b = layer.shared.A[0], layer.shared.B[0]
    expected = layer.routed(x, routing) + adapter.config.scale * (x @ a.T) @ b.T
    np.testing.assert_allclose(layer(x, routing), expected, rtol=1e-3, atol=1e-4)


def test_experts_of_one_a(model: Any):
    """As experts whose A are equal, and with one A's parameters."""
    adapter = adapter_of(model, Variant(shared_a=True))
    x = jax.random.normal(jax.random.key(2), (1, 5, model.config.embed_dim))
    layer = jax.tree.map(lambda leaf: leaf[1], adapter.experts["q_proj"])
    assert layer.A.shape == (1, 2, model.config.embed_dim)
    routing = adapter.plan(model, jnp.arange(5)[None], jnp.arange(5)[None], jnp.zeros((1, 5), int))[0]
    gates = np.asarray(routing.dense_gates(), np.float64)
    expected = sum(gates[..., e, None] * 2.0 * (x @ layer.A[0].T @ layer.B[e].T) for e in range(4))
    assert adapter.config.scale == 2.0
    np.testing.assert_allclose(layer(x, routing), expected, rtol=1e-3, atol=1e-4)


def test_context_goes_on_from_token_to_token(model: Any):
    """The plan of texts in one row is that of each alone, token by token; and the context is the decayed mean."""
    adapter = adapter_of(model, Variant(context_decay=0.9))
    tokens, positions = jnp.array([[5, 9, 30, 7, 8]]), jnp.array([[0, 1, 2, 0, 1]])
    routing, context = adapter.plan(model, tokens, positions, tokens)
    past = None
    for at in range(5):
        one = (slice(None), slice(at, at + 1))
        single, past = adapter.plan(model, tokens[one], positions[one], tokens[one], past=past)
        past = past[:, 0]
        np.testing.assert_allclose(past, context[:, at], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(single.probabilities[:, 0], routing.probabilities[:, at], rtol=1e-4, atol=1e-6)
    norm = jax.tree.map(lambda leaf: leaf[0], model.layers.input_layernorm)
    x = np.asarray(norm(model.embed_tokens[...][tokens]), np.float64)[0]
    x /= np.sqrt((x**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(context[0, 2], 0.1 * (x[2] + 0.9 * x[1] + 0.81 * x[0]), rtol=1e-3, atol=1e-5)


def test_selection_bias_moves_against_the_load(model: Any):
    adapter = adapter_of(model, Variant())
    tokens = jnp.arange(40).reshape(2, 20)
    mask = jnp.ones(tokens.shape, bool)
    before, _ = adapter.plan(model, tokens, tokens, tokens)

    def loss(adapter: PreGated) -> Any:
        return adapter.balance_loss(adapter.plan(model, tokens, tokens, tokens)[0], mask)

    grads = jax.grad(loss)(adapter)
    load = expert_load(before, mask)[0]
    np.testing.assert_allclose(grads.bias[...], load - 0.25, atol=1e-6)
    assert all(not leaf.any() for leaf in jax.tree.leaves((grads.router, grads.experts)))
    adapter.bias[...] = jnp.array([50.0, 0, 0, 40.0])
    after, _ = adapter.plan(model, tokens, tokens, tokens)
    assert (np.sort(after.experts, -1) == [0, 3]).all()
    logits = jnp.log(after.probabilities)[..., [0, 3]]
    np.testing.assert_allclose(after.dense_gates()[..., [0, 3]], jax.nn.softmax(logits), rtol=1e-4)


def test_rates_of_routers_and_biases(model: Any):
    adapter = adapter_of(model, Variant(shared_rank=1, context_decay=0.9, router_rate=0.3, bias_rate=7.0))
    rates = adapter.rates()
    assert [jax.tree.leaves(tree) for tree in (rates.router, rates.context, rates.bias)] == [[0.3], [0.3], [7.0]]
    assert set(jax.tree.leaves(rates.experts)) == {1.0}


def test_expert_dropout_and_orthogonal_experts(model: Any):
    adapter = adapter_of(model, Variant(expert_dropout=0.5))
    tokens = jnp.tile(jnp.arange(30), (64, 1))
    routing, _ = adapter.plan(model, tokens, tokens, tokens, key=jax.random.key(0))
    used = jax.nn.one_hot(routing.experts, 4).sum((1, 2)) > 0  # [B, E]
    assert 0.3 < used.mean() < 0.8
    again, _ = adapter.plan(model, tokens, tokens, tokens)
    assert (again.experts == again.experts[:1]).all(), "none is dropped without a key"
    fresh = PreGated(AdapterConfig(**MIXTURE), model.config, Variant(orthogonal=True), rngs=nnx.Rngs(0))
    a = fresh.experts["q_proj"].A[...].reshape(model.config.num_layers, -1, model.config.embed_dim)
    np.testing.assert_allclose(a @ a.swapaxes(1, 2), np.broadcast_to(np.eye(8) / 3, (len(a), 8, 8)), atol=1e-5)


def test_by_task_routes_by_the_set(model: Any):
    adapter = PreGated(
        AdapterConfig(**MIXTURE | {"num_experts": 8, "top_k": 1}), model.config, Variant(by_task=True), rngs=nnx.Rngs(0)
    )
    given = jnp.array([[3, 3, 7]])
    routing, _ = adapter.plan(model, given, given, given)
    assert isinstance(routing, Routing)
    assert (routing.dense_gates()[0].argmax(-1) == given).all()
    assert adapter.balance_loss(routing, given > 0) == 0


def test_greedy_decoding_is_the_full_forward_pass(model: Any):
    """Of two replicas, on prompts of different lengths; a reply that has ended stays so."""
    variant = Variant(context_decay=0.9, shared_rank=2)
    each = [adapter_of(model, variant), jax.tree.map(lambda leaf: leaf * 1.5, adapter_of(model, variant, seed=3))]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    prompts, lengths = jnp.array([[1, 40, 41, 42, 50], [1, 60, 61, 0, 0]]), jnp.array([5, 3])
    plan: dict[str, Any] = {"new_tokens": 4}

    @jax.jit
    def following(adapter: Any, tokens: jax.Array) -> jax.Array:
        view, _ = pregated.seen(adapter, model, tokens, jnp.arange(10)[None], jnp.zeros_like(tokens))
        return model.logits(model.run(tokens, adapter=view).hidden[0]).argmax(-1)

    found = generation.greedy(model, params, prompts, lengths, jnp.int32(0), jnp.array([-1]), **plan)
    assert found.shape == (2, 2, 4)
    for s, adapter in enumerate(each):
        for n in range(2):
            text = prompts[n, : lengths[n]].tolist()
            for _ in range(4):
                text.append(int(following(adapter, jnp.array([text + [0] * (10 - len(text))]))[len(text) - 1]))
            assert found[s, n].tolist() == text[lengths[n] :]
    stop = int(found[0, 0, 1])
    again = generation.greedy(model, params, prompts, lengths, jnp.int32(0), jnp.array([stop]), **plan)
    assert set(again[0, 0, 1:].tolist()) == {stop}


def test_loss_of_a_step_by_hand(mixed: mixture.Mixture, model: Any):
    """The mean over the examples of a batch of the mean over an example's targets, of a LoRA that is still nothing."""
    rows = mixed.training
    arm = SMALL["lora-32"]
    trainer = Trainer(
        partial(arms.make, arm), steps=1, optimizer=optimizer_of(1), phases=phases_of(arm, 1), forward=pregated.forward
    )
    trained = trainer.train(model, rows, seeds=(0, 7), rates=(0.0, 0.0), batch_size=2, points=20)
    run = jax.jit(lambda t, p, s: jax.nn.log_softmax(model(t, positions=p, segment_ids=s).logits))
    for replica, seed in enumerate((0, 7)):
        order = Batches(
            rows=(Rows(rows.tokens, rows.tokens > 0, rows.segment_ids, rows.positions),), seed=seed, batch_size=2
        )
        batch, examples = order.at(0), []
        tokens, segments = batch.tokens[0], batch.segment_ids[0]
        logs = run(tokens, batch.positions[0], segments)
        for row in range(2):
            (found,) = np.flatnonzero((rows.tokens == tokens[row]).all(1))
            place = np.flatnonzero(rows.loss_mask[found]) - 1
            for segment in range(1, segments[row].max() + 1):
                of = place[segments[row, place] == segment]
                examples.append(-np.mean(logs[row, of, tokens[row, of + 1]]))
        assert trained.history[0]["loss"][replica] == pytest.approx(np.mean(examples), rel=1e-4)


def test_targets_of_rows():
    mask = np.random.default_rng(0).random((5, 40)) < 0.1
    mask[:, 0] = False
    tokens = np.random.default_rng(1).integers(0, 99, mask.shape)
    rows = Rows(tokens, mask, tokens, tokens)
    place, wanted, there = mixture.targets_of(rows)
    found = np.zeros_like(mask)
    for row, (places, following, real) in enumerate(zip(place, wanted, there, strict=True)):
        found[row, places[real] + 1] = True
        np.testing.assert_array_equal(rows.tokens[row, places[real] + 1], following[real])
    np.testing.assert_array_equal(found, mask)


def test_weights_of_examples():
    mask = np.array([[0, 1, 1, 0, 1, 0]], bool)
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    rows = Rows(mask.astype(np.int32), mask, segments, segments)
    assert mixture.weights_of(rows).tolist() == [[0, 0.5, 0.5, 0, 1, 0]]


def test_study_from_files_to_tables(file: Path, stories260k_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An arm at two learning rates, then on two seeds; started again; then the tables, beside a LoRA of other numbers."""
    monkeypatch.setattr(arms, "ARMS", SMALL)
    runs, out, arm = tmp_path / "runs", tmp_path / "study.md", "adafuse-context"
    record = tmp_path / "record.jsonl.gz"
    places = ["--runs", str(runs), "--record", str(record)]
    flags = ["--model", str(stories260k_dir), "--mixture", str(file), *places, "--dtype", "float32"]
    flags += ["--steps", "8", "--batch-size", "2", "--new-tokens", "3", "--learning-rates", "1e-2", "1e-3"]
    assert main([*flags, "--budget-seconds", "1e-6"]) == 0
    assert not list(runs.glob("*")), "the budget was over before the first run"
    plan = Plan(steps=8, batch_size=2, new_tokens=3, dtype="float32")
    study = Study(str(stories260k_dir), file, Runs(record, runs), plan)
    study.do_all([grid(arm, (1e-2, 1e-3))], budget_seconds=None, begun=0)
    replicas = study.records[f"grid-{arm}-0@0.01,0@0.001"]["replicas"]
    best = best_rate(study.records, arm)
    assert max(r["mean"] for r in replicas) == next(r["mean"] for r in replicas if r["learning_rate"] == best)
    study.do_all([of_seeds(arm, (0, 5), study.records)], budget_seconds=None, begun=0)

    before = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert main([*flags, "--arms", arm]) == main([*flags, "--arms", arm, "--stage", "seeds", "--seeds", "0", "5"]) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.iterdir()} == before, "what is recorded is not done again"
    records = read_records(runs)
    assert records == study.records
    for record in records.values():
        losses = [point["loss"][0] for point in record["history"]]
        assert sum(losses[-3:]) < sum(losses[:3])
        for replica in record["replicas"]:
            assert replica["mean"] == pytest.approx(scoring.mixture_mean(replica["measures"]), abs=1e-3)
            assert sum(replica["load"]) == pytest.approx(1, abs=1e-3)
    (seeds,) = (record for record in records.values() if record["run"]["stage"] == "seeds")
    again, other = (replica["measures"]["code"]["loss"] for replica in seeds["replicas"])
    was = next(r for r in replicas if r["learning_rate"] == best)
    assert again == pytest.approx(was["measures"]["code"]["loss"], rel=1e-3)
    assert other != again

    for name, record in records.items():
        lora = json.loads(json.dumps(record).replace(arm, "lora-32")) | {"settings": arms.table(SMALL["lora-32"])}
        for replica in lora["replicas"]:
            replica["measures"]["vel"]["exact"] -= 8 * (2 + replica["seed"] / 5)  # 2 or 3 points less in the mean
        (runs / f"{name.replace(arm, 'lora-32')}.json").write_text(json.dumps(lora))
    assert main(["--report", *places, "--out", str(out)]) == main(["--merge", *places]) == 0
    text = out.read_text()
    for path in list(runs.iterdir()):
        path.unlink()
    assert main([*flags, "--arms", arm]) == main(["--report", *places, "--out", str(out)]) == 0
    assert not list(runs.iterdir()), "what is in the record is not done again"
    assert out.read_text() == text
    assert f"**{was['mean']:.2f}**" in text
    assert f"| {arm} | lora-32 | +2.50 ± 6.35 | +0.00 ± 0.00 | lora-32 | +2.50 ± 6.35 | +0.00 ± 0.00 |" in text
    with pytest.raises(UserError, match="another --runs"):
        main([*flags, "--steps", "5"])
    monkeypatch.setitem(arms.ARMS, arm, SMALL[arm] | {"rank": 3})
    with pytest.raises(UserError, match="no longer is; remove it"):
        main(flags)


def test_runs_have_names_of_their_own():
    run = Run(stage="grid", arm="mola", seeds=(0, 0), rates=(1e-3, 2.5e-4))
    assert run.name == "grid-mola-0@0.001,0@0.00025"
    assert dataclasses.replace(run, seeds=(0, 1)).name != run.name


def test_arms_cost_what_they_are_compared_at(smollm2_dir: Path):
    """Within 1% of the LoRA with as many active or as many parameters in all; the layer-wise baselines are as published."""
    from adafuse_jax.checkpoints.hf_config import read_model_config

    config = read_model_config(smollm2_dir)
    active, total = (arms.parameters(arms.ARMS[name], config)[0] for name in ("lora-32", "lora-128"))
    for name, settings in arms.ARMS.items():
        if name.startswith("adafuse"):
            assert arms.parameters(settings, config) == (
                pytest.approx(total, rel=0.01),
                pytest.approx(active, rel=0.01),
            )
