"""Bodies of requests: OpenAI's parameters, vLLM's top_k and repetition_penalty, and `return_experts`.

Unknown parameters are refused, and so are known ones that the server does not have, unless their value asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from adafuse_jax.core.errors import UserError
from adafuse_jax.core.fields import require_text

MAX_N, MAX_PROMPTS, MAX_MESSAGES, MAX_PARTS = 128, 1024, 4096, 256
MAX_LOGPROBS, MAX_PARAMETERS = 20, 128
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` in a completion; in a chat it is what the context has left."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none",), "functions": ([],), "function_call": ("none",),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "logit_bias": ({},),
    "suffix": ("",), "best_of": (1,), "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
    "reasoning_effort": (), "verbosity": (), "service_tier": ("auto", "default"), "store": (False,), "metadata": ({},),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": (),
    "min_p": (0, 0.0), "min_tokens": (0,), "length_penalty": (1, 1.0), "use_beam_search": (False,), "ignore_eos": (False,),
    "stop_token_ids": ([],), "prompt_logprobs": (), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "chat_template": (), "chat_template_kwargs": ({},),
}  # fmt: skip
"""Parameters that the server has not → the values, beside null, that ask for nothing."""


def _text(text: str) -> str:
    try:
        require_text("it", text)
    except UserError as error:
        raise ValueError(str(error).removeprefix("it: ")) from None
    return text


# A list ends at its first fault: a body has room for a million.
Text = Annotated[str, AfterValidator(_text)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
StopString = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class Body(BaseModel):
    """A JSON object without unknown keys, whose values have their own types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _check_number(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(values) > MAX_PARAMETERS:
            raise ValueError(
                f"parameters are {len(values)}, and one object has at most {MAX_PARAMETERS}; leave some out"
            )
        return values


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(Body):
    """Parameters that completions and chats have in common. None counts as absent."""

    model: Annotated[Text, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    return_experts: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        """Refuse by name what the server has not; leave out values that ask for nothing."""
        if not isinstance(values, dict):
            return values
        for name, neutral in NEUTRAL.items():
            if name in values and values[name] is not None and not any(_same(values[name], n) for n in neutral):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return {name: value for name, value in values.items() if name not in NEUTRAL}

    @model_validator(mode="after")
    def _check_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true; leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral


class CompletionRequest(GenerationRequest):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 is for echo: true; ask for at least 1")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    name: Annotated[Text, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("role") in ("tool", "function") or values.get("tool_calls") or values.get("function_call"):
            raise ValueError("tools are not supported by this server; leave their turns out")
        parts = values.get("content")
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError(f"content of type {kind[:40]!r} is not supported; send text parts only")
        empty = ("tool_calls", "function_call", "refusal", "audio", "annotations")  # of answers that are sent back
        return {name: value for name, value in values.items() if name not in empty or value}


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true; leave it out")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; leave max_tokens out")
        return self


class LoadAdapterRequest(Body):
    lora_name: Annotated[Text, Field(min_length=1, max_length=128)]
    lora_path: Annotated[Text, Field(min_length=1, max_length=4096)]


class UnloadAdapterRequest(Body):
    lora_name: Annotated[Text, Field(min_length=1, max_length=128)]
