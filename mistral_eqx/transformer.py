"""The model: an embedding, a stack of blocks, a norm, and a logit for every token id."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32, PRNGKeyArray

from .attention import Attention
from .cache import Cache, LayerCache
from .config import ModelConfig
from .layers import Embedding, FeedForward, Linear, RMSNorm, project
from .moe import MixtureOfExperts
from .rope import rotation


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

    # A program is sooner traced: blocks of the same shapes are traced once.
    @eqx.filter_jit
    def __call__(
        self,
        x: Float[Array, "seq dim"],
        positions: Int32[Array, "seq"],
        rotation: tuple[Float32[Array, "seq half"], Float32[Array, "seq half"]],
        cache: LayerCache | None,
        length: Int32[Array, ""],
    ) -> tuple[Float[Array, "seq dim"], LayerCache | None]:
        """As [`Attention`][], but for the whole block: `x` comes back with both added."""
        x, cache = self.attend(x, positions, rotation, cache, length)
        return self.feed(x), cache

    def attend(
        self,
        x: Float[Array, "seq dim"],
        positions: Int32[Array, "seq"],
        rotation: tuple[Float32[Array, "seq half"], Float32[Array, "seq half"]],
        cache: LayerCache | None,
        length: Int32[Array, ""],
    ) -> tuple[Float[Array, "seq dim"], LayerCache | None]:
        """The first half of the block: `x` comes back with what was attended added."""
        attended, cache = self.attention(
            self.attention_norm(x), positions, rotation, cache, length
        )
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
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `config`: sizes, window and constants.
        - `dtype`: of the weights, and so of everything that the contract does not fix
            to float32.
        - `key`: for the initialisation.
        """
        key_embed, key_out, *keys = jr.split(key, config.n_layers + 2)
        self.tok_embeddings = Embedding(
            config.vocab_size, config.dim, dtype=dtype, key=key_embed
        )
        self.layers = tuple(
            TransformerBlock(config, i, dtype=dtype, key=k) for i, k in enumerate(keys)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps, dtype=dtype)
        self.output = None
        if not config.tied_embeddings:
            self.output = Linear(config.dim, config.vocab_size, dtype=dtype, key=key_out)
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
        self, tokens: Int[Array, "seq"], cache: Cache | None = None
    ) -> tuple[tuple[Float[Array, "seq dim"], ...], Cache | None]:
        """The residual stream: `n_layers + 1` arrays, of which the first is the embedding
        and each other the output of a block. Arguments are those of `__call__`."""
        hidden, _, cache = self._run(tokens, cache)
        return hidden, cache

    def with_router_logits(
        self, tokens: Int[Array, "seq"]
    ) -> tuple[Float32[Array, "seq vocab"], Float[Array, "layers seq experts"]]:
        """For training a Mixtral: the logits of the token that follows each, and of each
        token's experts in every layer."""
        hidden, middle, _ = self._run(tokens, None)
        router_logits = [block.router_logits(x) for block, x in zip(self.layers, middle)]
        return self.logits(hidden[-1]), jnp.stack(router_logits)

    def _run(
        self, tokens: Int[Array, "seq"], cache: Cache | None
    ) -> tuple[
        tuple[Float[Array, "seq dim"], ...],
        tuple[Float[Array, "seq dim"], ...],
        Cache | None,
    ]:
        """The residual stream before each block and at the end, and amid each block."""
        length = jnp.int32(0) if cache is None else cache.length
        padding = jnp.int32(0) if cache is None else cache.padding
        positions = length - padding + jnp.arange(tokens.shape[0], dtype=jnp.int32)
        config = self.config
        angles = rotation(positions, config.head_dim, config.rope_theta, config.yarn)
        x = self.tok_embeddings(tokens)
        hidden, middle, layer_caches = [x], [], []
        for i, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            x, layer_cache = block.attend(x, positions, angles, layer_cache, length)
            middle.append(x)
            x = block.feed(x)
            hidden.append(x)
            layer_caches.append(layer_cache)
        if cache is not None:
            cache = eqx.tree_at(
                lambda c: (c.layers, c.length),
                cache,
                (tuple(layer_caches), length + tokens.shape[0]),
            )
        return tuple(hidden), tuple(middle), cache

    def logits(self, hidden: Float[Array, "seq dim"]) -> Float32[Array, "seq vocab"]:
        """The logits of the token that follows each: `hidden` is the last of
        `hidden_states`. The product is in the model's dtype, the cast comes after it."""
        hidden = self.norm(hidden)
        if self.output is None:
            logits = project(hidden, self.tok_embeddings.weight)
        else:
            logits = self.output(hidden)
        return logits.astype(jnp.float32)
