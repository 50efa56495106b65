import collections
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PARAMS, close, random_model, random_tokens

import mistral_eqx as mx
from mistral_eqx import (
    Sampling,
    Transformer,
    decode,
    decoding,
    generation,
    prefill,
    scoring,
)
from mistral_eqx.decoding import BLOCK, DecodeState
from mistral_eqx.devices.chips import CHIPS
from mistral_eqx.files.released import RELEASED
from mistral_eqx.prompts import default_chunk


KEY = jax.random.key(0)
# Windows of 8: less than one, one to the token, and several.
TEXT = random_tokens(40)
PROMPTS = [TEXT[:1], TEXT[3:11], TEXT[:23], TEXT]


def generate(model, prompts, *, max_tokens=24, temperature=0.0, key=KEY, **options):
    """The tokens of each row."""
    rows = generation.generate(
        model,
        prompts,
        max_tokens=max_tokens,
        sampling=Sampling(temperature),
        key=key,
        **options,
    )
    return [row.tokens for row in rows]


def stream(model, prompts, *, max_tokens=24, **options):
    """The tokens of each row in every block."""
    blocks = generation.stream(model, prompts, max_tokens=max_tokens, key=KEY, **options)
    return [[row.tokens for row in block] for block in blocks]


def score(model, tokens, **options):
    return np.array(scoring.score(model, tokens, **options).logprobs, np.float32)


def begin(model, prompts, *, max_tokens, eos_ids=(-1,)):
    """The state that a generation of `max_tokens` begins in."""
    cache, logits = prefill(model, prompts, max_tokens=max_tokens)
    return DecodeState.start(
        model, cache, logits, max_tokens=max_tokens, eos_ids=eos_ids, key=KEY
    )


@pytest.fixture
def traced(monkeypatch):
    """The tokens and the slots of every program that is traced from here on."""
    programs, hidden_states = [], Transformer.hidden_states

    def spy(self, tokens, cache, *more):
        programs.append((tokens.size, cache.slots[0]))
        return hidden_states(self, tokens, cache, *more)

    monkeypatch.setattr(Transformer, "hidden_states", spy)
    return programs


@pytest.mark.parametrize("window", [8, None])
def test_a_row_does_not_know_its_company(window):
    model = random_model(sliding_window=window)
    _, batch = prefill(model, PROMPTS, max_tokens=BLOCK)
    for prompt, logits in zip(PROMPTS, batch):
        _, alone = prefill(model, [prompt], max_tokens=BLOCK)
        close(alone[0], logits, 3e-5)
    for temperature in (0.0, 1.0):
        options = {"max_tokens": BLOCK, "temperature": temperature}
        together = generate(model, PROMPTS, **options)
        assert [len(row) for row in together] == [BLOCK] * 4
        for prompt, row in zip(PROMPTS, together):
            assert generate(model, [prompt], **options) == [row]
        assert generate(model, PROMPTS[::-1], **options) == together[::-1]


