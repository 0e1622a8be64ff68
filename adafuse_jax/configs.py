"""Every setting of the project as a frozen dataclass; the flags of `train.py` and `decode.py` are made from these fields."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Literal

from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.fields import MAX_SEED, check, flag, require
from adafuse_jax.presets import PRESETS

DType = Literal["float32", "bfloat16", "float16"]
TrainDType = Literal["float32", "bfloat16"]
"""Without float16, in which gradients vanish or overflow."""
Method = Literal["adafuse", "moral", "mola", "pesc", "lora", "full", "none"]
Strategy = Literal["fused", "unmerged", "golden", "switch", "simple", "merged"]
TOKEN_STRATEGIES = ("golden", "switch", "simple")
"""Those that merge the experts of one token, and so decode one row on one device."""

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + FFN_LINEARS
"""The seven linear layers of a block, in execution order."""

MAX_EXPERTS, MAX_COUNT, MAX_ROWS, MAX_TOKENS = 4096, 10**9, 2**16, 2**24
"""The largest values of flags: experts, steps and other counts, rows of a batch, tokens of a sequence."""
LEAST_TEMPERATURE = 1e-8
"""Temperatures below count as 0: float32 logits that differ at all differ by more than that, so only ties are drawn."""


def _preset(help: str, name: str, **bounds: Any) -> Any:
    """The flag of a setting whose default is the method's."""
    values: dict[str, list[str]] = {}
    for method, preset in PRESETS.items():
        if name in preset.settings:
            value = preset.settings[name]
            text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            values.setdefault(text, []).append(method)
    defaults = "; ".join(f"{' '.join(methods)}: {text}" for text, methods in values.items())
    return flag(f"{help} (default, by method: {defaults})", None, **bounds)


