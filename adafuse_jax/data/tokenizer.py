"""Tokenizers of model and adapter directories. Python code in them never runs."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from adafuse_jax.core.adapter_folder import adapter_folder
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.runtime import native_stdout_on_stderr
from adafuse_jax.core.tables import read_json, read_text
from adafuse_jax.data.direct_tokenizer import direct_tokenizer
from adafuse_jax.data.files import without_logs
from adafuse_jax.data.tokenizer_classes import NotCovered

log = logging.getLogger(__name__)

CONFIG_FILE, TOKENIZER_FILE, TEMPLATE_FILE = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
PROCESSOR_TEMPLATE_FILE = "chat_template.json"
"""File with the chat template of transformers' processors; its tokenizers do not read it."""
FILES = (
    TOKENIZER_FILE, CONFIG_FILE, "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", TEMPLATE_FILE,
)  # fmt: skip
PATTERNS = (
    "tokenizer*", "*.model", "*.tiktoken", "tekken.json", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
"""Patterns of the files that transformers reads tokenizers and chat templates from."""
OLDEST_TRANSFORMERS = "5.24"


def load_tokenizer(path_or_hub_id: str | Path, adapter: str | Path | None = None) -> Any:
    """The fast tokenizer of a local model directory or a hub id, or that of `adapter` if its directory has one.

    Training programs save the tokenizer beside the adapter, with the chat template that it was trained on: a tokenizer
    there is used, a chat template alone goes with the model's tokenizer, and either is logged.

    Raises:
      UserError: it cannot be loaded, has no offsets (a slow tokenizer), no EOS token or a template that is no text; or the
        adapter's has other ids for the tokens of the model's.
    """
    tokenizer = _load(path_or_hub_id)
    if tokenizer.chat_template is None and os.path.exists(Path(path_or_hub_id) / PROCESSOR_TEMPLATE_FILE):
        tokenizer.chat_template = _template_in(Path(path_or_hub_id) / PROCESSOR_TEMPLATE_FILE)
        log.info("%s: the chat template of %s is used", path_or_hub_id, PROCESSOR_TEMPLATE_FILE)
    own = None if adapter is None else _place(adapter)
    if own is None or (not os.path.exists(own / TOKENIZER_FILE) and _own_template(own) is None):
        return tokenizer
    if os.path.exists(own / TOKENIZER_FILE):
        changed = _load(own)
        _check_same_tokens(tokenizer, changed, own)
    else:
        changed, changed.chat_template = tokenizer, _own_template(own)
    log.info("%s: its own %s used", own, "tokenizer is" if changed is not tokenizer else "chat template is")
    return changed


def tokenizer_files(model: Path, adapter: Path | None = None) -> dict[str, bytes]:
    """The files, by their names in a directory, of the tokenizer that `load_tokenizer` gives for two directories."""
    adapter = None if adapter is None else _place(adapter)
    files, own = _files(model), {} if adapter is None else _files(adapter)
    if adapter is None or TOKENIZER_FILE in own:
        return own or files
    template = _own_template(adapter)
    if template is None:
        return files
    others = {name: data for name, data in files.items() if not name.startswith("chat_template")}
    return others | {TEMPLATE_FILE: template.encode()}


def write_tokenizer(files: Mapping[str, bytes], out: Path) -> None:
    """The files of `tokenizer_files` in the directory `out`."""
    for name, data in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)


def _files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for pattern in PATTERNS
        for path in sorted(directory.glob(pattern))
        if path.is_file() and path.suffix not in (".py", ".safetensors")
    }


def _place(adapter: str | Path) -> Path:
    """The folder of an adapter, or the directory that it is in, whichever has a tokenizer or else a chat template."""
    places = adapter_folder(adapter), Path(adapter).expanduser()
    with_tokenizer = (place for place in places if os.path.exists(place / TOKENIZER_FILE))
    with_template = (place for place in places if _own_template(place) is not None)
    return next(with_tokenizer, None) or next(with_template, None) or places[0]


def _own_template(adapter: Path) -> str | None:
    """The chat template of an adapter's directory without a tokenizer."""
    if os.path.exists(adapter / TEMPLATE_FILE):
        return read_text(adapter / TEMPLATE_FILE)
    found = (
        _template_in(path) for name in (CONFIG_FILE, PROCESSOR_TEMPLATE_FILE) if os.path.exists(path := adapter / name)
    )
    return next((template for template in found if template is not None), None)


def _template_in(file: Path) -> str | None:
    """The key chat_template of a JSON file."""
    template = read_json(file).get("chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{file}: chat_template is {quoted(template)}; it must be text")
    return template


