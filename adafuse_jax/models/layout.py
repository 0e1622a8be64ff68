"""Layout of arrays over devices, as the decoder, the loss and a training run use it. `Layout` itself is one device: every
method returns its input. `adafuse_jax.parallel.layout` has that of a mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int


class Layout:
    """Seams at which a program over several devices differs from that of one. Layouts are static arguments of programs."""

    def embedded(self, table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding."""
        return table[tokens]

    def activations(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream."""
        return x

    def layer[Weights](self, weights: Weights) -> Weights:
        """The weights of one layer, and of its experts, as the layer multiplies with them."""
        return weights

    def head[Weights](self, head: Weights, *, is_tied: bool) -> Weights:
        """The head [V, D], or the tied embedding, as the loss multiplies with it."""
        return head

    def body(self, body: Callable[..., Any], weights: Any, *, in_scan: bool) -> Callable[..., Any]:
        """The function that runs one layer, of which `weights` [L, …] are those of all. Its backward pass may use all that
        the forward pass has computed."""
        return body

    def attention(self, attend: Callable[..., Array]) -> Callable[..., Array]:
        """`attend(q, k, v, visibility, window)`, run by every device on its own rows and heads."""
        return attend

    def whole[Tree](self, tree: Tree) -> Tree:
        """Results of a program that every device, and every process, has."""
        return tree

    def state[State](self, state: State) -> State:
        """A training state, inside a program."""
        return state

    def rows(self, batch_size: int) -> range:
        """Rows of a micro-batch that this process reads."""
        return range(batch_size)

    def batch(self, rows: Any, batch_size: int, *, axis: int = 0) -> Any:
        """The batch of `batch_size` rows along `axis`, from a tree of arrays of this process's `rows`."""
        return rows

    def host(self, array: Array) -> np.ndarray:
        """The whole array in this host's memory. With several processes all call it."""
        return np.asarray(array)


ONE_DEVICE = Layout()
