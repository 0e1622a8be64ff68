"""SGMM against a float64 loop: here `xla` and `pallas` interpreted, with `-m gpu` every implementation compiled."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from sgmm_cases import CASES, GQA, HALF_ULP, LARGE_CASES, SCALE, SUM_ERROR, Case, assert_near, exact_merge, random_gates

import benchmarks.kernels.sgmm as benchmark
from benchmarks.kernels.sgmm_report import to_markdown
from pallas_kernels.sgmm import IMPLEMENTATIONS, Terms, choose_implementation, golden_terms, op, sgmm, switch_terms
from pallas_kernels.sgmm.kernel_sm90 import configure, sgmm_sm90

RESULTS = Path(benchmark.__file__).parents[1] / "results" / "nvidia_h200"
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 12) or jax.default_backend() != "cpu",
    reason="the interpreter runs on CPUs; before JAX 0.12 it fails unless every warpgroup sees a barrier's last phase",
)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")]
slow = [interpreted, pytest.mark.slow]
HERE = ["xla", pytest.param("interpreted", marks=interpreted), pytest.param("B fetched again", marks=slow)]
ON_GPU = [pytest.param(name, marks=on_gpu) for name in IMPLEMENTATIONS]


def merge_function(implementation: str) -> Callable:
    """f(weights, a, b, terms, pristine), jitted with donated weights. Interpreted, two blocks share small tiles, and
    the pipelines have so few stages that each is used again."""
    if implementation in ("interpreted", "B fetched again"):

        def merge(weights, a, b, terms, pristine):
            rank, num_terms = next(iter(a.values())).shape[2], len(terms.experts)
            config = replace(configure(num_terms, rank + -rank % 16, 2), tile_n=64, w_stages=2, split=2)
            pair = 2 * (rank + -rank % 16) // config.depth
            if implementation == "B fetched again":
                config = replace(config, keep_b=False, a_stages=pair, b_stages=pair)
            else:
                config = replace(config, keep_b=True, a_stages=pair, b_stages=num_terms * pair // 2)
            parameters = plgpu.InterpretGPUParams(detect_races=True)
            return sgmm_sm90(weights, a, b, terms, pristine, interpret=parameters, num_blocks=2, config=config)

        return jax.jit(merge, donate_argnums=0)
    if implementation == "pallas" and not op.compute_capability().startswith("9."):
        pytest.skip("no Hopper GPU")
    if implementation == "triton":
        pytest.importorskip("jax_triton")
    return jax.jit(
        lambda weights, a, b, terms, pristine: sgmm(
            weights, a, b, terms, pristine=pristine, implementation=implementation
        ),
        donate_argnums=0,
    )


@lru_cache(maxsize=1)
def problem(case: str, large: bool):
    """The inputs on the host, and the exact result."""
    weights, a, b, terms, pristine = (LARGE_CASES if large else CASES)[case].draw()
    exact = exact_merge(weights if pristine is None else pristine, a, b, terms)
    return jax.tree.map(np.asarray, (weights, a, b, terms, pristine)), exact


def check_case(case: str, implementation: str, large: bool = False) -> None:
    inputs, exact = problem(case, large)
    weights, *others = inputs
    others = jax.tree.map(jnp.asarray, others)
    placed, guards = {}, [jnp.full(4096, 7, jnp.int32)]  # what a store beyond the end of a buffer is likely to hit
    for name, w in weights.items():
        placed[name] = jnp.array(w)
        guards.append(jnp.full(4096, 7, jnp.int32))
    merged = merge_function(implementation)(placed, *others)
    assert {name: (w.shape, w.dtype) for name, w in merged.items()} == {
        name: (w.shape, w.dtype) for name, w in weights.items()
    }
    assert_near(merged, exact, additions=others[0][next(iter(weights))].shape[2] + len(others[2].experts))
    for before, after in zip(jax.tree.leaves(inputs[1:]), jax.tree.leaves(others), strict=True):
        assert before.tobytes() == np.asarray(after).tobytes()
    assert all((guard == 7).all() for guard in guards)


class TestValues:
    @pytest.mark.parametrize("implementation", HERE)
    @pytest.mark.parametrize("case", CASES)
    def test_here(self, case, implementation):
        if implementation != "xla" and not CASES[case].pallas:
            with pytest.raises(ValueError, match=r"cannot run as pallas: . is .*(tensor cores|multiples of 8 and 16)"):
                sgmm(*CASES[case].draw()[:4], implementation="pallas")
        else:
            check_case(case, implementation)

    @pytest.mark.parametrize("implementation", ON_GPU)
    @pytest.mark.parametrize("case", LARGE_CASES)
    def test_on_gpu(self, case, implementation):
        if implementation == "pallas" and not LARGE_CASES[case].pallas:
            with pytest.raises(ValueError, match="cannot run as pallas"):
                sgmm(*LARGE_CASES[case].draw()[:4], implementation="pallas")
        else:
            check_case(case, implementation, large=True)

    @interpreted
    def test_default_tiles(self):
        """Pipeline stages as configured for the rank, on three blocks."""
        case = Case(shapes={"q": (136, 144)}, golden=False)
        weights, a, b, terms, _ = case.draw()
        exact = exact_merge(weights, a, b, terms)
        parameters = plgpu.InterpretGPUParams(detect_races=True)
        merged = sgmm_sm90(weights, a, b, terms, None, interpret=parameters, num_blocks=3)
        assert_near(merged, exact, additions=case.rank + 4)

    @pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 6, 8])
    def test_rings_fit_the_shared_memory(self, num_terms):
        """Stages fit up to rank 256, with room for the slabs of two products, and for every slab of B that stays in
        shared memory."""
        for rank in range(16, 257, 16):
            config = configure(num_terms, rank, 2)
            parts = rank // config.depth
            assert config.shared_memory(2) <= 227 * 1024
            assert config.w_stages >= 2
            assert config.a_stages >= 2 * parts
            assert config.b_stages >= (num_terms if config.keep_b else 2) * parts

    @pytest.mark.parametrize("dtype", HALF_ULP)
    def test_the_bound_finds_lost_precision(self, dtype):
        """The bound leaves no room for a second rounding, of the sum before the base is added, or for half the digits
        of A."""
        case = Case(shapes={"q": (64, 64)}, rank=64, dtype=dtype)
        _, a, b, terms, base = case.draw()
        exact = exact_merge(base, a, b, terms)
        bound = {"exact": exact, "additions": case.rank + case.top_k}
        right = {name: jnp.asarray(total, dtype) for name, (total, _) in exact.items()}
        assert_near(right, **bound)
        w = np.asarray(base["q"], np.float64)
        twice = jnp.asarray(exact["q"][0] - w, dtype).astype(jnp.float32) + jnp.asarray(w, jnp.float32)
        short = {"q": jax.lax.reduce_precision(a["q"], 8, -int(np.log2(HALF_ULP[dtype])) // 2)}
        blurred = exact_merge(base, short, b, terms)["q"][0]
        for wrong in (*([] if dtype == "float32" else [twice.astype(dtype)]), jnp.asarray(blurred, dtype)):
            with pytest.raises(AssertionError, match="times the bound"):
                assert_near({"q": wrong}, **bound)


class TestTerms:
    @pytest.mark.parametrize("top_k", [1, 2, 3, 4])
    def test_switch_terms(self, top_k):
        """s·(g^t − g^{t−1}) by expert, one product for each expert of either token."""
        rng = np.random.default_rng(top_k)
        shared = set()
        for _ in range(20):
            previous, current = (random_gates(rng, 6, top_k) for _ in range(2))
            wanted = np.zeros(6)
            np.add.at(wanted, np.asarray(current[0]), SCALE * np.asarray(current[1], np.float64))
            np.add.at(wanted, np.asarray(previous[0]), -SCALE * np.asarray(previous[1], np.float64))
            terms = jax.jit(switch_terms)(previous, current, SCALE)
            assert terms.experts.shape == terms.coefficients.shape == (2 * top_k,)
            assert terms.coefficients.dtype == jnp.float32
            used = np.asarray(terms.experts)[np.asarray(terms.coefficients) != 0]
            union = set(np.asarray(previous[0]).tolist()) | set(np.asarray(current[0]).tolist())
            if top_k == 1 and len(union) == 1:
                union = set()  # the only gate is 1 for both, so the weights stay as they are
            assert sorted(used.tolist()) == sorted(union)
            found = np.zeros(6)
            np.add.at(found, np.asarray(terms.experts), np.asarray(terms.coefficients, np.float64))
            np.testing.assert_allclose(found, wanted, atol=SCALE * 2.0**-24)
            shared.add(2 * top_k - len(union))
        assert len(shared) > 1, "the draws had none or all experts in common"

    def test_golden_terms(self):
        experts, gates = jnp.array([3, 1]), jnp.array([0.75, 0.25], jnp.bfloat16)
        terms = golden_terms(experts, gates, 3.0)
        assert terms.experts.tolist() == [3, 1]
        assert terms.coefficients.dtype == jnp.float32
        assert terms.coefficients.tolist() == [2.25, 0.75]

    @pytest.mark.parametrize("dtype", HALF_ULP)
    def test_there_and_back(self, dtype):
        """Merge from gates of 0 to a token's and back: the weights again, but for two roundings."""
        case = Case(shapes=GQA, dtype=dtype, golden=False)
        weights, a, b, _, _ = case.draw()
        a, b = (jax.tree.map(lambda x: jnp.nan_to_num(x, nan=1.0), tree) for tree in (a, b))
        original = jax.tree.map(np.asarray, weights)
        token, merge = random_gates(np.random.default_rng(1), case.num_experts, case.top_k), merge_function("xla")
        nothing = token[0], jnp.zeros_like(token[1])
        merged = merge(weights, a, b, switch_terms(nothing, token, SCALE), None)
        merged_values = jax.tree.map(np.asarray, merged)
        back = merge(merged, a, b, switch_terms(token, nothing, SCALE), None)
        exact = exact_merge(original, a, b, switch_terms(nothing, token, SCALE))
        for name, w in original.items():
            assert np.abs(merged_values[name] - w).astype(np.float32).mean() > 0.1
            largest = np.maximum(np.abs(merged_values[name]), np.abs(w)).astype(np.float64)
            allowed = 4 * HALF_ULP[dtype] * largest + 2 * (case.rank + 4) * SUM_ERROR * exact[name][1]
            assert (np.abs(np.asarray(back[name], np.float64) - w.astype(np.float64)) <= allowed).all()

    def test_many_switches(self):
        """50 tokens in fp32: no further from W⁰ + Δ(g) than 50 roundings may be; *golden* then forgets them."""
        case = Case(shapes={"q": (24, 40), "v": (8, 40)}, dtype="float32", golden=False, num_experts=8)
        pristine, a, b, _, _ = case.draw()
        a, b = (jax.tree.map(lambda x: jnp.nan_to_num(x, nan=0.5), tree) for tree in (a, b))
        rng, merge = np.random.default_rng(0), merge_function("xla")
        weights = jax.tree.map(jnp.copy, pristine)
        previous = random_gates(rng, 8, 2)[0], jnp.zeros(2)
        size = dict.fromkeys(pristine, 0.0)
        for _ in range(50):
            current = random_gates(rng, 8, 2)
            terms = switch_terms(previous, current, SCALE)
            for name, (_, one) in exact_merge(weights, a, b, terms).items():
                size[name] = np.maximum(size[name], one)
            weights, previous = merge(weights, a, b, terms, None), current
        exact = exact_merge(pristine, a, b, golden_terms(*previous, SCALE))
        bound = {name: (total, size[name]) for name, (total, _) in exact.items()}
        assert_near(weights, bound, additions=case.rank + 4, roundings=50)
        golden = merge(weights, a, b, golden_terms(*previous, SCALE), pristine)
        assert_near(golden, exact, additions=case.rank + 2)


