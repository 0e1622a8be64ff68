"""The megakernel's tile schedule, executed in NumPy: the same plan, tiles, partial sums and phases, one CTA after the
other.

It is the reference of the schedule: a tile that no CTA computes, or a partial sum that is read before it is stored, is
NaN in the result. Everything is in fp32 and in plain layouts (an activation is [N, D]); what the CTAs of a phase
exchange goes through the same numbered partial sums as on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pallas_kernels.megakernel.activations import ACTIVATIONS
from pallas_kernels.megakernel.plan import Group, Plan
from pallas_kernels.megakernel.schedule import AttentionSchedule, Scalars, Tile, TileSchedule
from pallas_kernels.megakernel.sizes import TILE_K, TILE_M, WGMMA_M, WGMMA_N
from pallas_kernels.quantised.reference import dequantise_np

Array = np.ndarray
Store = Callable[[int, tuple[str, ...], slice, slice, list[Array]], None]
"""(layer, linears, output rows, batch columns, their values [rows, columns])."""


def run(inputs: dict[str, Any], plan: Plan, model: Any, **_: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the schedule in NumPy, in place of `kernel_sm90.run_megakernel`; all sums in fp32.

    Returns (logits [V, N], k_new [L, N, K, H], v_new [L, N, K, H]).
    """

    def fp32(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fp32(inner) for name, inner in value.items()}
        return np.asarray(value) if np.issubdtype(value.dtype, np.integer) else np.asarray(value, np.float32)

    dtype = inputs["x"].dtype
    inputs = {name: fp32(value) for name, value in inputs.items()}
    n, k_tiles = plan.padded_batch, model.embed_dim // TILE_K
    for name, scales in inputs["scales"].items():
        assert plan.layout is not None
        layers = zip(inputs["weights"][name], scales.swapaxes(1, 2), strict=True)
        inputs["weights"][name] = np.stack([dequantise_np(*layer, plan.layout) for layer in layers]).astype(np.float32)
    inputs["x"] = inputs["x"][: k_tiles * n].reshape(k_tiles, n, TILE_K).swapaxes(0, 1).reshape(n, -1)
    logits, k_new, v_new = Executor(inputs, plan, model).run()
    return jnp.asarray(logits.T), jnp.asarray(k_new, dtype), jnp.asarray(v_new, dtype)


