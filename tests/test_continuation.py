"""Laws of the engine: rows, budgets, log-probabilities, and caches that are continued."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from models import random_model, random_tokens

from mistral_eqx import Sampling, decoding, generation
from mistral_eqx.decoding import DecodeState, decode, prefill
from mistral_eqx.generation import generate
from mistral_eqx.scoring import score


PROMPTS = [random_tokens(3), random_tokens(20, seed=1), random_tokens(9, seed=2)]
BUDGETS = [5, 40, 21]
OPTIONS = {
    "sampling": Sampling(0.9, top_k=20, top_p=0.9, repetition_penalty=1.2),
    "eos_ids": [7],
    "alternatives": 3,
    "key": jr.key(3),
}


@pytest.mark.parametrize("window", [8, None])
def test_a_row_is_the_same_alone_and_in_a_batch(window):
    model = random_model(sliding_window=window)
    batch = generate(model, PROMPTS, max_tokens=BUDGETS, **OPTIONS)
    for prompt, n, row in zip(PROMPTS, BUDGETS, batch):
        (alone,) = generate(model, [prompt], max_tokens=n, **OPTIONS)
        assert alone.tokens == row.tokens and alone.reason == row.reason
        assert len(row.tokens) == n if row.reason == "length" else len(row.tokens) < n
        # The log-probabilities are the model's: those that the finished text is given.
        scored = score(model, prompt + row.tokens, alternatives=3)
        made = slice(len(prompt) - 1, None)
        np.testing.assert_allclose(row.logprobs, scored.logprobs[made], atol=5e-4)
        for ours, theirs in zip(row.alternatives, scored.alternatives[made], strict=True):
            assert list(ours) == list(theirs)
            np.testing.assert_allclose(
                list(ours.values()), list(theirs.values()), atol=5e-4
            )


def test_alternatives_are_the_best(n=4):
    model, tokens = random_model(), random_tokens(30)
    logits, _ = model(jnp.asarray(tokens))
    logprobs = np.asarray(jax.nn.log_softmax(logits))[:-1]
    scored = score(model, tokens, alternatives=n)
    np.testing.assert_allclose(
        scored.logprobs, logprobs[np.arange(29), tokens[1:]], atol=5e-4
    )
    best = np.argsort(-logprobs, axis=1)[:, :n]
    assert [list(row) for row in scored.alternatives] == best.tolist()
    expected = np.exp(-np.mean(scored.logprobs))
    np.testing.assert_allclose(scored.perplexity, expected, rtol=1e-6)


@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize("held", [3, 17])
def test_a_prefix_is_continued_many_times(window, held):
    model = random_model(sliding_window=window)
    base = random_tokens(held, seed=5)
    cache, logits = prefill(model, [base], max_tokens=60)
    for endings in ([[11, 12, 13]], [[3], [4], [3]], [[11, 12, 13]]):
        prompts = [base + ending for ending in endings]
        with_prefix = generate(model, prompts, max_tokens=12, prefix=cache, **OPTIONS)
        without = generate(model, prompts, max_tokens=12, **OPTIONS)
        for ours, theirs in zip(with_prefix, without):
            assert ours.tokens == theirs.tokens
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=5e-4)
    # A prefill of the rest is the prefill of all.
    rest = random_tokens(21, seed=6)
    _, ours = prefill(model, [rest], cache=cache)
    _, theirs = prefill(model, [base + rest])
    np.testing.assert_allclose(ours, theirs, atol=5e-4)


def test_prefixes_of_several_rows():
    model = random_model()
    cache, _ = prefill(model, PROMPTS, max_tokens=30)
    prompts = [prompt + [9, 8] for prompt in PROMPTS]
    ours = generate(model, prompts, max_tokens=9, prefix=cache, **OPTIONS)
    theirs = generate(model, prompts, max_tokens=9, **OPTIONS)
    assert [row.tokens for row in ours] == [row.tokens for row in theirs]


def decoded(model, prompts, budgets):
    cache, logits = prefill(model, prompts, max_tokens=40)
    state = DecodeState.start(model, cache, logits, max_tokens=budgets, key=jr.key(0))
    state, block = decode(model, state, jnp.int32(20))
    return state.cache, np.asarray(block.tokens)


def test_a_cache_is_continued_behind_what_was_made():
    model = random_model(sliding_window=None)
    cache, made = decoded(model, PROMPTS, [6, 6, 6])
    whole = [prompt + row[:6].tolist() + [5] for prompt, row in zip(PROMPTS, made)]
    _, ours = prefill(model, [[5]] * 3, cache=cache)
    _, theirs = prefill(model, whole)
    np.testing.assert_allclose(ours, theirs, atol=5e-4)


def test_a_row_that_ended_earlier_is_not_continued():
    model = random_model(sliding_window=None)
    cache, _ = decoded(model, PROMPTS, [6, 5, 6])
    with pytest.raises(ValueError, match="ended before the others"):
        prefill(model, [[5]] * 3, cache=cache)


@pytest.mark.parametrize(
    "window, prompts, options, message",
    [
        (None, [[1, 2, 3, 4]], {"max_tokens": 600}, "larger max_tokens"),
        (300, [[1, 2, 3, 4]], {"max_tokens": 600}, "larger max_tokens"),
        (None, [[1, 2, 3]], {"max_tokens": 3}, "go on by a token"),
        (None, [[1, 2, 3, 4], [1, 2, 3, 4, 5]], {"max_tokens": 3}, "of one length"),
    ],
)
def test_what_a_cache_cannot_do(window, prompts, options, message):
    model = random_model(sliding_window=window)
    cache, _ = prefill(model, [[1, 2, 3]], max_tokens=50)
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, prefix=cache, key=jr.key(0), **options)


def test_a_chunk_that_would_overwrite_what_is_seen():
    model = random_model(sliding_window=8)
    cache, _ = prefill(model, [[5] * 6], chunk=4, max_tokens=1000)
    with pytest.raises(ValueError, match="Give a chunk of at most 5"):
        prefill(model, [[5] * 20], cache=cache, max_tokens=100)
    _, logits = prefill(model, [[5] * 20], cache=cache, chunk=4, max_tokens=100)
    _, expected = prefill(model, [[5] * 26])
    np.testing.assert_allclose(logits, expected, atol=5e-4)


def test_a_state_needs_room_for_its_tokens():
    """Without a window, what is made would take the place of the prompt."""
    model = random_model(sliding_window=None)
    cache, logits = prefill(model, [[1] * 8], chunk=8)
    options = {"max_tokens": 40, "key": jr.key(0)}
    with pytest.raises(ValueError, match="made for 8 tokens, .* and 47 are asked of it"):
        DecodeState.start(model, cache, logits, **options)
    windowed = random_model(sliding_window=4)
    cache, logits = prefill(windowed, [[1] * 8], chunk=8)
    DecodeState.start(windowed, cache, logits, **options)


def test_a_cache_of_other_rows():
    model = random_model()
    cache, _ = prefill(model, [[1], [2]], max_tokens=50)
    with pytest.raises(ValueError, match="2 rows"):
        prefill(model, [[1], [2], [3]], cache=cache)
    with pytest.raises(ValueError, match="prefix has 2 rows, .* 3 prompts"):
        generate(model, [[1, 2]] * 3, prefix=cache, max_tokens=3, key=jr.key(0))


def test_options_and_caches_do_not_retrace(monkeypatch):
    model = random_model(n_layers=1)
    traced = eqx.debug.assert_max_traces(decoding.decode_step, max_traces=1)
    monkeypatch.setattr(decoding, "decode_step", traced)
    cache, _ = prefill(model, [[1, 2]], max_tokens=100)
    for sampling, prefix in (
        (None, None),
        (Sampling(1.0, top_p=0.5), None),
        (Sampling(0.3, top_k=3, min_p=0.2, repetition_penalty=1.1), cache),
    ):
        for n, block in ((20, 2), (50, 8)):
            made = generation.stream(
                model,
                [[1, 2, 3]],
                max_tokens=n,
                prefix=prefix,
                sampling=sampling,
                block=block,
                key=jr.key(n),
            )
            assert sum(len(piece.tokens) for (piece,) in made) == n


def test_rows_that_are_stopped_end():
    model = random_model()
    told = []
    made = generation.stream(
        model,
        [[1], [2]],
        max_tokens=1000,
        stopped=lambda: [len(told) >= 2, len(told) >= 4],
        key=jr.key(0),
    )
    for pieces in made:
        told.append([len(piece.tokens) for piece in pieces])
    assert len(told) == 4 and told[0] == [8, 8] and told[3] == [0, 8]


def test_no_tokens_are_a_length():
    (row,) = generate(random_model(), [[1]], max_tokens=0, key=jr.key(0))
    assert row.tokens == [] and row.reason == "length"


def test_a_long_prompt_takes_the_memory_of_a_chunk():
    """The largest array that any program makes does not grow with the prompt."""
    model = random_model(n_layers=1)
    tokens = random_tokens(5000)
    cache, logits = prefill(model, [tokens], max_tokens=10, chunk=8)
    assert cache.slots == (16,)
    scored = score(model, tokens, chunk=8)
    assert len(scored.logprobs) == 4999
    np.testing.assert_allclose(
        prefill(model, [tokens[-8:]], chunk=8)[1], logits, atol=5e-4
    )  # one layer of window 8 sees no further


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": [1, 2]}, "2 numbers for 1"),
        ({"max_tokens": [-1]}, "max_tokens"),
        ({"max_tokens": 3, "alternatives": 65}, "alternatives"),
        ({"max_tokens": 3, "chunk": 0}, "chunk"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        generate(random_model(), [[1]], key=jr.key(0), **options)


def test_the_options_given_can_be_used_again():
    """Nothing of them is given away with what a step donates."""
    rows = [generate(random_model(), PROMPTS, max_tokens=5, **OPTIONS) for _ in range(2)]
    assert [row.tokens for row in rows[0]] == [row.tokens for row in rows[1]]
    arrays = jax.tree.leaves([OPTIONS["sampling"], OPTIONS["key"]])
    assert not any(array.is_deleted() for array in arrays)
