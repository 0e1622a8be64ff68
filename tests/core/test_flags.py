"""Flags: every one declares its bounds, every way to give a value passes the same check, and `~` is a home."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.core.errors import MAX_MESSAGE, UserError
from adafuse_jax.core.fields import Kind, flag_name, kinds
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.evaluation.config import EvaluationConfig
from adafuse_jax.export import ExportConfig
from adafuse_jax.inference.config import DecodeConfig
from adafuse_jax.training.config import TrainConfig
from examples.skills.config import DemoConfig

REQUIRED: dict[type, list[str]] = {
    TrainConfig: ["--model=m", "--dataset=d", "--output=o"],
    DecodeConfig: ["--model=m"],
    AdapterConfig: [],
    EvaluationConfig: ["--model=m", "--dataset=d"],
    DemoConfig: [],
    ExportConfig: ["--model=m", "--adapter=a", "--output=o"],
}
NUMBERS = [(t, kind) for t in REQUIRED for kind in kinds(t) if kind.type in (int, float)]
PATHS = [(t, kind) for t in REQUIRED for kind in kinds(t) if kind.metadata["text"] == "path"]
WRONG = ["-1", str(10**30), "-" + "9" * 5000, "nan", "inf", "-inf", "1_0", "\u0661", "", "x" * 9999]
EVERY_METHOD = {"experts_per_layer": ["--adapter=mola"]}


def names(cases: list[tuple[type, Kind]]) -> list[str]:
    return [f"{t.__name__}.{kind.name}" for t, kind in cases]


def parse(config_type: type, *flags: str) -> Any:
    (config,) = parse_flags("", (config_type,), [*REQUIRED[config_type], *flags])
    return config


def refused(config_type: type, *flags: str) -> str:
    with pytest.raises(UserError) as raised:
        parse(config_type, *flags)
    message = str(raised.value)
    assert len(message) <= MAX_MESSAGE
    assert message.isprintable()
    return message


@pytest.mark.parametrize(("config_type", "kind"), NUMBERS, ids=names(NUMBERS))
class TestNumbers:
    def test_has_bounds(self, config_type: type, kind: Kind):
        low, high, above, below = (kind.metadata[name] for name in ("low", "high", "above", "below"))
        assert (low is None) != (above is None)
        assert (high is None) != (below is None)

    @pytest.mark.parametrize(
        "text", ["-1", str(10**30), "-" + "9" * 5000, "nan", "inf", "-inf", "1_0", "\u0661", "", "x" * 9999]
    )
    def test_what_is_out_of_bounds_is_refused_however_it_is_given(
        self, config_type: type, kind: Kind, text: str, tmp_path: Path
    ):
        extra = EVERY_METHOD.get(kind.name, [])
        if text == str(10**30) and (kind.metadata["high"] or 0) >= 1e30:
            text = "1e39"
        name = flag_name(kind.name)
        assert name in refused(config_type, *extra, f"{name}={text}")
        (tmp_path / "c.json").write_text(json.dumps({kind.name: text}))
        assert name in refused(config_type, *extra, f"--config={tmp_path}/c.json")
        if re.fullmatch(r"-?[0-9]{1,40}|nan|-?inf", text):
            value = int(text) if text[-1].isdigit() else math.nan if text == "nan" else float(text)
            required = {f.name: "m" for f in dataclasses.fields(config_type) if f.default is dataclasses.MISSING}
            if "dataset" in required:
                required |= {"dataset": ("d",)}
            settings: dict[str, Any] = {"adapter": "mola"} if extra else {}
            with pytest.raises(UserError, match=f"^{name} is "):
                config_type(**required, **settings, **{kind.name: (value,) if kind.is_tuple else value})

    def test_its_bounds_are_in_the_message(self, config_type: type, kind: Kind):
        extra = EVERY_METHOD.get(kind.name, [])
        message = refused(config_type, *extra, f"{flag_name(kind.name)}=-5")
        assert kind.rule in message
        high = kind.metadata["high"] if kind.metadata["high"] is not None else kind.metadata["below"]
        assert f"{high:g}" in message or str(high) in message


@pytest.mark.parametrize(("config_type", "kind"), PATHS, ids=names(PATHS))
class TestPaths:
    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("", "is empty"),
            ("x" * 256, "256 bytes"),
            ("é" * 128, "256 bytes"),
            ("a/" * 3000, "too long"),
            ("a\udce9", "UTF-8"),
        ],
    )
    def test_what_no_file_has_is_refused(self, config_type: type, kind: Kind, text: str, fault: str):
        message = refused(config_type, f"{flag_name(kind.name)}={text}")
        assert message.startswith(flag_name(kind.name))
        assert fault in message

    def test_a_tilde_is_the_home(self, config_type: type, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        config = parse(config_type, f"{flag_name(kind.name)}=~/x~y")
        assert getattr(config, kind.name) == f"{tmp_path}/x~y"


def test_a_tilde_in_data_sets_and_in_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("output: ~/run\ndataset: [~/a.jsonl@alpaca=2, org/set]\n")
    (config,) = parse_flags("", (TrainConfig,), ["--model=m", "--config=~/c.yaml"])
    assert config.output == f"{tmp_path}/run"
    assert config.dataset == (f"{tmp_path}/a.jsonl@alpaca=2", "org/set")


def test_a_config_file_gives_what_flags_give(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(
        "steps: 5\nlearning_rate: 1e-4\nepochs: 2\npacking: false\nbatch-size: '4'\ndataset: one\nmodel: null\n"
    )
    from_file = parse(TrainConfig, f"--config={tmp_path}/c.yaml")
    flags = ["--steps=5", "--learning-rate=1e-4", "--epochs=2", "--no-packing", "--batch-size=4"]
    assert from_file == parse(TrainConfig, *flags)  # --dataset=d wins over the file
    (tmp_path / "c.toml").write_text('dataset = "one"\n')
    (config,) = parse_flags("", (TrainConfig,), ["--model=m", "--output=o", f"--config={tmp_path}/c.toml"])
    assert config.dataset == ("one",)
