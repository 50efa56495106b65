"""The model: an embedding, a stack of blocks, a norm, and a logit for every token id."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32, PRNGKeyArray, PyTree

from .attention import Attention
from .cache import Cache, LayerCache
from .config import ModelConfig
from .devices.stages import Stages
from .layers import Embedding, FeedForward, Linear, RMSNorm, product
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
    layers: tuple[TransformerBlock, ...] | Stages
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
        and each other the output of a block. Arguments are those of `__call__`. What stages
        hand on stays with them: of a model in stages, the first and the last array."""
        length, positions, angles = self._places(tokens, cache)
        x = self.tok_embeddings(tokens)
        if isinstance(self.layers, Stages):
            one = lambda tree: jax.tree.map(lambda a: a[None], tree)
            rows = None if cache is None else one(cache.layers)
            out, rows, _ = self.layers(*one((x, positions, angles)), rows, length)
            return (x, out[0]), _after(cache, jax.tree.map(lambda a: a[0], rows), tokens)
        hidden, layer_caches = [x], []
        for i, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            x, layer_cache = block(x, positions, angles, layer_cache, length)
            hidden.append(x)
            layer_caches.append(layer_cache)
        return tuple(hidden), _after(cache, tuple(layer_caches), tokens)

    def batch(
        self, tokens: Int[Array, "batch seq"], cache: Cache | None = None
    ) -> tuple[Float[Array, "batch seq dim"], Cache | None]:
        """The last of the `hidden_states` of every row, and the cache of all. The stages of
        a model that has them work on different rows at the same time."""
        axes = None if cache is None else cache.axes
        if isinstance(self.layers, Stages):
            places = jax.vmap(self._places, (0, axes), (None, 0, 0))
            length, positions, angles = places(tokens, cache)
            x = jax.vmap(self.tok_embeddings)(tokens)
            rows = None if cache is None else cache.layers
            x, rows, _ = self.layers(x, positions, angles, rows, length)
            return x, _after(cache, rows, tokens)

        def row(tokens, cache):
            hidden, cache = self.hidden_states(tokens, cache)
            return hidden[-1], cache

        return jax.vmap(row, (0, axes), (0, axes))(tokens, cache)

    def with_router_logits(
        self, tokens: Int[Array, "batch seq"]
    ) -> tuple[Float[Array, "batch seq dim"], Float[Array, "batch layers seq experts"]]:
        """For training a Mixtral: what `batch` returns for whole sequences, and the logits
        of each token's experts in every layer."""
        length, positions, angles = self._places(tokens[0], None)

        def row(tokens):
            x, router_logits = self.tok_embeddings(tokens), []
            for block in self.layers:
                x, _ = block.attend(x, positions, angles, None, length)
                router_logits.append(block.router_logits(x))
                x = block.feed(x)
            return x, jnp.stack(router_logits)

        if not isinstance(self.layers, Stages):
            return jax.vmap(row)(tokens)
        repeat = lambda a: jnp.broadcast_to(a[None], (tokens.shape[0], *a.shape))
        positions, angles = jax.tree.map(repeat, (positions, angles))
        x = jax.vmap(self.tok_embeddings)(tokens)
        x, _, router_logits = self.layers(
            x, positions, angles, None, length, n_experts=self.config.moe.num_experts
        )
        return x, router_logits

    def _places(
        self, tokens: Int[Array, "seq"], cache: Cache | None
    ) -> tuple[
        Int32[Array, ""],
        Int32[Array, "seq"],
        tuple[Float32[Array, "seq half"], Float32[Array, "seq half"]],
    ]:
        """How many tokens came before, and the positions of these and their angles."""
        length = jnp.int32(0) if cache is None else cache.length
        padding = jnp.int32(0) if cache is None else cache.padding
        positions = length - padding + jnp.arange(tokens.shape[0], dtype=jnp.int32)
        config = self.config
        angles = rotation(positions, config.head_dim, config.rope_theta, config.yarn)
        return length, positions, angles

    def logits(self, hidden: Float[Array, "seq dim"]) -> Float32[Array, "seq vocab"]:
        """The logits of the token that follows each: `hidden` is the last of
        `hidden_states`. The product is in the model's dtype, the cast comes after it."""
        hidden = self.norm(hidden)
        if self.output is None:
            logits = product(hidden, self.tok_embeddings.weight)
        else:
            logits = self.output(hidden)
        return logits.astype(jnp.float32)


def _after(
    cache: Cache | None, layers: PyTree[Array], tokens: Int[Array, "*batch seq"]
) -> Cache | None:
    """The cache with `tokens` in its layers."""
    if cache is None:
        return None
    length = cache.length + tokens.shape[-1]
    return eqx.tree_at(lambda c: (c.layers, c.length), cache, (layers, length))
