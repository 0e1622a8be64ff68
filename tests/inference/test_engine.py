"""The engine against the full forward pass, transformers' tokens, and itself on other prompt lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import tiny
from flax import nnx
from generation import by_full_forward, generate, prompt_of
from goldens.tiny_models import CASES, write_model_dir
from random_models import FAMILIES, POSITIONS, random_adapter

from adafuse_jax import UserError, load_backbone
from adafuse_jax.data.chat import encode_prompt, load_tokenizer
from adafuse_jax.data.examples import Message
from adafuse_jax.inference import prefill as prefill_module
from adafuse_jax.inference import programs
from adafuse_jax.inference import state as state_module
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.kv_cache import KVCache

GOLDENS = tiny.GOLDENS


class TestCachedDecodingEqualsTheFullForward:
    @pytest.mark.parametrize("targets", POSITIONS.values(), ids=POSITIONS)
    @pytest.mark.parametrize("family", quick.first(FAMILIES))
    def test_greedy_tokens(self, models, family, targets):
        model = models(family)
        adapter = random_adapter(model.config, targets=targets)
        prompt = prompt_of(model, 21)
        (answer,) = generate(Engine(model, adapter, eos_ids=()), prompt, n=12)
        assert len(answer) == 12
        assert answer == by_full_forward(model, adapter, prompt, answer)

    @pytest.mark.parametrize("name", quick.first(CASES, 6))
    def test_backbone_gives_the_tokens_of_transformers(self, name, tmp_path):
        write_model_dir(CASES[name], tmp_path)
        golden = np.load(GOLDENS / "tiny" / f"{name}.npz")
        model = load_backbone(tmp_path, "float32")
        prompt, wanted = golden["prompt"].ravel().tolist(), golden["greedy"].ravel().tolist()
        assert generate(Engine(model, eos_ids=()), prompt, n=len(wanted)) == [wanted]

    def test_stories_word_for_word(self, stories260k_dir, shared_dir):
        model, tokenizer = load_backbone(stories260k_dir), load_tokenizer(stories260k_dir)
        (tokens,) = generate(Engine(model, eos_ids=()), [tokenizer.bos_token_id], n=256)
        story = (shared_dir / "assets" / "models" / "stories260K.md").read_text().split("```")[3]
        story = story.split("-t 0.0\n")[1]
        assert tokenizer.decode(tokens).split() == story.split()

    @pytest.mark.slow
    def test_chat_answers_of_a_real_model(self, smollm2_dir):
        model, tokenizer = load_backbone(smollm2_dir, "float32"), load_tokenizer(smollm2_dir)
        engine = Engine(model)
        for golden in json.loads((GOLDENS / "real.json").read_text())["smollm2"]:
            prompt = encode_prompt((Message("user", golden["question"]),), tokenizer).tolist()
            assert prompt == golden["prompt"]
            assert generate(engine, prompt, n=len(golden["answer"])) == [golden["answer"]]


class TestPrefill:
    @pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 100])
    def test_every_bucket_gives_the_same_tokens(self, models, length):
        model = models("mistral_window")
        adapter = random_adapter(model.config)
        prompt = prompt_of(model, length)
        (answer,) = generate(Engine(model, adapter, eos_ids=()), prompt, n=6)
        assert len(answer) == 6
        assert answer == by_full_forward(model, adapter, prompt, answer)

    def test_several_chunks(self, models, monkeypatch):
        monkeypatch.setattr(prefill_module, "CHUNKS", (4, 16))
        model = models("qwen2_window")
        prompt = prompt_of(model, 55)
        (answer,) = generate(Engine(model, eos_ids=()), prompt, n=6)
        assert len(answer) == 6
        assert answer == by_full_forward(model, None, prompt, answer)

    def test_a_new_prompt_length_compiles_nothing(self, models):
        model = models("llama_gqa")
        engine = Engine(model, random_adapter(model.config))
        generate(engine, prompt_of(model, 20), n=4)
        compiled = programs.prefill_chunk._cache_size(), programs.decode_step._cache_size()
        for length in range(17, 60, 5):
            generate(engine, prompt_of(model, length), n=4)
        assert (programs.prefill_chunk._cache_size(), programs.decode_step._cache_size()) == compiled

    def test_no_more_programs_than_buckets(self, models, monkeypatch):
        """Prompts of 1 … 110 tokens: at most a step for each cache size, a prefill for each pair of sizes that occurs."""
        monkeypatch.setattr(state_module, "MIN_CACHE_LENGTH", 32)
        model = models("qwen3")
        engine = Engine(model, eos_ids=())
        programs.prefill_chunk.clear_cache()
        programs.decode_step.clear_cache()
        context, pairs, sizes = model.config.max_position_embeddings, set(), set()
        for length in (1, 16, 17, 40, 64, 65, 90, 110):
            generate(engine, prompt_of(model, length), n=3)
            positions = state_module.cache_length(min(length + 3, context))
            sizes.add(positions)
            pairs |= {(positions, chunk) for chunk in prefill_module.chunk_lengths(length)}
        after = programs.prefill_chunk._cache_size(), programs.decode_step._cache_size()
        assert 0 < after[0] <= len(pairs)
        assert 0 < after[1] <= len(sizes) < 4

    def test_copies_the_weights_of_a_few_linears_at_a_time(self):
        """Copies are not of a whole layer, which is what scanning over the layers would copy."""
        config = ModelConfig(
            model_type="llama", vocab_size=64, embed_dim=512, hidden_dim=1376, num_layers=4, num_heads=4, num_kv_heads=4,
            head_dim=128, max_position_embeddings=256, norm_eps=1e-5,
        )  # fmt: skip
        model = Backbone(config, rngs=nnx.Rngs(0))
        state = state_module.DecodeState.empty(config, 1, 32, model.dtype)
        tokens, logits = np.zeros((1, 16), np.int32), jnp.zeros((1, 64))
        given = model, None, state, logits, tokens, np.array([0]), np.array([16]), None
        chunk = programs.prefill_chunk.lower(*given, pad_id=0)
        a_layer = sum(leaf.nbytes for leaf in jax.tree.leaves(model.layers)) / config.num_layers
        assert chunk.compile().memory_analysis().temp_size_in_bytes < 0.6 * a_layer


class TestLogits:
    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 6e-2)])
    @pytest.mark.parametrize("targets", [POSITIONS["attention"], POSITIONS["ffn"]], ids=["attention", "ffn"])
    def test_prefill_and_steps_equal_the_full_forward(self, targets, dtype, tolerance, tmp_path):
        """Logits of every position, through the cache, over the std of exact ones."""
        write_model_dir(CASES["mistral_window"], tmp_path)
        exact, model = load_backbone(tmp_path, "float32"), load_backbone(tmp_path, dtype)
        adapter = random_adapter(model.config, targets=targets)
        tokens = jnp.array([prompt_of(model, 40)])
        wanted = np.asarray(exact(tokens, adapter=adapter).logits[0])
        cache = KVCache.empty(model.config, 1, 64, model.dtype)
        step = jax.jit(
            lambda tokens, positions, cache: model(tokens, adapter=adapter, positions=positions, cache=cache)
        )
        found = []
        for start, stop in [(0, 24), *((i, i + 1) for i in range(24, 40))]:
            out = step(tokens[:, start:stop], jnp.arange(start, stop)[None], cache)
            cache = out.cache
            found.append(np.asarray(out.logits[0]))
        difference = np.abs(np.concatenate(found) - wanted) / wanted.std()
        assert np.median(difference) < tolerance / 4
        assert np.quantile(difference, 0.99) < tolerance


class TestNotFinite:
    @pytest.mark.parametrize("when", [0, 3])
    def test_is_told_whenever_it_happens(self, models, when):
        """NaN in the embedding of a token that only the answer holds, or of one in the prompt."""
        model = models("llama_mha")
        prompt = prompt_of(model, 5)
        answer = generate(Engine(model, eos_ids=()), prompt, n=8)[0]
        spoiled = prompt[2] if when == 0 else next(t for t in answer if t not in prompt)
        broken = jax.tree.map(lambda x: x, model)
        broken.embed_tokens[...] = model.embed_tokens[...].at[spoiled].set(jnp.nan)
        with pytest.raises(UserError, match="not finite"):
            generate(Engine(broken, eos_ids=()), prompt, n=8)


class TestPadding:
    @pytest.mark.parametrize("pad", [-1, 10**6, None, 0])
    def test_a_pad_id_that_is_no_token_changes_nothing(self, models, pad):
        model = models("llama_gqa")
        prompts = [prompt_of(model, n, seed=n) for n in (5, 9)]
        free = [generate(Engine(model, eos_ids=()), p, n=12)[0] for p in prompts]
        eos = next(t for t in free[0][2:] if t not in free[1])
        padded = jax.tree.map(lambda x: x, model)
        padded.config = replace(model.config, pad_token_id=pad)
        rows = generate(Engine(padded, eos_ids=(eos, -1, 2**40)), *prompts, n=12)
        assert rows[0] == free[0][: free[0].index(eos) + 1] + [0] * (11 - free[0].index(eos))
        assert rows[1] == free[1]


class TestPrompts:
    @pytest.mark.parametrize("wrong", [-1, 10**4, 2**40])
    def test_ids_that_the_model_has_not(self, models, wrong):
        model = models("llama_gqa")
        with pytest.raises(UserError, match=f"has token {wrong} and the model {model.config.vocab_size} tokens"):
            generate(Engine(model), [3, wrong, 4])


class TestRows:
    def test_rows_of_different_lengths_equal_each_alone(self, models):
        model = models("llama_gqa")
        engine = Engine(model, random_adapter(model.config), eos_ids=())
        prompts = [prompt_of(model, n, seed=n) for n in (3, 30, 17)]
        assert generate(engine, *prompts, n=10) == [generate(engine, p, n=10)[0] for p in prompts]

    @pytest.mark.parametrize("targets", quick.first(POSITIONS.values()), ids=POSITIONS)
    def test_sampled_rows_equal_each_alone(self, models, targets):
        """Every row has its own experts and penalty, and the noise it would have alone."""
        model = models("llama_gqa")
        engine = Engine(model, random_adapter(model.config, targets=targets), eos_ids=())
        prompts = [prompt_of(model, n, seed=n) for n in (4, 40, 11)]
        options = {"n": 10, "seed": 3, "sampling": Sampling.of(temperature=1.2, top_k=9, repetition_penalty=1.3)}
        rows = generate(engine, *prompts, **options)
        assert rows == [generate(engine, p, **options)[0] for p in prompts]
        assert len({tuple(row) for row in rows}) == 3

    def test_each_row_has_the_room_it_would_have_alone(self, models):
        """Room of one prompt is 5 tokens of the context; the other goes on."""
        model = models("llama_gqa")
        engine = Engine(model, random_adapter(model.config), eos_ids=())
        prompts = [prompt_of(model, n, seed=n) for n in (model.config.max_position_embeddings - 5, 20)]
        long, short = generate(engine, *prompts, n=12)
        assert long[:5] == generate(engine, prompts[0], n=12)[0]
        assert short == generate(engine, prompts[1], n=12)[0]
        assert len(short) == 12

    def test_a_row_that_ended_is_padded_and_does_not_disturb_the_others(self, models):
        model = models("llama_gqa")
        prompts = [prompt_of(model, n, seed=n) for n in (5, 9)]
        free = [generate(Engine(model, eos_ids=()), p, n=12)[0] for p in prompts]
        eos = next(t for t in free[0][2:] if t not in free[1])
        at = free[0].index(eos)
        rows = generate(Engine(model, eos_ids=(eos,)), *prompts, n=12)
        assert rows[0] == free[0][: at + 1] + [model.config.pad_token_id or 0] * (11 - at)
        assert rows[1] == free[1]

    def test_stops_when_every_row_has_ended(self, models):
        model = models("llama_gqa")
        prompt = prompt_of(model, 5)
        free = generate(Engine(model, eos_ids=()), prompt, n=12)[0]
        assert generate(Engine(model, eos_ids=(free[3],)), prompt, n=12)[0] == free[: free.index(free[3]) + 1]


class TestConversation:
    def test_next_turn_prefills_only_what_is_new(self, models, monkeypatch):
        model = models("llama_gqa")
        adapter = random_adapter(model.config)
        engine, fresh = Engine(model, adapter, eos_ids=()), Engine(model, adapter, eos_ids=())
        first = prompt_of(model, 20)
        answer = generate(engine, first, n=8, keep_cache=True)[0]
        second = [*first, *answer, *prompt_of(model, 7, seed=1)]
        seen = []
        chunk_lengths = prefill_module.chunk_lengths

        def spy(length: int, *more: Any) -> list[int]:
            seen.append(length)
            return chunk_lengths(length, *more)

        monkeypatch.setattr(prefill_module, "chunk_lengths", spy)
        continued = generate(engine, second, n=8, keep_cache=True)
        assert seen == [len(second) - len(first) - 7]  # the last token of the answer was never read
        assert continued == generate(fresh, second, n=8)

    def test_another_conversation_begins_anew(self, models):
        model = models("llama_gqa")
        engine = Engine(model, eos_ids=())
        generate(engine, prompt_of(model, 20), n=8, keep_cache=True)
        other = prompt_of(model, 12, seed=9)
        assert generate(engine, other, n=8, keep_cache=True) == generate(Engine(model, eos_ids=()), other, n=8)

    def test_cache_grows_with_the_conversation(self, models, monkeypatch):
        monkeypatch.setattr(state_module, "MIN_CACHE_LENGTH", 16)
        model = models("llama_gqa")
        engine = Engine(model, eos_ids=())
        tokens = prompt_of(model, 10)
        for turn in range(4):
            answer = generate(engine, tokens, n=6, keep_cache=True)
            assert answer == generate(Engine(model, eos_ids=()), tokens, n=6)
            tokens = [*tokens, *answer[0], *prompt_of(model, 5, seed=turn)]

    def test_abandoned_stream_keeps_a_usable_cache(self, models):
        model = models("llama_gqa")
        engine = Engine(model, eos_ids=())
        prompt = prompt_of(model, 10)
        stream = engine.generate([prompt], max_new_tokens=20, keep_cache=True)
        got = [int(next(stream).ids[0]) for _ in range(4)]
        stream.close()
        second = [*prompt, *got, 5, 6]
        assert generate(engine, second, n=6, keep_cache=True) == generate(Engine(model, eos_ids=()), second, n=6)


class TestLimits:
    def test_answer_is_cut_at_the_context(self, models):
        model = models("llama_gqa")
        context = model.config.max_position_embeddings
        assert len(generate(Engine(model, eos_ids=()), prompt_of(model, context - 5), n=50)[0]) == 5

    def test_prompt_that_fills_the_context(self, models):
        model = models("llama_gqa")
        with pytest.raises(UserError, match="shorten the prompt"):
            generate(Engine(model), prompt_of(model, model.config.max_position_embeddings))

    def test_empty_prompt(self, models):
        with pytest.raises(UserError, match="empty"):
            generate(Engine(models("llama_gqa")), [])


class TestExperts:
    def test_reported_experts_are_those_of_the_router(self, models):
        model = models("llama_gqa")
        adapter = random_adapter(model.config, targets=("gate_proj",))
        prompt = prompt_of(model, 9)
        tokens = list(Engine(model, adapter, eos_ids=()).generate([prompt], max_new_tokens=6))
        whole = np.array([[*prompt, *(int(t.ids[0]) for t in tokens)]])
        routed = np.asarray(model(whole, adapter=adapter).routing.experts[0])
        assert tokens[0].experts is None
        for i, token in enumerate(tokens[1:]):
            assert set(token.experts[0]) == set(routed[len(prompt) + i])


class TestSampledDecoding:
    def test_rows_of_one_prompt_are_samples_of_their_own(self, models):
        model = models("llama_gqa")
        engine, prompt, other = Engine(model, eos_ids=()), prompt_of(model, 5), prompt_of(model, 5, seed=1)
        options = {"n": 8, "seed": 4, "sampling": Sampling.of(temperature=1.0)}
        rows = generate(engine, prompt, other, prompt, prompt, **options)
        assert len({tuple(row) for row in rows}) == 4
        asked = [(prompt, 2), (other, 0), (prompt, 0), (prompt, 1)]
        again = generate(engine, *(p for p, _ in asked), **options, samples=[n for _, n in asked])
        assert again == [rows[3], rows[1], rows[0], rows[2]]

    def test_same_seed_same_tokens(self, models):
        model = models("llama_gqa")
        engine, prompt = Engine(model, eos_ids=()), prompt_of(model, 5)
        sampling = Sampling.of(temperature=1.0)
        first, again, other = (generate(engine, prompt, n=20, sampling=sampling, seed=s) for s in (1, 1, 2))
        assert first == again != other

    def test_repetition_penalty_sees_prompt_and_output(self, models):
        """A penalty that forbids what was seen makes every token new."""
        model = models("llama_gqa")
        prompt = prompt_of(model, 20)
        sampling = Sampling.of(temperature=0.0, repetition_penalty=1e6)
        (tokens,) = generate(Engine(model, eos_ids=()), prompt, n=20, sampling=sampling)
        assert len({*prompt, *tokens}) == len(set(prompt)) + 20
