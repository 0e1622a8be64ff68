"""Chat templates that write the present time: a run's data is that of its start, on whatever day it is resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import tiny

from adafuse_jax.core.errors import UserError
from adafuse_jax.core.tables import Table
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.data import Data, prepare_data, run_date

DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now(FORMAT) %}{% endif %}Today: {{ date_string }}\n"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DAY_1, DAY_2 = datetime(2026, 3, 1, 9, 30, 15, 123456), datetime(2027, 11, 22, 23, 59, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("dated"))


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    """Sets the clock that transformers gives to templates."""

    def set_clock(day: datetime) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return day

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    return set_clock


def prepared(folder: Path, template: str, recorded: dict | None = None, **changes) -> tuple[Data, str | None]:
    """The data of a run, and the date to record. `recorded` is the config of a run that is resumed."""
    tokenizer = load_tokenizer(folder / "model")
    tokenizer.chat_template = template
    config = TrainConfig(
        model="m", dataset=(f"{folder}/alpha.jsonl",), output="o", max_length=128, **({"eval_fraction": 0.2} | changes)
    )
    with run_date(config, tokenizer, None if recorded is None else Table(recorded, "train_config.json")) as date:
        return prepare_data(config, tokenizer), date


def text_of(data: Data, folder: Path) -> str:
    return load_tokenizer(folder / "model").decode(data.batches.rows[0].rows().tokens[0])


FORMATS = ("%d %b %Y", "%B %d, %Y", "%Y-%m-%d %H:%M:%S.%f", "%A %j, week %V", "%s %x")


@pytest.mark.parametrize("form", FORMATS)
def test_a_run_resumed_on_another_day_has_the_same_data(folder: Path, on_day, form: str, caplog):
    """The held-out part too. Another run that starts then has other data."""
    caplog.set_level("INFO", "adafuse_jax")
    template = DATED.replace("FORMAT", f"'{form}'")
    on_day(DAY_1)
    first, date = prepared(folder, template)
    assert date == DAY_1.isoformat()
    assert f"Today: {DAY_1.strftime(form)}\n" in text_of(first, folder)
    on_day(DAY_2)
    caplog.clear()
    again, date_again = prepared(folder, template, {"template_date": date})
    assert (again.fingerprint, date_again) == (first.fingerprint, date)
    assert [row.tokens.tolist() for row in again.held_out.rows] == [row.tokens.tolist() for row in first.held_out.rows]
    assert caplog.messages.count(
        f"the chat template writes the date: rendered with {DAY_1}, also when the run is resumed"
    ) == 1  # fmt: skip
    other, _ = prepared(folder, template)
    assert other.fingerprint != first.fingerprint
    repeated, _ = prepared(folder, template, template_date=date)
    assert repeated.fingerprint == first.fingerprint


def test_a_run_of_an_earlier_version_recorded_none(folder: Path, on_day, caplog):
    """The run goes on as before on its day, and on another day with its day as --template-date."""
    template = DATED.replace("FORMAT", "'%d %b %Y'")
    on_day(DAY_1)
    first, _ = prepared(folder, template)
    assert prepared(folder, template, {})[0].fingerprint == first.fingerprint
    assert "give the day of its start as --template-date" in caplog.text
    on_day(DAY_2)
    assert prepared(folder, template, {})[0].fingerprint != first.fingerprint
    assert prepared(folder, template, {}, template_date="2026-03-01")[0].fingerprint == first.fingerprint


def test_a_template_without_a_date_records_none(folder: Path, on_day, caplog):
    template = DATED.replace("strftime_now(FORMAT)", "'26 Jul 2024'")
    on_day(DAY_1)
    _, date = prepared(folder, template)
    assert date is None
    assert not [line for line in caplog.messages if "date" in line]
    prepared(folder, template, template_date="2026-03-01")
    assert "--template-date 2026-03-01: the chat template writes no date; it has no effect" in caplog.messages


def test_dates_that_are_none(folder: Path):
    with pytest.raises(UserError, match=r"--template-date is 'tomorrow': it must be a date or time in ISO format"):
        TrainConfig(model="m", dataset=("d",), output="o", template_date="tomorrow")
    for damaged in ("yesterday", 5):
        with pytest.raises(UserError, match=r"^train_config\.json: template_date"):
            prepared(folder, DATED.replace("FORMAT", "'%d'"), {"template_date": damaged})


def test_train_config_records_the_date_and_gives_it_back(folder: Path, on_day, tmp_path: Path, monkeypatch):
    """Through train.py's function: a run, and the same one resumed on another day."""
    from adafuse_jax.adapters.config import AdapterConfig
    from adafuse_jax.training import trainer

    model = tiny.write_model(tmp_path / "model")
    table = json.loads((model / "tokenizer_config.json").read_text())
    table["chat_template"] = DATED.replace("FORMAT", "'%d %b %Y'")
    (model / "tokenizer_config.json").write_text(json.dumps(table))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = TrainConfig(
        model=str(model), dataset=(f"{folder}/alpha.jsonl",), output=str(tmp_path / "run"), max_length=64, batch_size=1,
        steps=2, eval_examples=0, dtype="float32", checkpoint_every=1,
    )  # fmt: skip
    adapter = AdapterConfig(adapter="lora", rank=1, targets=("q_proj",))
    on_day(DAY_1)
    trainer.train(config, adapter)
    assert json.loads((tmp_path / "run" / "train_config.json").read_text())["template_date"] == DAY_1.isoformat()
    weights = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    on_day(DAY_2)
    trainer.train(dataclasses.replace(config, resume=True), adapter)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == weights
