"""From the logits of one row to its next token."""

import math
from typing import TypedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray, UInt32

from . import arguments


class SamplingOptions(TypedDict, total=False):
    """The options of [`Sampling`][], for functions that pass them on."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float


class Sampling(eqx.Module):
    """How a token is chosen. Its numbers are arrays: other values do not retrace, and what
    is switched off costs nothing.

    The options are applied in the order in which they are listed here, which is that of
    Hugging Face's transformers. They keep the tokens that it keeps.
    """

    repetition_penalty: Float32[Array, ""]
    temperature: Float32[Array, ""]
    top_k: Float32[Array, ""]
    top_p: Float32[Array, ""]
    min_p: Float32[Array, ""]

    def __init__(
        self,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ):
        """**Arguments:**

        - `repetition_penalty`: divides the logits of tokens that the row has already, or
            multiplies them where they are negative. 1 does nothing. Applied first.
            Keskar et al. (arXiv 1909.05858).
        - `temperature`: divides the logits. At 0 the most probable token is taken, and
            the options below change nothing. Less than 1e-5 counts as 0, because the
            quotients would overflow.
        - `top_k`: only the `top_k` most probable tokens are drawn, and all that are just
            as probable as the last of them.
        - `top_p`: only the smallest set of tokens is drawn from whose probabilities sum to
            this. Of equally probable tokens those with higher ids are taken first, as by
            a stable sort. Holtzman et al. (arXiv 1904.09751).
        - `min_p`: only tokens are drawn that have this share of the probability of the
            most probable one. Nguyen et al. (arXiv 2407.01082).

        **Raises:**

        `TypeError` for what is no number, `ValueError` for one outside its range.
        """
        number = arguments.number
        temperature = number("temperature", temperature)
        top_p, min_p = number("top_p", top_p), number("min_p", min_p)
        repetition_penalty = number("repetition_penalty", repetition_penalty)
        best = math.inf
        if top_k is not None:
            best = number("top_k", top_k, "a whole number, or None for all")
        if not 0 <= temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (greedy) or more, got {temperature!r}."
            )
        if top_k is not None and not (best >= 1 and best == best // 1):
            raise ValueError(f"top_k must be 1 or more, or None for all, got {top_k!r}.")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}.")
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {min_p!r}.")
        if not 0 < repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be above 0 (1 does nothing), got "
                f"{repetition_penalty!r}."
            )
        self.repetition_penalty = jnp.float32(repetition_penalty)
        self.temperature = jnp.float32(temperature if temperature >= 1e-5 else 0.0)
        self.top_k = jnp.float32(best)
        self.top_p = jnp.float32(top_p)
        self.min_p = jnp.float32(min_p)

    # Jitted for those who call it by itself. Outside of a jitted function a `cond` would
    # be compiled again at every call.
    @eqx.filter_jit
    def __call__(
        self,
        logits: Float32[Array, "vocab"],
        seen: Bool[Array, "vocab"] | None = None,
        *,
        key: PRNGKeyArray,
    ) -> Int32[Array, ""]:
        """Chooses a token: the first of the most probable ones if greedy.

        **Arguments:**

        - `logits`: of the next token.
        - `seen`: which ids the row has already, for the repetition penalty.
        - `key`: for the draw.
        """
        logits = self._penalise(logits, seen)
        token = jax.lax.cond(
            self.temperature > 0,
            lambda: jr.categorical(key, self._filter(logits)),
            lambda: jnp.argmax(logits),
        )
        return token.astype(jnp.int32)

    @eqx.filter_jit
    def scores(
        self, logits: Float32[Array, "vocab"], seen: Bool[Array, "vocab"] | None = None
    ) -> Float32[Array, "vocab"]:
        """The logits of the distribution that is drawn from: `-inf` where nothing is.
        Arguments are those of `__call__`; the temperature must not be 0."""
        return self._filter(self._penalise(logits, seen))

    def _penalise(
        self, logits: Float32[Array, "vocab"], seen: Bool[Array, "vocab"] | None
    ) -> Float32[Array, "vocab"]:
        if seen is None:
            return logits
        penalty = self.repetition_penalty
        penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
        return jnp.where(seen, penalised, logits)

    def _filter(self, logits: Float32[Array, "vocab"]) -> Float32[Array, "vocab"]:
        logits = logits / self.temperature
        for on, keep in (
            (self.top_k < logits.size, self._keep_top_k),
            (self.top_p < 1, self._keep_top_p),
            (self.min_p > 0, self._keep_min_p),
        ):
            # Under `jax.vmap` these stay branches: the options are the same in all rows.
            logits = jax.lax.cond(
                on,
                lambda x, keep=keep: jnp.where(keep(x), x, -jnp.inf),
                lambda x: x,
                logits,
            )
        return logits

    def _keep_top_k(self, logits: Float32[Array, "vocab"]) -> Bool[Array, "vocab"]:
        ranks = _ranks(logits)
        return ranks >= _threshold(ranks, jnp.ones_like(logits), self.top_k)

    def _keep_top_p(self, logits: Float32[Array, "vocab"]) -> Bool[Array, "vocab"]:
        ranks, probabilities = _ranks(logits), jax.nn.softmax(logits)
        last = _threshold(ranks, probabilities, self.top_p)
        above = jnp.sum(jnp.where(ranks > last, probabilities, 0.0))
        # Those on the threshold are as probable as one another. They join from the end
        # of the vocabulary on, until the probability is reached.
        tied = ranks == last
        probability = jnp.max(jnp.where(tied, probabilities, 0.0))
        before = jnp.cumsum(tied[::-1])[::-1].astype(jnp.float32) - 1
        joins = above + before * probability < self.top_p
        return (ranks > last) | (tied & (joins | (before == 0)))

    def _keep_min_p(self, logits: Float32[Array, "vocab"]) -> Bool[Array, "vocab"]:
        probabilities = jax.nn.softmax(logits)
        return probabilities >= self.min_p * jnp.max(probabilities)


def _ranks(x: Float32[Array, "vocab"]) -> UInt32[Array, "vocab"]:
    """Integers in the same order as the floats: the bits of a positive float already are,
    those of a negative one are in the reverse order."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0.0 becomes 0.0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _threshold(
    ranks: UInt32[Array, "vocab"],
    weights: Float32[Array, "vocab"],
    target: Float32[Array, ""],
) -> UInt32[Array, ""]:
    """The highest rank such that what has it or a higher one weighs `target` or more.

    Found bit by bit, in 32 passes. Sorting the vocabulary takes 30 times as long on a
    CPU, and cutting it to the best few first is only right if the rest is not needed.
    """

    def try_bit(i, rank):
        higher = rank | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = jnp.sum(jnp.where(ranks >= higher, weights, 0.0)) >= target
        return jnp.where(enough, higher, rank)

    rank = jax.lax.fori_loop(0, 32, try_bit, jnp.uint32(0))
    # The best token always stays, however little is asked for.
    return jnp.minimum(rank, jnp.max(ranks))
