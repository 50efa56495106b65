"""The model: an embedding, a stack of blocks, a norm, and a logit for every token id."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from .attention import Attention
from .cache import Cache, LayerCache
from .config import ModelConfig
from .layers import Embedding, FeedForward, Linear, RMSNorm, each_token, product
from .moe import MixtureOfExperts
from .rope import Places


class TransformerBlock(eqx.Module):
    """Attention, then the feed-forward network, each added to the residual stream."""

    attention: Attention
    feed_forward: FeedForward | MixtureOfExperts
    attention_norm: RMSNorm
    ffn_norm: RMSNorm

    def __init__(
        self, config: ModelConfig, layer: int = 0, *, dtype: DTypeLike, key: PRNGKeyArray
    ):
        """**Arguments:**

        - `config`: of the model.
        - `layer`: which one, from 0.
        - `dtype`: of the weights.
        - `key`: for their initialisation.
        """
        key_attention, key_ffn = jr.split(key)
        self.attention = Attention(config, layer, dtype=dtype, key=key_attention)
        if config.moe is None:
            self.feed_forward = FeedForward(
                config.dim, config.hidden_dim, dtype=dtype, key=key_ffn
            )
        else:
            self.feed_forward = MixtureOfExperts(config, dtype=dtype, key=key_ffn)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype=dtype)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, dtype=dtype)

    # Each block is jitted, so identical blocks are traced once.
    @eqx.filter_jit
    def __call__(
        self, x: Float[Array, "seq dim"], places: Places, cache: LayerCache | None
    ) -> tuple[Float[Array, "seq dim"], LayerCache | None]:
        """As [`Attention`][], but for the whole block: `x` comes back with both added."""
        x, cache = self.attend(x, places, cache)
        return self.feed(x), cache

    def attend(
        self, x: Float[Array, "seq dim"], places: Places, cache: LayerCache | None
    ) -> tuple[Float[Array, "seq dim"], LayerCache | None]:
        """The first half of the block: `x` comes back with what was attended added."""
        attended, cache = self.attention(self.attention_norm(x), places, cache)
        return x + attended, cache

    def feed(self, x: Float[Array, "seq dim"]) -> Float[Array, "seq dim"]:
        """The second half of the block."""
        return x + self.feed_forward(self.ffn_norm(x))

    def router_logits(self, x: Float[Array, "seq dim"]) -> Float[Array, "seq experts"]:
        """What the second half of a Mixtral's block chooses experts by."""
        return self.feed_forward.gate(self.ffn_norm(x))


