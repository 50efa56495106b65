"""Beam search against transformers: the same sequences with the same scores."""

import functools

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
from models import random_model, random_tokens
from test_parity import hugging_face

from mistral_eqx import beams, generation, load
from mistral_eqx.beams import beam_search


@functools.cache
def pair(window):
    """A model in both: the embedded one, or a random one with such a window."""
    model = load()[0] if window == "embedded" else random_model(sliding_window=window)
    return model, hugging_face(model)


def search_both(window, prompts, **options):
    model, reference = pair(window)
    ours = beam_search(model, prompts, **options)
    assert [len(row) for row in ours] == [options["n_best"]] * len(prompts)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    eos_ids = list(options["eos_ids"])
    theirs = reference.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=options["n_beams"],
        num_return_sequences=options["n_best"],
        max_new_tokens=options["max_tokens"],
        length_penalty=options["length_penalty"],
        early_stopping=options["early_stopping"],
        eos_token_id=eos_ids or None,
        bos_token_id=None,
        pad_token_id=eos_ids[0] if eos_ids else 0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sequences = theirs.sequences[:, longest:].tolist()
    scores = theirs.sequences_scores.tolist()
    for i, beam in enumerate(beam for row in ours for beam in row):
        sequence = sequences[i]
        if eos_ids:
            ends = [sequence.index(eos) for eos in eos_ids if eos in sequence]
            sequence = sequence[: min(ends, default=len(sequence))]
        assert beam.tokens == sequence
        # Sums of float32 logarithms: 5e-7 apart is what is seen on one processor.
        np.testing.assert_allclose(beam.score, scores[i], rtol=2e-5)
    return ours


PROMPTS = [random_tokens(5), random_tokens(11, seed=1), random_tokens(8, seed=2)]


@pytest.mark.parametrize(
    "early_stopping, length_penalty, eos_ids",
    [
        (False, 1.0, [2]),
        (False, -0.7, [2]),
        (True, 0.0, [2, 9, 33]),
        (True, 2.0, [2]),
        ("never", 1.0, [2, 9, 33]),
        ("never", -0.7, [2]),
    ],
)
def test_equals_transformers(early_stopping, length_penalty, eos_ids):
    ours = search_both(
        8,
        PROMPTS,
        n_beams=4,
        n_best=3,
        max_tokens=16,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos_ids=eos_ids,
    )
    if length_penalty == 0:
        assert "eos" in {beam.reason for row in ours for beam in row}


def test_embedded_model():
    _, tokenizer = load()
    search_both(
        "embedded",
        [tokenizer.encode("To be, or not"), tokenizer.encode("And God said unto")],
        n_beams=4,
        n_best=2,
        max_tokens=24,
        length_penalty=1.0,
        early_stopping=False,
        eos_ids=[tokenizer.eos_id],
    )


@pytest.mark.parametrize("n_beams", [1, 3])
def test_without_window_and_without_end(n_beams):
    if n_beams > 1:
        search_both(
            None,
            PROMPTS[:2],
            n_beams=n_beams,
            n_best=n_beams,
            max_tokens=8,
            length_penalty=1.0,
            early_stopping=False,
            eos_ids=[],
        )
    else:
        model, _ = pair(None)
        (beam,), (greedy,) = (
            beam_search(model, PROMPTS[:1], n_beams=1, max_tokens=8)[0],
            generation.generate(model, PROMPTS[:1], max_tokens=8, key=jax.random.key(0)),
        )
        assert beam.tokens == greedy.tokens
        np.testing.assert_allclose(beam.logprobs, greedy.logprobs, atol=1e-5)
        np.testing.assert_allclose(beam.score, np.mean(greedy.logprobs), atol=1e-5)


def test_a_length_penalty_may_make_scores_huge():
    model, tokenizer = load()
    options = {"n_beams": 2, "n_best": 2, "max_tokens": 64, "length_penalty": -5.0}
    (found,) = beam_search(model, [tokenizer.encode("To be, or")], **options)
    best, second = found
    assert best.tokens and second.tokens and best.score > second.score


def test_a_row_does_not_depend_on_the_others():
    model, _ = pair(8)
    options = {"n_beams": 3, "n_best": 2, "max_tokens": 24, "eos_ids": [2]}
    batch = beam_search(model, PROMPTS, **options)
    for prompt, row in zip(PROMPTS, batch):
        (alone,) = beam_search(model, [prompt], **options)
        assert [beam.tokens for beam in alone] == [beam.tokens for beam in row]


def test_one_trace_for_all_numbers():
    model, _ = pair(8)
    searched = eqx.debug.assert_max_traces(beams._choose, max_traces=2)
    before = beams._choose
    beams._choose = searched
    try:
        for max_tokens, penalty, early in ((20, 1.0, True), (23, 0.5, "never")):
            beam_search(
                model,
                [[5, 6, 7]],
                n_beams=5,
                max_tokens=max_tokens,
                length_penalty=penalty,
                early_stopping=early,
            )
    finally:
        beams._choose = before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_beams": 0}, "n_beams"),
        ({"n_beams": 65}, "n_beams must be at most 64, got 65"),
        ({"n_best": 3}, "n_best"),
        ({"n_best": 0}, "n_best"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": -40.0}, "length_penalty is too small"),
        ({"early_stopping": "soon"}, "early_stopping"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        beam_search(pair(8)[0], [[1]], **{"n_beams": 2, "max_tokens": 4} | options)