def test_chunks_and_blocks_do_not_matter():
    model = random_model()
    rows = generate(model, PROMPTS, temperature=1.0)
    assert generate(model, PROMPTS, temperature=1.0, chunk=5) == rows
    for block in (1, 8, 13, BLOCK):
        streamed = stream(model, PROMPTS, sampling=Sampling(1.0), block=block)
        assert len(streamed) == -(-24 // block)
        assert all(len(row) <= block for made in streamed for row in made)
        joined = [sum((made[i] for made in streamed), []) for i in range(4)]
        assert joined == rows


def test_sampling_draws_anew_for_every_token():
    model = random_model()
    # As good as uniform: a text tells of nothing but its keys.
    options = {"temperature": 1e30, "max_tokens": BLOCK}
    rows = generate(model, [TEXT] * 4, **options)
    assert len({tuple(row) for row in rows}) == 4
    counts = np.bincount(np.concatenate(rows), minlength=64)
    assert counts.max() < 20 and (counts > 0).sum() > 50
    # The first copy is what the prompt gets alone; the key is all that decides.
    assert generate(model, [TEXT], **options) == rows[:1]
    assert generate(model, [TEXT] * 4, **options) == rows
    other = generate(model, [TEXT] * 4, **options, key=jax.random.key(1))
    assert sum(a == b for a, b in zip(sum(rows, []), sum(other, []))) < 20


def until(row, eos_ids):
    ends = [i for i, token in enumerate(row) if token in eos_ids]
    return row[: ends[0]] if ends else row


def test_end_of_sequence():
    model = random_model()
    rows = generate(model, PROMPTS)
    # Ends one row at once, some later and some perhaps not at all.
    for eos_ids in ([rows[0][0]], [rows[1][5], rows[2][9]], [row[0] for row in rows]):
        expected = [until(row, eos_ids) for row in rows]
        assert min(len(row) for row in expected) < 24
        assert generate(model, PROMPTS, eos_ids=eos_ids) == expected
        made = stream(model, PROMPTS, eos_ids=eos_ids, block=2)
        assert [sum((rows[i] for rows in made), []) for i in range(4)] == expected


def test_decoding_stops_when_every_row_has_ended():
    model = random_model()
    rows = generate(model, PROMPTS)
    ends = [row[6] for row in rows]
    longest = max(len(until(row, ends)) for row in rows)
    assert longest < 10
    state = begin(model, PROMPTS, max_tokens=BLOCK, eos_ids=ends)
    before = int(state.cache.length)
    state, choice = decode(model, state, jnp.int32(BLOCK))
    tokens = np.where(choice.made, choice.tokens, -1)
    # The step that makes the last end is the last.
    assert int(state.cache.length) - before == longest + 1
    assert state.ended.all() and tokens.shape == (4, BLOCK)
    assert [[t for t in row if t >= 0] for row in tokens.tolist()] == [
        until(row, ends) for row in rows
    ]
    # And nothing more happens.
    state, choice = decode(model, state, jnp.int32(BLOCK))
    assert int(state.cache.length) - before == longest + 1
    assert not choice.made.any() and (choice.reason == 1).all()


def test_max_tokens():
    model = random_model()
    rows = generate(model, PROMPTS, max_tokens=BLOCK + 3)
    for max_tokens in (0, 1, 24, BLOCK, BLOCK + 1):
        cut = [row[:max_tokens] for row in rows]
        assert generate(model, PROMPTS, max_tokens=max_tokens) == cut


def test_one_program_decodes_everything(traced):
    model = random_model(norm_eps=2e-5)  # of no other test, so that nothing is compiled
    generate(model, PROMPTS, chunk=8)
    generate(model, PROMPTS, max_tokens=BLOCK + 7, chunk=8)
    for options in (
        {"max_tokens": 1},
        {"max_tokens": 200},
        {"temperature": 0.7},
        {"key": jax.random.key(5)},
        {"eos_ids": [7]},
    ):
        generate(model, PROMPTS, **options, chunk=8)
    others = [TEXT[:9], TEXT[5:30] * 8, TEXT[:2], TEXT[7:8]]
    generate(model, others, temperature=1.0, chunk=8)
    stream(model, PROMPTS, block=3, chunk=8)
    other = jax.tree.map(lambda leaf: 2 * leaf, model)
    generate(other, PROMPTS, chunk=8)
    # A chunk of one window, and the step.
    assert traced == [(8, 16), (1, 16)]


def test_prompts_of_all_lengths_share_their_programs(traced):
    model = random_model(norm_eps=3e-5)
    for length in range(1, 41):
        prefill(model, [TEXT[:length]], chunk=8)
    # A text that will not fill the ring gets a smaller one.
    assert len(traced) == len(set(traced)) <= 8
    assert set(traced) == {(size, slots) for size in (1, 2, 4, 8) for slots in (8, 16)}


def test_no_prompt_compiles_anything_in_the_end(traced):
    model = random_model(norm_eps=6e-5)
    generate(model, [TEXT], chunk=8, max_tokens=9)
    for size in (1, 2, 4):  # the programs for what is left of a chunk
        generate(model, [TEXT[: 8 + size]], chunk=8, max_tokens=9)
    n_traced = len(traced)
    lengths = np.random.default_rng(0).integers(9, 400, 50)
    for length in lengths:
        generate(model, [random_tokens(length)], chunk=8, max_tokens=9)
    assert len(traced) == n_traced <= 8


def test_a_program_is_compiled_once(caplog):
    """For a model that was put on a device too, as a loaded one is: what a program makes is
    then no more on that device than what it was first given."""
    model = jax.device_put(random_model(norm_eps=7e-5), jax.devices()[0])
    with jax.log_compiles():
        stream(model, [TEXT[:20]], block=3, chunk=8)
        score(model, TEXT[:25], chunk=8)
    messages = [record.getMessage() for record in caplog.records]
    for name, n in ("decode", 1), ("prefill_chunk", 2), ("_score_chunk", 1):
        compiled = [text for text in messages if f"XLA compilation of jit({name})" in text]
        assert len(compiled) == n, compiled


def test_a_long_prompt_needs_no_more(traced, monkeypatch):
    """Through the programs of a short prompt, so in their memory, and in its cache."""
    model = random_model(norm_eps=4e-5, sliding_window=64)
    long = random_tokens(8000)
    programs = {}

    def run(prompt):
        # The programs of this prompt alone, with the memory that each needs.
        programs.clear()
        cache, _ = prefill(model, [prompt], max_tokens=8, chunk=64)
        rows = generate(model, [prompt], max_tokens=8, chunk=64)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        return rows, size, {shape: programs[shape] for shape in programs}

    prefill_chunk = decoding.prefill_chunk

    def spy(model, cache, tokens):
        shape = (tokens.shape, cache.slots)
        if shape not in programs:
            compiled = prefill_chunk.lower(model, cache, tokens).compile()
            programs[shape] = compiled.memory_analysis().temp_size_in_bytes
        return prefill_chunk(model, cache, tokens)

    monkeypatch.setattr(decoding, "prefill_chunk", spy)
    _, size, short_programs = run(long[:100])
    n_traced = len(traced)
    (row,), long_size, long_programs = run(long)
    assert long_size == size
    assert long_programs.keys() <= short_programs.keys()
    assert max(long_programs.values()) <= max(short_programs.values())
    # Nothing was traced but, again, for the memory of the one chunk.
    assert len(traced) - n_traced <= len(long_programs)
    # Two layers reach 126 tokens back: the same text from its last 128 alone.
    logits = prefill(model, [long])[1]
    np.testing.assert_allclose(logits, prefill(model, [long[-128:]])[1], atol=0.02)
    assert len(row) == 8


@pytest.mark.parametrize("window", [8, None])
def test_the_cache_is_updated_in_place(window):
    """A step writes each ring once, as a block and not as a scatter, and copies none."""
    model = random_model(sliding_window=window)
    state = begin(model, PROMPTS, max_tokens=24)
    batch, kv_heads, slots, head_dim = state.cache.layers[0].keys.shape
    hlo = decode.lower(model, state, jnp.int32(BLOCK)).compile().as_text()
    ring = f"f32[{batch},{kv_heads},{slots},{head_dim}]"
    lines = [line.partition(", metadata")[0] for line in hlo.splitlines() if ring in line]
    made = [line.partition(" = ")[2] for line in lines]
    made = [line.split("} ", 1)[1] for line in made if line.startswith(ring)]
    operations = collections.Counter(line.partition("(")[0] for line in made)
    assert operations["dynamic-update-slice"] == 2 * model.config.n_layers
    assert operations["scatter"] == operations["copy"] == 0
    # On a CPU a scatter would have become a loop over its rows.
    assert sum(" while(" in line for line in lines) == 1


def test_a_block_is_under_way_while_another_is_read():
    model = random_model(dim=512, hidden_dim=2048, sliding_window=None)
    state = begin(model, PROMPTS, max_tokens=11 * BLOCK)
    under_way = []
    # On a busy machine a block may be done before anybody looks; not ten times.
    for _ in range(10):
        state, choice = decode(model, state, jnp.int32(BLOCK))
        under_way.append(not choice.tokens.is_ready())
        choice.tokens.block_until_ready()
    assert any(under_way)


@pytest.mark.parametrize("window", [8, None])
def test_score_is_the_log_probability(window):
    model, text = random_model(sliding_window=window), random_tokens(41)
    logits, _ = eqx.filter_jit(model)(jnp.asarray(text[:-1]))
    logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(40), text[1:]]
    for chunk in (None, 5):
        scores = score(model, text, chunk=chunk)
        np.testing.assert_allclose(scores, logprobs, atol=5e-4)


