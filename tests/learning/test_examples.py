import json
from pathlib import Path

import mistral_common
import pytest

import mistral_eqx as mx
from mistral_eqx.chat import encode_answered
from mistral_eqx.learning.examples import read_examples, split
from mistral_eqx.text import TINY_MISTRAL


DATA = Path(mistral_common.__file__).parent / "data"
# One of each template; v3's moves the system prompt to the last turn, v7's does not.
TOKENIZERS = {
    "v1": "tokenizer.model.v1",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "tekken": "tekken_240911.json",
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '</s>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Who wrote Hamlet?"},
    {"role": "assistant", "content": "Shakespeare did."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "Around 1600."},
]


def tokenizer(name):
    if name != "chatml":
        return mx.Tokenizer(DATA / TOKENIZERS[name])
    tiny = mx.load_tokenizer(TINY_MISTRAL)
    tiny.chat_template = CHATML
    return tiny


@pytest.fixture
def written(tmp_path):
    def write(*lines):
        path = tmp_path / "data.jsonl"
        texts = [x if isinstance(x, str) else json.dumps(x) for x in lines]
        path.write_text("".join(f"{text}\n" for text in texts))
        return path

    return write


def learnt(example, tokenizer):
    """The stretches of an example that are learnt, as text."""
    runs, run = [], []
    for token, is_learnt in [*zip(example.tokens, example.learnt), (0, False)]:
        if is_learnt:
            run.append(token)
        elif run:
            runs.append(run)
            run = []
    return runs


@pytest.mark.parametrize("name", [*TOKENIZERS, "chatml"])
@pytest.mark.parametrize("system", [False, True])
def test_only_answers_are_learnt(name, system, written):
    """Each with the id that ends it; and a model learns an answer behind the very ids that
    it gets when it writes."""
    tok = tokenizer(name)
    messages = [SYSTEM] * system + TALK
    examples = read_examples(written({"messages": messages}), tok, seq_len=150)
    found = []
    for example in examples:
        for run in learnt(example, tok):
            assert run[-1] == tok.eos_id
            found.append(tok.decode(run[:-1]).strip())
    assert sorted(found) == ["Around 1600.", "Shakespeare did."]
    # v3 writes the system prompt into the last turn, so an earlier turn stands alone.
    assert len(examples) == (2 if system and name in ("v3", "tekken") else 1)
    prompts = [mx.encode_chat(tok, messages[:-1]), mx.encode_chat(tok, messages[:-3])]
    for prompt in prompts:
        assert any(list(e.tokens[: len(prompt)]) == prompt for e in examples)
        begins = [e for e in examples if list(e.tokens[: len(prompt)]) == prompt]
        assert any(e.learnt[len(prompt)] and not e.learnt[len(prompt) - 1] for e in begins)


