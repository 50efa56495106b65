"""Text in pieces is the text: no character is torn, no stop string leaks."""

import functools
from pathlib import Path

import hypothesis.strategies as st
import mistral_common
import pytest
from hypothesis import given, settings
from models import random_model

import mistral_eqx as mx
from mistral_eqx.generation import Continuation
from mistral_eqx.text import TINY_MISTRAL
from mistral_eqx.tokenizer import Detokenizer, Tokenizer
from mistral_eqx.writer import Writer


DATA = Path(mistral_common.__file__).parent / "data"
PATHS = {
    "ours": TINY_MISTRAL / "tokenizer.model",
    "v1": DATA / "tokenizer.model.v1",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "tekken": DATA / "tekken_240718.json",
}
ODD = ["", " ", "  two", "\n\n x", "naïve 😀👩\u200d👧 漢", 5 * "\ufffd" + " \ufffd"]
TEXTS = st.sampled_from(ODD) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=30
)


@functools.cache
def tokenizer_of(name):
    return Tokenizer(PATHS[name])


def ids_of(tokenizer):
    """Ids as a random model makes them: text's, bytes that are no characters, controls."""
    anything = st.integers(0, tokenizer.vocab_size - 1)
    of_bytes = st.integers(3, 258) if tokenizer.vocab_size < 32768 else anything
    texts = TEXTS.map(lambda text: tokenizer.encode(text, bos=False))
    return st.lists(
        texts | st.lists(anything, max_size=4) | st.lists(of_bytes, max_size=8), max_size=8
    ).map(lambda parts: [i for part in parts for i in part])


@pytest.mark.parametrize("name", PATHS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_are_the_whole_text(name, data):
    tokenizer = tokenizer_of(name)
    prompt = tokenizer.encode(data.draw(TEXTS))
    ids = data.draw(ids_of(tokenizer)) * data.draw(st.sampled_from([1, 1, 7]))
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces, rest = [], ids
    while rest:
        n = data.draw(st.integers(1, 5))
        pieces.append(detokenizer.add(rest[:n]))
        rest = rest[n:]
    pieces.append(detokenizer.end())
    before = tokenizer.decode(prompt)
    assert before + "".join(pieces) == tokenizer.decode(prompt + ids)


@pytest.mark.parametrize("name", PATHS)
def test_controls_have_no_text_and_take_none(name):
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode("king", bos=False) + 40 * [tokenizer.bos_id]
    ids += tokenizer.encode("lear", bos=False)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add([i]) for i in ids] + [detokenizer.end()]
    assert "".join(pieces) == tokenizer.decode(ids)


def test_a_long_text_is_not_decoded_again_and_again():
    decoded = []

    class Counting(Tokenizer):
        def decode(self, ids):
            decoded.append(len(ids))
            return super().decode(ids)

    tokenizer = Counting(PATHS["ours"])
    ids = tokenizer.encode("To be, or not to be, that is the question. " * 100)
    detokenizer = Detokenizer(tokenizer)
    for i in ids:
        detokenizer.add([i])
    assert max(decoded) <= 40


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abc 😀\n", max_size=40),
    stop=st.lists(st.text("abc 😀", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_a_stop_string_ends_the_text_and_never_shows(text, stop, data):
    tokenizer = tokenizer_of("ours")
    ids = tokenizer.encode(text, bos=False)
    writer = Writer(tokenizer, [], stop=stop)
    told = ""
    for i, token in enumerate(ids):
        reason = "length" if i == len(ids) - 1 else None
        told += writer.add(Continuation([token], [0.0], [], reason))
        ends = [text.find(s) + len(s) for s in stop if s in text]
        cut = min(ends, default=len(text))
        starts = [cut - len(s) for s in stop if text[:cut].endswith(s)] if ends else []
        expected = text[: min(starts)] if ends else text
        assert expected.startswith(told)
    if ids:
        assert told == expected == writer.completion.text
        assert writer.completion.reason == ("stop" if ends else "length")
        # In one block it is the same.
        whole = Writer(tokenizer, [], stop=stop)
        whole.add(Continuation(ids, [0.0] * len(ids), [], "length"))
        assert whole.completion == writer.completion


@functools.cache
def small():
    tokenizer = tokenizer_of("ours")
    return random_model(vocab_size=tokenizer.vocab_size), tokenizer


@pytest.mark.parametrize("stop", [(), ["e", " th"]])
def test_streamed_text_is_the_text(stop):
    model, tokenizer = small()
    for seed in range(4):
        options = {"max_tokens": 40, "temperature": 1.0, "stop": stop, "seed": seed}
        whole = mx.generate(model, tokenizer, " Once 😀", **options)
        assert "".join(mx.stream(model, tokenizer, " Once 😀", **options)) == whole.text
        assert all(s not in whole.text for s in stop)
        assert len(whole.tokens) == len(whole.logprobs) <= 40
        if not stop:
            ids = tokenizer.encode(" Once 😀")
            assert str(whole) == tokenizer.decode(ids + whole.tokens)


def test_every_row_ends_for_its_own_reason():
    model, tokenizer = small()
    prompts = ["a", "Once upon a time", "b c d"]
    rows = mx.generate(
        model,
        tokenizer,
        prompts,
        max_tokens=[30, 0, 7],
        stop=" ",
        temperature=1.0,
        alternatives=2,
    )
    alone = [
        mx.generate(model, tokenizer, prompt, max_tokens=n, stop=" ", temperature=1.0)
        for prompt, n in zip(prompts, [30, 0, 7])
    ]
    assert [row.text for row in rows] == [row.text for row in alone]
    assert [row.reason for row in rows] == [row.reason for row in alone]
    assert rows[0].reason == "stop" and rows[1].reason == "length"
    assert all(len(row.alternatives) == len(row.tokens) for row in rows)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_bad_options(options, message):
    model, tokenizer = small()
    with pytest.raises(ValueError, match=message):
        mx.generate(model, tokenizer, "x", **options)
    with pytest.raises(ValueError, match=message):
        list(mx.stream(model, tokenizer, "x", **options))


def test_stop_strings_may_come_from_an_iterator(unchecked):
    model, tokenizer = small()
    options = {"max_tokens": 30, "temperature": 1.0}
    rows = mx.generate(model, tokenizer, ["x", "x y"], stop=iter([" "]), **options)
    assert rows == mx.generate(model, tokenizer, ["x", "x y"], stop=[" "], **options)


def test_an_empty_text_is_not_scored():
    with pytest.raises(ValueError, match="empty"):
        mx.score(*small(), "")