def test_score_of_a_long_text(traced):
    model = random_model(norm_eps=5e-5)
    scores = score(model, random_tokens(3004), chunk=8)
    assert scores.shape == (3003,) and np.isfinite(scores).all()
    score(model, random_tokens(204, seed=1), chunk=8)
    score(model, random_tokens(1001, seed=2), chunk=8)
    # 3 are 2 and 1.
    assert sorted(traced) == [(1, 16), (2, 16), (8, 16)]


@pytest.mark.parametrize(
    "window, chunk",
    [(1, 128), (64, 128), (255, 128), (256, 256), (4096, 256), (None, 256)],
)
def test_default_chunk(window, chunk):
    assert default_chunk(random_model(sliding_window=window).config) == chunk


@pytest.mark.parametrize(
    "name, model, chunk",
    [
        ("v5e", "mistral-7b-v0.3", 256),
        ("h100", "mistral-7b-v0.3", 512),
        ("v6e", "mistral-7b-v0.3", 1024),
        # Eight experts share the tokens, and two take each.
        ("v5e", "mixtral-8x7b", 1024),
        ("h100", "mixtral-8x7b", 2048),
    ],
)
def test_a_chunk_for_a_chip(name, model, chunk):
    """So many tokens that it multiplies for as long as it reads weights."""
    chip, config = CHIPS[name], RELEASED[model]
    assert default_chunk(config, chip) == chunk
    assert default_chunk(config, chip, rows=2) == max(256, chunk // 2)
    assert default_chunk(config, chip, rows=64) == 256
    share = 1 if config.moe is None else 2 / 8
    assert chunk / 2 < chip.operations / chip.bandwidth / share <= chunk or chunk == 256
    narrow = dataclasses.replace(config, sliding_window=200)
    assert default_chunk(narrow, chip) == 128


def test_window_of_one():
    """Nothing is seen but the token itself: the next depends on the last alone."""
    model = random_model(sliding_window=1)
    _, logits = prefill(model, [TEXT, TEXT[-1:]])
    close(logits[0], logits[1], 3e-5)
    rows = generate(model, [TEXT, TEXT[-1:]], max_tokens=8)
    assert rows[0] == rows[1]


def test_a_loop_of_ones_own():
    """The example at the head of `generation.py` makes what `generate` makes."""
    model = random_model()
    cache, logits = prefill(model, PROMPTS, max_tokens=20)
    state = DecodeState.start(
        model, cache, logits, max_tokens=[20, 3, 20, 0], prompts=PROMPTS, key=KEY
    )
    step, made = jax.jit(mx.decode_step, donate_argnums=1), []
    while not state.ended.all():
        state, choice = step(model, state)
        made.append(np.where(choice.made, choice.tokens, -1))
    rows = [[int(token) for token in row if token >= 0] for row in np.array(made).T]
    assert rows == generate(model, PROMPTS, max_tokens=[20, 3, 20, 0])


def test_no_more_steps_than_a_block_has():
    """The tokens of steps behind a block would be lost."""
    model = random_model()
    state, made = decode(
        model, begin(model, [TEXT], max_tokens=2 * BLOCK), jnp.int32(BLOCK + 9)
    )
    assert state.remaining.tolist() == [BLOCK] and made.made.sum() == BLOCK


def test_prompts_may_come_from_an_iterator(unchecked):
    model = random_model()
    assert generate(model, iter(PROMPTS), max_tokens=4) == generate(
        model, PROMPTS, max_tokens=4
    )


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[1], [2]], "There are 2 prompts for 1 rows"),
        ([[99]], "Prompt 0 has the token id 99"),
        ([[-1]], "Prompt 0 has the token id -1"),
    ],
)
def test_the_prompts_of_a_state(prompts, message, unchecked):
    model = random_model()
    cache, logits = prefill(model, [TEXT], max_tokens=9)
    with pytest.raises(ValueError, match=message):
        DecodeState.start(model, cache, logits, max_tokens=9, prompts=prompts, key=KEY)
    options = {"max_tokens": np.array(9), "prompts": [[]], "key": KEY}
    assert DecodeState.start(model, cache, logits, **options).remaining == 9


