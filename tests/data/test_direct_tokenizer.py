"""Tokenizers read without transformers are those that `AutoTokenizer` gives, or are left to it."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import CHATML, transformers_tokenizer, write_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from adafuse_jax.data.direct_tokenizer import direct_tokenizer
from adafuse_jax.data.tokenizer import load_tokenizer
from adafuse_jax.data.tokenizer_classes import NotCovered

TEXTS = (
    "", "Hello world", "  <|im_start|>user\n hi <|im_end|> x</s> <s>", "日本語 ñ é 🙂 a\u0301",
    "a\n\n\tb   c 12345 don't WON'T", " x . y ? it 's n't 've", "<|endoftext|>  \t<tool> <think>\n", "▁a▁", "<unk>",
)  # fmt: skip
PROSE = "the cat sat on the mat, and the dog didn't. Ça va? 12 + 30 = 42 日本語 " * 3
TOKEN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def assert_same(directory: Path) -> None:
    own, other = direct_tokenizer(str(directory)), transformers_tokenizer(directory)
    assert own.class_name == type(other).__name__
    assert own.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    for name in (
        "chat_template", "special_tokens_map", "all_special_tokens", "bos_token", "eos_token", "bos_token_id",
        "eos_token_id", "name_or_path", "is_fast", "split_special_tokens",
    ):  # fmt: skip
        assert getattr(own, name) == getattr(other, name), name
    assert list(own.special_tokens_map) == list(other.special_tokens_map)
    assert own.get_vocab() == other.get_vocab()
    assert {i: repr(t) for i, t in own.added_tokens_decoder.items()} == {
        i: repr(t) for i, t in other.added_tokens_decoder.items()
    }
    for text in TEXTS:
        for adds in (True, False):
            ids = own(text, add_special_tokens=adds)["input_ids"]
            assert ids == other(text, add_special_tokens=adds)["input_ids"] == own.encode(text, add_special_tokens=adds)
            for skip in (True, False):
                for clean in (True, False, None):
                    options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
                    assert own.decode(ids, **options) == other.decode(ids, **options)
        assert own.convert_tokens_to_ids(text) == other.convert_tokens_to_ids(text)
    assert own(list(TEXTS)).input_ids == other(list(TEXTS)).input_ids
    assert [own.convert_ids_to_tokens(i) for i in range(400)] == [other.convert_ids_to_tokens(i) for i in range(400)]


def byte_level(out: Path) -> Path:
    return write_tokenizer(out, template=CHATML, eos="<|im_end|>", merges_from=PROSE)


def metaspace(out: Path) -> Path:
    """A tokenizer as sentencepiece models of Llama 2 become: byte fallback, BOS by the post-processor."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special[:3], show_progress=False)
    tokenizer.train_from_iterator([PROSE.replace(" ", "▁")], trainer)
    table = json.loads(tokenizer.to_str())
    vocab = table["model"]["vocab"]
    vocab |= {token: len(vocab) + i for i, token in enumerate(special[3:])}
    tokenizer = Tokenizer.from_str(json.dumps(table))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return written(out, tokenizer)


def unigram(out: Path) -> Path:
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    trainer.show_progress = False
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator([PROSE], trainer)
    return written(out, tokenizer)


def written(out: Path, tokenizer: Tokenizer) -> Path:
    out.mkdir(parents=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


KINDS = {"byte_level": byte_level, "metaspace": metaspace, "unigram": unigram}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    return {name: make(folder / name) for name, make in KINDS.items()}


@pytest.fixture
def variant(kinds, tmp_path):
    """A copy of a kind of tokenizer with other files: settings, config.json and special_tokens_map.json."""

    def make(kind: str, model_type: str | None = None, special: dict | None = None, **settings: Any) -> Path:
        out = shutil.copytree(kinds[kind], tmp_path / "t")
        table = json.loads((out / "tokenizer_config.json").read_text()) | settings
        (out / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in table.items() if v != "absent"}))
        if model_type is not None:
            (out / "config.json").write_text(json.dumps({"model_type": model_type}))
        if special is not None:
            (out / "special_tokens_map.json").write_text(json.dumps(special))
        return out

    return make


@pytest.mark.parametrize("name", ["stories260k", "smollm2"])
def test_real_tokenizers(request, name):
    assert_same(request.getfixturevalue(f"{name}_dir"))


CLASSES = (
    "absent", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast",
    "Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast",
)  # fmt: skip


