"""Damaged files and flags, drawn by Hypothesis: each ends in one line and exit code 2, or in a right result.

Every case runs a command in this process through `run_cli`, up to the place where XLA would compile; where the damage left
the model as it is, also to the tokens, which are then those of the undamaged files. The draws are the same in every run;
FUZZ_TIMES=20 draws others, 20 times as many.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from flax import nnx
from fuzzing import VALUES, damaged_bytes, damaged_json, dump
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import decode
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.registry import make_adapter
from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.checkpoints.peft import save_peft_lora
from adafuse_jax.core import runtime
from adafuse_jax.core.cli import run_cli
from adafuse_jax.core.errors import EXIT_CODE, MAX_MESSAGE
from adafuse_jax.core.fields import flag_name, kinds
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.evaluation.config import EvaluationConfig
from adafuse_jax.export import ExportConfig
from adafuse_jax.inference.config import DecodeConfig
from adafuse_jax.inference.prompts import read_prompts
from adafuse_jax.inference.session import Session
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.data import prepare_data

pytestmark = pytest.mark.timeout(240)
CASES = {"run": 0}
COUNTS = {
    "model/config.json": 110, "model/generation_config.json": 40, "model/tokenizer_config.json": 50,
    "model/tokenizer.json": 50, "adapter/adapter_config.json": 60, "peft/adapter_config.json": 60,
    "model/model.safetensors": 30, "adapter/adapter_model.safetensors": 30, "model/chat_template.jinja": 40, "data": 120,
    "prompts": 50, "config.json": 30, "config.yaml": 30, "config.toml": 30, "flags": 120,
}  # fmt: skip
"""Number of cases for each damaged input."""


def fuzz(name: str) -> Callable:
    """Run as many cases as `COUNTS` gives, the same in every run; no shrinking, which takes minutes, because the
    falsifying case is printed anyway."""
    times = int(os.environ.get("FUZZ_TIMES", "1"))
    options = settings(
        max_examples=COUNTS[name] * times,
        derandomize=times == 1,
        database=None,
        deadline=None,
        phases=[p for p in settings.default.phases if p.name in ("explicit", "generate")],
        suppress_health_check=list(HealthCheck),
    )

    def decorated(case: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            before = CASES["run"]
            options(case)()
            assert CASES["run"] - before >= COUNTS[name]

        return run

    return decorated


def load(argv: Sequence[str]) -> int:
    """decode.py without an answer: the model, the adapter and the tokenizer are loaded, and the prompts are tokens."""
    (config,) = parse_flags("", (DecodeConfig,), argv)
    runtime.set_up()
    with runtime.memory_errors("lower --batch-size"):
        prompts = [config.prompt or "Hi"] if config.prompts_file is None else read_prompts(Path(config.prompts_file))
        Session(config).tokens_of_all(prompts)
    print("loaded")
    return 0


def prepare(argv: Sequence[str]) -> int:
    """train.py as far as its data are prepared."""
    config, _ = parse_flags("", (TrainConfig, AdapterConfig), argv)
    runtime.set_up()
    data = prepare_data(config, load_tokenizer(Path(config.model)))
    data.batches.at(0)
    print("prepared")
    return 0


def parse(*config_types: type) -> Callable[[Sequence[str]], int]:
    def main(argv: Sequence[str]) -> int:
        parse_flags("", config_types, argv)
        print("parsed")
        return 0

    return main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data, prompts, an adapter of ours in `adapter` and one of PEFT in `peft`."""
    folder = tiny.write_folder(tmp_path_factory.mktemp("fuzz"))
    checkpoint = HFCheckpoint.open(folder / "model")
    model, identity = checkpoint.config, checkpoint.identity()
    adafuse = make_adapter(AdapterConfig(rank=2, num_experts=4), model, rngs=nnx.Rngs(0))
    save_adapter(adafuse, folder / "adapter", backbone_name="tiny", backbone_identity=identity)
    lora = make_adapter(AdapterConfig(adapter="lora", rank=2), model, rngs=nnx.Rngs(0))
    save_peft_lora(lora, folder / "peft", model, backbone_name="tiny")
    return folder


