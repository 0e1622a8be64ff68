"""Settings of `decode.py` as a frozen dataclass; its flags are made from these fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adafuse_jax.core.fields import MAX_COUNT, MAX_ROWS, MAX_SEED, check, flag, require
from adafuse_jax.models.config import QUANTIZE_HEAD_HELP, QUANTIZE_HELP, DType, Quantize

Strategy = Literal["fused", "unmerged", "golden", "switch", "merged"]
TOKEN_STRATEGIES = ("golden", "switch")
"""Strategies that merge the experts of one token, and so decode one row on one device."""
LEAST_TEMPERATURE = 1e-8
"""Temperatures below count as 0: float32 logits that differ at all differ by more than that, so only ties are drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """Configuration of `python decode.py`: model, prompts, sampling, output."""

    model: str = flag("Hugging Face model directory or hub id", metavar="DIR|ID", text="path")
    adapter: str | None = flag(
        "adapter directory written by train.py, or a LoRA of PEFT; default: the bare backbone", None, "DIR", text="path"
    )
    strategy: Strategy | None = flag(
        "how a token's experts act: beside the weights, in the megakernel (fused) or in separate XLA ops (unmerged), merged "
        "into a second copy of them (golden), merged in place, where every token's rounding stays in the weights, which "
        "drift (switch), or, a LoRA, merged once before decoding (merged); default: fused, for AdaFuse or no adapter, on a "
        "Hopper GPU with bfloat16 weights, else unmerged",
        None,
        moved={
            "simple": "it is the paper's ablation and a strategy of the benchmarks, see benchmarks/simple_merging.py"
        },
    )
    prompt: str | None = flag("one prompt; without a prompt, prompts are read from stdin, one a line", None, "TEXT")
    prompts_file: str | None = flag(
        "prompts, one a line: text, or JSON with a 'prompt' or 'messages' (.jsonl); a pipe is read as text",
        None,
        "FILE",
        text="path",
    )
    tensor_parallel: int = flag(
        "devices that share the model and decode together, fused, unmerged or with a merged LoRA", 1, low=1, high=4096
    )
    batch_size: int | None = flag(
        "prompts of --prompts-file, or answers of --num-samples, decoded together; default: 8, and 1 with a strategy that "
        "merges each token's experts",
        None,
        low=1,
        high=MAX_ROWS,
    )
    num_samples: int = flag("answers to each prompt, drawn apart from each other", 1, low=1, high=MAX_COUNT)
    chat: bool = flag("talk to the model; the conversation and its cache are kept until a line says /new", False)
    system: str | None = flag("system message put before the prompt", None, "TEXT")
    raw: bool = flag("give the prompt to the model as it is, without the chat template", False)
    max_new_tokens: int = flag("tokens to generate, at most", 256, low=1, high=MAX_COUNT)
    temperature: float = flag("0 (or below 1e-8) decodes greedily; higher is more random", 0.0, low=0, high=1e38)
    top_k: int = flag("sample among the k likeliest tokens (0: all)", 0, low=0, high=2**31 - 1)
    top_p: float = flag("sample among the likeliest tokens that hold this probability", 1.0, above=0, high=1)
    repetition_penalty: float = flag(
        "divide positive (multiply negative) logits of tokens seen before", 1.0, above=0, high=1e38
    )
    stop: tuple[str, ...] = flag("stop before any of these strings appears", (), "TEXT")
    seed: int = flag(
        "seed of the sampling; a prompt's n-th answer depends on the seed, the prompt and n alone",
        0,
        low=0,
        high=MAX_SEED,
    )
    stats: bool = flag("print ms/token, tokens/s and the experts used", False)
    json: bool = flag("print one JSON object a line per prompt instead of streaming text", False)
    dtype: DType | None = flag("type of weights and activations; default: the model's own", None)
    quantize: Quantize | None = flag(QUANTIZE_HELP, None)
    quantize_head: bool = flag(QUANTIZE_HEAD_HELP, False)

    def __post_init__(self) -> None:
        check(self)
        require(
            self.batch_size is None or self.prompts_file is not None or self.num_samples > 1,
            "--batch-size is for --prompts-file and --num-samples; give one of them, or leave --batch-size out",
        )
        require(
            self.num_samples == 1 or self.temperature >= LEAST_TEMPERATURE,
            f"--num-samples {self.num_samples} draws, and --temperature {self.temperature:g} has one answer only; give a "
            "higher one",
        )
        require(self.num_samples == 1 or not self.chat, "--num-samples and --chat exclude each other; give one of them")
        require(
            self.strategy not in TOKEN_STRATEGIES or self.tensor_parallel == 1,
            f"--strategy {self.strategy} runs on one device; leave --tensor-parallel out, or decode unmerged",
        )
        require(
            self.strategy not in TOKEN_STRATEGIES or self.batch_size in (None, 1),
            f"--strategy {self.strategy} merges the experts of one prompt; give --batch-size 1, or decode unmerged",
        )
        require(
            self.strategy in (None, "fused", "unmerged") or self.adapter is not None,
            f"--strategy {self.strategy} merges the experts of an adapter; give --adapter, or leave --strategy out",
        )
        require(all(self.stop), "--stop: a stop string is empty; leave it out or give it text")
        given = [
            f"--{n.replace('_', '-')}"
            for n in ("prompt", "prompts_file", "chat")
            if getattr(self, n) not in (None, False)
        ]
        require(len(given) <= 1, f"{' and '.join(given)} exclude each other; give one of them")
        require(not (self.raw and self.chat), "--raw and --chat exclude each other; give one of them")
        require(not (self.raw and self.system), "--raw leaves no place for --system; write it into the prompt")
        require(not (self.json and self.chat), "--json and --chat exclude each other; give one of them")

    @property
    def rows(self) -> int:
        """Prompts decoded together."""
        return self.batch_size or (1 if self.strategy in TOKEN_STRATEGIES else 8)
