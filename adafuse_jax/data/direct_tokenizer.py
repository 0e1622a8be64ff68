"""Tokenizers read from their directory with the library `tokenizers` alone: importing transformers takes seconds, and many
where torch is installed.

The rules are those of `AutoTokenizer.from_pretrained` and of the classes it takes for the families of this project: which
class the files ask for, which parts of tokenizer.json that class replaces, and which tokens it adds. What is not covered
raises `NotCovered`, and transformers reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from tokenizers.models import BPE

from adafuse_jax.data.tokenizer_classes import BACKEND, REBUILT, NotCovered, Tokens, backend_of

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BACKEND_NAMES = (BACKEND, "PreTrainedTokenizer", "PreTrainedTokenizerFast", "PythonBackend")
"""Values of `tokenizer_class` that stand for tokenizer.json as it is."""
DEFAULT_CLASSES = {
    "llama": BACKEND,
    "mistral": BACKEND,
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "": BACKEND,
}
"""Type of model → the class without `tokenizer_class`; the empty type is that of a directory without config.json."""
BACKEND_MODELS = (
    "deepseek-ai/deepseek-r1-distill-llama-*", "deepseek-ai/deepseek-coder-*", "allenai/dolma2-tokenizer",
    "google/umt5-small", "naver-clova-ix/donut-*", "salesforce/blip2-opt-*", "salesforce/blip2-flan-t5-*",
    "salesforce/instructblip-flan-t5-*", "stepfun-ai/step-3.7-*",
)  # fmt: skip
"""Names of models whose `tokenizer_class` counts as `TokenizersBackend`."""
UNCOVERED_KEYS = (
    "auto_map", "fast_tokenizer_files", "fix_mistral_regex", "gguf_file", "init_inputs", "merges",
    "model_specific_special_tokens", "post_processor", "tokenizer_object", "tokenizer_padding", "tokenizer_truncation",
    "vocab", "unk_id", "_json_padding", "_json_truncation",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)  # fmt: skip
SPECIAL_KEYS = {*ROLES, "additional_special_tokens", "extra_special_tokens"}
CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, or of each of several."""

    input_ids: Any

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class DirectTokenizer:
    """The part of transformers' fast tokenizers that this project uses, with the same results.

    Args:
      backend: the Rust tokenizer; truncation and padding are off.
      class_name: the class that transformers would take.
      special: role (`ROLES`) → token.
      extra: special tokens without a role.
    """

    is_fast = True

    def __init__(
        self,
        backend: Tokenizer,
        *,
        class_name: str,
        name_or_path: str,
        chat_template: Any,
        special: Mapping[str, str],
        extra: Sequence[str],
        clean_up: bool,
        split_special_tokens: bool,
    ):
        self.backend_tokenizer, self.class_name, self.name_or_path = backend, class_name, name_or_path
        self.chat_template, self.special_tokens_map, self._extra = chat_template, dict(special), tuple(extra)
        self._clean_up, self.split_special_tokens = clean_up, split_special_tokens

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.convert_tokens_to_ids(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.convert_tokens_to_ids(self.eos_token)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id; that of the unknown token, or None without one, for what is no token."""
        unknown = self.special_tokens_map.get("unk_token")
        found = self.backend_tokenizer.token_to_id(token)
        return found if found is not None or unknown in (None, token) else self.convert_tokens_to_ids(unknown)

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The token of an id, None for what is no id; a list of them for several."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(int(index)) for index in ids]

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool = True) -> Encoded:
        single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        encodings = self.backend_tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        ids = [encoding.ids for encoding in encodings]
        return Encoded(ids[0] if single else ids)

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """Ids of a text. `verbose` is of transformers' warnings about long texts; there are none here."""
        return self(text, add_special_tokens=add_special_tokens).input_ids

    def decode(
        self, ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """The text of ids. Clean-up takes the spaces before punctuation out; of a BPE tokenizer never, as they are text."""
        ids = [int(index) for index in ([ids] if isinstance(ids, int) else ids)]
        text = self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        clean_up = self._clean_up if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        if clean_up and not isinstance(self.backend_tokenizer.model, BPE):
            for old, new in CLEAN_UP:
                text = text.replace(old, new)
        return text


def direct_tokenizer(directory: str) -> DirectTokenizer:
    """The tokenizer of a directory, as transformers reads it.

    Raises:
      NotCovered: it may be another one by these rules, or its files are broken: transformers names the fault.
    """
    try:
        return _read(directory)
    except NotCovered:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library raises anything, panics too
        raise NotCovered(f"its files are not as expected ({type(error).__name__})") from error


def _read(directory: str) -> DirectTokenizer:
    path = Path(directory)
    if not os.path.isfile(path / "tokenizer.json"):
        raise NotCovered("it has no tokenizer.json")
    settings, model = _table(path / "tokenizer_config.json"), _table(path / "config.json")
    if uncovered := [key for key in UNCOVERED_KEYS if key in settings]:
        raise NotCovered(f"tokenizer_config.json has {uncovered[0]}")
    text = (path / "tokenizer.json").read_text("utf-8")
    class_name = _class_name(path, settings, model, is_byte_level='"ByteLevel"' in text)
    settings |= dict.fromkeys(("tokenizer_class", "add_bos_token", "add_eos_token"))
    settings["chat_template"] = _chat_template(path, settings.get("chat_template"))
    added = _special_tokens(path, settings, text)
    tokens = {role: added.get(_content(value), value) for role in ROLES if (value := settings.get(role)) is not None}
    given = {role: tokens.get(role) for role in ROLES if role in settings}
    backend, found = backend_of(class_name, text, settings, given)
    special = {role: found[role] for role in ROLES if found.get(role) is not None}
    if backend.truncation is not None or backend.padding is not None:
        raise NotCovered("tokenizer.json truncates or pads")
    extra = list(settings.get("extra_special_tokens") or ())
    _add_tokens(backend, added, special, extra)
    if backend.post_processor is None:
        backend.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    names = {role: _content(token) for role, token in special.items()}
    if class_name == "Qwen2Tokenizer":
        marked = dict.fromkeys([*names.values(), *map(_content, extra)])
        backend.add_tokens([AddedToken(token, special=True) for token in marked])
    split = settings.get("split_special_tokens", False)
    backend.encode_special_tokens = split
    return DirectTokenizer(
        backend, class_name=class_name, name_or_path=directory, chat_template=settings["chat_template"],
        special=names, extra=[_content(token) for token in extra],
        clean_up=bool(settings.get("clean_up_tokenization_spaces", False)), split_special_tokens=split,
    )  # fmt: skip


def _table(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not os.path.exists(path):
        return {}
    table = json.loads(path.read_text("utf-8"))
    if not isinstance(table, dict):
        raise NotCovered(f"{path.name} is no object")
    return table


def _class_name(path: Path, settings: dict[str, Any], model: dict[str, Any], *, is_byte_level: bool) -> str:
    """The class that transformers takes: of a family's own and a declared one, one is trusted."""
    model_type = model.get("model_type", "") if model else ""
    declared = settings.get("tokenizer_class")
    if model_type not in DEFAULT_CLASSES or (model and not model_type):
        raise NotCovered(f"config.json has model_type {str(model_type)[:40]}")
    if "model_name" in model or (declared is None and model.get("tokenizer_class") is not None):
        raise NotCovered("config.json names its tokenizer")
    if os.path.exists(path / "tekken.json"):
        raise NotCovered("it has a tekken.json")
    found = str(declared or DEFAULT_CLASSES[model_type])
    name = found.removesuffix("Fast")
    if model_type == "qwen2":
        name = "Qwen2Tokenizer"
    elif name in BACKEND_NAMES or model_type == "mistral" or (name == "LlamaTokenizer" and is_byte_level):
        name = BACKEND
    elif name not in REBUILT:
        raise NotCovered(f"tokenizer_class is {found[:60]}")
    names = (str(path).lower(), str(model.get("_name_or_path", "")).lower())
    if name != BACKEND and any(fnmatch(one, pattern) for one in names for pattern in BACKEND_MODELS):
        raise NotCovered("its name is one of those that have a class of their own")
    return name


def _chat_template(path: Path, configured: Any) -> Any:
    """The template, or templates by name; files of their own come before tokenizer_config.json."""
    files = {"default": path / "chat_template.jinja"} if os.path.exists(path / "chat_template.jinja") else {}
    files |= {file.name.removesuffix(".jinja"): file for file in (path / "additional_chat_templates").glob("*.jinja")}
    texts = {name: file.read_text("utf-8") for name, file in files.items()}
    if texts:
        return texts["default"] if [*texts] == ["default"] else texts
    if isinstance(configured, list):
        return {template["name"]: template["template"] for template in configured}
    return configured


def _special_tokens(path: Path, settings: dict[str, Any], text: str) -> dict[str, AddedToken]:
    """Complete the special tokens of `settings`, and list the tokens to add by their text, in the order of their ids."""
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        added = {int(index): AddedToken(**token) for index, token in settings["added_tokens_decoder"].items()}
    else:
        if os.path.exists(path / "added_tokens.json"):
            raise NotCovered("it has an added_tokens.json")
        for key, value in _table(path / "special_tokens_map.json").items():
            if key not in SPECIAL_KEYS:
                raise NotCovered(f"special_tokens_map.json has {key[:40]}")
            if isinstance(value, dict) and key in ROLES:
                settings[key] = AddedToken(**{k: v for k, v in value.items() if k != "special"}, special=True)
            elif key in ROLES and isinstance(value, str):
                settings[key] = value
            else:
                raise NotCovered(f"special_tokens_map.json has {key}")
        for token in json.loads(text)["added_tokens"]:
            index = token.pop("id")
            added[index] = AddedToken(**token)
    for key, value in settings.items():
        if key.endswith("_token") and key not in ROLES and isinstance(value, str | dict):
            raise NotCovered(f"tokenizer_config.json has {key[:40]}")
    extra = settings.get("extra_special_tokens") or []
    if not isinstance(extra, list):
        raise NotCovered("it names its extra special tokens")
    settings["extra_special_tokens"] = [_token(token) for token in extra]
    settings |= {role: _token(settings[role]) for role in ROLES if settings.get(role) is not None}
    by_text = {token.content: token for _, token in sorted(added.items())}
    if len(by_text) != len(added):
        raise NotCovered("it lists a token twice")
    return by_text


def _token(value: Any) -> str | AddedToken:
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return AddedToken(**{name: part for name, part in value.items() if name != "__type"})
    if not isinstance(value, str | AddedToken):
        raise NotCovered(f"a special token is {str(value)[:40]}")
    return value


def _content(token: str | AddedToken) -> str:
    return token if isinstance(token, str) else token.content


def _add_tokens(
    backend: Tokenizer, added: dict[str, AddedToken], special: Tokens, extra: list[str | AddedToken]
) -> None:
    """Add the listed tokens, then those special ones that there are not yet."""
    roles = [*special.values()]
    known = {token.content for token in backend.get_added_tokens_decoder().values()} | added.keys()
    tokens: list[str | AddedToken] = [*added.values()]
    for token in (*roles, *extra):
        if _content(token) not in known:
            known.add(_content(token))
            tokens.append(token)
    named = {_content(token) for token in roles}
    for i, token in enumerate(tokens):
        if isinstance(token, str):
            tokens[i] = AddedToken(token, special=True)
        elif not token.special and token.content in named:
            token.special = True
    if tokens:
        backend.add_tokens(tokens)