class TestDonation:
    @pytest.mark.parametrize("golden", [True, False], ids=["golden", "switch"])
    @pytest.mark.parametrize("implementation", ["xla", *ON_GPU])
    def test_in_place(self, implementation, golden):
        """The same buffers, and of temporaries nothing (the kernels) or those of one layer, however many there are."""
        case = Case(shapes={"q": (512, 512), "v": (256, 512)}, num_layers=32, num_experts=8, golden=golden)
        weights, *others = case.draw()
        total = sum(w.nbytes for w in weights.values())
        layer = total // case.num_layers
        places = {name: w.unsafe_buffer_pointer() for name, w in weights.items()}
        compiled = merge_function(implementation).lower(weights, *others).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= total
        if implementation != "xla":
            assert memory.temp_size_in_bytes < layer // 100
        elif jax.default_backend() == "cpu":
            products = len(others[2].experts) * 2 * layer  # in fp32
            assert memory.temp_size_in_bytes < products + layer < total
        merged = compiled(weights, *others)
        assert {name: w.unsafe_buffer_pointer() for name, w in merged.items()} == places
        assert all(w.is_deleted() for w in weights.values())


class TestChoice:
    def arrays(self, **changes):
        weights, a, *_ = replace(Case(shapes=GQA), **changes).draw()
        return weights, a

    @pytest.fixture(autouse=True)
    def unfiltered(self, monkeypatch):
        """Remove the filter that logs each message once per process."""
        monkeypatch.setattr(op.log, "filters", [])

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="for machines without a GPU")
    def test_cpu(self, caplog):
        with caplog.at_level(logging.INFO, logger="pallas_kernels"):
            assert choose_implementation(*self.arrays()) == "xla"
        for name, wanted in {"pallas": "Hopper", "triton": "Ampere"}.items():
            (line,) = (line for line in caplog.messages if name in line)
            assert wanted in line
            assert jax.devices()[0].device_kind in line

    def test_hopper(self, monkeypatch, caplog):
        """Use the kernel where it can run; otherwise the reason is in the log."""
        monkeypatch.setattr(op, "compute_capability", lambda: "9.0")
        monkeypatch.setattr(op.importlib.util, "find_spec", lambda name: None)
        assert choose_implementation(*self.arrays()) == "pallas"
        refused = {"float32": {"dtype": "float32"}, "multiples": {"shapes": {"q": (64, 72)}}, "rank 512": {"rank": 512}}
        for why, changes in refused.items():
            caplog.clear()
            with caplog.at_level(logging.INFO, logger="pallas_kernels"):
                assert choose_implementation(*self.arrays(**changes)) == "xla"
            assert why in caplog.text
            assert "jax-triton is not installed" in caplog.text
        monkeypatch.setattr(op, "compute_capability", lambda: "gfx942")  # not NVIDIA's
        assert choose_implementation(*self.arrays()) == "xla"

    @pytest.mark.gpu
    @pytest.mark.skipif(not op.compute_capability().startswith("9."), reason="no Hopper GPU")
    def test_hopper_itself(self):
        assert choose_implementation(*self.arrays()) == "pallas"
        weights, a, b, terms, pristine = Case(shapes=GQA).draw()
        merged = sgmm(weights, a, b, terms, pristine=pristine)
        assert_near(merged, exact_merge(pristine, a, b, terms), additions=18)


