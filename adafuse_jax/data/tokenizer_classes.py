"""The classes of transformers that set up a tokenizer themselves: of tokenizer.json they take the vocabulary, the merges and
the post-processor alone, and build the rest of the pipeline as here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

BACKEND = "TokenizersBackend"
"""The class that takes all of tokenizer.json."""
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class NotCovered(Exception):
    """The reason why transformers has to read a tokenizer."""


Tokens = dict[str, Any]
"""Role → token, as text or `AddedToken`; None: there is none."""


def backend_of(class_name: str, text: str, settings: dict[str, Any], given: Tokens) -> tuple[Tokenizer, Tokens]:
    """The Rust tokenizer before tokens are added, and the special tokens with the defaults of the class."""
    if class_name == BACKEND:
        return Tokenizer.from_str(text), given
    table = json.loads(text)
    model = table["model"]
    if model.get("type") != "BPE" or not isinstance(model["vocab"], dict):
        raise NotCovered(f"tokenizer_class is {class_name} and tokenizer.json of another kind")
    if table.get("truncation") is not None or table.get("padding") is not None:
        raise NotCovered("tokenizer.json truncates or pads")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    backend, defaults = REBUILT[class_name](model["vocab"], merges, settings)
    empty = {**model, "vocab": {}, "merges": []}
    post = Tokenizer.from_str(json.dumps(table | {"model": empty, "added_tokens": []})).post_processor
    if post is not None:
        backend.post_processor = post
    return backend, defaults | given


Merges = list[Any]
"""Pairs of tokens."""


def _llama(vocab: dict[str, int], merges: Merges, settings: dict[str, Any]) -> tuple[Tokenizer, Tokens]:
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, dropout=None))
    prefix = _prefix_space(settings, default=True)
    scheme = ("always" if settings.get("legacy", False) else "first") if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * prefix)
    return backend, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def _qwen2(vocab: dict[str, int], merges: Merges, settings: dict[str, Any]) -> tuple[Tokenizer, Tokens]:
    model = BPE(
        vocab=vocab, merges=merges, dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="",
        fuse_unk=False, byte_fallback=False,
    )  # fmt: skip
    backend = Tokenizer(model)
    backend.decoder, backend.normalizer = decoders.ByteLevel(), normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False)
    prefix = _prefix_space(settings, default=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
    )
    end = "<|endoftext|>"
    return backend, {"unk_token": end, "bos_token": None, "eos_token": end, "pad_token": end}


def _gpt2(vocab: dict[str, int], merges: Merges, settings: dict[str, Any]) -> tuple[Tokenizer, Tokens]:
    model = BPE(
        vocab=vocab, merges=merges, dropout=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False
    )
    backend = Tokenizer(model)
    if settings.get("add_prefix_space", False) is None:
        raise NotCovered("add_prefix_space is null")
    prefix = _prefix_space(settings, default=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    end = "<|endoftext|>"
    return backend, {"unk_token": end, "bos_token": end, "eos_token": end, "pad_token": None}


def _prefix_space(settings: dict[str, Any], *, default: bool) -> bool:
    value = settings.get("add_prefix_space")
    if value is not None and not isinstance(value, bool):
        raise NotCovered("add_prefix_space is neither true nor false")
    return default if value is None else value


REBUILT: dict[str, Callable[[dict[str, int], Merges, dict[str, Any]], tuple[Tokenizer, Tokens]]] = {
    "LlamaTokenizer": _llama, "Qwen2Tokenizer": _qwen2, "GPT2Tokenizer": _gpt2,
}  # fmt: skip
"""Classes that take only vocabulary, merges and post-processor of tokenizer.json, and set the rest themselves."""
