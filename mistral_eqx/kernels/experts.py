"""Mixtral's experts at the cost of the chosen ones.

Tokens are brought together by their expert, in blocks of one size, so that each block is a
plain matrix product with one expert's weights. Mixtral of Experts (arXiv 2401.04088), 2.1.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ..layers import FeedForward, product
from ..learning.lora import LoRALinear
from ..moe import mix
from . import cpu, quantized
from .replaced import replaces


@replaces(mix, on="cpu", derived=True)
def mix_chosen(
    experts: FeedForward,
    x: Float[Array, "batch seq dim"],
    chosen: Int32[Array, "batch seq top_k"],
    weights: Float[Array, "batch seq top_k"],
    **sizes: int,
) -> Float[Array, "batch seq dim"]:
    """[`mistral_eqx.moe.mix`][], with the tokens of all rows as those of one."""
    flat = [array.reshape(-1, array.shape[-1]) for array in (x, chosen, weights)]
    return dispatch(experts, *flat, **sizes).reshape(x.shape)


@replaces(mix, on="any", derived=True)
def mix_in_large_blocks(
    experts: FeedForward,
    x: Float[Array, "batch seq dim"],
    chosen: Int32[Array, "batch seq top_k"],
    weights: Float[Array, "batch seq top_k"],
    few: int = 2,
) -> Float[Array, "batch seq dim"]:
    """[`mix_chosen`][mistral_eqx.kernels.experts.mix_chosen] for accelerators, which wait
    for weights rather than for products. A GPU even copies a block's weights first, if the
    block has several tokens."""
    return mix_chosen(experts, x, chosen, weights, few=few, parts=1)


def dispatch(
    experts: FeedForward,
    x: Float[Array, "seq dim"],
    chosen: Int32[Array, "seq top_k"],
    weights: Float[Array, "seq top_k"],
    **sizes: int,
) -> Float[Array, "seq dim"]:
    (seq, top_k), dim = chosen.shape, x.shape[1]
    n_experts = jax.tree.leaves(experts)[0].shape[0]
    block, n_blocks = block_sizes(chosen.size, n_experts, **sizes)
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
    out = _run_blocks((experts, rows), expert)
    out = out.reshape(slots, dim).at[slot].get(mode="fill", fill_value=0)
    return jnp.sum(out.reshape(seq, top_k, dim) * weights[:, :, None], axis=1)


@eqx.filter_custom_vjp
def _run_blocks(
    inputs: tuple[FeedForward, Float[Array, "blocks block dim"]],
    expert: Int32[Array, "blocks"],
) -> Float[Array, "blocks block dim"]:
    """The experts, the blocks of tokens, and which expert each block is for."""
    experts, rows = inputs
    n_experts = jax.tree.leaves(experts)[0].shape[0]

    def run(experts, expert, rows):
        one = _one_of(experts, expert)
        return _one_token(one, rows) if rows.shape[0] == 1 else one(rows)

    def step(_, block):
        # Blocks that no expert needs come last, and are skipped. The branch has a second
        # use: without it XLA:CPU converts all bfloat16 weights before the loop.
        skip = lambda experts, expert, rows: jnp.zeros_like(rows)
        return None, jax.lax.cond(block[0] < n_experts, run, skip, experts, *block)

    return jax.lax.scan(step, None, (expert, rows))[1]


@_run_blocks.def_fwd
def _forward(perturbed, inputs, expert):
    return _run_blocks(inputs, expert), None


@_run_blocks.def_bwd
def _backward(_, out_grads, perturbed, inputs, expert):
    """A block's gradients are added to those of its expert, in place. JAX alone would add
    arrays of all experts' size, most of them zeros, for every block."""
    (experts, rows), (is_trained, _) = inputs, perturbed
    trained, frozen = eqx.partition(experts, is_trained)

    def step(sums, block):
        expert, rows, out_grads = block
        here = functools.partial(_one_of, expert=expert)
        run = lambda part, rows: eqx.combine(part, here(frozen))(rows)
        _, pull_back = jax.vjp(run, here(trained), rows)
        grads, row_grads = pull_back(out_grads)
        put = lambda sum, new, old: jax.lax.dynamic_update_index_in_dim(
            sum, old + new.astype(sum.dtype), expert, 0
        )
        return jax.tree.map(put, sums, grads, here(sums)), row_grads

    # Blocks that no expert needs have no gradient to add.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
    sums, row_grads = jax.lax.scan(step, zeros, (expert, rows, out_grads))
    grads = jax.tree.map(lambda sum, leaf: sum.astype(leaf.dtype), sums, trained)
    return grads, row_grads


def _one_of(experts: FeedForward, expert: Int32[Array, ""]) -> FeedForward:
    take = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False)
    return jax.tree.map(take, experts)


def _one_token(expert: FeedForward, x: Float[Array, "1 dim"]) -> Float[Array, "1 dim"]:
    """As `expert(x)`. On a CPU and on a GPU every other product would first copy the
    expert's weights out of the stack."""

    def project(x, linear):
        if isinstance(linear, LoRALinear):
            return project(x, linear.base) + linear.added(x)
        if isinstance(linear, quantized.QuantizedLinear):
            parts, multiply = (linear.values, linear.scales), quantized.quantized_product
            ways = {"cpu": quantized.product_of_few_rows}
        else:
            parts, multiply = (linear.weight,), product
            ways = {"cpu": cpu.product_of_few_rows, "cuda": _summed}
        cast = lambda way: lambda x, *parts: way(x, *parts).astype(x.dtype)
        ways = {platform: cast(way) for platform, way in ways.items()}
        return jax.lax.platform_dependent(x, *parts, **ways, default=multiply.plain)

    gate = jax.nn.silu(project(x, expert.w1))
    return project(gate * project(x, expert.w3), expert.w2)


def _summed(x: Float[Array, "1 in"], weight: Float[Array, "out in"]) -> Array:
    return jnp.sum(x.astype(jnp.float32) * weight.astype(jnp.float32), axis=-1)[None, :]


def block_sizes(
    n_pairs: int, n_experts: int, few: int = 8, parts: int = 4
) -> tuple[int, int]:
    """How many tokens there are in a block, and the most blocks that can be needed.

    **Arguments:**

    - `n_pairs`: of a token and an expert.
    - `n_experts`: to share them.
    - `few`: with up to so many pairs an expert, blocks have one token.
    - `parts`: with more, a block is this part of an expert's average share.
    """
    # Each block reads one expert's weights. With few tokens, as in decode, reading is all
    # the cost, so blocks have one token. With many, padding adds 1 / `parts` at most.
    block = 1 if n_pairs <= few * n_experts else max(16, n_pairs // (parts * n_experts))
    return block, (n_pairs + min(n_pairs, n_experts) * (block - 1)) // block
