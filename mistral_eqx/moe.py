"""A sparse mixture of experts: a router sends each token through a few networks of many.

Mixtral of Experts (arXiv 2401.04088), §2.1.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from .config import ModelConfig
from .kernels.replaced import replaceable
from .layers import FeedForward, Linear


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


@replaceable(shared=("experts",))
def mix(
    experts: FeedForward,
    x: Float[Array, "seq dim"],
    chosen: Int32[Array, "seq top_k"],
    weights: Float[Array, "seq top_k"],
) -> Float[Array, "seq dim"]:
    """The weighted sum of the chosen experts' outputs, for each token. Here every token
    goes through every expert, and experts that were not chosen have weight 0.

    **Arguments:**

    - `experts`: a feed-forward network whose weights have a leading axis `experts`.
    - `x`: the tokens.
    - `chosen`: the experts of each token, from 0. A number that is no expert is ignored:
        that expert is on another device.
    - `weights`: of the chosen experts.
    """
    n_experts = jax.tree.leaves(experts)[0].shape[0]
    # Each expert gets a copy of the tokens. Without copies XLA:CPU transposes the weights.
    copies = jnp.broadcast_to(x[None], (n_experts, *x.shape))
    outputs = jax.vmap(FeedForward.__call__)(experts, copies)
    one_hot = jax.nn.one_hot(chosen, n_experts, dtype=x.dtype)
    shares = jnp.sum(one_hot * weights[:, :, None], axis=1)
    out = jnp.einsum("eti,te->ti", outputs, shares, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)
