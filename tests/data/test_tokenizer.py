"""Tokenizers of directories whose Python code must not run, and those that lie beside an adapter."""

from __future__ import annotations

import importlib
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from data_fixtures import CHATML, write_tokenizer

from adafuse_jax.core.errors import UserError
from adafuse_jax.data import tokenizer as tokenizer_module
from adafuse_jax.data.tokenizer import load_tokenizer

EVIL = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class EvilTokenizer(PreTrainedTokenizerFast): pass
class EvilConfig(PretrainedConfig): model_type = "llama"
"""


def edit(path: Path, **changes) -> Path:
    """A JSON file with other values; None removes a key."""
    table = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
    return path


def add_code(directory: Path, marker: Path, **changes) -> None:
    """Python that leaves `marker` behind if it runs, as the code of tokenizer, config and model."""
    (directory / "evil.py").write_text(EVIL.format(marker=str(marker)))
    edit(
        directory / "tokenizer_config.json",
        **{
            "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
            "tokenizer_class": "EvilTokenizer",
        }
        | changes,
    )
    if (directory / "config.json").exists():
        edit(directory / "config.json", auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with code and a LoRA for it, in lora/, with code of its own; plain/ is the model without code and
    template, and run/adapter the LoRA alone."""
    out = tiny.write_folder(tmp_path_factory.mktemp("code"))
    train = importlib.import_module("train")
    assert train.main(tiny.train_flags(out, adapter="lora", num_experts=None, steps=1)) == 0
    shutil.copytree(out / "model", out / "plain")
    edit(out / "plain" / "tokenizer_config.json", chat_template=None)
    shutil.copytree(out / "run" / "adapter", out / "lora")
    write_tokenizer(out / "lora", template=CHATML)
    for name in ("model", "lora"):
        add_code(out / name, out / "marker")
    return out


class TestCodeNeverRuns:
    @pytest.mark.parametrize("tokenizer_class", ["EvilTokenizer", "PreTrainedTokenizerFast", "LlamaTokenizer", None])
    @pytest.mark.parametrize(
        "auto_map",
        [
            {"AutoTokenizer": ["evil.EvilTokenizer", None]},
            {"AutoTokenizer": [None, "evil.EvilTokenizer"]},
            {"AutoTokenizer": "evil.EvilTokenizer"},
            ["evil.EvilTokenizer", "evil.EvilTokenizer"],
            {"AutoTokenizer": ["some/repository--evil.EvilTokenizer", None]},
            {"AutoConfig": "evil.EvilConfig"},
            5,
        ],
    )
    def test_tokenizer_json_is_enough(self, tmp_path, monkeypatch, capsys, caplog, auto_map, tokenizer_class):
        plain = load_tokenizer(write_tokenizer(tmp_path / "tok", template=CHATML))
        add_code(tmp_path / "tok", tmp_path / "marker", auto_map=auto_map, tokenizer_class=tokenizer_class)
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
        tokenizer = load_tokenizer(tmp_path / "tok")
        assert tokenizer("<|im_start|>hé")["input_ids"] == plain("<|im_start|>hé")["input_ids"]
        assert not (tmp_path / "marker").exists()
        assert sys.stdin.read() == "y\ny\n"
        assert capsys.readouterr().out == ""
        assert "Python code that tokenizer_config.json names is not run" in caplog.text

    def test_without_tokenizer_json_one_line(self, tmp_path):
        write_tokenizer(tmp_path / "tok")
        (tmp_path / "tok" / "tokenizer.json").unlink()
        add_code(tmp_path / "tok", tmp_path / "marker")
        with pytest.raises(UserError, match=r"which is never run, and there is no tokenizer\.json"):
            load_tokenizer(tmp_path / "tok")
        assert not (tmp_path / "marker").exists()

    ENTRIES: dict[str, Callable[[Path], list[str]]] = {  # noqa: RUF012
        "train": lambda f: tiny.train_flags(f, "run2", steps=1),
        "decode": lambda f: tiny.decode_flags(f, prompt=None, adapter=f / "lora"),
        "adafuse_jax.evaluation": lambda f: tiny.as_flags(
            {"model": f / "model", "adapter": f / "lora", "dataset": f / "choices.jsonl", "limit": 2, "max_new_tokens": 2}
        ),
        "adafuse_jax.evaluation.lm_eval": lambda f: [
            "--model", "adafuse", "--model_args", f"model={f / 'model'},adapter={f / 'lora'}", "--tasks", "tiny_choices",
            "--include_path", str(f / "tasks"), "--limit", "1",
        ],
        "adafuse_jax.export": lambda f: tiny.as_flags(
            {"model": f / "model", "adapter": f / "lora", "output": f / "exported"}
        ),
    }  # fmt: skip

    @pytest.mark.parametrize(
        "entry",
        [pytest.param(entry, marks=pytest.mark.slow if "lm_eval" in entry else ()) for entry in ENTRIES],
    )
    def test_entry_points(self, folder, monkeypatch, capsys, entry):
        """Every entry point works; stdin is left unread, or its lines are answered as prompts."""
        from goldens.lm_eval_cases import write_tasks

        write_tasks(folder / "tasks")
        flags = self.ENTRIES[entry](folder)
        monkeypatch.setattr(sys, "argv", [entry, *flags])
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
        name = "adafuse_jax.evaluation.__main__" if entry == "adafuse_jax.evaluation" else entry
        assert importlib.import_module(name).main(flags) in (0, None)
        assert not (folder / "marker").exists()
        rest, out = sys.stdin.read(), capsys.readouterr().out
        assert "trust" not in out
        if entry == "decode":
            assert out.count("> y\n") == 2
        else:
            assert rest == "y\ny\n"


