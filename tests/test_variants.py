"""What newer models add, against transformers' classes for them: windows that differ from
layer to layer, YaRN, llama-4 scaling, tied embeddings. In float32 the logits agree at every
position, beyond the original context too."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from models import PARAMS, close, random_model, random_tokens

from mistral_eqx import Transformer, decoding, load_model, prefill, save
from mistral_eqx.cache import Cache
from mistral_eqx.config import Llama4Scaling, Yarn
from mistral_eqx.files.params import config_from_params
from mistral_eqx.rope import query_scale


YARN = Yarn(
    factor=4.0,
    original_max_position_embeddings=16,
    beta=4.0,
    alpha=0.5,
    apply_scale=False,
)
# The context of 70 tokens is beyond the original one, and wraps the rings.
CASES = {
    "mistral": {},
    "mistral without a window": {"sliding_window": None, "rope_theta": 1e6},
    "ministral": {"sliding_window": (None, 8), "rope_theta": 1e8},
    "ministral, wide first": {"sliding_window": (None, 8, 8), "n_layers": 3},
    "ministral3": {
        "sliding_window": None,
        "head_dim": 16,
        "yarn": YARN,
        "llama_4_scaling": Llama4Scaling(16, 0.3),
    },
    "ministral3, tied": {
        "sliding_window": None,
        "head_dim": 16,
        "tied_embeddings": True,
        "yarn": YARN,
        "llama_4_scaling": Llama4Scaling(16, 0.1),
    },
    "ministral3, yarn with its scale": {
        "head_dim": 16,
        "yarn": Yarn(8.0, 20, 8.0, 1.0, True),
    },
    "ministral with yarn": {
        "sliding_window": (8, None),
        "head_dim": 16,
        "yarn": YARN,
    },
}
cases = pytest.mark.parametrize("name", CASES)
torch.set_num_threads(1)


@functools.cache
def model_of(name):
    return random_model(**CASES[name])


@functools.cache
def tokens_of(name):
    return random_tokens(70)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """transformers' logits, of the folder that we write for it."""

    @functools.cache
    def logits(name):
        folder = tmp_path_factory.mktemp("variant") / "model"
        save(model_of(name), folder, format="huggingface")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        architecture = name.replace(",", "").split()[0]
        assert type(model).__name__ == f"{architecture.capitalize()}ForCausalLM"
        with torch.no_grad():
            out = model(torch.tensor([tokens_of(name)])).logits[0].numpy()
        loaded = load_model(folder, dtype="float32")
        assert loaded.config.windows == model_of(name).config.windows
        for ours, theirs in zip(*map(jax.tree.leaves, (model_of(name), loaded))):
            np.testing.assert_array_equal(ours, theirs)
        return out

    return logits


@cases
def test_logits_of_a_whole_sequence(name, expected):
    logits, _ = eqx.filter_jit(model_of(name))(jnp.asarray(tokens_of(name)))
    close(logits, expected(name), 3e-5)


@pytest.mark.parametrize(
    "name, chunk", [(name, (8, 3)[i % 2]) for i, name in enumerate(CASES)]
)
def test_logits_of_a_ragged_batch_in_chunks(name, chunk, expected):
    """Rows of other lengths, whose last tokens are at positions within and beyond the
    original context, then decoding steps to where the longest has ended."""
    model, tokens, steps = model_of(name), tokens_of(name), 4
    lengths = [5, 16, 17, 37, 70 - steps]
    rows = [tokens[:length] for length in lengths]
    cache, logits = prefill(model, rows, max_tokens=steps, chunk=chunk)
    got = [logits]
    for step in range(steps):
        following = jnp.array([[tokens[length + step]] for length in lengths], jnp.int32)
        cache, logits = decoding.prefill_chunk(model, cache, following)
        got.append(logits)
    for step, logits in enumerate(got):
        rows = [length - 1 + step for length in lengths]
        close(logits, expected(name)[np.array(rows)], 3e-5)


def test_every_layer_has_a_ring_of_its_own_size():
    config = model_of("ministral").config
    assert config.windows == (None, 8)
    cache = Cache(config, jnp.int32(0), chunk=4, max_length=128, dtype=jnp.float32)
    assert cache.slots == (128, 12)


def test_the_window_of_each_layer_is_the_reach_of_each_layer():
    """A token past every window still reaches the last one through the layers without."""
    tokens = jnp.asarray(tokens_of("ministral"))
    changed = tokens.at[0].set((tokens[0] + 1) % PARAMS["vocab_size"])
    for windows, moved in [((None, 8), True), ((8, 8), False)]:
        model = random_model(sliding_window=windows)
        one, _ = eqx.filter_jit(model)(tokens)
        other, _ = eqx.filter_jit(model)(changed)
        # Two layers of window 8 carry 14 positions.
        assert bool(jnp.any(one[15:] != other[15:])) is moved


def test_yarn_and_scaling_matter():
    """Each of them moves the logits, within the original context or beyond it alone."""
    plain = CASES["ministral3"] | {"yarn": None, "llama_4_scaling": None}
    tokens = jnp.asarray(tokens_of("ministral3"))

    def logits(**changes):
        return eqx.filter_jit(random_model(**plain | changes))(tokens)[0]

    before, scaled = logits(), logits(llama_4_scaling=Llama4Scaling(16, 0.3))
    np.testing.assert_array_equal(before[:16], scaled[:16])
    assert np.abs(before - scaled)[16:].max(axis=1).min() > 1e-3
    slowed = logits(yarn=YARN)
    assert np.abs(before - slowed)[1:].max(axis=1).min() > 1e-3


@settings(deadline=None)
@given(st.integers(-100, 10**6), st.integers(1, 10**5), st.floats(0.01, 1))
def test_query_scale(position, context, beta):
    scale = query_scale(jnp.array([position], jnp.int32), Llama4Scaling(context, beta))
    expected = 1 + beta * np.log(1 + max(position, 0) // context)
    np.testing.assert_allclose(scale[0], expected, rtol=1e-5)


def test_tied_embeddings_are_one_array():
    model = model_of("ministral3, tied")
    untied = random_model(**CASES["ministral3"])
    assert model.output is None
    assert len(jax.tree.leaves(untied)) - len(jax.tree.leaves(model)) == 1


REAL = {
    "7B v0.1": (
        {"n_layers": 32, "dim": 4096, "hidden_dim": 14336, "vocab_size": 32000},
        4096,
        7_241_732_096,
    ),
    "Nemo": (
        {"n_layers": 40, "dim": 5120, "hidden_dim": 14336, "vocab_size": 131072},
        None,
        12_247_782_400,
    ),
    "Ministral 8B": (
        {"n_layers": 36, "dim": 4096, "hidden_dim": 12288, "vocab_size": 131072},
        [131072, 32768, 32768, 32768],
        8_019_808_256,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configurations(name):
    params, window, parameters = REAL[name]
    params = params | {"n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "norm_eps": 1e-5}
    config = config_from_params(params | {"sliding_window": window})
    skeleton = eqx.filter_eval_shape(Transformer, config, key=jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(skeleton)) == parameters
    tokens = jax.ShapeDtypeStruct((300,), jnp.int32)
    logits, _ = eqx.filter_eval_shape(skeleton, tokens)
    assert logits.shape == (300, config.vocab_size)