@pytest.mark.parametrize("model_type", [None, "llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_classes(variant, kind, model_type):
    """For every declared class the one that transformers takes: it decides how tokenizer.json is read."""
    for name in CLASSES:
        directory = variant(kind, model_type, tokenizer_class=name)
        assert_same(directory)
        shutil.rmtree(directory)


SETTINGS: dict[str, dict[str, Any]] = {
    "roles": {
        "unk_token": "<unk>",
        "pad_token": "<|im_end|>",
        "sep_token": "<sep>",
        "mask_token": "<m>",
        "cls_token": "x",
    },
    "no BOS": {"bos_token": None, "pad_token": None},
    "adds BOS and EOS": {"add_bos_token": True, "add_eos_token": True},
    "clean-up": {"clean_up_tokenization_spaces": True},
    "split special tokens": {"split_special_tokens": True},
    "prefix space": {"add_prefix_space": True},
    "no prefix space": {"add_prefix_space": False, "legacy": True},
    "legacy": {"legacy": True, "sp_model_kwargs": {}, "use_default_system_prompt": True, "model_max_length": 9},
    "extra": {"extra_special_tokens": ["<tool>", "<think>"]},
    "additional": {"additional_special_tokens": ["<tool>", {"__type": "AddedToken", "content": "<think>", **TOKEN}]},
    "objects": {"eos_token": {"__type": "AddedToken", "content": "</s>", **TOKEN, "rstrip": True}},
    "listed": {
        "added_tokens_decoder": {
            "900": {"content": "<tool>", **TOKEN, "lstrip": True, "rstrip": True},
            "258": {"content": "<|im_start|>", **TOKEN, "special": False, "normalized": True},
            "901": {"content": "cat", **TOKEN, "single_word": True, "special": False},
        }
    },
    "several templates": {
        "chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    },
    "no template": {"chat_template": None},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("kind", "class_name"),
    [
        ("byte_level", "TokenizersBackend"), ("byte_level", "Qwen2Tokenizer"), ("byte_level", "GPT2Tokenizer"),
        ("metaspace", "LlamaTokenizer"), ("unigram", "TokenizersBackend"),
    ],
)  # fmt: skip
def test_settings(variant, kind, class_name, settings):
    assert_same(variant(kind, tokenizer_class=class_name, **SETTINGS[settings]))


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_map(variant, kind):
    roles = {"pad_token": {"content": "<p>", **TOKEN, "lstrip": True}, "eos_token": "</s>"}
    assert_same(variant(kind, "llama", special=roles, tokenizer_class="TokenizersBackend"))


def test_template_files(variant):
    directory = variant("byte_level")
    (directory / "chat_template.jinja").write_text("from\r\na file")
    assert_same(directory)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert_same(directory)


NOT_COVERED = {
    "auto_map": {"auto_map": {"AutoTokenizer": ["a.B", None]}},
    "another class": {"tokenizer_class": "GemmaTokenizer"},
    "a token by name": {"image_token": "<image>"},
    "named extra tokens": {"extra_special_tokens": {"image_token": "<image>"}},
    "broken": {"added_tokens_decoder": {"x": 5}},
}


@pytest.mark.parametrize("settings", NOT_COVERED)
def test_what_is_left_to_transformers(variant, settings):
    with pytest.raises(NotCovered):
        direct_tokenizer(str(variant("byte_level", "llama", **NOT_COVERED[settings])))


def test_padding_and_other_files_are_left_to_transformers(variant):
    directory = variant("metaspace", "gemma")
    with pytest.raises(NotCovered, match="model_type gemma"):
        direct_tokenizer(str(directory))
    (directory / "config.json").unlink()
    (directory / "added_tokens.json").write_text("{}")
    with pytest.raises(NotCovered, match=r"added_tokens\.json"):
        direct_tokenizer(str(directory))
    (directory / "added_tokens.json").unlink()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.save(str(directory / "tokenizer.json"))
    with pytest.raises(NotCovered, match="truncates or pads"):
        direct_tokenizer(str(directory))


def test_the_log_names_the_reason(variant, caplog):
    caplog.set_level("INFO", "adafuse_jax")
    directory = variant("byte_level", "llama", image_token="<image>")
    tokenizer = load_tokenizer(directory)
    assert type(tokenizer).__module__.startswith("transformers")
    assert (
        f"{directory}: the tokenizer is read by transformers, as tokenizer_config.json has image_token" in caplog.text
    )


def test_pickle(kinds):
    """Processes that encode training data get a copy."""
    tokenizer = load_tokenizer(kinds["byte_level"])
    assert pickle.loads(pickle.dumps(tokenizer))(PROSE)["input_ids"] == tokenizer(PROSE)["input_ids"]
