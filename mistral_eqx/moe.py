"""A sparse mixture of experts: a router sends each token through a few networks of many.

A token costs what its experts cost, and not what all of them would. Tokens are brought
together by their expert, in blocks of one size, so that each block is a plain matrix
product with one expert's weights. Mixtral of Experts (arXiv 2401.04088), §2.1.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from .config import ModelConfig
from .devices.experts import where_experts_are
from .kernels import cpu
from .kernels.batching import batched_as
from .layers import FeedForward, Linear, product


class MixtureOfExperts(eqx.Module):
    """In place of the feed-forward network of a block: many of them, and a router."""

    gate: Linear
    experts: FeedForward
    top_k: int = eqx.field(static=True)

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, key: PRNGKeyArray):
        """**Arguments:**

        - `config`: of the model; its `moe` says how many experts there are.
        - `dtype`: of the weights.
        - `key`: for their initialisation.
        """
        n_experts, self.top_k = config.moe.num_experts, config.moe.num_experts_per_tok
        key_gate, key_experts = jr.split(key)
        self.gate = Linear(config.dim, n_experts, dtype=dtype, key=key_gate)
        make = lambda key: FeedForward(config.dim, config.hidden_dim, dtype=dtype, key=key)
        # One FeedForward, whose weights have a leading axis `experts`.
        self.experts = jax.vmap(make)(jr.split(key_experts, n_experts))

    def __call__(self, x: Float[Array, "seq dim"]) -> Float[Array, "seq dim"]:
        chosen, weights = route(self.gate(x), self.top_k)
        return mix(self.experts, x, chosen, weights)


def route(
    router_logits: Float[Array, "seq experts"], top_k: int
) -> tuple[Int32[Array, "seq top_k"], Float[Array, "seq top_k"]]:
    """The experts with the largest logits of each token, and how much of each it takes.

    The softmax is over the logits of the chosen alone, in float32, then cast, as in the
    reference. A softmax over all, divided by the sum of the chosen, is the same.
    """
    logits, chosen = jax.lax.top_k(router_logits, top_k)
    weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    return chosen, weights.astype(router_logits.dtype)


def mix_all(
    experts: FeedForward,
    x: Float[Array, "seq dim"],
    chosen: Int32[Array, "seq top_k"],
    weights: Float[Array, "seq top_k"],
) -> Float[Array, "seq dim"]:
    """As [`mix`][], with every token through every expert. What was not chosen counts 0."""
    n_experts = experts.w1.weight.shape[0]
    # A copy of the tokens for each, or XLA:CPU transposes the weights instead.
    copies = jnp.broadcast_to(x[None], (n_experts, *x.shape))
    outputs = jax.vmap(FeedForward.__call__)(experts, copies)
    one_hot = jax.nn.one_hot(chosen, n_experts, dtype=x.dtype)
    shares = jnp.sum(one_hot * weights[:, :, None], axis=1)
    out = jnp.einsum("eti,te->ti", outputs, shares, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


def _mix_batch(batch, batched, experts, x, chosen, weights):
    """The tokens of all rows as those of one."""
    if any(jax.tree.leaves(batched[0])):  # not one model, but many
        axes = jax.tree.map(lambda leaf: 0 if leaf else None, batched)
        return jax.vmap(mix_all, tuple(axes))(experts, x, chosen, weights), True
    flat = []
    for rows, is_batched in zip((x, chosen, weights), batched[1:]):
        rows = rows if is_batched else jnp.broadcast_to(rows[None], (batch, *rows.shape))
        flat.append(rows.reshape(-1, rows.shape[-1]))
    return mix(experts, *flat).reshape(batch, -1, flat[0].shape[-1]), True


@batched_as(_mix_batch, derivative=mix_all)
def mix(
    experts: FeedForward,
    x: Float[Array, "seq dim"],
    chosen: Int32[Array, "seq top_k"],
    weights: Float[Array, "seq top_k"],
) -> Float[Array, "seq dim"]:
    """The sum of what the chosen experts make of each token, times the weights.

    Its derivatives are those of [`mix_all`][], and cost as much. Under `jax.vmap` the
    tokens of all rows are brought together.

    **Arguments:**

    - `experts`: one `FeedForward`, whose weights have a leading axis `experts`.
    - `x`: the tokens.
    - `chosen`: the experts of each, from 0. A number outside counts for nothing: it is of
        an expert that is elsewhere.
    - `weights`: by how much each counts.
    """
    return where_experts_are(_dispatch, experts, x, chosen, weights)


def _dispatch(
    experts: FeedForward,
    x: Float[Array, "seq dim"],
    chosen: Int32[Array, "seq top_k"],
    weights: Float[Array, "seq top_k"],
) -> Float[Array, "seq dim"]:
    (seq, top_k), dim = chosen.shape, x.shape[1]
    n_experts = experts.w1.weight.shape[0]
    block, n_blocks = block_sizes(chosen.size, n_experts)
    # Every expert's tokens get whole blocks: where does each pair of a token and an
    # expert go? `slots` is the number of rows in all, which is nowhere.
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
        # Blocks that no expert needs come last. The slice of the weights stands in a
        # branch also because XLA:CPU would otherwise move the conversion of all bfloat16
        # weights to float32 out of the loop.
        skip = lambda experts, expert, rows: jnp.zeros_like(rows)
        return None, jax.lax.cond(block[0] < n_experts, run, skip, experts, *block)

    _, out = jax.lax.scan(step, None, (expert, rows))
    out = out.reshape(slots, dim).at[slot].get(mode="fill", fill_value=0)
    return jnp.sum(out.reshape(seq, top_k, dim) * weights[:, :, None], axis=1)


def _one_token(expert: FeedForward, x: Float[Array, "1 dim"]) -> Float[Array, "1 dim"]:
    """As `expert(x)`. On a CPU no other product multiplies by a slice of stacked weights
    without copying it first."""

    def project(x, linear):
        ways = {"cpu": cpu.product_of_few_rows, "default": product}
        return jax.lax.platform_dependent(x, linear.weight, **ways).astype(x.dtype)

    gate = jax.nn.silu(project(x, expert.w1))
    return project(gate * project(x, expert.w3), expert.w2)


def block_sizes(n_pairs: int, n_experts: int) -> tuple[int, int]:
    """How many tokens there are in a block, and the most blocks that can be needed.

    **Arguments:**

    - `n_pairs`: of a token and an expert.
    - `n_experts`: to share them.
    """
    # A block reads one expert's weights. Where there are few tokens, as in decode, that is
    # all that counts, and rows one by one are read at the bus's speed. A block of a
    # quarter of what an expert has on average pads by a quarter at most.
    block = 1 if n_pairs <= 8 * n_experts else max(16, n_pairs // (4 * n_experts))
    return block, (n_pairs + min(n_pairs, n_experts) * (block - 1)) // block


def load_balancing_loss(
    router_logits: Float[Array, "*layers experts"], top_k: int
) -> Float32[Array, ""]:
    """`experts` times the sum over the experts of the share of tokens that chose one and
    the mean probability it was given: `top_k` if all are used alike, more otherwise.

    Switch Transformers (arXiv 2101.03961), equations 4 to 6, over all layers together, as
    `load_balancing_loss_func` in transformers.

    **Arguments:**

    - `router_logits`: as they come from the router, of every token in every layer.
    - `top_k`: how many experts each token chooses.
    """
    n_experts = router_logits.shape[-1]
    logits = router_logits.reshape(-1, n_experts).astype(jnp.float32)
    _, chosen = jax.lax.top_k(logits, top_k)
    used = jnp.sum(jax.nn.one_hot(chosen, n_experts, dtype=jnp.float32), axis=1)
    probabilities = jax.nn.softmax(logits, axis=-1)
    return n_experts * jnp.sum(jnp.mean(used, axis=0) * jnp.mean(probabilities, axis=0))
