"""Flags of the server: each mistake is one line that names the flag, before the large files are read."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from random_models import random_method

from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.core.errors import UserError
from adafuse_jax.serving.__main__ import main
from adafuse_jax.serving.config import ServeConfig
from adafuse_jax.serving.security import api_key, is_loopback
from adafuse_jax.serving.server import bound_socket, listen


def fault(*flags: Any) -> str:
    with pytest.raises(UserError) as error:
        main([*map(str, flags)])
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapters", "tales"], "NAME=DIR"),
        (["--adapters", "=DIR"], "NAME=DIR"),
        (["--adapters", "a b=DIR"], "NAME=DIR"),
        (["--adapters", "a=X", "a=Y"], "given twice"),
        (["--adapters", "a="], "--adapters a is empty"),
        (["--adapters", "model=DIR"], "backbone's name"),
        (["--served-model-name", "a b"], "--served-model-name"),
        (["--api-key", "a", "--api-key-file", "b"], "exclude each other"),
        (["--strategy", "merged"], "--strategy merged"),
        (["--max-slots", "0"], "--max-slots"),
        (["--port", "70000"], "--port"),
        (["--drain-seconds", "-1"], "--drain-seconds"),
        (["--model", "nowhere"], "nowhere"),
        (["--api-key", ""], "--api-key: the key"),
        (["--api-key-file", "nowhere"], "--api-key-file"),
        (["--host", "no.such.host.invalid"], "cannot be listened on"),
        (["--unknown"], "--unknown"),
    ],
)
def test_mistakes(flags: list[str], message: str, tmp_path: Path):
    assert message in fault("--model", tmp_path / "model", "--port", 0, *flags)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("adafuse_jax.serving.server", "adafuse_jax.serving.app"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert fault("--model", tmp_path) == "uvicorn is not installed; pip install 'adafuse-jax[serve]'"


def test_a_port_in_use(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"--port {port}: cannot be listened on (Address already in use)" in fault(
            "--model", tmp_path, "--port", port
        )


def test_a_port_of_a_server_that_still_loads():
    """Two servers may bind one port; the second that listens gets one line."""
    first = ServeConfig(model="x", port=0)
    with bound_socket(first.host, first.port) as one:
        second = ServeConfig(model="x", port=one.getsockname()[1])
        with bound_socket(second.host, second.port) as two:
            listen(one, first)
            with pytest.raises(UserError, match="cannot be listened on"):
                listen(two, second)


def test_keys(tmp_path: Path):
    path = tmp_path / "key"
    for text, key in (("secret\n", "secret"), (" secret \r\nother\n", "secret")):
        path.write_text(text)
        assert api_key(ServeConfig(model="x", api_key_file=str(path))) == key
    for text in ("", "\n", "\u00e4\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="printable ASCII"):
            api_key(ServeConfig(model="x", api_key_file=str(path)))
    assert api_key(ServeConfig(model="x")) is None


def test_hosts():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org")))


def test_what_the_model_has_no_room_for(stories260k_dir: Path, tmp_path: Path):
    """A length beyond the context, layer-wise routers, and more experts than --max-experts."""
    flags = ["--model", stories260k_dir, "--port", 0, "--no-warm-up", "--max-slots", 1]
    assert "exceeds the 512 positions" in fault(*flags, "--max-model-len", 513)
    checkpoint = HFCheckpoint.open(str(stories260k_dir))
    settings = {"targets": ("q_proj",), "experts_per_layer": (2,) * checkpoint.config.num_layers}
    adapter = random_method("mola", checkpoint.config, **settings)
    identity = checkpoint.identity()
    save_adapter(adapter, tmp_path / "mola", backbone_name="stories", backbone_identity=identity)
    assert "mola" in fault(*flags, "--adapters", f"a={tmp_path / 'mola'}").lower()
    lora = random_method("lora", checkpoint.config, targets=("q_proj",))
    save_adapter(lora, tmp_path / "lora", backbone_name="stories", backbone_identity=identity)
    names = [f"{name}={tmp_path / 'lora'}" for name in "ab"]
    assert "--max-experts" in fault(*flags, "--adapters", *names, "--max-experts", 1)