@pytest.fixture
def check(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., bool]:
    """Run a command with a file of the folder damaged: True if it succeeded, else its one line has been checked."""

    def run(main: Callable, flags: list[str], name: str | None = None, content: bytes = b"", remove: str = "") -> bool:
        CASES["run"] += 1
        saved = {path: (folder / path).read_bytes() for path in (name, remove) if path and (folder / path).exists()}
        try:
            if name:
                (folder / name).write_bytes(content)
            if remove:
                (folder / remove).unlink()
            with pytest.raises(SystemExit) as end:
                run_cli(main, flags)
        finally:
            if name and name not in saved:
                (folder / name).unlink()
            for path, data in saved.items():
                (folder / path).write_bytes(data)
        out, err = capfd.readouterr()
        lines = err.splitlines()
        assert "Traceback" not in err
        assert all(len(line) <= runtime.MAX_LOG_LINE for line in lines)
        errors = [line for line in lines if line.startswith("error: ")]
        if end.value.code == 0:
            assert out
            assert not errors
            return True
        assert (end.value.code, out) == (EXIT_CODE, "")
        assert errors == lines[-1:], err
        assert len(errors[0]) <= len("error: ") + MAX_MESSAGE
        assert errors[0].isprintable()
        return False

    return run


def flags_of(folder: Path, **changes: Any) -> list[str]:
    return tiny.decode_flags(folder, prompt="Hi", **changes)