def invalid(**changes):
    """The arguments of a right call, some of them changed by a function."""
    weights, a, b, terms, pristine = Case(shapes=GQA).draw()
    arguments = {"weights": weights, "a": a, "b": b, "terms": terms, "pristine": pristine, "implementation": "xla"}
    return arguments | {name: change(arguments[name]) for name, change in changes.items()}


def changed(function):
    """Change the array of q only."""
    return lambda arrays: arrays | {"q": function(arrays["q"])}


INVALID = {
    "no targets": (dict.fromkeys(("weights", "a", "b"), lambda _: {}), "different targets"),
    "names": ({"a": lambda a: {"q": a["q"], "v": a["k"]}}, r"different targets: \['k', 'q'\], \['q', 'v'\]"),
    "pristine names": ({"pristine": lambda x: {"q": x["q"]}}, "different targets"),
    "no terms": ({"terms": lambda _: Terms(jnp.zeros(0, jnp.int32), jnp.zeros(0))}, r"\(0,\).* must be \[J\]"),
    "more experts": ({"terms": lambda t: Terms(jnp.zeros(3, jnp.int32), t.coefficients)}, r"\(3,\).*\(2,\)"),
    "terms by layer": ({"terms": lambda t: Terms(t.experts[None], t.coefficients[None])}, r"\(1, 2\)"),
    "one layer": ({"weights": changed(lambda w: w[0])}, r"q: .*\(128, 64\)"),
    "layers differ": (
        {"weights": changed(lambda w: w[:1])},
        r"q: W is bfloat16\(1, .* beside k it must be bfloat16\(2, ",
    ),
    "layers of A": ({"a": changed(lambda x: x[:1])}, r"q: A is bfloat16\(1, 4, 16, 64\).* must be .*\(2, 4, 16, 64\)"),
    "input of A": ({"a": changed(lambda x: x[..., :32])}, "q: A is"),
    "transposed B": ({"b": changed(lambda x: x.mT)}, r"q: B is .* must be .*\(2, 4, 128, 16\)"),
    "rank of B": ({"b": changed(lambda x: x[..., :8])}, "q: B is"),
    "type of B": ({"b": changed(lambda x: x.astype(jnp.float32))}, "q: B is float32.* must be bfloat16"),
    "pristine shape": ({"pristine": changed(lambda x: x[:, :64])}, "q: pristine is"),
    "pristine type": ({"pristine": changed(lambda x: x.astype(jnp.float16))}, "q: pristine is float16"),
    "integers": (
        dict.fromkeys(("weights", "a", "b", "pristine"), lambda x: {n: y.astype(jnp.int8) for n, y in x.items()}),
        "int8; bfloat16, float16 and float32 can be merged",
    ),
    "implementation": ({"implementation": lambda _: "cuda"}, "'cuda' is none of pallas, triton, xla"),
    "rank for pallas": (
        {
            "implementation": lambda _: "pallas",
            "a": lambda x: {n: jnp.tile(y, (1, 1, 32, 1)) for n, y in x.items()},
            "b": lambda x: {n: jnp.tile(y, (1, 1, 1, 32)) for n, y in x.items()},
        },
        "cannot run as pallas: rank 512 is above 256",
    ),
}


