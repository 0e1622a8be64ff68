"""Directories of a real model with unusual templates and ids: the tokens that transformers generates, written down.

The expected tokens are those of `transformers` 5 (PyTorch, greedy) on directories made in the same way.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

import decode as script
import train as train_script
from adafuse_jax.evaluation import __main__ as evaluation
from adafuse_jax.evaluation.config import EvaluationConfig

PREFILLED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}{% elif m.role == 'assistant' %}"
    "[A]{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]<think>\n{% endif %}"
)
ROLES = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def changed(source: Path, out: Path, file: str, **values) -> Path:
    """A copy of a model directory with other values in one of its JSON files."""
    if source != out:
        shutil.copytree(source, out)
    table = json.loads((out / file).read_text()) | values
    (out / file).write_text(json.dumps(table))
    return out


@pytest.fixture
def answers(capsys):
    def answers(**flags) -> list[dict]:
        capsys.readouterr()
        assert script.main(tiny.as_flags({"json": True} | flags)) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return answers


def test_generation_prompt_with_an_open_reasoning_block(stories260k_dir, tmp_path, answers):
    model = changed(stories260k_dir, tmp_path / "m", "tokenizer_config.json", chat_template=PREFILLED)
    flags = {"model": model, "prompt": "Tell me a story", "max_new_tokens": 12}
    (answer,) = answers(**flags)
    assert answer["prompt_tokens"] == 24
    assert answer["token_ids"] == [441, 416, 411, 328, 432, 410, 454, 412, 340, 269, 410, 454]
    (raw,) = answers(**flags, raw=True)
    assert raw["token_ids"] == [426, 274, 415, 293, 349, 304, 422, 410, 293, 267, 329, 261]


def test_training_and_evaluation_with_one(tmp_path):
    folder = tiny.write_folder(tmp_path / "tiny")
    model = changed(folder / "model", folder / "model", "tokenizer_config.json", chat_template=PREFILLED)
    assert train_script.main(tiny.train_flags(folder, steps=1, adapter="lora", num_experts=None)) == 0
    config = EvaluationConfig(model=str(model), dataset=(str(folder / "choices.jsonl"),), limit=3, max_new_tokens=2)
    assert evaluation.run(config)["datasets"][0]["questions"] == 3


@pytest.mark.parametrize("pad", [-1, None, 0, 512])
def test_pad_ids_that_are_no_token(stories260k_dir, tmp_path, answers, pad):
    """Three prompts whose rows end at different steps; 426, the full stop, is an end token."""
    model = changed(stories260k_dir, tmp_path / "m", "config.json", pad_token_id=pad, eos_token_id=[2, 426])
    (tmp_path / "prompts.txt").write_text("Once upon a time\nLily\nThe end.\n")
    found = answers(model=model, raw=True, prompts_file=tmp_path / "prompts.txt", max_new_tokens=60)
    assert [a["token_ids"] for a in found] == [
        [432, 383, 286, 261, 376, 298, 315, 421, 395, 317],
        [269, 274, 287, 382, 276, 337, 299, 322, 265, 282, 295, 433],
        [274, 287, 286, 399, 270, 379, 428, 420, 422],
    ]
    assert {a["finish_reason"] for a in found} == {"stop"}


def test_a_template_beside_a_peft_adapter(stories260k_dir, tmp_path, answers):
    """Template beside the adapter, as TRL leaves it. A LoRA with B = 0 changes nothing, so the tokens are those of the
    model on the adapter's prompt."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 64), "B": (64, 2)}
    save_file(
        {name.format(i, ab): np.zeros(shape, np.float32) for i in range(5) for ab, shape in shapes.items()},
        adapter / "adapter_model.safetensors",
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories260k_dir / file, adapter)
    (adapter / "chat_template.jinja").write_text(ROLES)
    (answer,) = answers(model=stories260k_dir, adapter=adapter, prompt="Tell me a story", max_new_tokens=12)
    assert answer["prompt_tokens"] == 24
    assert answer["token_ids"] == [447, 416, 416, 412, 432, 364, 280, 303, 298, 414, 267, 265]
