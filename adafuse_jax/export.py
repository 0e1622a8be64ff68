"""Export an adapter for other programs: `python -m adafuse_jax.export --model DIR --adapter DIR --output DIR`.

    huggingface    the backbone with a LoRA, or whatever else PEFT adapts, merged in: a plain model directory for any
                   program; its linears in 8 or 4 bits with --quantize, which needs no adapter
    peft           a LoRA as PEFT's two files
    adafuse-jax    any adapter as train.py writes it; ties a LoRA of PEFT to this backbone

A tokenizer or a chat template in the adapter's directory goes with it in each form.

Experts that change from token to token have no place in other programs: only a LoRA leaves in the first two forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adafuse_jax.core import runtime
from adafuse_jax.core.atomic_files import require_free
from adafuse_jax.core.cli import run_cli
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.fields import check, flag
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.models.config import DType, Quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Model, adapter, and the form and place of the export."""

    model: str = flag("Hugging Face model directory or hub id of the adapter's backbone", metavar="DIR|ID", text="path")
    adapter: str | None = flag(
        "adapter directory written by train.py, or a LoRA of PEFT; with --quantize it may be left out",
        None,
        "DIR",
        text="path",
    )
    output: str = flag("directory to write; it must not exist, or be empty", metavar="DIR", text="path")
    format: Literal["huggingface", "peft", "adafuse-jax"] = flag(
        "a plain model with the LoRA merged in, a LoRA for PEFT, or an adapter of this project", "huggingface"
    )
    dtype: DType | None = flag("type of the merged model's weights; default: the backbone's own", None)
    quantize: Quantize | None = flag(
        "write the linears' weights in 8 bits, or in 4 with groups of 128 (int4) or 64 (int4-g64) inputs; default: plain",
        None,
    )
    quantize_head: bool = flag(
        "write the head in 8 bits, too, with a scale for each token; one that is tied to the embedding gets a tensor of its "
        "own",
        False,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.adapter is None and self.quantize is None and not self.quantize_head:
            raise UserError("there is nothing to export; give --adapter, or --quantize for a smaller model")
        if self.dtype is not None and self.format != "huggingface":
            raise UserError(f"--dtype is for --format huggingface; adapters are written as {self.format} in float32")
        for flag_name, is_given in (("--quantize", self.quantize is not None), ("--quantize-head", self.quantize_head)):
            if is_given and self.format != "huggingface":
                raise UserError(
                    f"{flag_name} is for --format huggingface; {self.format} holds no backbone; leave it out"
                )


def export(config: ExportConfig) -> None:
    """Write `config.output`. It appears complete or not at all. Raises `UserError` for bad input or a full disk."""
    import jax.numpy as jnp
    from safetensors import SafetensorError

    from adafuse_jax.adapters.lora import LoRA, merged
    from adafuse_jax.adapters.registry import AnyAdapter
    from adafuse_jax.checkpoints.adapter_directory import load_adapter, save_adapter, trained_quantization
    from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
    from adafuse_jax.checkpoints.hf_export import export_backbone
    from adafuse_jax.checkpoints.peft import merged_peft, read_mergeable, save_peft_lora
    from adafuse_jax.checkpoints.peft_files import PeftAdapter
    from adafuse_jax.data.tokenizer import load_tokenizer, tokenizer_files, write_tokenizer
    from adafuse_jax.models.decoder import Backbone
    from adafuse_jax.models.quantised import quantised

    out = Path(config.output)
    require_free(out, "--output")
    wanted = HFCheckpoint.open(config.model, config.quantize, config.quantize_head)
    checkpoint = wanted.quantised(None)  # as it is stored: adapters merge before the weights are quantised
    identity, merges = checkpoint.identity(), config.adapter is not None and config.format == "huggingface"
    if merges and (form := checkpoint.hf_config.form) is not None:
        raise UserError(
            f"{checkpoint.directory}: the weights are {form.layout.name}, whose codes cannot hold what is merged into them; "
            "give the model that they were made of, or --format peft"
        )

    def as_wanted(model: Backbone) -> Backbone:
        found = wanted.quantisation
        return model if found is None else quantised(model, found.linears, head=found.has_head)

    adapter: AnyAdapter | PeftAdapter | None = None
    if config.adapter is not None and config.format == "huggingface":
        adapter = read_mergeable(config.adapter, checkpoint.config)
    if config.adapter is not None and adapter is None:
        adapter = load_adapter(
            config.adapter, checkpoint.config, backbone_identity=identity, dtype=jnp.dtype("float32"),
            quantization=checkpoint.quantisation,
        )  # fmt: skip
    own = tokenizer_files(checkpoint.directory)
    tokenizer = own
    if config.adapter is not None:
        tokenizer = tokenizer_files(checkpoint.directory, Path(config.adapter).expanduser())
    if tokenizer != own:  # the adapter's: it must be of this model's tokens
        load_tokenizer(checkpoint.directory, config.adapter)
    try:
        if adapter is None:
            model = load_backbone(wanted, config.dtype)
            export_backbone(model, out, source=checkpoint, tokenizer=tokenizer, base_identity=identity)
        elif isinstance(adapter, PeftAdapter):
            model = merged_peft(load_backbone(checkpoint, config.dtype), adapter)
            model = as_wanted(model)
            export_backbone(model, out, source=checkpoint, tokenizer=tokenizer)
        elif config.format == "adafuse-jax":
            trained = trained_quantization(Path(str(config.adapter)).expanduser())
            save_adapter(adapter, out, backbone_name=config.model, backbone_identity=identity, quantization=trained)
        elif not isinstance(adapter, LoRA):
            raise UserError(
                f"--format {config.format} is for a LoRA, and {config.adapter} is an adapter of {adapter.config.adapter}, "
                "whose experts change from token to token; decode it with decode.py"
            )
        elif config.format == "peft":
            save_peft_lora(adapter, out, checkpoint.config, backbone_name=config.model)
        else:
            model = merged(load_backbone(checkpoint, config.dtype), adapter)
            model = as_wanted(model)
            export_backbone(model, out, source=checkpoint, tokenizer=tokenizer)
        if config.format != "huggingface" and tokenizer != own:
            write_tokenizer(tokenizer, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output {out}: cannot be written ({reason}); give another directory") from error


def main(argv: Sequence[str], program: str = "python -m adafuse_jax.export") -> None:
    """Export an adapter for other programs."""
    (config,) = parse_flags(main.__doc__, (ExportConfig,), argv, program)
    runtime.set_up()
    with runtime.memory_errors("set JAX_PLATFORMS=cpu to merge in the host's memory"):
        export(config)
    print(f"wrote {config.output}")


if __name__ == "__main__":
    run_cli(main)
