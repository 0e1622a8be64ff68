"""lm-evaluation-harness on our models: the same numbers as its own Hugging Face backend has (goldens/make_lm_eval.py), to
the last example, whatever the batch size; and on an adapter, those of a backbone with the same weights."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lm_eval
import pytest
import tiny
from flax import nnx
from goldens.lm_eval_cases import MAX_LENGTH, MODELS, TASK_NAMES, task_results, write_case, write_tasks
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.core.errors import UserError
from adafuse_jax.evaluation.lm_eval import AdaFuseLM
from adafuse_jax.evaluation.loading import load

GOLDEN = json.loads((tiny.GOLDENS / "lm_eval.json").read_text())
ATOL = 1e-4  # of a log-likelihood in nats


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(results of the Hugging Face backend, a loaded model)"""
    directory = write_case(request.param, tmp_path_factory.mktemp(request.param))
    return GOLDEN[request.param], load(str(directory))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    return TaskManager(include_path=str(folder), include_defaults=False)


def ask(kind: str, requests: list[tuple]) -> list[Any]:
    return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(requests)]


def scores_of(lm: AdaFuseLM, rows: list[dict[str, Any]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(ask("loglikelihood", [(r["context"], r["continuation"]) for r in rows]), disable_tqdm=True)


def check_equal(ours: Any, golden: Any, where: str = "") -> None:
    """Floats within ATOL (of their size, when that is above 1), anything else exactly."""
    if isinstance(golden, dict):
        assert ours.keys() == golden.keys(), where
        for key in golden:
            check_equal(ours[key], golden[key], f"{where}.{key}")
    elif isinstance(golden, list):
        assert len(ours) == len(golden), where
        for i in range(len(golden)):
            check_equal(ours[i], golden[i], f"{where}[{i}]")
    elif isinstance(golden, float):
        assert ours == pytest.approx(golden, abs=ATOL, rel=ATOL), where
    else:
        assert ours == golden, where


@pytest.mark.parametrize("batch_size", [1, 7])
def test_log_likelihoods(case: Any, batch_size: int):
    golden, loaded = case
    rows = golden["loglikelihood"]
    for row, (value, greedy) in zip(rows, scores_of(AdaFuseLM(loaded, batch_size=batch_size), rows), strict=True):
        assert abs(value - row["log_likelihood"]) <= ATOL, row
        assert greedy == row["greedy"], row
    assert any(len(row["context"]) + len(row["continuation"]) > MAX_LENGTH for row in rows), "none is truncated"
    assert any(row["context"] == "" for row in rows)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rolling_log_likelihoods(case: Any, batch_size: int):
    golden, loaded = case
    rows = golden["rolling"]
    requests = ask("loglikelihood_rolling", [(row["text"],) for row in rows])
    values = AdaFuseLM(loaded, batch_size=batch_size).loglikelihood_rolling(requests, disable_tqdm=True)
    for row, value in zip(rows, values, strict=True):
        assert abs(value - row["log_likelihood"]) <= ATOL * max(1, abs(value) / 100), row
    assert max(len(row["text"]) for row in rows) > 2 * MAX_LENGTH, "none has several windows"


@pytest.mark.parametrize("batch_size", [1, 5])
def test_generations(case: Any, batch_size: int):
    golden, loaded = case
    rows = golden["generate"]
    lm = AdaFuseLM(loaded, batch_size=batch_size)
    texts = lm.generate_until(ask("generate_until", [(row["context"], row["settings"]) for row in rows]))
    assert texts == [row["text"] for row in rows]


@pytest.mark.parametrize("chat", [False, True])
def test_tasks_of_the_harness(case: Any, tasks: TaskManager, chat: bool):
    golden, loaded = case
    evaluated = lm_eval.simple_evaluate(
        AdaFuseLM(loaded, batch_size=4),
        tasks=list(TASK_NAMES),
        task_manager=tasks,
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    check_equal(json.loads(json.dumps(task_results(evaluated))), golden["chat_tasks" if chat else "tasks"])


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory):
    """(model directory, adapter directory, model with the adapter's only expert merged into its weights)"""
    folder = tmp_path_factory.mktemp("adapted")
    directory = write_case("plain", folder / "model")
    model = load(str(directory)).model
    config = AdapterConfig(num_experts=1, top_k=1, rank=2, alpha=4.0)
    adapter = AdaFuse(config, model.config, rngs=nnx.Rngs(0))
    for number, (name, experts) in enumerate(adapter.experts.items()):
        experts.B[...] = 0.2 * jax.random.normal(jax.random.key(number), experts.B.shape)
        weight = getattr(model.layers, name).weight
        delta = jnp.einsum("leor,leri->loi", experts.B[...], experts.A[...], precision="highest")
        weight[...] += config.scale * delta
    identity = HFCheckpoint.open(directory).identity()
    save_adapter(adapter, folder / "adapter", backbone_name="tiny", backbone_identity=identity)
    return str(directory), str(folder / "adapter"), model


@pytest.mark.slow
def test_an_adapter_counts(adapted: Any):
    """One expert with gate 1 is a merged weight: the harness sees the same model."""
    directory, adapter, merged = adapted
    with_adapter = AdaFuseLM(directory, adapter=adapter, batch_size=6)
    with_weights = AdaFuseLM(replace(load(directory), model=merged), batch_size=6)
    rows = GOLDEN["plain"]["loglikelihood"]
    scores = scores_of(with_adapter, rows)
    for row, (value, greedy), (expected, same) in zip(rows, scores, scores_of(with_weights, rows), strict=True):
        assert value == pytest.approx(expected, abs=5e-4)
        assert greedy == same
        assert abs(value - row["log_likelihood"]) > 1e-3, "the adapter changes nothing"
    requests = ask("generate_until", [(row["context"], row["settings"]) for row in GOLDEN["plain"]["generate"][:2]])
    assert with_adapter.generate_until(requests) == with_weights.generate_until(requests)


def test_from_the_shell(
    adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    directory, adapter, _ = adapted
    tasks = write_tasks(tmp_path / "tasks")
    flags = ["--model", "adafuse", "--model_args", f"model={directory},adapter={adapter}", "--tasks", "tiny_choices"]
    flags += ["--include_path", str(tasks), "--batch_size", "4", "--output_path", str(tmp_path / "out")]
    assert run_module(flags, monkeypatch) == 0
    table = capsys.readouterr().out
    (file,) = (tmp_path / "out").rglob("results*.json")
    result = json.loads(file.read_text())
    assert f"{result['results']['tiny_choices']['acc_norm,none']:.4f}" in table
    assert "rank=2" in result["config"]["adapter"]


def run_module(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["lm_eval", *flags])
    monkeypatch.delitem(sys.modules, "adafuse_jax.evaluation.lm_eval")
    monkeypatch.setattr("lm_eval.api.registry.model_registry._objs", {})
    without_defaults = partialmethod(TaskManager.__init__, include_defaults=False)  # reading them takes long
    monkeypatch.setattr(TaskManager, "__init__", without_defaults)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("adafuse_jax.evaluation.lm_eval", run_name="__main__")
    return end.value.code


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "adafuse_jax.evaluation.lm_eval")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("adafuse_jax.evaluation.lm_eval", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: lm-evaluation-harness is not installed; pip install 'adafuse-jax[eval]'\n"
    with pytest.raises(UserError, match="not installed"):
        importlib.import_module("adafuse_jax.evaluation.lm_eval")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ("--model_args", "'model' is missing", "model=DIR")),
        ({"model": "{}", "pretrained": "x"}, ("unknown 'pretrained'", "give model=DIR")),
        ({"model": "{}/none"}, ("no such model directory",)),
        ({"model": "{}", "batch_size": "auto"}, ("batch_size is 'auto'", "number greater than 0")),
        ({"model": "{}", "batch_size": 0}, ("batch_size is 0", "number greater than 0")),
        ({"model": "{}", "max_length": 65}, ("max_length is 65", "64 positions")),
        ({"model": "{}", "max_length": 1}, ("max_length is 1", "above 1")),
    ],
)
def test_bad_arguments(adapted: Any, arguments: dict[str, Any], expected: tuple[str, ...]):
    placed = {k: v.replace("{}", adapted[0]) if isinstance(v, str) else v for k, v in arguments.items()}
    with pytest.raises(UserError) as caught:
        AdaFuseLM.create_from_arg_obj(placed, {"device": "cuda:0", "max_batch_size": None, "batch_size": 2})
    assert all(text in str(caught.value) for text in expected), str(caught.value)


