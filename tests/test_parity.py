"""The package and the one-file port against transformers, which is the authority.

The package is compared as users run it, and once more with all kernels switched off, so
that the plain text of the model can be trusted. In float32 the logits agree to 3e-5 of
the largest at every position, and greedy decoding to the token. The one-file port keeps
the reference's prefill, whose queries see one key more than the window: it is compared
where a prefill is no longer than the window.
"""

import contextlib
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from models import cast, close, random_model, random_tokens

import one_file_ref
from mistral_eqx import decoding, generation, load
from mistral_eqx.apps.options import CORPUS
from mistral_eqx.apps.terminal import read_text, split_held_out
from mistral_eqx.config import MoEConfig
from mistral_eqx.files.names import weight_name
from mistral_eqx.files.params import config_to_params
from mistral_eqx.kernels.replaced import plain
from mistral_eqx.text import TINY_MISTRAL


# Of the largest logit.
TOLERANCE = 3e-5
STEPS = 64
# Windows and none, 1, 2 and as many kv heads as heads, head_dim = dim / n_heads and not.
CASES = {
    "window 4, 1 kv head": {"sliding_window": 4, "n_kv_heads": 1, "head_dim": 6},
    "window 8, 2 kv heads": {"sliding_window": 8, "n_kv_heads": 2, "head_dim": 8},
    "no window, 4 kv heads": {
        "sliding_window": None,
        "n_kv_heads": 4,
        "head_dim": 12,
        "rope_theta": 1e6,
    },
}
# The one-file port has no experts.
MIXTRAL = "4 experts, 2 a token"
PACKAGE_CASES = CASES | {
    MIXTRAL: {
        "sliding_window": None,
        "head_dim": 8,
        "rope_theta": 1e6,
        "moe": MoEConfig(4, 2),
    }
}
CHUNKS = (1, 3, 8, 11)
torch.set_num_threads(1)  # no model here is worth more
HUGGING_FACE_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "mlp.gate",
    "feed_forward.experts.w1": "mlp.experts.gate_proj",
    "feed_forward.experts.w2": "mlp.experts.down_proj",
    "feed_forward.experts.w3": "mlp.experts.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def state_dict(model):
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {weight_name(path): np.asarray(leaf) for path, leaf in leaves}


def hugging_face_weight(name, weight, config):
    """Mistral's name and rows to Hugging Face's: the pairs of a head that turn together
    are neighbours in the one and half a head apart in the other."""
    name = name.removesuffix(".weight")
    if name.endswith(("wq", "wk")):
        heads = config.n_heads if name.endswith("wq") else config.n_kv_heads
        pairs = weight.reshape(heads, config.head_dim // 2, 2, config.dim)
        weight = pairs.swapaxes(1, 2).reshape(weight.shape)
    prefix = ""
    if name.startswith("layers."):
        _, layer, name = name.split(".", 2)
        prefix = f"model.layers.{layer}."
    return prefix + HUGGING_FACE_NAMES[name] + ".weight", torch.tensor(weight)


def hugging_face_weights(weights, config):
    """Those of a whole model. transformers stacks the experts too, and w1 upon w3."""
    renamed = dict(
        hugging_face_weight(name, weight, config) for name, weight in weights.items()
    )
    for name in [name for name in renamed if name.endswith("experts.gate_proj.weight")]:
        stem = name.removesuffix(".gate_proj.weight")
        gate, up = (renamed.pop(f"{stem}.{w}_proj.weight") for w in ("gate", "up"))
        renamed[f"{stem}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        renamed[f"{stem}.down_proj"] = renamed.pop(f"{stem}.down_proj.weight")
    return renamed


def hugging_face(model, **changes):
    """The same model, in float32, in transformers."""
    config = model.config
    kwargs = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "sliding_window": config.sliding_window,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": 2**20,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    name = "Mistral"
    if config.moe is not None:
        name = "Mixtral"
        kwargs["num_local_experts"] = config.moe.num_experts
        kwargs["num_experts_per_tok"] = config.moe.num_experts_per_tok
    torch_config = getattr(transformers, f"{name}Config")(
        **kwargs | changes, attn_implementation="eager"
    )
    torch_model = getattr(transformers, f"{name}ForCausalLM")(torch_config).eval()
    weights = state_dict(cast(model, jnp.float32))
    torch_model.load_state_dict(hugging_face_weights(weights, config))
    return torch_model


def one_file(model):
    """The same model in the one-file port."""
    args = one_file_ref.ModelArgs(**config_to_params(model.config))
    skeleton = eqx.filter_eval_shape(one_file_ref.Transformer, args, key=jax.random.key(0))
    weights = state_dict(model)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(weights.pop(weight_name(path))), skeleton
    )


class Numerals(one_file_ref.Tokenizer):
    """Writes ids as numbers, so that texts are ids."""

    pad_id = -1

    def __init__(self):
        pass

    def encode(self, s):
        return [int(word) for word in s.split()]

    def decode(self, t):
        return " ".join(str(token) for token in t)


def logits_of(torch_model, tokens):
    with torch.no_grad():
        return torch_model(torch.tensor([tokens])).logits[0].float().numpy()


def greedy(torch_model, prompt):
    tokens = torch_model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=STEPS,
        pad_token_id=0,
    )
    return tokens[0, len(prompt) :].tolist()


