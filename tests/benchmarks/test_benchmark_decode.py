"""benchmarks.decode on tiny shapes: costs by hand, rows through the engine, the three files, the torch peers' checks."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adafuse_jax.adapters.registry import num_parameters
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.quantised import LAYOUTS
from benchmarks.common import jobs
from benchmarks.common.jobs import Job, run_job
from benchmarks.decode import __main__ as decode
from benchmarks.decode import costs as decode_costs
from benchmarks.decode import layer, merged_step, models, report, rows, token_step, unfused_step
from benchmarks.decode.costs import SIZES, costs
from benchmarks.decode.prompts import make_prompts
from benchmarks.kernels import streaming
from benchmarks.training.shapes import SHAPES
from pallas_kernels.quantised import quantise

REPOSITORY = tiny.REPOSITORY
RESULTS = REPOSITORY / "benchmarks" / "results" / "nvidia_h200"
TORCH = REPOSITORY / ".venv-torch" / "bin" / "python"
ROW_FIELDS = {
    "method", "targets", "strategy", "batch", "ms_per_token", "spread_ms", "overhead_pct", "bytes_gb", "read_bandwidth_pct",
    "peak_gib", "params_b", "flops_g",
}  # fmt: skip
SEVEN_B = SIZES["llama2-7b"]


class TestCosts:
    def test_linears_are_those_of_the_backbone(self):
        assert decode_costs.LINEARS == LINEARS
        config = models.model_config(SEVEN_B)
        assert [SEVEN_B.linear_shape(name) for name in LINEARS] == [config.linear_shape(name) for name in LINEARS]

    @pytest.mark.parametrize(("targets", "factors", "merge"), [("qv", 0.134, 4.295), ("all7", 0.640, 25.904)])
    def test_bytes_of_llama2_7b(self, targets, factors, merge):
        """The arithmetic of the design notes."""
        bare = costs(SEVEN_B, "backbone", "-", "-", 1, 0).bytes_gb
        assert bare == pytest.approx(13.215, abs=1e-3)
        unmerged = costs(SEVEN_B, "adafuse", targets, "unmerged", 1, 0).bytes_gb
        assert unmerged - bare == pytest.approx(factors, abs=1e-3)
        golden, switch = (costs(SEVEN_B, "adafuse", targets, s, 1, 0).bytes_gb for s in ("golden", "switch"))
        assert golden - unmerged == pytest.approx(merge, abs=1e-3)
        assert switch - golden == pytest.approx(factors, abs=1e-3)

    def test_bytes_of_quantised_weights(self):
        """The bytes of the arrays themselves."""
        bare, config = costs(SEVEN_B, "backbone", "-", "-", 1, 0).bytes_gb, models.model_config(SEVEN_B)
        whole = [jax.ShapeDtypeStruct(config.linear_shape(name), "bfloat16") for name in LINEARS]
        for name, layout in LAYOUTS.items():
            shapes = jax.eval_shape(lambda weights: [quantise(w, layout, "bfloat16") for w in weights], whole)  # noqa: B023
            found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) * config.num_layers
            saved = 2 * SEVEN_B.elements(LINEARS) - found
            computed = costs(SEVEN_B, "backbone", "-", f"unmerged-{name}", 1, 0).bytes_gb
            assert bare - computed == pytest.approx(saved / 1e9, rel=1e-3)

    def test_parameters_are_those_of_the_modules(self):
        shapes = SIZES["tiny"]
        config = models.model_config(shapes)
        model = models.random_backbone(config)
        adapter = models.random_adapter(models.adapter_config(shapes, "qv"), config)
        count = sum(leaf.size for leaf in jax.tree.leaves((model, adapter)))
        assert costs(shapes, "adafuse", "qv", "unmerged", 1, 0).params_b * 1e9 == pytest.approx(count)
        assert costs(shapes, "backbone", "-", "-", 1, 0).params_b * 1e9 == sum(x.size for x in jax.tree.leaves(model))
        for method, targets, _ in decode.METHODS:
            adapter = models.random_adapter(models.adapter_config(shapes, targets, None, method), config)
            count = sum(leaf.size for leaf in jax.tree.leaves(model)) + num_parameters(adapter)
            computed = costs(shapes, method, targets, "unmerged", 1, 0).params_b * 1e9
            # the two layers of this size have MoLA's first two numbers of experts, and not all four
            assert computed == pytest.approx(count) or (method == "mola" and computed > count)
        mixture = costs(shapes, "moral", "all7", "unmerged", 1, 0)
        assert costs(shapes, "lora-moe-compiled", "all7", "-", 1, 0) == mixture

    def test_a_merged_lora_costs_what_the_backbone_does(self):
        bare = costs(SEVEN_B, "backbone", "-", "-", 1, 100)
        beside, merged = (costs(SEVEN_B, "lora", "all7", strategy, 1, 100) for strategy in ("unmerged", "merged"))
        assert (merged.bytes_gb, merged.flops_g) == (bare.bytes_gb, bare.flops_g)
        assert beside.bytes_gb - bare.bytes_gb == pytest.approx(0.32, abs=0.01)
        assert costs(SEVEN_B, "peft-lora", "all7", "-", 1, 100) == beside

    def test_rows_share_experts(self):
        one, eight = (costs(SEVEN_B, "adafuse", "all7", "unmerged", b, 0) for b in (1, 8))
        assert eight.bytes_gb - one.bytes_gb == pytest.approx(6 * 0.32, abs=0.01)
        assert costs(SEVEN_B, "adafuse", "all7", "unmerged", 8, 0, distinct=2).bytes_gb < one.bytes_gb + 0.01
        assert eight.flops_g == one.flops_g


class TestRandomModules:
    def test_leaves(self):
        shapes = SIZES["tiny"]
        config = models.model_config(shapes)
        model = models.random_backbone(config)
        adapter = models.random_adapter(models.adapter_config(shapes, "all7"), config)
        weight = np.asarray(model.layers.down_proj.weight[...], np.float32)
        assert model.dtype == jnp.bfloat16
        assert weight.std() == pytest.approx(0.02, rel=0.1)
        assert not np.array_equal(weight[0], weight[1])
        assert (model.layers.input_layernorm.weight[...] == 1).all()
        assert adapter.router.weight[...].dtype == jnp.float32
        for leaf in jax.tree.leaves(adapter.experts):
            assert leaf.dtype == jnp.bfloat16
            assert (leaf != 0).mean() > 0.99


@pytest.fixture
def in_process(monkeypatch):
    """Jobs run here instead of in processes; those named in `broken` break."""
    broken: dict[str, str] = {}

    def run_job(job, common, timeout, python):
        if job.name in broken:
            return {}, broken[job.name]
        found = {"device": "cpu", "jax": jax.__version__}
        rows.KINDS[job.settings["kind"]](common | job.settings, found.update)
        return found, None

    monkeypatch.setattr(jobs, "run_job", run_job)
    return broken


def run(out: Path, *flags: str) -> dict:
    decode.main(["--size=tiny", f"--out={out}", "--queries=2", "--new-tokens=4", *flags])
    return json.loads((out / "decode.json").read_text())


class TestDecode:
    @pytest.mark.slow
    def test_quantised_rows(self, in_process, tmp_path):
        only = ("--only", "backbone-unmerged", "backbone-int8", "unmerged-int8")
        result = run(tmp_path, "--part=jax", "--batches", "1", "--batch-queries=1", "--quantize", "int8", *only)
        plain, *quantised = result["rows"]
        assert [(row["method"], row["strategy"]) for row in quantised] == [
            ("backbone", "unmerged-int8"), ("adafuse", "unmerged-int8")
        ]  # fmt: skip
        assert all(row["bytes_gb"] < plain["bytes_gb"] for row in quantised[:1])
        for row in quantised:
            over = 100 * (row["ms_per_token"] / plain["ms_per_token"] - 1)
            assert row["overhead_pct"] == pytest.approx(over, abs=0.1)

    @pytest.mark.slow
    def test_rows_and_files(self, in_process, tmp_path):
        only = ("--only", "backbone", "unmerged-all7", "golden-qv", "simple-qv")
        in_process["simple-qv"] = "RuntimeError: out of | memory"
        result = run(tmp_path, "--part=jax", "--batches", "1", "2", "--batch-queries=1", *only)
        names = {"device", "jax", "commit", "command", "ceilings", "rows", "peers", "breakdown", "notes"}
        assert names <= result.keys()
        assert set(result["ceilings"]) == {"read_tbps", "copy_tbps"}
        assert all(set(row) == ROW_FIELDS for row in result["rows"])
        places = [(row["method"], row["targets"], row["strategy"], row["batch"]) for row in result["rows"]]
        assert places == [
            ("backbone", "-", "-", 1), ("backbone", "-", "-", 2), ("backbone", "-", "unmerged", 1),
            ("backbone", "-", "unmerged", 2), ("adafuse", "all7", "unmerged", 1),
            ("adafuse", "all7", "unmerged", 2), ("adafuse", "qv", "golden", 1), ("adafuse", "qv", "simple", 1),
        ]  # fmt: skip
        *measured, failed = result["rows"]
        for row in measured:
            assert row["ms_per_token"] > 0
            assert row["spread_ms"] >= 0
            assert row["read_bandwidth_pct"] > 0
            assert row["params_b"] > 0
        base = {(row["strategy"], row["batch"]): row["ms_per_token"] for row in measured[:4]}
        for row, over in ((measured[5], base["unmerged", 2]), (measured[6], base["-", 1])):
            assert row["overhead_pct"] == pytest.approx(100 * (row["ms_per_token"] / over - 1), abs=0.1)
        assert failed["ms_per_token"] is None
        details = {(row["targets"], row["strategy"], row["batch"]): row for row in result["details"]}
        assert details["qv", "golden", 1]["queries"] == 2
        assert details["qv", "golden", 1]["step_ms"] > 0
        assert details["all7", "unmerged", 2]["distinct_experts"] >= 2
        markdown = (tmp_path / "decode.md").read_text()
        assert "RuntimeError: out of / memory" in markdown
        assert markdown.count("| adafuse |") == 4

        in_process.clear()
        result = run(tmp_path, "--part=jax", "--only", "simple-qv")
        assert result["rows"][-1]["ms_per_token"] > 0
        assert len(result["rows"]) == 8
        assert (tmp_path / "decode.png").stat().st_size > 10_000

    @pytest.mark.slow
    def test_compared_methods(self, in_process, tmp_path):
        result = run(tmp_path, "--part=methods")
        places = [(row["method"], row["targets"], row["strategy"]) for row in result["rows"]]
        assert sorted(places) == sorted(decode.METHODS)
        assert [method for method, *_ in places] == sorted((m for m, *_ in places), key=report.METHODS.index)
        assert all(row["ms_per_token"] > 0 for row in result["rows"]), result["details"]

    def test_points_of_the_breakdown(self):
        points = layer.layer_points([8, 64, 128], [1, 128, 512, 2048], 64)
        assert points == [(8, 1), (64, 1), (128, 1), (8, 512), (64, 512), (128, 512), (64, 128), (64, 2048)]

    @pytest.mark.slow
    def test_layer(self, in_process, tmp_path):
        result = run(tmp_path, "--part=layer")
        assert sorted((row["length"], row["rank"]) for row in result["breakdown"]) == [(1, 8), (16, 8)]
        for row in result["breakdown"]:
            assert row["backbone_ms"] > 0
            assert {"adafuse_ms", "layerwise_ms"} <= row.keys()

    def test_contexts(self, in_process, tmp_path):
        result = run(tmp_path, "--part=context")
        assert [(row["method"], row["context"]) for row in result["contexts"]] == [
            ("backbone", 16), ("backbone", 64), ("adafuse", 16), ("adafuse", 64),
        ]  # fmt: skip
        short, long = result["contexts"][:2]
        cache = 2 * SIZES["tiny"].num_layers * SIZES["tiny"].embed_dim * 2
        assert long["bytes_gb"] - short["bytes_gb"] == pytest.approx(48 * cache / 1e9)
        markdown = (tmp_path / "decode.md").read_text()
        assert f"| backbone {long['strategy']} | 64 | {long['ms']:.3f} |" in markdown

    def test_nothing_measured(self, tmp_path):
        with pytest.raises(SystemExit, match="no part"):
            run(tmp_path, "--part=merge")

    def test_a_process_that_breaks(self, tmp_path, capfd):
        job = Job(name="x", module="benchmarks.decode.rows", settings={"kind": "rows", "size": "none"})
        found, problem = run_job(job, {}, 60, sys.executable)
        assert found == {}
        assert problem == "KeyError: 'none'"


def test_committed_reports():
    """decode.json and decode.md are made from the parts beside them."""
    record = report.merge(report.read_parts(RESULTS))
    assert json.loads((RESULTS / "decode.json").read_text()) == record
    assert (RESULTS / "decode.md").read_text() == report.to_markdown(record)


class TestPrompts:
    @pytest.mark.parametrize("name", ["chats.json", "chats.jsonl", "chats.jsonl.gz"])
    def test_lengths_of_conversations(self, tmp_path, name):
        chats = [
            {"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y" * 400}]},
            {"messages": [{"role": "user", "content": "z" * 241}]},
            {"conversations": [{"from": "human", "value": "short"}]},
            {"conversations": [{"from": "gpt", "value": "nobody asked"}]},
        ]
        text = json.dumps(chats) if name.endswith("json") else "\n".join(map(json.dumps, chats))
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        arguments = decode.parse(["--out=x", f"--conversations={tmp_path / name}", "--batches", "1", "4"])
        prompts, queries, description = make_prompts(arguments, SEVEN_B)
        assert [len(prompt) for prompt in prompts] == [100, 61, 100, 61]
        assert prompts[0] != prompts[2]
        assert queries == 2
        assert "57 to 312" in description

    def test_random_prompts(self):
        prompts, queries, _ = make_prompts(decode.parse(["--out=x"]), SEVEN_B)
        assert (queries, {len(prompt) for prompt in prompts}) == (50, {128})


class TestPeers:
    def test_against_plain_loops(self):
        """Comparison with float64 loops, token by token: Hugging Face, PEFT, and each form of the layer-wise
        mixture."""
        if not TORCH.exists():
            pytest.skip("no .venv-torch")
        command = [TORCH, "-m", "benchmarks.peers", "--check"]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=offline)
        if "ModuleNotFoundError" in done.stderr:
            pytest.skip(f".venv-torch: {done.stderr.splitlines()[-1]}")
        assert done.returncode == 0, done.stderr[-1000:]
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["hf", "peft-lora", "lora-moe"]


def test_merged_step():
    """Rows of the backbone and of the merging strategies; a merge writes into the buffers of the weights."""
    measured = merged_step.run(SIZES["tiny"], steps=3, repeats=2, pointer_steps=4)
    assert [row["strategy"] for row in measured] == ["backbone", "golden", "switch"]
    for row in measured[1:]:
        assert row["ms"] > 0
        assert row["same_pointers"] is True
        assert row["alias_gb"] >= row["adapted_gb"] > 0
        assert row["steps"] == 3 * 3 + 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="where the kernels do not run")
def test_unfused_step(capsys):
    """A line a case and form, the overhead over the bare model, and the reason where the kernels cannot run."""
    found = unfused_step.run("tiny", [("bare", 2), ("qv", 2)], ["kernels", "xla"], steps=2, repeats=2)
    assert found.keys() == {("bare", 2, "xla"), ("qv", 2, "xla")}
    assert all(ms > 0 for ms in found.values())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"tiny {case}:2 {form}" for case in ("bare", "qv") for form in ("kernels", "xla")
    ]
    assert "they cannot run, as they need an NVIDIA GPU" in lines[0]
    assert "% over bare" in lines[3]


def test_unfused_step_ends_where_the_kernels_round_more(monkeypatch):
    """The exact logits are 1, those of XLA 1.25."""
    forms = {"kernels": SimpleNamespace(off=0.5), "xla": SimpleNamespace(off=0.25, model=None, adapter=None)}
    monkeypatch.setattr(unfused_step, "exact_logits", lambda model, adapter, batch: np.ones((batch, 4)))
    monkeypatch.setattr(unfused_step, "logits", lambda backend, batch: np.full((batch, 4), 1 + backend.off))
    with pytest.raises(SystemExit, match=r"the logits of 3 rows are off by 5\.0e-01, those of XLA 2\.5e-01"):
        unfused_step.check(forms, 3)
    forms["kernels"].off = 0.3
    assert unfused_step.check(forms, 3) == pytest.approx({"kernels": 0.3, "xla": 0.25})


def test_exact_logits_of_unfused_step():
    """In float32 whatever the type of the weights: those in bfloat16 are off by its rounding, and by no more."""
    config = unfused_step.config_of(SHAPES["tiny"])
    model = models.random_backbone(config)
    found = unfused_step.exact_logits(model, None, 2)
    assert found.dtype == np.float32
    rounded = np.asarray(unfused_step.logits(unfused_step.Unfused(model, None), 2), np.float32)
    error = np.linalg.norm(rounded - found) / np.linalg.norm(found)
    assert 1e-4 < error < 0.05


class TestTokenStep:
    def test_cases(self, capsys):
        assert [token_step.case_of(case) for case in ("bare", "qv:8")] == [("bare", 1), ("qv", 8)]
        for case in ("all", "qv:x", "qv:8:1"):
            with pytest.raises(SystemExit, match="2"):
                token_step.main(["--cases", case])
            assert f"--cases: {case}: give bare, qv, all7" in capsys.readouterr().err

    def test_timeline(self):
        """Two warpgroups that compute, one that copies, with scopes in each other."""
        events = [{"ph": "M", "name": "process"}]
        for thread, offset in ((1, 0.0), (2, 4.0)):
            for phase, name, at in (
                ("B", "products", 10), ("B", "wait", 12), ("E", "wait", 13 + offset), ("E", "products", 20 + offset),
                ("B", "barrier", 20 + offset), ("E", "barrier", 30),
            ):  # fmt: skip
                events.append({"ph": phase, "name": name, "ts": at, "tid": thread})
        events += [{"ph": phase, "name": "Init", "ts": 0.0, "tid": 3} for phase in "BE"]
        assert token_step.summarise(events) == [
            "products   from     0.00 to     0.00, takes 10.00, 12.00, 14.00",
            "wait       from     2.00 to     2.00, takes 1.00, 3.00, 5.00",
            "barrier    from    10.00 to    14.00, takes 6.00, 8.00, 10.00",
        ]


@pytest.mark.parametrize("variant", [streaming.VARIANTS[0], streaming.VARIANTS[-2]], ids=str)
def test_streaming_lowers_for_a_gpu_without_one(variant):
    step = jax.jit(streaming.make(variant, num_blocks=132))
    step.trace(*streaming.shapes(132)).lower(lowering_platforms=("cuda",))