class Transformer(eqx.Module):
    """A Mistral. The path of every weight is its name in Mistral's own checkpoints.

    It acts on one sequence; `jax.vmap` makes it act on a batch:

    ```python
    logits, _ = jax.vmap(model)(tokens)
    ```
    """

    tok_embeddings: Embedding
    layers: tuple[TransformerBlock, ...]
    norm: RMSNorm
    output: Linear | None
    config: ModelConfig = eqx.field(static=True)

    def __init__(
        self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, key: PRNGKeyArray
    ):
        """**Arguments:**

        - `config`: sizes, window and constants.
        - `dtype`: of the weights, and so of everything that the contract does not fix
            to float32.
        - `key`: for the initialisation.
        """
        key_embed, key_out, *keys = jr.split(key, config.n_layers + 2)
        vocab_size, dim = config.vocab_size, config.dim
        self.tok_embeddings = Embedding(vocab_size, dim, dtype=dtype, key=key_embed)
        self.layers = tuple(
            TransformerBlock(config, i, dtype=dtype, key=k) for i, k in enumerate(keys)
        )
        self.norm = RMSNorm(dim, config.norm_eps, dtype=dtype)
        self.output = None
        if not config.tied_embeddings:
            self.output = Linear(dim, vocab_size, dtype=dtype, key=key_out)
        self.config = config

    @property
    def dtype(self) -> DTypeLike:
        return self.tok_embeddings.weight.dtype

    def __call__(
        self, tokens: Int[Array, "seq"], cache: Cache | None = None
    ) -> tuple[Float32[Array, "seq vocab"], Cache | None]:
        """Runs the model over a sequence, or over the next chunk of one.

        **Arguments:**

        - `tokens`: ids in `[0, vocab_size)`. Inside a jitted function an id outside
            cannot be an error and gives NaN.
        - `cache`: what came before `tokens`. Without one, they are a whole sequence.

        **Returns:**

        The logits of the token that follows each, and the cache with `tokens` in it.
        """
        hidden, cache = self.hidden_states(tokens, cache)
        return self.logits(hidden[-1]), cache

    def hidden_states(
        self,
        tokens: Int[Array, "seq"],
        cache: Cache | None = None,
        segments: Int[Array, "seq"] | None = None,
    ) -> tuple[tuple[Float[Array, "seq dim"], ...], Cache | None]:
        """The residual stream: `n_layers + 1` arrays, of which the first is the embedding
        and each other the output of a block.

        **Arguments:**

        - `tokens`, `cache`: those of `__call__`.
        - `segments`: without a cache, the number of the text that each token belongs to.
            Texts of one sequence are then read as if each were alone.
        """
        places = self.places(tokens, cache, segments)
        hidden, layer_caches = [self.tok_embeddings(tokens)], []
        for i, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            x, layer_cache = block(hidden[-1], places, layer_cache)
            hidden.append(x)
            layer_caches.append(layer_cache)
        if cache is not None:
            cache = cache.after(tuple(layer_caches), tokens.shape[0])
        return tuple(hidden), cache

    def places(
        self,
        tokens: Int[Array, "seq"],
        cache: Cache | None,
        segments: Int[Array, "seq"] | None = None,
    ) -> Places:
        """Where `tokens` stand, behind what the cache holds, or each in its own text."""
        indices = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        if segments is not None and cache is not None:
            raise ValueError("segments are for whole sequences: leave out the cache.")
        if segments is not None:
            begins = jnp.diff(segments, prepend=segments[:1]) != 0
            indices -= jax.lax.cummax(jnp.where(begins, indices, 0))
        if cache is None:
            return Places(self.config, indices, segments=segments)
        return Places(self.config, cache.length - cache.padding + indices, cache.length)

    def batch(
        self,
        tokens: Int[Array, "batch seq"],
        cache: Cache | None = None,
        segments: Int[Array, "batch seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Cache | None]:
        """The last of the `hidden_states` of every row, and the cache of all."""
        axes = None if cache is None else cache.axes

        def row(tokens, cache, segments):
            hidden, cache = self.hidden_states(tokens, cache, segments)
            return hidden[-1], cache

        return jax.vmap(row, (0, axes, 0), (0, axes))(tokens, cache, segments)

    def empty_cache(self, padding: Int[Array, "*batch"], **options: Any) -> Cache:
        """A [`Cache`][] for this model. [`Cache`][] says what the options are."""
        return Cache(self.config, padding, **options)

    def with_router_logits(
        self,
        tokens: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Float[Array, "batch layers seq experts"]]:
        """For training a Mixtral: what `batch` returns for whole sequences, and the logits
        of each token's experts in every layer."""
        places = jax.vmap(self.places, (0, None, 0))(tokens, None, segments)
        x, router_logits = jax.vmap(self.tok_embeddings)(tokens), []
        for block in self.layers:
            x, _ = jax.vmap(block.attend, (0, 0, None))(x, places, None)
            router_logits.append(each_token(block.router_logits, x))
            x = each_token(block.feed, x)
        return x, jnp.stack(router_logits, axis=1)

    def logits(self, hidden: Float[Array, "seq dim"]) -> Float32[Array, "seq vocab"]:
        """The logits of the token that follows each: `hidden` is the last of
        `hidden_states`. The product is in the model's dtype, the cast comes after it."""
        hidden = self.norm(hidden)
        if self.output is None:
            logits = product(hidden, self.tok_embeddings.weight)
        else:
            logits = self.output(hidden)
        return logits.astype(jnp.float32)
