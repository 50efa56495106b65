import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PARAMS, cast, close, random_model, random_tokens

from mistral_eqx import Cache, ModelConfig, Transformer
from mistral_eqx.files.params import config_from_params
from mistral_eqx.prompts import chunk_sizes


def in_chunks(model, tokens, chunk):
    """The logits at every position, through a ring that is written chunk by chunk."""
    cache = Cache(
        model.config, jnp.int32(0), chunk=chunk, max_length=len(tokens), dtype=model.dtype
    )
    step = eqx.filter_jit(lambda model, tokens, cache: model(tokens, cache))
    logits, start = [], 0
    for size in chunk_sizes(0, len(tokens), chunk=chunk, slots=cache.slots):
        rows, cache = step(model, jnp.asarray(tokens[start : start + size]), cache)
        logits.append(rows)
        start += size
    assert cache.length == len(tokens)
    return np.concatenate(logits)


@pytest.mark.parametrize("window", [8, None])
def test_decode_is_prefill_is_one_shot_is_no_cache(window):
    model, tokens = random_model(sliding_window=window), random_tokens(43)
    expected, _ = eqx.filter_jit(model)(jnp.asarray(tokens))
    # Of one token, of less than the window, of all of it, of more, and of everything.
    for chunk in (1, 3, 8, 11, 43):
        close(in_chunks(model, tokens, chunk), expected, 3e-5)


def test_a_window_as_long_as_the_text_is_none():
    tokens = jnp.asarray(random_tokens(43))
    wide, whole, short = (
        eqx.filter_jit(random_model(sliding_window=window))(tokens)[0]
        for window in (43, None, 42)
    )
    np.testing.assert_allclose(wide, whole, atol=1e-5)
    close(short[:-1], whole[:-1], 3e-5)
    # What one key less does to the last query depends on the key: little, often.
    assert np.abs(short[-1] - whole[-1]).max() > 1e-4


def test_batch_is_every_row():
    model = random_model()
    tokens = jnp.asarray([random_tokens(12, seed=seed) for seed in range(3)])
    run = eqx.filter_jit(model)
    batch, _ = eqx.filter_jit(lambda model, tokens: jax.vmap(model)(tokens))(model, tokens)
    for row, logits in zip(tokens, batch):
        close(run(row)[0], logits, 3e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_hidden_states(dtype):
    model, tokens = cast(random_model(), dtype), jnp.asarray(random_tokens(12))

    @eqx.filter_jit
    def run(model, tokens):
        hidden, cache = model.hidden_states(tokens)
        return hidden, cache, model.logits(hidden[-1]), model(tokens)[0]

    hidden, cache, logits, expected = run(model, tokens)
    assert cache is None
    assert len(hidden) == model.config.n_layers + 1
    assert all(state.shape == (12, 32) and state.dtype == dtype for state in hidden)
    np.testing.assert_array_equal(hidden[0], model.tok_embeddings.weight[tokens])
    np.testing.assert_array_equal(logits, expected)
    assert logits.dtype == jnp.float32 and logits.shape == (12, 64)


def test_reach():
    """Information goes `window - 1` positions a layer and no further: exact zeros."""
    window, seq, query = 4, 20, 18
    model = random_model(sliding_window=window, n_layers=3)
    # Every position its own id, so that rows of the embedding are positions.
    tokens = jnp.arange(seq)
    weights = np.random.default_rng(0).standard_normal(32).astype(np.float32)

    @eqx.filter_jit
    def gradients(model):
        def states(embedding):
            changed = eqx.tree_at(lambda m: m.tok_embeddings.weight, model, embedding)
            hidden, _ = changed.hidden_states(tokens)
            return jnp.stack([state[query] @ weights for state in hidden])

        return jax.jacrev(states)(model.tok_embeddings.weight)[:, :seq]

    for layers, gradient in enumerate(np.asarray(gradients(model))):
        reached = np.flatnonzero(np.abs(gradient).max(axis=-1))
        first = query - layers * (window - 1)
        assert reached.tolist() == list(range(first, query + 1))


def test_an_id_that_is_none_gives_nan():
    model = random_model()
    for wrong in (-1, PARAMS["vocab_size"]):
        logits, _ = eqx.filter_jit(model)(jnp.array([3, wrong, 5]))
        assert np.isnan(logits[1:]).all()


def test_arrays_are_the_only_leaves():
    model = random_model()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model))
    assert model.dtype == jnp.float32
    assert cast(model, jnp.bfloat16).dtype == jnp.bfloat16


def test_initialisation():
    model = eqx.filter_jit(Transformer)(ModelConfig(**PARAMS), key=jax.random.key(0))
    logits, _ = eqx.filter_jit(model)(jnp.asarray(random_tokens(43)))
    # A new model has no opinion, but one on everything: all of variance about 1.
    assert 0.8 < logits.std() < 1.2
    values = np.concatenate(
        [leaf.ravel() for leaf in jax.tree.leaves(model) if leaf.ndim > 1]
    )
    assert len(np.unique(values)) > 0.99 * len(values)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        model = eqx.filter_eval_shape(
            Transformer, ModelConfig(**PARAMS), dtype=dtype, key=jax.random.key(0)
        )
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(model))


V7B = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 32000,
}
NEMO = V7B | {"dim": 5120, "n_layers": 40, "vocab_size": 131072, "rope_theta": 1e6}
RELEASED = {
    "7B v0.1": (V7B | {"sliding_window": 4096}, 7_241_732_096),
    "7B v0.2": (V7B | {"rope_theta": 1e6}, 7_241_732_096),
    "7B v0.3": (V7B | {"vocab_size": 32768, "rope_theta": 1e6}, 7_248_023_552),
    "Nemo 12B": (NEMO, 12_247_782_400),
    "Small 24B": (NEMO | {"hidden_dim": 32768, "rope_theta": 1e8}, 23_572_403_200),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name):
    params, count = RELEASED[name]
    config = config_from_params(params)
    model = eqx.filter_eval_shape(
        Transformer, config, dtype=jnp.bfloat16, key=jax.random.key(0)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    cache = eqx.filter_eval_shape(
        Cache, config, jnp.zeros(2, int), chunk=16, max_length=8192, dtype=jnp.bfloat16
    )
    logits, cache = eqx.filter_eval_shape(
        lambda model, tokens, cache: jax.vmap(
            model, in_axes=(0, cache.axes), out_axes=(0, cache.axes)
        )(tokens, cache),
        model,
        tokens,
        cache,
    )
    assert logits.shape == (2, 16, config.vocab_size)
    slots = 4112 if config.sliding_window else 8192
    assert cache.layers[-1].keys.shape == (2, 8, slots, 128)


def test_several_texts_in_a_row_go_without_a_cache():
    model = random_model()
    padding = jnp.zeros((), jnp.int32)
    options = {"chunk": 4, "max_length": 8, "dtype": jnp.float32}
    tokens = jnp.arange(4, dtype=jnp.int32)
    with pytest.raises(ValueError, match="leave out the cache"):
        model.hidden_states(tokens, model.empty_cache(padding, **options), tokens // 2)
