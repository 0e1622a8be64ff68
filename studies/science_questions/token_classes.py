"""A coarse class of every token of a vocabulary, by the text it stands for; and the experts that each class uses."""

from __future__ import annotations

import unicodedata
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from adafuse_jax.models.decoder import Backbone
from studies.questions import Packed

CLASSES = ("word, after a space", "letters, within a word", "digits", "punctuation", "white space", "special", "other")


def class_of(text: str) -> str:
    """Class of a token that is not special, from its text."""
    bare = text.strip()
    if not bare:
        return "white space" if text else "other"
    if all(c.isdigit() for c in bare):
        return "digits"
    if all(c.isalpha() or c in "'’" for c in bare) and any(c.isalpha() for c in bare):
        return "word, after a space" if text[0].isspace() else "letters, within a word"
    if all(unicodedata.category(c)[0] in "PS" for c in bare) and "\ufffd" not in bare:
        return "punctuation"
    return "other"


def classes_of(tokenizer: Any, vocab_size: int) -> Int32[np.ndarray, " V"]:
    """The index in CLASSES of every token; ids beyond the tokenizer's are "other"."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    classes = np.full(vocab_size, CLASSES.index("other"), np.int32)
    count = min(vocab_size, len(tokenizer))
    texts = tokenizer.batch_decode([[i] for i in range(count)], clean_up_tokenization_spaces=False)
    for i, text in enumerate(texts):
        classes[i] = CLASSES.index("special" if i in special else class_of(text))
    return classes


@partial(jax.jit, static_argnames="num_classes")
def class_loads(
    model: Backbone, adapter: Any, tokens: Array, positions: Array, segment_ids: Array, classes: Array, num_classes: int
) -> Float[Array, "C E"]:
    """Count the tokens of each class that use each expert. `classes` [V] gives the class of every token id; padding
    (segment 0) is not counted."""
    routing = model.run(tokens, adapter=adapter, positions=positions, segment_ids=segment_ids).routing
    used = jax.nn.one_hot(routing.experts, routing.probabilities.shape[-1]).sum(-2)  # [B, T, E]
    kind = jax.nn.one_hot(classes[tokens], num_classes) * (segment_ids > 0)[..., None]  # [B, T, C]
    return jnp.einsum("btc,bte->ce", kind, used)


def expert_use(
    model: Backbone, adapter: Any, packed: Packed, classes: Int32[np.ndarray, " V"], *, batch_size: int
) -> np.ndarray:
    """`class_loads` over all rows, [C, E] counts."""
    total = np.zeros(())
    for at in range(0, len(packed.tokens), batch_size):
        arrays = (
            np.pad(array[at : at + batch_size], ((0, max(0, at + batch_size - len(array))), (0, 0)))
            for array in (packed.tokens, packed.positions, packed.segment_ids)
        )
        total = total + np.asarray(class_loads(model, adapter, *arrays, classes, len(CLASSES)))
    return total