def test_answered_is_mistral_commons():
    """Its own word on a conversation to learn from."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    path = DATA / TOKENIZERS["tekken"]
    theirs = MistralTokenizer.from_file(str(path), mode=ValidationMode.finetuning)
    request = ChatCompletionRequest(messages=[SYSTEM, *TALK])
    expected = theirs.encode_chat_completion(request).tokens
    assert encode_answered(mx.Tokenizer(path), [SYSTEM, *TALK]) == expected


@pytest.mark.parametrize("names", [("messages", "content"), ("interactions", "text")])
def test_names_of_mistral_finetune(names, written):
    key, content = names
    tok = tokenizer("v3")
    talk = [{"role": m["role"], content: m["content"]} for m in TALK]
    line = {key: talk, "system_prompt": "Be brief.", "id": 17}
    expected = read_examples(written({"messages": [SYSTEM, *TALK]}), tok, seq_len=100)
    assert read_examples(written(line), tok, seq_len=100) == expected


def test_weights_of_answers(written):
    tok = tokenizer("v7")
    first = [TALK[0], TALK[1] | {"weight": 0}, TALK[2], TALK[3] | {"weight": 1}]
    for line in ({"messages": first}, {"messages": TALK, "only_last": True}):
        (example,) = read_examples(written(line), tok, seq_len=100)
        (run,) = learnt(example, tok)
        assert tok.decode(run) == "Around 1600."


def test_texts(written):
    tok = tokenizer("v1")
    path = written({"text": "One short text."}, "", {"content": "word " * 60})
    short, *pieces = read_examples(path, tok, seq_len=20)
    assert short.tokens == [*tok.encode("One short text."), tok.eos_id]
    assert all(short.learnt)
    # A long text in pieces, each behind a BOS, and nothing of it lost.
    assert all(piece.tokens[0] == tok.bos_id for piece in pieces)
    assert all(len(piece.tokens) <= 21 for piece in pieces)
    ids = [token for piece in pieces for token in piece.tokens[1:]]
    assert ids == [*tok.encode("word " * 60, bos=False), tok.eos_id]


ANSWER = {"role": "assistant", "content": "Yes."}
BAD = [
    ('{"text": ', "line 2 is no JSON object"),
    ("[1]", r"line 2 is no JSON object: it must be an object, got \[1\] \(list\)"),
    ("[" * 100_000, "line 2 is no JSON object"),
    (b"\xff".decode("latin-1"), "line 2 is no JSON object"),
    ({"id": 3}, 'line 2: it must have either a "text" or "messages", and has id'),
    ({"text": "a", "messages": TALK}, 'either a "text" or "messages"'),
    ({"text": 3}, "line 2: text must be a text"),
    ({"text": ""}, "line 2: the text is empty"),
    ({"text": "a", "label": "b"}, 'line 2: it has a "label", and the first line has none'),
    ({"messages": []}, "line 2: messages must be a list"),
    ({"messages": ["a"]}, "line 2: message 0 must be an object"),
    ({"messages": TALK[:1]}, "does not end with an answer of the assistant's"),
    ({"messages": TALK[:3]}, "does not end with an answer of the assistant's"),
    ({"messages": [TALK[0], ANSWER | {"weight": 0}]}, "every answer has weight 0"),
    ({"messages": [TALK[0], ANSWER | {"weight": 2}]}, "message 1 has weight 2"),
    ({"messages": [{"role": "king", "content": "a"}, ANSWER]}, "unknown role 'king'"),
    ({"messages": [{"content": "a"}, ANSWER]}, "line 2: Message 0 must be"),
    ({"messages": TALK, "tools": [{}]}, "line 2: tools: function calls cannot be learnt"),
    ({"messages": [*TALK[:3], {"role": "assistant", "tool_calls": [{}]}]}, "function call"),
    ({"messages": [TALK[0], {"role": "tool", "content": "3"}, ANSWER]}, "function call"),
    ({"messages": [TALK[0], ANSWER | {"content": "no " * 99}]}, "tokens, more than a seq"),
]


@pytest.mark.parametrize("line, words", BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_told_with_its_line(line, words, written):
    path = written({"text": "fine"}, line)
    with pytest.raises(ValueError, match=words) as error:
        read_examples(path, tokenizer("v3"), seq_len=50)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_empty_file(written):
    for path in (written(), written("", "  ")):
        with pytest.raises(ValueError, match="data.jsonl is empty: there is nothing"):
            read_examples(path, tokenizer("v3"), seq_len=50)


def test_a_template_that_does_not_fit_itself(written):
    tok = tokenizer("chatml")
    tok.chat_template = "{% if add_generation_prompt %}a{% else %}b{% endif %}"
    with pytest.raises(ValueError, match="line 1: the template .* does not write answer 1"):
        read_examples(written({"messages": TALK[:2]}), tok, seq_len=50)


def test_split():
    learn, measure = split(range(100), 0.1)
    assert sorted(learn + measure) == list(range(100)) and len(measure) == 10
    assert measure != list(range(90, 100))
    assert split(range(100), 0.1) == (learn, measure)
    assert split(range(3), 0.0) == ([0, 1, 2], [])
    assert len(split(range(3), 0.01)[1]) == 1
    with pytest.raises(ValueError, match="nothing to learn from when 1 of 1"):
        split(range(1), 0.1)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="held-out share must be from 0 to below 1"):
            split(range(9), share)