BAD_PROMPTS = {
    "none": ([], "There is no prompt"),
    "empty": ([TEXT, []], "Prompt 1 is empty"),
    "past the vocabulary": ([[3, 64]], "Prompt 0 has the token id 64, .* has 64 ids"),
    "far past": ([[3], [2**31]], f"Prompt 1 has the token id {2**31}"),
    "negative": ([[3], [5, -1, 2]], "Prompt 1 has the token id -1"),
}


@pytest.mark.parametrize("bad", BAD_PROMPTS)
def test_bad_prompts(bad, traced):
    prompts, message = BAD_PROMPTS[bad]
    model = random_model()
    with pytest.raises(ValueError, match=message):
        generate(model, prompts)
    with pytest.raises(ValueError, match=message):
        prefill(model, prompts)
    assert not traced


def test_all_ids_of_the_vocabulary_are_good():
    assert generate(random_model(), [[0, PARAMS["vocab_size"] - 1]], max_tokens=0) == [[]]


def test_bad_options(traced):
    model = random_model()
    with pytest.raises(ValueError, match="max_tokens must be 0 or more, got -1"):
        generate(model, PROMPTS, max_tokens=-1)
    for block in (0, -1, BLOCK + 1):
        with pytest.raises(ValueError, match=f"block must be .* got {block}"):
            stream(model, PROMPTS, max_tokens=1, block=block)
    for chunk in (0, -1):
        for call in (
            lambda: generate(model, PROMPTS, chunk=chunk),
            lambda: score(model, TEXT, chunk=chunk),
        ):
            with pytest.raises(ValueError, match=f"chunk must be 1 or more, got {chunk}"):
                call()
    with pytest.raises(ValueError, match="one token has nothing to score"):
        score(model, [3])
    with pytest.raises(ValueError, match="Prompt 0 is empty"):
        score(model, [])
    with pytest.raises(ValueError, match="token id 64"):
        score(model, [3, 64])
    assert not traced