class Executor:
    """One decoding step. `inputs`: the caller's arrays of `buffers.TABLE` in fp32, but x [N, D]. `model`: an
    `op.Shape`."""

    def __init__(self, inputs: dict[str, Any], plan: Plan, model: Any):
        self.plan, self.model, self.inputs = plan, model, inputs
        self.x = np.array(inputs["x"], np.float32)
        n, new = plan.padded_batch, (model.num_layers, plan.padded_batch, model.num_kv_heads, model.head_dim)
        self.q = np.full((n, model.num_heads, model.head_dim), np.nan, np.float32)
        self.k = np.full((n, model.num_kv_heads, model.head_dim), np.nan, np.float32)
        self.context = np.full((n, model.num_heads * model.head_dim), np.nan, np.float32)
        self.hidden = np.full((n, model.hidden_dim), np.nan, np.float32)
        self.logits = np.full((n, model.head_rows), np.nan, np.float32)
        self.output = np.full((n, model.embed_dim), np.nan, np.float32)
        self.k_new, self.v_new = np.full(new, np.nan, np.float32), np.full(new, np.nan, np.float32)
        experts = [int(e) for e in inputs.get("experts", ())]
        self.scalars = Scalars(experts, int(inputs.get("num_used", (0,))[0]), [int(p) for p in inputs["positions"]])

    def run(self) -> tuple[Float[Array, "N V"], Float[Array, "L N K H"], Float[Array, "L N K H"]]:
        """(logits, k_new, v_new)."""
        plan, norms = self.plan, self.inputs["norms"]
        for layer in range(self.model.num_layers):
            self.linears(plan.qkv, layer, self.normed(norms[2 * layer]), self.store_heads)
            self.attention(layer)
            self.residual(plan.o, layer, self.context, 2 * layer)
            self.linears(plan.gate_up, layer, self.normed(norms[2 * layer + 1]), self.gated_product)
            self.residual(plan.down, layer, self.hidden, 2 * layer + 1)
        self.linears(plan.head, 0, self.normed(norms[-1]), self.store_logits)
        return self.logits, self.k_new, self.v_new

    def residual(self, group: Group, layer: int, x: Array, norm: int) -> None:
        """x + m · W …, or with output norms, of which `norm` is this one's number, x + m · norm(W …)."""
        if not self.model.has_output_norms:
            return self.linears(group, layer, x, self.add_residual)
        self.linears(group, layer, x, self.store_output)
        self.x += self.model.residual_multiplier * self.normed(self.inputs["output_norms"][norm], self.output)
        return None

    def normed(self, weight: Array, x: Array | None = None) -> Array:
        """The norm of x, by default of the residual."""
        x = self.x if x is None else x
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.model.norm_eps) * weight

    # Linears: A x, then h, then W x and B h, then the epilogue; every CTA its tiles.

    def linears(self, group: Group, layer: int, x: Array, store: Store) -> None:
        schedules = [TileSchedule(group, self.plan, self.scalars, cta) for cta in range(self.plan.num_ctas)]
        n, adapted = self.plan.padded_batch, len(group.adapted)
        rank_tiles = self.plan.max_rank_tiles + self.plan.max_rank_tiles % 2
        t = np.full((group.a_partials, adapted, rank_tiles, TILE_K, n), np.nan, np.float32)
        y = np.full((group.split_k + bool(adapted), group.num_tiles, TILE_M, n), np.nan, np.float32)
        tiles = [(s, [self._tile(s, i) for i in range(int(s.num_a + s.num_w + s.num_b))]) for s in schedules]
        for schedule, own in tiles:
            for tile in own[: int(schedule.num_a)]:
                self._multiply_a(group, layer, tile, x, t)
        h = self._hidden(group, t)
        for schedule, own in tiles:
            for tile in own[int(schedule.num_a) :]:
                number = int(schedule.tile_number(tile.linear, tile.tile))
                self._multiply(schedule, layer, tile, x, h, y[tile.partial, number])
        for schedule in schedules:
            self._finish(group, layer, schedule, y, store)

    def _tile(self, schedule: TileSchedule, n: int) -> Tile:
        return Tile(*map(int, schedule.tile(n)))

    def _columns(self, tile: Tile, k_tiles: int = 1) -> slice:
        """Columns of a tile whose chunks have so many K-tiles."""
        return slice(tile.first * k_tiles * TILE_K, (tile.first + tile.chunks) * k_tiles * TILE_K)

    def _ranks(self, rank_tile: int) -> tuple[int, slice]:
        """(expert, its ranks)."""
        number, part = divmod(rank_tile, self.plan.rank_tiles)
        return self.scalars.experts[number], slice(part * TILE_K, (part + 1) * TILE_K)

    def _multiply_a(self, group: Group, layer: int, tile: Tile, x: Array, t: Array) -> None:
        """t_partials of a pair of rank tiles."""
        a, columns = self.inputs["a"][group.adapted[tile.adapted_index]], self._columns(tile)
        last = self.scalars.num_used * self.plan.rank_tiles - 1
        for half in (0, 1):
            expert, ranks = self._ranks(min(2 * tile.tile + half, last))
            t[tile.partial, tile.adapted_index, 2 * tile.tile + half] = (
                a[layer, expert, ranks, columns] @ x[:, columns].T
            )

    def _hidden(self, group: Group, t: Array) -> Array:
        """h [adapted, rank tiles in use, TILE_K, N] = g Σ_s t_partials[s]."""
        if not group.adapted:
            return t[:, :, :0].sum(0)
        number, used = self.scalars.num_used, self.scalars.num_used * self.plan.rank_tiles
        gates = np.repeat(self.inputs["gates"][:number], self.plan.rank_tiles, 0)
        return t[:, :, :used].sum(0) * gates[:, None]

    def _multiply(self, schedule: TileSchedule, layer: int, tile: Tile, x: Array, h: Array, y: Array) -> None:
        """y_partials of a tile of W or B; the last tile of a linear may be a part of one."""
        group = schedule.group
        name, rows = list(group.outs)[tile.linear], slice(tile.tile * TILE_M, (tile.tile + 1) * TILE_M)
        height = min(TILE_M, group.outs[name] - rows.start)
        if not tile.is_b:
            w = self.inputs["weights"][name]
            columns = self._columns(tile, group.chunk_k_tiles)
            y[:height] = (w if name == "lm_head" else w[layer])[rows, columns] @ x[:, columns].T
        elif tile.chunks:
            products: Any = 0
            for piece in range(int(schedule.num_h_pieces(True, tile.chunks))):
                first, number = schedule.h_piece(True, tile.chunks, piece)
                h_smem = h[tile.adapted_index, first : first + self.plan.h_rank_tiles]
                for i in range(number):
                    expert, ranks = self._ranks(first + i)
                    products += self.inputs["b"][name][layer, expert, rows, ranks] @ h_smem[i]
            y[:height] = products

    def _finish(self, group: Group, layer: int, schedule: TileSchedule, y: Array, store: Store) -> None:
        number, at = schedule.epilogue_share()
        for n in range(int(number)):
            unit, half, n_tile = map(int, at(n))
            linear, tile = map(int, schedule.linear_of(unit, 0))
            names = group.passes[linear // group.width]
            start = tile * TILE_M + half * WGMMA_M
            if start >= group.outs[names[0]]:
                continue
            columns = slice(n_tile * WGMMA_N, (n_tile + schedule.n_tiles_at_once) * WGMMA_N)
            values = []
            for place, name in enumerate(names):
                partials = y[: group.split_k + (name in group.adapted), int(schedule.tile_number(linear + place, tile))]
                value = partials[:, half * WGMMA_M : (half + 1) * WGMMA_M, columns].sum(0)
                bias = self.inputs["biases"].get(name)
                values.append(value if bias is None else value + bias[layer, start : start + WGMMA_M, None])
            store(layer, names, slice(start, start + WGMMA_M), columns, values)

    # What becomes of the outputs.

    def store_heads(self, layer: int, names: tuple[str, ...], rows: slice, columns: slice, values: list[Array]) -> None:
        target = {"q_proj": self.q, "k_proj": self.k, "v_proj": self.v_new[layer]}[names[0]]
        target.reshape(self.plan.padded_batch, -1)[columns, rows] = values[0].T

    def add_residual(
        self, layer: int, names: tuple[str, ...], rows: slice, columns: slice, values: list[Array]
    ) -> None:
        self.x[columns, rows] += self.model.residual_multiplier * values[0].T

    def store_output(
        self, layer: int, names: tuple[str, ...], rows: slice, columns: slice, values: list[Array]
    ) -> None:
        self.output[columns, rows] = values[0].T

    def gated_product(
        self, layer: int, names: tuple[str, ...], rows: slice, columns: slice, values: list[Array]
    ) -> None:
        gate, up = values
        self.hidden[columns, rows] = (np.asarray(ACTIVATIONS[self.model.activation](jnp.asarray(gate))) * up).T

    def store_logits(
        self, layer: int, names: tuple[str, ...], rows: slice, columns: slice, values: list[Array]
    ) -> None:
        self.logits[columns, rows] = values[0].T

    # Attention: units of one row, one key-value head and one part of the context.

    def attention(self, layer: int) -> None:
        plan, model = self.plan, self.model
        batch, group_size = len(self.scalars.positions), model.num_heads // model.num_kv_heads
        q, k = (
            self._rotated(heads, self.inputs.get(f"{name}_norm"), layer)
            for name, heads in (("q", self.q), ("k", self.k))
        )
        self.k_new[layer, :batch] = k[:batch]
        self.context[batch:] = 0
        parts: dict[tuple[int, int, int], list[tuple[Array, Array, Array]]] = {}
        for cta in range(plan.num_ctas):
            schedule = AttentionSchedule(plan, batch, model.num_kv_heads, group_size, cta)
            if plan.o.fused_attention:
                first, number = cta % plan.o.split_k, int(cta // plan.o.split_k < plan.o.cta_groups)
            else:
                first, number = map(int, schedule.share(plan.context_splits))
            for n in range(number):
                row, head, group, split = map(int, schedule.unit(first + n * plan.num_ctas, plan.context_splits))
                window = int(self.inputs["windows"][layer])
                position = self.scalars.positions[row]
                start, tiles = map(int, schedule.tiles(position, window, split))
                slots = np.arange(start * TILE_M, (start + tiles) * TILE_M)
                seen = slots[(slots < position) & (slots > position - window)]
                keys, values = (self.inputs[f"cache_{c}"][layer, row, seen, head] for c in "kv")
                if split == 0:  # the new token's are not in the cache yet
                    keys = np.concatenate([keys, k[row, head][None]])
                    values = np.concatenate([values, self.v_new[layer, row, head][None]])
                low, high = (head * group_size + min(g * WGMMA_N, group_size) for g in (group, group + 1))
                multiplier, cap = model.attention_multiplier, model.attention_softcap
                scores = q[row, low:high] @ keys.T * (model.head_dim**-0.5 if multiplier is None else multiplier)
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                most = scores.max(-1, keepdims=True, initial=-1e30)
                weights = np.exp(scores - most)
                part = weights @ values, most, weights.sum(-1, keepdims=True)
                found = parts.setdefault((row, low, high), [])
                if not plan.o.fused_attention or not found:  # with it, several CTAs compute the same unit
                    found.append(part)
        for (row, low, high), found in parts.items():
            assert len(found) == plan.context_splits
            most = np.max([m for _, m, _ in found], axis=0)
            total = sum(np.exp(m - most) * s for _, m, s in found)
            context = sum(np.exp(m - most) * o for o, m, _ in found) / total
            self.context.reshape(self.plan.padded_batch, -1, model.head_dim)[row, low:high] = context

    def _rotated(self, heads: Array, norm: Array | None, layer: int) -> Array:
        """Heads [N, ·, H] after their norm, if they have one, and the rotary embedding."""
        if norm is not None:
            mean = np.mean(heads**2, -1, keepdims=True)
            heads = heads / np.sqrt(mean + self.model.norm_eps) * norm[layer, : self.model.head_dim]
        partners = np.roll(heads, self.model.head_dim // 2, axis=-1)
        n = self.plan.padded_batch
        table = int(self.inputs["ropes"][layer]) if "ropes" in self.inputs else 0
        cos, sin = (self.inputs[name][table * n : (table + 1) * n, None] for name in ("cos", "sin"))
        return heads * cos + partners * sin
