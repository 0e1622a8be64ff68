"""lm-evaluation-harness on a backbone and its adapter: its tasks, few-shot prompts and metrics, our numbers.

    from adafuse_jax.evaluation.lm_eval import AdaFuseLM
    lm_eval.simple_evaluate(model=AdaFuseLM("MODEL", adapter="ADAPTER", batch_size=16), tasks=["arc_easy"])

    python -m adafuse_jax.evaluation.lm_eval --model adafuse --model_args model=MODEL,adapter=ADAPTER --tasks arc_easy

Tokens, truncation and stops are those of the harness's own Hugging Face backend at batch size 1, whatever the batch size
here: rows to score are truncated on the left to `max_length`, prompts to continue to `max_length - max_gen_toks`, an
empty context is the BOS token (or EOS), and generation ends at the model's EOS tokens and before the task's stop strings.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import batched, groupby
from typing import Any

from adafuse_jax.core.cli import run_cli

MODULE = "adafuse_jax.evaluation.lm_eval"

if __name__ == "__main__":  # before the harness is imported: what fails or is interrupted meanwhile is one line, too
    run_cli(lambda argv: importlib.import_module(MODULE).main(argv))

from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.core import runtime
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.data.examples import Message
from adafuse_jax.data.rendering import render
from adafuse_jax.models.config import DType, Quantize

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lm_eval":
        raise
    raise UserError("lm-evaluation-harness is not installed; pip install 'adafuse-jax[eval]'") from error

from adafuse_jax.evaluation.continuations import score_continuations
from adafuse_jax.evaluation.loading import Loaded, load
from adafuse_jax.inference.detokenizer import TextStream
from adafuse_jax.inference.engine import Engine, occurrences
from adafuse_jax.inference.sampling import Sampling

ARGUMENTS = ("model", "adapter", "batch_size", "max_length", "dtype", "quantize", "quantize_head")
DEFAULTS = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 0}
BOUNDS = {
    "temperature": (0, 1e30),
    "top_k": (0, 2**31 - 1),
    "top_p": (1e-30, 1),
    "repetition_penalty": (1e-30, 1e30),
    "seed": (0, 2**32 - 1),
}
SAMPLING = ("do_sample", *DEFAULTS)


@register_model("adafuse")
class AdaFuseLM(TemplateLM):
    """A language model of the harness.

    Args:
      model: Hugging Face model directory or hub id, or what `evaluation.loading.load` made of one.
      adapter: adapter directory; None is the bare backbone. Not beside a loaded model, which has its own.
      batch_size: sequences scored or continued together; results do not depend on it.
      max_length: tokens the model sees at most; default: its context.
      dtype: of weights and activations; default: the model's own.
      quantize: int8, int4 or int4-g64, as the flag of decode.py; default: as the files have the weights.
      quantize_head: as the flag of decode.py.
    """

    def __init__(
        self,
        model: str | Loaded,
        adapter: str | None = None,
        *,
        batch_size: int | str = 8,
        max_length: int | None = None,
        dtype: DType | None = None,
        quantize: Quantize | None = None,
        quantize_head: bool = False,
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size!r}: it must be a number greater than 0")
        if isinstance(model, Loaded):
            if (adapter, dtype, quantize, quantize_head) != (None, None, None, False):
                raise UserError("a loaded model has its adapter, its dtype and its quantisation; leave these out")
            self.loaded = model
        else:
            self.loaded = load(HFCheckpoint.open(model, quantize, quantize_head), adapter, dtype)
        self.tokenizer, self.batch_size = self.loaded.tokenizer, int(batch_size)
        self._engine = Engine(self.loaded.model, self.loaded.adapter)
        context = self._engine.context_length
        self.max_length = context if max_length is None else int(max_length)
        if not 1 < self.max_length <= context:
            raise UserError(
                f"max_length is {max_length}: it must be above 1 and at most the model's {context} positions"
            )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> AdaFuseLM:
        """Create the model from `--model_args`. Ignores a torch device and a largest batch size to try, which the harness
        adds: JAX_PLATFORMS selects the device, and the batch size is fixed."""
        unknown = sorted(arg_dict.keys() - set(ARGUMENTS))
        if unknown or "model" not in arg_dict:
            wrong = f"unknown {unknown[0]!r}" if unknown else "'model' is missing"
            raise UserError(f"--model_args: {wrong}; give model=DIR and, if you like, {', '.join(ARGUMENTS[1:])}")
        batch_size = (additional_config or {}).get("batch_size")
        return cls(**({} if batch_size is None else {"batch_size": batch_size}) | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> AdaFuseLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated when a task does not specify a number."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        adapter = getattr(self.loaded.adapter, "config", None)
        return {"model_dtype": self.loaded.dtype, "adapter": None if adapter is None else str(adapter)}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation by the tokenizer's template, or as the Alpaca text that adapters without one are trained on.

        Without `add_generation_prompt` the text ends with the last message, to be continued. Raises `UserError` when the
        template refuses the conversation, or does not write the message that is to be continued as it is.
        """
        messages = [Message(m["role"], m["content"]) for m in chat_history]  # type: ignore[arg-type]
        if add_generation_prompt or not messages:
            return render(messages, self.tokenizer, add_generation_prompt=add_generation_prompt)
        text, last = render(messages, self.tokenizer, add_generation_prompt=False), messages[-1].content.strip()
        at = text.rfind(last)
        if at < 0:
            raise UserError("chat template: alters the last message, so it cannot be continued; correct the template")
        return text[: at + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the special tokens the tokenizer adds unless the text begins with one or the caller decides."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of tokenised requests (cache key or None, context, continuation)."""
        for key, context, continuation in requests:
            self._engine.check_prompt([*context, *continuation])
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens cannot be scored with max_length {self.max_length}: "
                    f"{key[1][:50] if key else ''!r}"
                )
        scores = score_continuations(
            self.loaded.model,
            self.loaded.adapter,
            [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests],
            max_length=self.max_length,
            batch_size=self.batch_size,
        )
        for (key, _, _), score in zip(requests, scores, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts: every token once, in windows of `max_length` that overlap as little as they can."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first stop string, EOS, or `max_gen_toks` tokens."""
        answers = [""] * len(requests)
        settings = [repr(sorted(request.args[1].items())) for request in requests]
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        for prompt in prompts:
            self._engine.check_prompt(prompt)
        # A request that comes several times (`repeats`) asks for as many samples.
        samples = occurrences([(setting, *prompt) for setting, prompt in zip(settings, prompts, strict=True)])
        order = sorted(range(len(requests)), key=lambda i: (settings[i], len(prompts[i])))
        for _, group in groupby(order, key=lambda i: settings[i]):
            for members in batched(group, self.batch_size):
                rows = [prompts[i] for i in members]
                texts = self._continue(rows, [samples[i] for i in members], requests[members[0]].args[1])
                for i, text in zip(members, texts, strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _continue(self, contexts: Sequence[list[int]], samples: Sequence[int], settings: dict[str, Any]) -> list[str]:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        until = handle_stop_sequences(kwargs.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        new_tokens = kwargs.pop("max_gen_toks")
        max_prompt = self.max_length - new_tokens
        if max_prompt < 1:
            raise UserError(
                f"max_gen_toks {new_tokens} leaves no room for a prompt in {self.max_length} tokens; lower it"
            )
        unknown = sorted(kwargs.keys() - set(SAMPLING))
        if unknown:
            raise UserError(
                f"generation setting {unknown[0]!r} is unknown; use {', '.join(SAMPLING)}, max_gen_toks, until"
            )
        values: dict[str, Any] = {
            name: default if kwargs.get(name) is None else kwargs[name] for name, default in DEFAULTS.items()
        }
        for name, value in values.items():
            low, high = BOUNDS[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UserError(f"generation setting {name} is {quoted(value)}: it must be from {low:g} to {high:g}")
        seed = int(values.pop("seed"))
        sampling = Sampling.of(**values | ({} if kwargs.get("do_sample") else {"temperature": 0.0}))
        # One batch size, one program: the last row fills it up.
        spare = self.batch_size - len(contexts)
        prompts = [context[-max_prompt:] for context in contexts] + [contexts[-1][-max_prompt:]] * spare
        stops = tuple(stop for stop in until if stop)
        streams = [TextStream(self.tokenizer, stops, inside_special=True) for _ in prompts]
        for step in self._engine.generate(
            prompts,
            max_new_tokens=new_tokens,
            sampling=sampling,
            seed=seed,
            samples=[*samples, *[samples[-1]] * spare],
        ):
            for index, row in step.rows.items():
                streams[index].read(row)
        return [stream.text for stream in streams[: len(contexts)]]


def main(argv: Sequence[str]) -> int:
    """The harness's own command line, with the model `adafuse` known to it."""
    from lm_eval.__main__ import cli_evaluate

    runtime.set_up()
    with runtime.memory_errors("lower --batch_size, or give --model_args dtype=bfloat16"):
        cli_evaluate()
    return 0
