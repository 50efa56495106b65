import math
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from models import random_model, random_tokens

import mistral_eqx as mx
from mistral_eqx import prefill
from mistral_eqx.text import TINY_MISTRAL


TOKENIZER = mx.Tokenizer(TINY_MISTRAL / "tokenizer.model")
PROMPTS = ["To be, or not", "", "  ", "🦙 <s>\n\té 2024", "In the beginning " * 5]


def generate(prompts, **options):
    return mx.generate(random_model(vocab_size=2048), TOKENIZER, prompts, **options)


def with_output(model, token, *, like):
    """The same model, but that it says `token` where it said `like`, and the reverse."""
    rows = model.output.weight
    swapped = rows.at[token].set(rows[like]).at[like].set(rows[token])
    return eqx.tree_at(lambda m: m.output.weight, model, swapped)


def test_load(folder):
    model, tokenizer = mx.load(folder, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16 and tokenizer.vocab_size == 2048
    np.testing.assert_array_equal(
        model.output.weight,
        random_model(vocab_size=2048).output.weight.astype(jnp.bfloat16),
    )
    assert mx.load(str(folder))[0].dtype == jnp.float32


def test_one_text_or_several():
    completions = generate(PROMPTS, max_tokens=16)
    assert [completion.prompt for completion in completions] == PROMPTS
    for prompt, completion in zip(PROMPTS, completions):
        alone = generate(prompt, max_tokens=16)
        assert (alone.text, alone.tokens) == (completion.text, completion.tokens)
        np.testing.assert_allclose(alone.logprobs, completion.logprobs, atol=5e-4)
        assert len(completion.tokens) == 16 and completion.reason == "length"
        assert str(completion) == prompt + completion.text


@given(
    prompts=st.lists(st.text(max_size=20), min_size=2, max_size=2), seed=st.integers(0, 9)
)
@settings(max_examples=10, deadline=None)
def test_text_is_what_the_tokens_say(prompts, seed):
    for completion in generate(prompts, max_tokens=8, temperature=1.0, seed=seed):
        everything = TOKENIZER.encode(completion.prompt) + completion.tokens
        prompt = completion.prompt.replace("\u2581", " ")
        assert prompt + completion.text == TOKENIZER.decode(everything)


def test_the_space_before_a_word_is_kept():
    """By itself a word is decoded without it: text is decoded behind its prompt."""
    model = random_model(vocab_size=2048)
    (word,) = TOKENIZER.encode("the", bos=False)
    _, logits = prefill(model, [TOKENIZER.encode("king")])
    model = with_output(model, word, like=int(logits[0].argmax()))
    assert mx.generate(model, TOKENIZER, "king", max_tokens=1).text == " the"


def test_no_tokens():
    assert generate("king", max_tokens=0) == mx.Completion(prompt="king", reason="length")
    assert generate([""], max_tokens=0) == [mx.Completion(prompt="", reason="length")]


def test_end():
    model = random_model(vocab_size=2048)
    first, second = mx.generate(model, TOKENIZER, "king", max_tokens=2).tokens
    model = with_output(model, TOKENIZER.eos_id, like=second)
    completion = mx.generate(model, TOKENIZER, "king", max_tokens=8)
    assert completion.tokens == [first] and completion.reason == "eos"
    assert str(completion) == TOKENIZER.decode([*TOKENIZER.encode("king"), first])


def test_seed():
    options = {"max_tokens": 16, "temperature": 1.0}
    alone = generate("king", **options)
    assert generate("king", **options, seed=0) == alone
    assert generate("king", **options, seed=1).tokens != alone.tokens
    batch = generate(["queen", "king", "king"], **options)
    assert batch[1].text == alone.text and batch[2].tokens != alone.tokens


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": -1}, "max_tokens must be 0 or more, got -1"),
        ({"temperature": -0.1}, "temperature must be 0 .* got -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 .* got nan"),
        ({"chunk": 0}, "chunk must be 1 or more, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        generate("king", **options)


def test_no_prompts():
    with pytest.raises(ValueError, match="There is no prompt"):
        generate([])


@pytest.mark.parametrize("vocab_size", [2000, 2100])
def test_a_tokenizer_of_another_model(tmp_path, vocab_size):
    path = tmp_path / "model"
    tokenizer = TINY_MISTRAL / "tokenizer.model"
    mx.save(random_model(vocab_size=vocab_size), path, tokenizer=tokenizer)
    # Told before the weights are read, which takes minutes for a large model.
    (path / "consolidated.safetensors").unlink()
    message = f"tokenizer has 2048 ids, but the model has {vocab_size}"
    with pytest.raises(ValueError, match=message):
        mx.load(path)


def test_ids_that_the_model_does_not_have():
    with pytest.raises(ValueError, match="token id .* has 64 ids.* tokenizer of this"):
        mx.generate(random_model(), TOKENIZER, "king")


def test_broken_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path / 'none'}"):
        mx.load(tmp_path / "none")
    path = folder / "tokenizer.model"
    shutil.copy(folder / "params.json", path)
    with pytest.raises(ValueError, match=f"{path} is not a sentencepiece model"):
        mx.load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no tokenizer in {folder}"):
        mx.load(folder)


def test_embedded_model():
    model, tokenizer = mx.load()
    stored = mx.load_model(TINY_MISTRAL, dtype=jnp.bfloat16)
    for leaf, other in zip(jax.tree.leaves(model), jax.tree.leaves(stored)):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, other.astype(jnp.float32))
    size = sum(path.stat().st_size for path in TINY_MISTRAL.glob("*.*"))
    assert size < 16e6
    completion = mx.generate(model, tokenizer, "To be, or not", max_tokens=32)
    assert len(completion.text.split()) > 4
    assert completion.text.startswith(" ")