def test_bad_requests(adapted: Any):
    lm = AdaFuseLM(adapted[0], max_length=20)
    with pytest.raises(UserError, match="30 tokens cannot be scored with max_length 20"):
        lm.loglikelihood(ask("loglikelihood", [("a", "b" * 30)]))
    with pytest.raises(UserError, match="max_gen_toks 20 leaves no room"):
        lm.generate_until(ask("generate_until", [("a", {"max_gen_toks": 20, "until": []})]))
    with pytest.raises(UserError, match="'num_beams' is unknown"):
        lm.generate_until(ask("generate_until", [("a", {"max_gen_toks": 4, "until": [], "num_beams": 2})]))


def test_repeats_are_samples_of_their_own(case):
    """Samples are distinct, the same again, and the same alone or among others, in any order and at any batch size."""
    _, loaded = case
    settings = {"until": ["\n\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 12}

    def run(contexts: list[str], batch_size: int, **more: Any) -> list[str]:
        lm = AdaFuseLM(loaded, batch_size=batch_size)
        return lm.generate_until(
            ask("generate_until", [(c, {**settings, **more}) for c in contexts]), disable_tqdm=True
        )

    eight = run(["Once"] * 8, 4)
    assert len(set(eight)) == 8
    mixed = run(["Once", "Twice", "Once", "Thrice again", "Once", "Twice"], 4)
    assert [mixed[i] for i in (0, 2, 4)] == eight[:3]
    assert mixed[1] != mixed[5]
    assert run(["Twice"], 4) == [mixed[1]]
    assert run(["Once"] * 3, 4, seed=1) != eight[:3]
    greedy = run(["Once"] * 3, 4, do_sample=False, temperature=0.0)
    assert len(set(greedy)) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"seed": "x"},
    ],
)
def test_settings_out_of_bounds(case, setting):
    lm = AdaFuseLM(case[1])
    with pytest.raises(UserError, match=f"generation setting {next(iter(setting))}"):
        lm.generate_until(ask("generate_until", [("a", {"until": [], "max_gen_toks": 2, "do_sample": True} | setting)]))