def _check_same_tokens(base: Any, other: Any, place: Path) -> None:
    """Refuse ids that mean another token, and log tokens that only one of the two has."""
    mine, theirs = base.get_vocab(), other.get_vocab()
    by_id = {index: token for token, index in mine.items()}
    for token, index in sorted(theirs.items(), key=lambda item: item[1]):
        if mine.get(token, index) != index or by_id.get(index, token) != token:
            was = f"{mine[token]}" if token in mine else quoted(by_id[index])
            raise UserError(
                f"{place}: token {quoted(token)} has id {index} in the adapter's tokenizer, where the model's has {was}; "
                "the adapter is of another model, or give it the tokenizer of this one"
            )
    only = sorted(mine.keys() ^ theirs.keys(), key=lambda token: mine.get(token, theirs.get(token, 0)))
    if only:
        log.warning(
            "%s: %d tokens are in only one of the model's and the adapter's tokenizers: %s%s",
            place, len(only), ", ".join(map(quoted, only[:4])), ", …" if len(only) > 4 else "",
        )  # fmt: skip


def _load(path_or_hub_id: str | Path) -> Any:
    name = str(path_or_hub_id)
    local = os.path.isdir(name)
    if local:
        _check_files(Path(name))
    elif os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"no tokenizer: {name}: not a directory: give a Hugging Face model directory or a hub id org/name"
        )
    try:
        if not local:
            raise NotCovered("it is a hub id")
        with native_stdout_on_stderr():
            tokenizer: Any = direct_tokenizer(name)
    except NotCovered as reason:
        tokenizer = _by_transformers(name, local)
        log.info("%s: the tokenizer is read by transformers, as %s", name, reason)
    if not tokenizer.is_fast:
        raise UserError(f"slow tokenizer: {name}: offsets are needed: provide a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"no EOS token: {name}: set eos_token in tokenizer_config.json")
    template = tokenizer.chat_template
    texts = list(template.values()) if isinstance(template, dict) else [template or ""]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name}: chat_template is {quoted(template)}; it must be text, or texts by name")
    return tokenizer


def _by_transformers(name: str, local: bool) -> Any:
    installed = version("transformers")
    if _numbers(installed) < _numbers(OLDEST_TRANSFORMERS):
        raise UserError(
            f"{name}: its tokenizer is read by transformers, and transformers {installed} reads some wrongly; install "
            f"transformers>={OLDEST_TRANSFORMERS}"
        )
    try:
        with _silent():
            return _without_code(name, local)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises anything, panics of its Rust code too
        reason = " ".join(str(error)[:2000].split())[:160] or type(error).__name__
        advice = "it needs tokenizer.json and tokenizer_config.json" if local else "check the name and the connection"
        raise UserError(f"cannot load the tokenizer: {name}: {reason}: {advice}") from None


def _numbers(release: str) -> tuple[int, ...]:
    """(5, 24) of 5.24.0.dev0."""
    return tuple(int(number) for number in re.findall(r"\d+", release)[:2])


@contextmanager
def _silent() -> Iterator[None]:
    """No log lines from transformers and the hub's library: of a directory's faults, the error names the one that counts."""
    # transformers warns on import when torch is missing, which is no fault here
    environment = mock.patch.dict(os.environ, {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"})
    with environment, without_logs(), native_stdout_on_stderr():
        import transformers  # noqa: F401 - sets the level of its logger

        library = logging.getLogger("transformers")
        level = library.level
        library.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            library.setLevel(level)


def _without_code(name: str, local: bool) -> Any:
    """The tokenizer by transformers' own classes. One whose class is Python code in the directory or the repository is read
    from its tokenizer.json, which holds all there is to a fast tokenizer; this is logged."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto import tokenization_auto

    read, named = tokenization_auto.get_tokenizer_config, []

    def read_without_code(*args: Any, **kwargs: Any) -> dict[str, Any]:
        table = read(*args, **kwargs)
        named.append("auto_map" in table)
        return {key: value for key, value in table.items() if key != "auto_map"}

    try:
        # Code that is named but not run would still change which of its classes transformers takes.
        with mock.patch.object(tokenization_auto, "get_tokenizer_config", read_without_code):
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        if not any(named):
            raise
        if local and not os.path.exists(Path(name) / TOKENIZER_FILE):
            raise UserError(
                f"auto_map of {CONFIG_FILE} names Python code, which is never run, and there is no {TOKENIZER_FILE}"
            ) from error
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    if any(named):
        log.warning("%s: the Python code that %s names is not run", name, CONFIG_FILE)
    return tokenizer


def _check_files(directory: Path) -> None:
    """Refuse files that reading could wait on for ever."""
    for name in (*FILES, "config.json"):
        path = directory / name
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: is not a regular file; restore the tokenizer's files")


@functools.lru_cache(maxsize=8)
def special_token_texts(tokenizer: Any) -> tuple[str, ...]:
    """All special tokens, of which `all_special_tokens` has only those with a role (BOS, EOS, ...)."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple({*tokenizer.all_special_tokens, *added})


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of all that text and tokens depend on: the Rust tokenizer, chat templates and special tokens."""
    class_name = getattr(tokenizer, "class_name", type(tokenizer).__name__)
    parts = (
        class_name, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sorted(special_token_texts(tokenizer)),
        tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "split_special_tokens", False),
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