def test_embedded_model_knows_its_books():
    """Far from the 7.6 nats of a guess, on either: a model that was not trained, or that
    is not read as it was written, is not."""
    model, tokenizer = mx.load()
    for text in (
        "First Citizen:\nBefore we proceed any further, hear me speak.\n",
        "In the beginning God created the heaven and the earth.\n",
    ):
        scored = mx.score(model, tokenizer, text)
        assert math.log(scored.perplexity) < 4.5


def test_embedded_model_reads_a_long_prompt():
    model, tokenizer = mx.load()
    tokens = random_tokens(8000, vocab_size=2048)
    cache, logits = prefill(model, [tokens], max_tokens=8)
    assert cache.slots == (256,) * model.config.n_layers
    assert np.isfinite(logits).all()
    long = tokenizer.decode(tokens[3:]) + " And God said"
    assert len(tokenizer.encode(long)) > 7000
    assert len(mx.generate(model, tokenizer, long, max_tokens=8).tokens) == 8


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda b: mx.stream(*b, ["To be"]),
            r"prompt must be a text \(str\), got \['To be'",
        ),
        (
            lambda b: mx.stream(*b, "a", max_tokens=None),
            "max_tokens must be a whole number",
        ),
        (lambda b: mx.stream(*b, "a", stop=-1), r"stop must be a text .*, got -1 \(int\)"),
        (lambda b: mx.generate(*b, None), "prompts must be a text .*, got None"),
        (lambda b: mx.generate(*b, ["a", 5]), r"prompts\[1\] must be a text .*, got 5"),
        (lambda b: mx.generate(*b, b"a"), "prompts must be a text .*, got b'a'"),
        (
            lambda b: mx.generate(*b, "\ud83e"),
            r"prompts has '\\ud83e' at character 0: that",
        ),
        (lambda b: mx.generate(*b, "a", stop=math.inf), "stop must be a text .*, got inf"),
        (lambda b: mx.generate(*b, "a", top_p="0.5"), "top_p must be a number, got '0.5'"),
        (lambda b: mx.generate(*b, "a", seed=1.5), "seed must be a whole number, got 1.5"),
        (lambda b: mx.generate(*b, "a", seed=(1,)), "seed must be a whole number"),
        (lambda b: mx.generate(*b, "a", alternatives=None), "alternatives must be a whole"),
        (lambda b: mx.generate(*b, "a", chunk=-0.0), "chunk must be a whole number"),
        (lambda b: mx.generate(*b, "a", chunk=2**31), "chunk must be at most 1048576, got"),
        (lambda b: mx.generate(*b, "a", max_tokens=True), "max_tokens must be a whole num"),
        (lambda b: mx.prefill(b[0], "abc"), "prompts must be lists of token ids, .*'abc'"),
        (lambda b: mx.prefill(b[0], [[1.5]]), "Prompt 0 must be a list of token ids"),
        (lambda b: b[1].encode(5), r"text must be a text \(str\), got 5 \(int\)"),
        (lambda b: b[1].decode([5, 9999]), "a token id must be at most 2047, got 9999"),
        (lambda b: mx.load(5), r"folder must be a path \(str or Path\), got 5"),
        (lambda b: mx.load("a\0b"), "folder cannot be a path, got 'a"),
        (lambda b: mx.load("x" * 300), "folder cannot be a path, got 'xxx"),
    ],
)
def test_wrong_arguments_are_told_at_the_call(call, message, unchecked):
    """And not by a library, nor at the first `next`. `python tests/fuzz.py` tries more."""
    with pytest.raises((TypeError, ValueError), match=message):
        call((random_model(vocab_size=2048), TOKENIZER))


def test_numbers_of_numpy_and_jax_are_numbers(unchecked):
    expected = generate("To be", max_tokens=4, temperature=0.5, top_k=9, seed=3)
    for integer, number in ((np.int64, np.float32), (jnp.int32, jnp.float32)):
        numbers = {"max_tokens": integer(4), "temperature": number(0.5)}
        numbers |= {"top_k": integer(9), "seed": integer(3)}
        assert generate("To be", **numbers).tokens == expected.tokens


def test_a_text_of_nothing_has_a_perplexity_of_one():
    assert generate("To be", max_tokens=0).perplexity == 1
