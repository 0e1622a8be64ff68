"""Settings of `adafuse serve` as a frozen dataclass; its flags are made from these fields."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.fields import MAX_COUNT, MAX_TOKENS, check, checked_path, flag, require
from adafuse_jax.inference.config import Strategy
from adafuse_jax.models.config import QUANTIZE_HEAD_HELP, QUANTIZE_HELP, DType, Quantize

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")
"""Names of models, as clients write them in `model`."""
MAX_SLOTS, MAX_EXPERTS = 1024, 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Configuration of `adafuse serve`: model and adapters, address and key, sizes and limits."""

    model: str = flag("Hugging Face model directory or hub id", metavar="DIR|ID", text="path")
    adapters: tuple[str, ...] = flag(
        "adapters that requests choose by name: directories written by train.py, or LoRAs of PEFT", (), "NAME=DIR"
    )
    adapter_folders: tuple[str, ...] = flag(
        "folders below which /v1/load_lora_adapter may load adapters; default: it and /v1/unload_lora_adapter are off",
        (),
        "DIR",
        text="path",
    )
    served_model_name: str | None = flag("name of the backbone; default: that of its directory", None, "NAME")
    host: str = flag("address to listen on; 0.0.0.0: all", "127.0.0.1", "HOST")
    port: int = flag("port to listen on (0: a free one, which the log shows)", 8000, low=0, high=65535)
    api_key: str | None = flag("key that clients must send; visible to all users of this machine", None, "TEXT")
    api_key_file: str | None = flag("file whose first line is the key", None, "FILE", text="path")
    max_slots: int = flag("rows decoded together", 32, low=1, high=MAX_SLOTS)
    max_model_len: int | None = flag(
        "tokens of a prompt and its answer, at most; default: the model's context", None, low=2, high=MAX_TOKENS
    )
    max_experts: int | None = flag(
        "experts that all adapters together may have, a LoRA being one; memory is taken at the start; default: those of "
        "--adapters, and at least 64 with --adapter-folders",
        None,
        low=1,
        high=MAX_EXPERTS,
    )
    max_queue: int = flag("rows that wait for a slot, at most; more get 429", 256, low=0, high=MAX_COUNT)
    warm_up: bool = flag("compile what requests need before the first one", True)
    drain_seconds: int = flag("time that running requests get after SIGTERM or Ctrl-C", 30, low=0, high=86400)
    strategy: Strategy | None = flag("how a token's experts act, as in decode.py; default: decode.py's", None)
    tensor_parallel: int = flag("devices that share the model and decode together", 1, low=1, high=4096)
    dtype: DType | None = flag("type of weights and activations; default: the model's own", None)
    quantize: Quantize | None = flag(QUANTIZE_HELP, None)
    quantize_head: bool = flag(QUANTIZE_HEAD_HELP, False)

    def __post_init__(self) -> None:
        check(self)
        self.adapter_directories()
        require(
            self.api_key is None or self.api_key_file is None,
            "--api-key and --api-key-file exclude each other; give one of them",
        )
        require(
            self.strategy in (None, "fused", "unmerged"),
            f"--strategy {self.strategy} merges the experts of one adapter, and requests have their own; leave it out",
        )
        require(
            bool(NAME.fullmatch(self.model_name)),
            f"--served-model-name {quoted(self.model_name)}: use letters, digits and . _ / : -",
        )
        require(
            self.model_name not in self.adapter_directories(),
            f"--adapters: {self.model_name} is the backbone's name; give another one, or --served-model-name",
        )

    @property
    def model_name(self) -> str:
        """Name of the backbone for clients."""
        return self.served_model_name or Path(self.model).name or self.model

    def adapter_directories(self) -> dict[str, str]:
        """Name → directory. Raises `UserError` for another form and for names that are given twice."""
        found: dict[str, str] = {}
        for text in self.adapters:
            name, equals, directory = text.partition("=")
            if not equals or not NAME.fullmatch(name):
                raise UserError(
                    f"--adapters {quoted(text)}: give NAME=DIR, the name of letters, digits and . _ / : - only"
                )
            if name in found:
                raise UserError(f"--adapters: {name} is given twice; rename one of them")
            found[name] = checked_path(directory, f"--adapters {name}")
        return found