class TestAdapters:
    """A tokenizer, or only a chat template, beside the adapter is what decoding uses."""

    TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}{{ 'bot: ' if add_generation_prompt }}"

    @pytest.fixture
    def dirs(self, tmp_path):
        return write_tokenizer(tmp_path / "base", template=CHATML), tmp_path / "adapter"

    @pytest.mark.parametrize("form", ["tokenizer", "jinja", "config"])
    def test_its_template_is_used_and_logged(self, dirs, form, caplog):
        base, adapter = dirs
        adapter.mkdir()
        if form == "tokenizer":
            write_tokenizer(adapter, template=self.TEMPLATE)
        elif form == "jinja":
            (adapter / "chat_template.jinja").write_text(self.TEMPLATE)
        else:
            edit(adapter / "tokenizer_config.json", chat_template=self.TEMPLATE)
        with caplog.at_level("INFO"):
            tokenizer = load_tokenizer(base, adapter)
        assert tokenizer.chat_template == self.TEMPLATE
        assert f"{adapter}: its own {'tokenizer' if form == 'tokenizer' else 'chat template'} is used" in caplog.text

    def test_the_template_of_a_processor_is_used_and_logged(self, tmp_path, caplog):
        directory = write_tokenizer(tmp_path / "model")
        edit(directory / "chat_template.json", chat_template=CHATML)
        with caplog.at_level(logging.INFO, "adafuse_jax"):
            assert load_tokenizer(directory).chat_template == CHATML
        assert caplog.messages == [f"{directory}: the chat template of chat_template.json is used"]

    def test_without_one_the_model_s_is_used(self, dirs, caplog):
        base, adapter = dirs
        adapter.mkdir()
        assert load_tokenizer(base, adapter).chat_template == CHATML
        assert not caplog.records

    def test_other_ids_are_refused_and_further_tokens_logged(self, dirs, caplog):
        base, adapter = dirs
        write_tokenizer(adapter, template=CHATML)
        table = json.loads((adapter / "tokenizer.json").read_text())
        extra = {**table["added_tokens"][-1], "id": 260, "content": "<pad>"}
        (adapter / "tokenizer.json").write_text(json.dumps(table | {"added_tokens": [*table["added_tokens"], extra]}))
        load_tokenizer(base, adapter)
        assert "1 tokens are in only one of the model's and the adapter's tokenizers: '<pad>'" in caplog.text
        vocab = table["model"]["vocab"]
        vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
        (adapter / "tokenizer.json").write_text(json.dumps(table))
        with pytest.raises(UserError, match="has id 0 in the adapter's tokenizer, where the model's has 1"):
            load_tokenizer(base, adapter)

    def test_decode_and_export(self, folder, tmp_path, capsys):
        """A LoRA with a template, of a model without one."""
        model, adapter = folder / "plain", tmp_path / "adapter"
        shutil.copytree(folder / "run" / "adapter", adapter)
        (adapter / "chat_template.jinja").write_text(self.TEMPLATE)
        decode, export = importlib.import_module("decode"), importlib.import_module("adafuse_jax.export")

        def prompt_tokens(**flags) -> int:
            capsys.readouterr()
            assert decode.main(tiny.as_flags({"prompt": "Hi", "max_new_tokens": 2, "json": True} | flags)) == 0
            return json.loads(capsys.readouterr().out)["prompt_tokens"]

        for form in ("huggingface", "peft", "adafuse-jax"):
            out = tmp_path / form
            export.main(tiny.as_flags({"model": model, "adapter": adapter, "output": out, "format": form}))
            assert (out / "chat_template.jinja").read_text() == self.TEMPLATE
        assert prompt_tokens(model=tmp_path / "huggingface") == len("user: Hi;bot: ")
        for name in ("peft", "adafuse-jax"):
            assert prompt_tokens(model=model, adapter=tmp_path / name) == len("user: Hi;bot: ")


@pytest.mark.parametrize(
    ("installed", "is_old"), [("5.3.0", True), ("4.57.1", True), ("5.24.0.dev0", False), ("6.0", False)]
)
def test_an_old_transformers_is_refused(monkeypatch, tmp_path, installed, is_old):
    """Such a version reads some tokenizers wrongly without a word; one that needs no transformers is read."""
    directory = tiny.write_model(tmp_path / "model")
    monkeypatch.setattr(tokenizer_module, "version", lambda name: installed)
    load_tokenizer(directory)
    edit(directory / "tokenizer_config.json", image_token="<image>")
    if not is_old:
        load_tokenizer(directory)
        return
    with pytest.raises(UserError, match=rf"transformers {installed} .* install transformers>=5\.24"):
        load_tokenizer(directory)