@pytest.mark.parametrize("what", INVALID)
def test_invalid(what):
    changes, message = INVALID[what]
    with pytest.raises(ValueError, match=message):
        sgmm(**invalid(**changes))


class TestBenchmark:
    """The whole script at a tiny size."""

    def test_files(self, tmp_path: Path):
        """Rows for all implementations; one that cannot run has the reason in its row, and does not end the run."""
        broken = "xla" if jax.default_backend() == "gpu" else "pallas"
        result = benchmark.run(benchmark.TINY, tmp_path, "the command", ("xla", "pallas"), swept="xla")
        assert json.loads((tmp_path / "sgmm.json").read_text()) == result
        assert {"copy", "best_copy", "best_read", "best_matmul"} <= result["ceilings"].keys()
        assert len(result["rows"]) == 2 * (3 + 2 + 2)  # the simple merge is compared with golden alone
        assert len(result["sweep"]) == 2 * 2 * 2
        products = {"golden": 2, "switch": 4, "one shared": 3}
        for row in (*result["rows"], *result["sweep"]):
            if row["implementation"] != broken:
                assert row["ms"] > 0
                assert row["tb_per_s"] == pytest.approx(row["gigabytes"] / row["ms"])
                assert not row["wrong"]
                assert 0 < row["max_error"] <= 1.02 * row["max_error_of_rounding"]
            else:
                assert row["error"]
        for row in result["rows"]:
            assert row["products"] == products[row["mode"]]
        text = (tmp_path / "sgmm.md").read_text()
        assert all(word in text for word in ("the command", jax.__version__, result["device"], "over simple"))
        assert (tmp_path / "sgmm.png").read_bytes().startswith(b"\x89PNG")

    def test_committed_results(self):
        """The table is the record's, every row of it was right and timed, and its page in docs/ has its numbers."""
        record = json.loads((RESULTS / "sgmm.json").read_text())
        assert (RESULTS / "sgmm.md").read_text() == to_markdown(record)
        assert len(record["rows"]) == len(benchmark.table_rows(benchmark.LLAMA2_7B, IMPLEMENTATIONS))
        assert len(record["sweep"]) == len(benchmark.sweep_rows(benchmark.LLAMA2_7B, "pallas"))
        assert all(row["ms"] > 0 and not row["wrong"] for row in (*record["rows"], *record["sweep"]))
        page = (RESULTS.parents[2] / "docs" / "kernels" / "sgmm.md").read_text()
        for row in record["rows"]:
            if row["implementation"] == "pallas" and row["mode"] in ("golden", "switch"):
                assert "**{ms:.2f} ms, {percent_of_copy:.0f}%**".format(**row) in page
        for row in json.loads((RESULTS / "merged_step.json").read_text())["rows"]:
            costs = "" if row["strategy"] == "backbone" else "{overhead_pct:+.0f}%".format(**row)
            name = "bare model" if row["strategy"] == "backbone" else "`{strategy}`".format(**row)
            assert f"| {name} | {row['ms']:.2f} | {costs}".rstrip() in page

    def test_wrong_results_end_the_run(self, tmp_path, monkeypatch):
        """A single element of one layer is off."""
        right = benchmark.sgmm

        def wrong(*arguments, **options):
            merged = right(*arguments, **options)
            return merged | {"q_proj": merged["q_proj"].at[0, 1, 2].add(0.01)}

        monkeypatch.setattr(benchmark, "sgmm", wrong)
        size = replace(benchmark.TINY, sweep_top_ks=(1,))
        with pytest.raises(SystemExit, match="10 wrong results"):
            benchmark.run(size, tmp_path, "the command", ("xla",), swept="xla")
        rows = json.loads((tmp_path / "sgmm.json").read_text())["rows"]
        assert [row["wrong"] for row in rows] == [row["implementation"] == "xla" for row in rows]
        assert all("ms" not in row for row in rows if row["wrong"])