def _require_date(name: str, text: str | None) -> None:
    try:
        datetime.fromisoformat(text or "2026-01-01")
    except ValueError:
        raise UserError(f"{name} is {quoted(text)}: it must be a date or time in ISO format, as 2026-03-01") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. `kind` is `default`, `linear` (positions divided by `factor`) or `llama3`."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes of a Llama-family decoder. `sliding_windows[l]` is layer l's attention window in tokens, None for all."""

    model_type: str
    vocab_size: int
    embed_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of one of the seven linears."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, f = self.embed_dim, self.hidden_dim
        shapes = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        return (shapes | {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)})[name]

    def has_bias(self, name: str) -> bool:
        if name == "o_proj":
            return self.o_bias
        return self.qkv_bias if name in ATTENTION_LINEARS else self.mlp_bias


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The method, which linears get experts, how many, how large, and how the router chooses among them.

    A setting that is not given is the method's preset; one that the method does not have is None, and refused when given.
    """

    adapter: Method = flag("method: mixtures of experts, one LoRA, all weights, or no training at all", "adafuse")
    targets: tuple[str, ...] = _preset(f"linears that get experts: any of {' '.join(LINEARS)}, or 'all'", "targets")
    num_experts: int = _preset("experts per linear, E", "num_experts", low=1, high=MAX_EXPERTS)
    experts_per_layer: tuple[int, ...] = _preset(
        "experts per linear by depth, for equal parts of the layers from the first to the last; one number is for all",
        "experts_per_layer",
        low=1,
        high=MAX_EXPERTS,
    )
    rank: int = _preset("LoRA rank of each expert, R; width of a PESC adapter", "rank", low=1, high=2**16)
    top_k: int = _preset("experts active per token, k", "top_k", low=1, high=MAX_EXPERTS)
    alpha: float = _preset("LoRA scale: each expert's output is multiplied by alpha / rank", "alpha", above=0, high=1e6)
    dropout: float = _preset("share of each expert's inputs dropped while training", "dropout", low=0, below=1)
    renormalize: bool = _preset(
        "gates are a softmax over the k selected logits; off: over all E logits, then top-k", "renormalize"
    )
    balance_coefficient: float = _preset(
        "weight of the load-balance loss E·Σ f_e·P_e", "balance_coefficient", low=0, high=1e6
    )

    def __post_init__(self) -> None:
        settings = PRESETS[self.adapter].settings
        for f in fields(self):
            given, default = getattr(self, f.name), settings.get(f.name)
            name = "--" + f.name.replace("_", "-")
            if f.name != "adapter":
                require(
                    given is None or default is not None,
                    f"{name} is no setting of --adapter {self.adapter}, which has "
                    f"{', '.join('--' + s.replace('_', '-') for s in settings) or 'none'}; leave it out",
                )
                object.__setattr__(self, f.name, default if given is None else given)
        check(self)
        if self.targets is not None:
            targets = LINEARS if tuple(self.targets) == ("all",) else tuple(self.targets)
            unknown = [name for name in targets if name not in LINEARS]
            require(not unknown, f"--targets: unknown linear {unknown!r}; choose from {' '.join(LINEARS)}, or 'all'")
            require(bool(targets), f"--targets is empty; name at least one of {' '.join(LINEARS)}")
            object.__setattr__(self, "targets", tuple(name for name in LINEARS if name in targets))
        if self.experts_per_layer is not None:
            numbers = " ".join(map(str, self.experts_per_layer))
            require(bool(numbers), "--experts-per-layer is empty; give one number or several")
            require(
                min(self.experts_per_layer) >= self.top_k,
                f"--experts-per-layer {numbers}: no layer can have fewer than --top-k {self.top_k}; raise the smallest",
            )
        require(
            self.num_experts is None or self.top_k <= self.num_experts,
            f"--top-k {self.top_k} is larger than --num-experts {self.num_experts}; choose at most as many as there are",
        )

    @property
    def scale(self) -> float:
        """s = α / R."""
        return self.alpha / self.rank

    @property
    def max_experts(self) -> int:
        """The most experts that a router of the method chooses from; 0 without a router."""
        return self.num_experts or max(self.experts_per_layer or (0,))

    def table(self) -> dict[str, Any]:
        """The method and those settings that it has."""
        return {"adapter": self.adapter} | {name: getattr(self, name) for name in PRESETS[self.adapter].settings}

    def require_strategy(self, strategy: str) -> None:
        """Raise `UserError` unless the method can decode so."""
        fitting = PRESETS[self.adapter].strategies
        require(
            strategy in fitting,
            f"--strategy {strategy} does not fit an adapter of {self.adapter}; it decodes {' or '.join(fitting)}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What `python train.py` does: data, schedule, optimiser, checkpoints."""

    model: str = flag("Hugging Face model directory or hub id", metavar="DIR|ID", text="path")
    dataset: tuple[str, ...] = flag(
        "data sets: SOURCE[:SUBSET][#SPLIT][@FORMAT][=WEIGHT], SOURCE a preset, hub id, file, directory or pipe",
        metavar="SPEC",
        text="spec",
    )
    output: str = flag("directory for checkpoints, metrics, plots and the final adapter", metavar="DIR", text="path")
    init_lora: str | None = flag(
        "LoRA to begin from, written by train.py or PEFT: it is every expert's initial value", None, "DIR", text="path"
    )
    eval_dataset: tuple[str, ...] = flag(
        "held-out data sets, as --dataset without a weight; default: the sets' own validation or test split",
        (),
        "SPEC",
        text="spec",
    )
    skip_bad_rows: bool = flag("leave out rows that cannot be read or used, and log how many and the first", False)
    eval_fraction: float = flag(
        "share of the training data held out when there is no other held-out split", 0.02, low=0, below=1
    )
    eval_examples: int = flag(
        "held-out examples scored at each evaluation, at most (0: no evaluation)", 200, low=0, high=MAX_COUNT
    )
    eval_every: int = flag("steps between evaluations; the last step is always evaluated", 200, low=1, high=MAX_COUNT)
    steps: int | None = flag("optimiser steps; default: from --epochs", None, low=1, high=MAX_COUNT)
    epochs: float = flag(
        "passes over the data, when --steps is not given: each row is drawn so many times, and the last batch is filled up "
        "with padding; of data sets with weights, as many rows in all",
        1.0,
        above=0,
        high=1e6,
    )
    batch_size: int = flag("sequences per micro-batch", 8, low=1, high=MAX_ROWS)
    grad_accum: int = flag("micro-batches per optimiser step", 1, low=1, high=MAX_ROWS)
    max_length: int = flag("tokens per sequence; longer examples are cut", 1024, low=8, high=MAX_TOKENS)
    packing: bool = flag("pack several examples into a sequence, masked from each other", True)
    learning_rate: float = flag("peak learning rate of AdamW", 2e-4, above=0, high=1e30)
    tied_share: float = flag(
        "share of the steps, from the first, in which AdaFuse's experts learn as one LoRA", 0.0, low=0, high=1
    )
    router_share: float = flag(
        "share of the steps, from the first, in which routers learn; then they stay as they are", 1.0, low=0, high=1
    )
    min_lr_ratio: float = flag("final learning rate of the cosine, as a share of the peak", 0.1, low=0, below=1)
    warmup_ratio: float = flag("share of the steps spent warming up", 0.03, low=0, below=1)
    weight_decay: float = flag("AdamW weight decay on the experts' matrices", 0.0, low=0, high=1e3)
    clip_norm: float = flag("global gradient norm above which gradients are scaled down", 1.0, above=0, high=1e30)
    beta1: float = flag("AdamW first-moment decay", 0.9, low=0, below=1)
    beta2: float = flag("AdamW second-moment decay", 0.999, low=0, below=1)
    dtype: TrainDType = flag("type of the backbone and of the activations; adapters train in float32", "bfloat16")
    remat: bool = flag("recompute each layer in the backward pass to save memory", True)
    seed: int = flag("seed of the adapters' initial values and of the data order", 0, low=0, high=MAX_SEED)
    checkpoint_every: int = flag("steps between checkpoints", 100, low=1, high=MAX_COUNT)
    keep_checkpoints: int = flag("checkpoints kept", 2, low=1, high=MAX_COUNT)
    log_every: int = flag("steps between lines of metrics.jsonl", 1, low=1, high=MAX_COUNT)
    resume: bool = flag("continue the run in --output from its last checkpoint", False)
    template_date: str | None = flag(
        "time that chat templates write if they ask for the present one, in ISO format; default: the start of the run",
        None,
        "DATE",
    )

    def __post_init__(self) -> None:
        check(self)
        require(
            self.batch_size * self.max_length < 2**31,
            f"--batch-size {self.batch_size} × --max-length {self.max_length}: a micro-batch has at most 2**31 - 1 tokens; "
            "lower one of them",
        )
        require(len(self.dataset) > 0, "--dataset is empty; name at least one data set")
        _require_date("--template-date", self.template_date)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """What `python decode.py` does: model, prompts, sampling, output."""

    model: str = flag("Hugging Face model directory or hub id", metavar="DIR|ID", text="path")
    adapter: str | None = flag(
        "adapter directory written by train.py, or a LoRA of PEFT; default: the bare backbone", None, "DIR", text="path"
    )
    strategy: Strategy | None = flag(
        "how a token's experts act: beside the weights, in one launch (fused) or as single operations (unmerged), merged "
        "into a second copy of them (golden), merged in place, which drifts (switch), merged layer by layer (simple), or, "
        "a LoRA, merged once before decoding (merged); default: fused, for AdaFuse or no adapter, on a Hopper GPU with "
        "bfloat16 weights, else unmerged",
        None,
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