class Case:
    """A model, all that transformers says about it, and prompts up to five windows."""

    def __init__(self, model, tokens, lengths):
        self.model, self.tokens = model, tokens
        self.window = model.config.sliding_window
        self.hugging_face = hugging_face(model)
        self.logits = logits_of(self.hugging_face, tokens)
        self.prompts = [tokens[:length] for length in lengths]
        self.continued = [greedy(self.hugging_face, prompt) for prompt in self.prompts]


@functools.cache
def case(name):
    model = random_model(**PACKAGE_CASES[name])
    window = model.config.sliding_window
    # Without a window far enough for a missing permutation of wq and wk to show.
    tokens = random_tokens(5 * window if window else 80)
    lengths = [len(tokens), 1, (window or 8) - 1, len(tokens) // 2 + 3]
    made = Case(model, tokens, lengths)
    for prompt, continued in zip(made.prompts, made.continued):
        # No near ties, which logits off by the tolerance could turn, and no monotony.
        rows = logits_of(made.hugging_face, prompt + continued)[len(prompt) - 1 : -1]
        second, first = np.sort(rows, axis=-1)[:, -2:].T
        assert (first - second).min() > 2 * TOLERANCE * np.abs(rows).max()
        assert len(set(continued)) > 8
    return made


cases = pytest.mark.parametrize("name", CASES)
package_cases = pytest.mark.parametrize("name", PACKAGE_CASES)


# Of the module, so that compiled programs are dropped once and not at every test.
@pytest.fixture(scope="module", params=["kernels", "plain"])
def programs(request):
    """What computes the replaceable functions of the model."""
    with plain() if request.param == "plain" else contextlib.nullcontext():
        yield


@package_cases
def test_package_logits(name, programs):
    expected = case(name)
    logits, cache = eqx.filter_jit(expected.model)(jnp.asarray(expected.tokens))
    assert cache is None
    close(logits, expected.logits, TOLERANCE)


# Without kernels one chunk that divides no window is enough.
@pytest.mark.parametrize(
    "programs, chunk",
    [*(("kernels", chunk) for chunk in CHUNKS), ("plain", 3)],
    indirect=["programs"],
)
@package_cases
def test_package_ragged_batch_in_chunks(name, chunk, programs):
    expected = case(name)
    # Every beginning of the text is a row, so every position is the last of some row.
    everything = [expected.tokens[: i + 1] for i in range(len(expected.tokens))]
    _, logits = decoding.prefill(expected.model, everything, max_tokens=STEPS, chunk=chunk)
    close(logits, expected.logits, TOLERANCE)
    continued = generation.generate(
        expected.model, everything, max_tokens=STEPS, chunk=chunk, key=jax.random.key(0)
    )
    for prompt, tokens in zip(expected.prompts, expected.continued):
        assert continued[len(prompt) - 1].tokens == tokens


@package_cases
def test_package_hidden_states(name, programs):
    expected = case(name)
    tokens = torch.tensor([expected.tokens])
    with torch.no_grad():
        theirs = expected.hugging_face(tokens, output_hidden_states=True).hidden_states

    @eqx.filter_jit
    def states(model, tokens):
        hidden, _ = model.hidden_states(tokens)
        # The last of transformers' is behind the final norm.
        return *hidden[:-1], model.norm(hidden[-1])

    ours = states(expected.model, jnp.asarray(expected.tokens))
    assert len(ours) == len(theirs) == expected.model.config.n_layers + 1
    for our, their in zip(ours, theirs):
        close(our, their[0], TOLERANCE)


def one_file_logits(model, tokens, prefill):
    logits, cache = model.forward(
        jnp.asarray([tokens[:prefill]]),
        jnp.arange(prefill),
        model.empty_cache(1, len(tokens)),
    )
    rows = [logits[0]]
    for i in range(prefill, len(tokens)):
        logits, cache = model.forward(jnp.asarray([[tokens[i]]]), jnp.array([i]), cache)
        rows.append(logits[0])
    return np.concatenate(rows)


@cases
def test_one_file_logits(name):
    expected = case(name)
    prefill = expected.window or len(expected.tokens)
    logits = one_file_logits(one_file(expected.model), expected.tokens, prefill)
    close(logits, expected.logits, TOLERANCE)


def test_one_file_prefill_is_a_window_wider():
    expected = case("window 8, 2 kv heads")
    logits = one_file_logits(one_file(expected.model), expected.tokens, 40)
    wider = hugging_face(expected.model, sliding_window=9)
    close(logits, logits_of(wider, expected.tokens), TOLERANCE)
    assert np.abs(logits - expected.logits)[8:].max() > 1


def one_file_greedy(expected):
    lengths = [len(prompt) for prompt in expected.prompts]
    texts, _ = one_file_ref.generate(
        [" ".join(str(token) for token in prompt) for prompt in expected.prompts],
        one_file(expected.model),
        Numerals(),
        # It counts from the shortest prompt.
        max_tokens=max(lengths) - min(lengths) + STEPS,
    )
    return [
        [int(word) for word in text.split()][length : length + STEPS]
        for text, length in zip(texts, lengths)
    ]


@cases
def test_one_file_ragged_batch(name):
    expected = case(name)
    assert one_file_greedy(expected) == expected.continued


@pytest.mark.parametrize("name", ["window 8, 2 kv heads", "no window, 4 kv heads"])
def test_bfloat16(name, programs):
    """Two right programs round differently in bfloat16, whose steps are 2**-8 of a number,
    some twenty times on the way. So the measure is the exact logits of the same bfloat16
    weights: the package is within 5 percent of their spread on average and no further from
    them than transformers is, give or take a quarter."""
    model = cast(random_model(**CASES[name]), jnp.bfloat16)
    tokens = case(name).tokens
    torch_model = hugging_face(model)
    exact = logits_of(torch_model, tokens)
    theirs = np.abs(logits_of(torch_model.bfloat16(), tokens) - exact).mean()
    at_once, _ = eqx.filter_jit(model)(jnp.asarray(tokens))
    _, in_chunks = decoding.prefill(
        model, [tokens[: i + 1] for i in range(len(tokens))], chunk=8
    )
    prefill = case(name).window or len(tokens)
    in_one_file = one_file_logits(one_file(model), tokens, prefill)
    for logits in (at_once, in_chunks, in_one_file):
        ours = np.abs(np.asarray(logits) - exact).mean()
        assert ours < 0.05 * exact.std()
        assert ours < 1.25 * theirs


@pytest.mark.parametrize("window", [None, 8])
def test_features_in_the_thousands(window, programs):
    """Trained models have a few features that are a thousand times the others, which
    magnify the rounding of any program. Measured from the logits in float64 and relative to
    the largest of them, the package's error stays within five times that of transformers in
    float32, and the same tokens are the most probable ones."""
    sizes = {"dim": 256, "hidden_dim": 512, "n_layers": 4, "head_dim": 32, "n_heads": 8}
    model = random_model(**sizes, vocab_size=512, sliding_window=window)
    rows = jnp.ones((256, 1)).at[jnp.array([3, 77]), 0].set(jnp.array([400.0, -900.0]))
    weight = lambda m: m.layers[0].feed_forward.w2.weight
    model = eqx.tree_at(weight, model, weight(model) * rows)
    tokens = random_tokens(200, 512)
    hidden, _ = eqx.filter_jit(lambda m, t: m.hidden_states(t))(model, jnp.asarray(tokens))
    assert jnp.abs(hidden[2]).max() > 3000
    torch_model = hugging_face(model)
    theirs = logits_of(torch_model, tokens)
    with torch.no_grad():
        exact = torch_model.double()(torch.tensor([tokens])).logits[0].numpy()
    at_once, _ = eqx.filter_jit(model)(jnp.asarray(tokens))
    _, in_chunks = decoding.prefill(
        model, [tokens[: i + 1] for i in range(len(tokens))], chunk=64
    )
    bound = 5 * np.abs(theirs - exact).max()
    assert bound < 1e-3 * np.abs(exact).max()
    for logits in (at_once, in_chunks):
        assert np.abs(logits - exact).max() < bound
        np.testing.assert_array_equal(logits.argmax(-1), exact.argmax(-1))


@functools.cache
def embedded():
    """The embedded model on text of five windows and more."""
    model, tokenizer = load(dtype=jnp.float32)
    assert model.config.sliding_window == 64
    _, unseen = split_held_out(read_text(CORPUS[0]))
    tokens = tokenizer.encode(unseen[:2000])[:330]
    assert len(tokens) == 330
    return Case(model, tokens, [330, 64, 7])


def test_embedded_model_package(programs):
    expected = embedded()
    logits, _ = eqx.filter_jit(expected.model)(jnp.asarray(expected.tokens))
    close(logits, expected.logits, 1e-5)
    continued = generation.generate(
        expected.model, expected.prompts, max_tokens=STEPS, key=jax.random.key(0)
    )
    assert [row.tokens for row in continued] == expected.continued


def test_embedded_model_one_file():
    expected = embedded()
    model = one_file_ref.Transformer.from_folder(TINY_MISTRAL, jnp.float32)
    logits = one_file_logits(model, expected.tokens, expected.window)
    close(logits, expected.logits, TOLERANCE)
    assert one_file_greedy(expected) == expected.continued