def test_ids_that_the_model_has_not(case):
    lm = AdaFuseLM(replace(case[1], tokenizer=case[1].tokenizer))
    lm.tok_encode = lambda text, **_: [5, tiny.VOCAB_SIZE]  # type: ignore[method-assign]
    for kind, arguments in (
        ("generate_until", ("a", {"until": [], "max_gen_toks": 2})), ("loglikelihood", ("a", "b")),
        ("loglikelihood_rolling", ("a",)),
    ):  # fmt: skip
        with pytest.raises(UserError, match="has token 260 and the model 260 tokens"):
            getattr(lm, kind)(ask(kind, [arguments]))


def test_chat_text_without_a_template(tmp_path: Path):
    """Alpaca text, as adapters are trained on it."""
    tiny.write_model(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    lm = AdaFuseLM(str(tmp_path))
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "So?"},
    ]
    begun = "### Instruction:\nHi\n\n### Response:\nHo</s>\n\n### Instruction:\nSo?"
    assert lm.apply_chat_template(history) == begun + "\n\n### Response:\n"
    assert lm.apply_chat_template(history[:2], add_generation_prompt=False) == begun[: begun.index("</s>")]
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}"
    with pytest.raises(UserError, match="alters the last message"):
        lm.apply_chat_template(history[:2], add_generation_prompt=False)
