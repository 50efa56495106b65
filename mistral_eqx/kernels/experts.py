"""Mixtral's experts at the cost of the chosen ones.

Tokens are brought together by their expert, in blocks of one size, so that each block is a
plain matrix product with one expert's weights. Mixtral of Experts (arXiv 2401.04088), 2.1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ..layers import FeedForward, product
from ..moe import mix
from . import cpu, quantized
from .replaced import replaces


@replaces(mix, on="any")
def mix_chosen(
    experts: FeedForward,
    x: Float[Array, "batch seq dim"],
    chosen: Int32[Array, "batch seq top_k"],
    weights: Float[Array, "batch seq top_k"],
) -> Float[Array, "batch seq dim"]:
    """[`mistral_eqx.moe.mix`][], with the tokens of all rows as those of one."""
    flat = [array.reshape(-1, array.shape[-1]) for array in (x, chosen, weights)]
    return dispatch(experts, *flat).reshape(x.shape)


def dispatch(
    experts: FeedForward,
    x: Float[Array, "seq dim"],
    chosen: Int32[Array, "seq top_k"],
    weights: Float[Array, "seq top_k"],
) -> Float[Array, "seq dim"]:
    (seq, top_k), dim = chosen.shape, x.shape[1]
    n_experts = jax.tree.leaves(experts)[0].shape[0]
    block, n_blocks = block_sizes(chosen.size, n_experts)
    # The tokens of an expert get whole blocks. `slot` is the row in which each pair of a
    # token and an expert goes; pairs of absent experts get `slots`, which is no row.
    slots = n_blocks * block
    member = chosen.reshape(-1, 1) == jnp.arange(n_experts, dtype=jnp.int32)[None, :]
    rank = jnp.cumsum(member, axis=0, dtype=jnp.int32) - 1
    ends = jnp.cumsum(-(-jnp.sum(member, axis=0, dtype=jnp.int32) // block))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    slot = jnp.min(jnp.where(member, block * starts[None, :] + rank, slots), axis=1)
    pairs = jnp.arange(chosen.size, dtype=jnp.int32)
    token = jnp.full(slots, seq, jnp.int32).at[slot].set(pairs // top_k, mode="drop")
    rows = x.at[token].get(mode="fill", fill_value=0).reshape(n_blocks, block, dim)
    numbers = jnp.arange(n_blocks, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, numbers, side="right").astype(jnp.int32)

    def run(experts, expert, rows):
        take = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False)
        one = jax.tree.map(take, experts)
        return _one_token(one, rows) if block == 1 else one(rows)

    def step(_, block):
        # Blocks that no expert needs come last, and are skipped. The branch has a second
        # use: without it XLA:CPU converts all bfloat16 weights before the loop.
        skip = lambda experts, expert, rows: jnp.zeros_like(rows)
        return None, jax.lax.cond(block[0] < n_experts, run, skip, experts, *block)

    _, out = jax.lax.scan(step, None, (expert, rows))
    out = out.reshape(slots, dim).at[slot].get(mode="fill", fill_value=0)
    return jnp.sum(out.reshape(seq, top_k, dim) * weights[:, :, None], axis=1)


def _one_token(expert: FeedForward, x: Float[Array, "1 dim"]) -> Float[Array, "1 dim"]:
    """As `expert(x)`. On a CPU every other product would first copy the expert's weights
    out of the stack."""

    def project(x, linear):
        if isinstance(linear, quantized.QuantizedLinear):
            parts, multiply = (linear.values, linear.scales), quantized.quantized_product
            few = quantized.product_of_few_rows
        else:
            parts, multiply, few = (linear.weight,), product, cpu.product_of_few_rows
        on_cpu = lambda x, *parts: few(x, *parts).astype(x.dtype)
        return jax.lax.platform_dependent(x, *parts, cpu=on_cpu, default=multiply.plain)

    gate = jax.nn.silu(project(x, expert.w1))
    return project(gate * project(x, expert.w3), expert.w2)


def block_sizes(n_pairs: int, n_experts: int) -> tuple[int, int]:
    """How many tokens there are in a block, and the most blocks that can be needed.

    **Arguments:**

    - `n_pairs`: of a token and an expert.
    - `n_experts`: to share them.
    """
    # Each block reads one expert's weights. With few tokens, as in decode, reading is all
    # the cost, so blocks have one token. With many, a block is a quarter of an expert's
    # average share, so that padding adds a quarter at most.
    block = 1 if n_pairs <= 8 * n_experts else max(16, n_pairs // (4 * n_experts))
    return block, (n_pairs + min(n_pairs, n_experts) * (block - 1)) // block