def answer(folder: Path, capfd: pytest.CaptureFixture[str], **changes: Any) -> list[int]:
    """The tokens of decode.py."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run_cli(decode.main, flags_of(folder, json=True, **changes))
    assert end.value.code == 0, capfd.readouterr().err
    return json.loads(capfd.readouterr().out)["token_ids"]


@pytest.fixture(scope="module")
def tables(folder: Path) -> dict[str, Any]:
    """The undamaged JSON files, by their path."""
    return {str(p.relative_to(folder)): json.loads(p.read_text()) for p in folder.rglob("*.json")}


@pytest.mark.parametrize("name", [name for name in COUNTS if name.startswith("model/") and name.endswith(".json")])
def test_files_of_a_model(name: str, folder: Path, tables: dict[str, Any], check: Callable):
    @fuzz(name)
    @given(damaged_json(tables[name]))
    def case(content: bytes):
        check(load, flags_of(folder), name, content)

    case()


@pytest.mark.parametrize("name", ["adapter", "peft"])
def test_the_config_of_an_adapter(name: str, folder: Path, tables: dict[str, Any], check: Callable):
    file = f"{name}/adapter_config.json"

    @fuzz(file)
    @given(damaged_json(tables[file]))
    def case(content: bytes):
        check(load, flags_of(folder, adapter=folder / name), file, content)

    case()


@pytest.mark.parametrize("name", ["model/model.safetensors", "adapter/adapter_model.safetensors"])
def test_weights(name: str, folder: Path, check: Callable):
    """The header is JSON after eight bytes of its length."""
    content = (folder / name).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + size], content[8 + size :]

    @fuzz(name)
    @given(damaged_bytes(header[:400]), st.booleans())
    def case(damaged: bytes, right_size: bool):
        damaged += header[400:]
        length = len(damaged) if right_size else size
        check(load, flags_of(folder, adapter=folder / "adapter"), name, length.to_bytes(8, "little") + damaged + rest)

    case()


TEMPLATES = (
    "{{ messages }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages[0]['content'] | tojson }}",
    "{{ raise_exception('no\nsystem turn') }}", "{{ messages[99].content }}", "{{ 1 / 0 }}", "{{ undefined.a.b }}", "{{ '",
    "{% if %}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**12 }}", "{{ messages.append(1) }}", "{{ self }}",
    "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ strftime_now('%Y' * 10000) }}", "{% set x = namespace(a=1) %}{{ x }}", "{{ '%9999999999d' % 1 }}",
    "\ufeff{{ messages }}",
)  # fmt: skip


def test_chat_templates(folder: Path, check: Callable):
    good = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"

    @fuzz("model/chat_template.jinja")
    @given(st.one_of(st.sampled_from([t.encode() for t in TEMPLATES]), damaged_bytes(good.encode())))
    def case(content: bytes):
        check(load, flags_of(folder), "model/chat_template.jinja", content)

    case()


ROWS = [
    {"instruction": "Double 1.", "input": "", "output": "2 is the answer."},
    {"instruction": "Double 2.", "input": "Now", "output": "4 is the answer."},
]
CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]
CHOICES = [
    {"question": "Which?", "choices": ["a", "b"], "answer": 1},
    {"question": "Or?", "choices": ["a", "b"], "answer": 0},
]


def as_csv(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


@st.composite
def data_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """(name, content) of a file of rows, one of which is damaged, or the whole."""
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv"]))
    if suffix == ".csv":
        return f"data{suffix}", draw(damaged_bytes(as_csv(ROWS)))
    rows = draw(st.sampled_from([ROWS, [CHATS[0]] * 2, [CHATS[1]] * 2, CHOICES]))
    damaged = draw(st.one_of(damaged_json(rows[1]), VALUES.map(dump)))
    whole = [dump(rows[0]), damaged, dump(rows[1])]
    return f"data{suffix}", b"\n".join(whole) + b"\n" if suffix == ".jsonl" else b"[" + b",".join(whole) + b"]"


def test_data(folder: Path, check: Callable):
    @fuzz("data")
    @given(data_files())
    def case(file: tuple[str, bytes]):
        name, content = file
        flags = tiny.train_flags(folder, dataset=folder / name, batch_size=1)
        check(prepare, flags, name, content)

    case()


def test_prompts(folder: Path, check: Callable):
    lines = [{"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}]

    @fuzz("prompts")
    @given(st.sampled_from([".txt", ".jsonl"]), st.sampled_from(lines).flatmap(damaged_json))
    def case(suffix: str, line: bytes):
        name = f"prompts{suffix}"
        flags = tiny.decode_flags(folder, prompt=None, prompts_file=folder / name)
        check(load, flags, name, dump(lines[0]) + b"\n" + line + b"\n")

    case()


SETTINGS = {"steps": 3, "learning_rate": 1e-3, "packing": False, "targets": ["q_proj"], "dtype": "float32", "top-k": 2}


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".toml"])
def test_config_files(suffix: str, folder: Path, check: Callable):
    table = SETTINGS | {"model": str(folder / "model"), "dataset": [str(folder / "alpha.jsonl")], "output": "run"}
    content = "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items()).encode()
    strategy = damaged_bytes(content) if suffix == ".toml" else damaged_json(table)

    @fuzz(f"config{suffix}")
    @given(strategy)
    def case(damaged: bytes):
        check(parse(TrainConfig, AdapterConfig), [f"--config={folder}/c{suffix}"], f"c{suffix}", damaged)

    case()


COMMANDS: dict[tuple[type, ...], list[str]] = {
    (TrainConfig, AdapterConfig): ["--model=m", "--dataset=d", "--output=o"],
    (DecodeConfig,): ["--model=m"],
    (EvaluationConfig,): ["--model=m", "--dataset=d"],
    (ExportConfig,): ["--model=m", "--adapter=a", "--output=o"],
}


def as_text(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**60:
        return "9" * 5000  # more digits than Python converts
    return value if isinstance(value, str) else str(value)[:5000]


def test_flags(check: Callable):
    names = [(types, flag_name(kind.name)) for types in COMMANDS for t in types for kind in kinds(t)]
    more = st.sampled_from(["--", "-1", "1e5", "0.3", "all", "~", "~x/y", "/"])

    @fuzz("flags")
    @given(st.sampled_from(names), st.one_of(VALUES.map(as_text), more), st.booleans())
    def case(flag: tuple[tuple[type, ...], str], text: str, joined: bool):
        types, name = flag
        check(parse(*types), [*COMMANDS[types], *([f"{name}={text}"] if joined else [name, text])])

    case()


HARMLESS: dict[str, Callable[[Any], bytes]] = {
    "byte order mark": lambda table: b"\xef\xbb\xbf" + dump(table),
    "indented": lambda table: json.dumps(table, indent=7).encode(),
    "CR LF": lambda table: json.dumps(table, indent=1).replace("\n", "\r\n").encode(),
    "other order": lambda table: json.dumps(dict(reversed(table.items()))).encode(),
    "white space around": lambda table: b"\n\t " + dump(table) + b"\n\n",
    "a null": lambda table: dump(table | {"something_else": None}),
}


NULL_REFUSED = ("adapter/adapter_config.json", "a null")
READ_BY_TRANSFORMERS = (("model/config.json", "byte order mark"), ("model/tokenizer_config.json", "byte order mark"))
"""Files that transformers reads, which takes no byte order mark."""
CHANGES = [
    (f"{name}.json", change)
    for name in ("model/config", "model/generation_config", "model/tokenizer_config", "adapter/adapter_config")
    for change in HARMLESS
    if (f"{name}.json", change) not in (NULL_REFUSED, *READ_BY_TRANSFORMERS)
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_what_changes_nothing(
    name: str, change: str, folder: Path, tables: dict[str, Any], capfd: pytest.CaptureFixture[str]
):
    expected = answer(folder, capfd, adapter=folder / "adapter")
    original = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(HARMLESS[change](tables[name]))
        assert answer(folder, capfd, adapter=folder / "adapter") == expected
    finally:
        (folder / name).write_bytes(original)


def test_the_budget():
    assert sum(COUNTS.values()) >= 500
