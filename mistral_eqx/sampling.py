"""From the logits of one row to its next token."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float32, Int32, PRNGKeyArray


class Sampling(eqx.Module):
    """How a token is chosen. Its numbers are arrays: other values do not retrace."""

    temperature: Float32[Array, ""]

    def __init__(self, temperature: float = 0.0):
        """**Arguments:**

        - `temperature`: divides the logits. 0 always takes the most probable token.

        **Raises:**

        `ValueError` if it is negative or not a finite number.
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (greedy) or more, got {temperature!r}."
            )
        self.temperature = jnp.float32(temperature)

    def __call__(
        self, logits: Float32[Array, "vocab"], *, key: PRNGKeyArray
    ) -> Int32[Array, ""]:
        """Chooses a token: the first of the most probable ones if greedy."""
        greedy = jnp.argmax(logits)
        # The unused branch must stay finite where the temperature is 0.
        temperature = jnp.where(self.temperature > 0, self.temperature, 1.0)
        # Below zero, so that dividing by a very small temperature makes no infinities.
        sampled = jr.categorical(key, (logits - jnp.max(logits)) / temperature)
        token = jnp.where(self.temperature > 0, sampled, greedy)
        return token.astype(jnp.int32)
