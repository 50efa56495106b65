"""Mistral's `one_file_ref.py` in JAX and Equinox, to be read beside the original.

Follows `one_file_ref.py` of mistralai/mistral-inference at commit b818190 (Apache License
2.0): the same classes, functions and names in the same order, from `ModelArgs` to `demo`.

    python one_file_ref.py [MODEL_DIR] [--max_tokens 35]

MODEL_DIR is a folder in Mistral's own format: params.json, tokenizer.model, and
consolidated.safetensors or consolidated.00.pth (which needs PyTorch to be read). Without it
the small model of this repository runs.

Departures. What JAX makes different:

- Modules are `eqx.Module`s: their fields are declared, whatever is not an array is static,
  `layers` is a tuple, `ModelArgs` is frozen, and `__call__` is `forward`. `Linear`,
  `view_as_complex` and `view_as_real` stand in for what torch brings along; jaxtyping's
  annotations for asserted and commented shapes.
- Nothing is mutated: `forward` takes the cache and returns it with its result.
  `empty_cache` allocates it, for the batch at hand and in the dtype of the weights, so
  `max_batch_size` is gone.
- Decoding attends to every slot of the cache and masks those not yet written, where the
  reference slices `[:, :cur_pos]`: shapes are fixed, so `Transformer.forward`, which is
  jitted, is traced once for all decoding steps.
- `precompute_freqs_cis` takes the positions wanted, and `Transformer` calls it at each step
  in place of storing 128,000 rows, which would be a leaf of the model though no weight of
  it, or a constant in each compiled function.
- Random initialisation takes an explicit `key`. `from_folder` skips it and fills a skeleton
  without data. There is no device to choose; `dtype` is float32 on a CPU and the
  checkpoint's own elsewhere, unless given.
- `generate` pads the prompts on the host, in NumPy.

What later checkpoints and a command of its own need:

- `sliding_window` may be null or absent (v0.2, v0.3): no band in the mask, and a cache as
  long as the text.
- `rope_theta` is read from params.json; without it, it is 1e4 if there is a window (v0.1)
  and 1e6 if not.
- consolidated.safetensors is read, and preferred where both files are present;
  tokenizer.model.v3 stands in for a missing tokenizer.model.
- Configuration, files and prompts are checked; `BadModelError` says what is wrong with a
  model.
- `argparse` in place of `fire`, and progress while a large model is loaded.

One thing that is kept though it looks wrong: past the window, prefill attends to one key
more than decoding does. See the mask in `Transformer.forward`.

On a GPU or TPU, float32 products are exact only under
`jax.default_matmul_precision("highest")`.
"""

import argparse
import json
import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Complex64, Float, Float32, Int, PRNGKeyArray
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm


class BadModelError(ValueError):
    """A model that cannot be used, said in one line to whoever named its folder."""


class Linear(eqx.Module):
    """torch.nn.Linear without a bias, on any number of leading axes."""

    weight: Float[Array, "out in"]

    def __init__(self, in_features: int, out_features: int, *, key: PRNGKeyArray) -> None:
        shape, bound = (out_features, in_features), in_features**-0.5
        self.weight = jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return jnp.einsum("...i,oi->...o", x, self.weight)


def view_as_complex(x: Float32[Array, "*batch 2"]) -> Complex64[Array, "*batch"]:
    return jax.lax.complex(x[..., 0], x[..., 1])


def view_as_real(x: Complex64[Array, "*batch"]) -> Float32[Array, "*batch 2"]:
    return jnp.stack([x.real, x.imag], axis=-1)


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    sliding_window: int | None = None
    norm_eps: float
    vocab_size: int

    rope_theta: float | None = None

    def __post_init__(self) -> None:
        if self.rope_theta is None:
            # v0.1 has a window and names no theta; without a window came the larger theta
            object.__setattr__(self, "rope_theta", 1e4 if self.sliding_window else 1e6)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field.name} must be positive, not {value}")
        if self.n_heads % self.n_kv_heads != 0:
            raise ValueError(
                f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim={self.head_dim} must be even")


Heads = Float[Array, "bsz seqlen n_heads head_dim"]
KVHeads = Float[Array, "bsz seqlen n_kv_heads head_dim"]


def repeat_kv(keys: KVHeads, values: KVHeads, repeats: int) -> tuple[Heads, Heads]:
    keys = jnp.repeat(keys, repeats, axis=2)
    values = jnp.repeat(values, repeats, axis=2)
    return keys, values


def _reshape_for_broadcast(
    freqs_cis: Complex64[Array, "seqlen half"],
    x: Complex64[Array, "bsz seqlen n_heads half"],
) -> Complex64[Array, "1 seqlen 1 half"]:
    ndim = x.ndim
    shape = [d if i == 1 or i == ndim - 1 else 1 for i, d in enumerate(x.shape)]
    return freqs_cis.reshape(shape)


def apply_rotary_emb(
    xq: Heads, xk: KVHeads, freqs_cis: Complex64[Array, "seqlen half"]
) -> tuple[Heads, KVHeads]:
    # pairs are neighbours, (x[2i], x[2i+1]); Hugging Face pairs x[i] with x[i + head_dim/2]
    # and permutes the weights to match
    xq_ = view_as_complex(xq.astype(jnp.float32).reshape(*xq.shape[:-1], -1, 2))
    xk_ = view_as_complex(xk.astype(jnp.float32).reshape(*xk.shape[:-1], -1, 2))
    freqs_cis = _reshape_for_broadcast(freqs_cis, xq_)
    xq_out = view_as_real(xq_ * freqs_cis).reshape(xq.shape)
    xk_out = view_as_real(xk_ * freqs_cis).reshape(xk.shape)
    return xq_out.astype(xq.dtype), xk_out.astype(xk.dtype)


# cache_k and cache_v of one layer
Cache = tuple[
    Float[Array, "bsz slots n_kv_heads head_dim"],
    Float[Array, "bsz slots n_kv_heads head_dim"],
]


class Attention(eqx.Module):
    args: ModelArgs = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    n_kv_heads: int = eqx.field(static=True)
    repeats: int = eqx.field(static=True)
    sliding_window: int | None = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    wq: Linear
    wk: Linear
    wv: Linear
    wo: Linear

    def __init__(self, args: ModelArgs, *, key: PRNGKeyArray) -> None:
        self.args = args

        self.n_heads = args.n_heads
        self.n_kv_heads = args.n_kv_heads

        self.repeats = self.n_heads // self.n_kv_heads
        self.sliding_window = self.args.sliding_window

        self.scale = self.args.head_dim**-0.5

        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.wq = Linear(args.dim, args.n_heads * args.head_dim, key=q_key)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim, key=k_key)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim, key=v_key)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim, key=o_key)

    def empty_cache(self, bsz: int, seqlen: int) -> Cache:
        # without a window no slot may be overwritten
        slots = seqlen if self.sliding_window is None else self.sliding_window
        shape = (bsz, slots, self.n_kv_heads, self.args.head_dim)
        cache_k = jnp.zeros(shape, self.wk.weight.dtype)
        cache_v = jnp.zeros(shape, self.wv.weight.dtype)
        return cache_k, cache_v

    def forward(
        self,
        x: Float[Array, "bsz seqlen dim"],
        freqs_cis: Complex64[Array, "seqlen half"],
        positions: Int[Array, "seqlen"],
        mask: Float[Array, "seqlen seqlen"] | None,
        cache: Cache,
    ) -> tuple[Float[Array, "bsz seqlen dim"], Cache]:

        bsz, seqlen, _ = x.shape
        cache_k, cache_v = cache
        slots = cache_k.shape[1]

        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.reshape(bsz, seqlen, self.n_heads, self.args.head_dim)
        xk = xk.reshape(bsz, seqlen, self.n_kv_heads, self.args.head_dim)
        xv = xv.reshape(bsz, seqlen, self.n_kv_heads, self.args.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis=freqs_cis)

        # The cache is a rotating buffer
        # Only the last positions are written: of two writes to one slot, JAX does not say
        # which wins
        scatter_pos = positions[-slots:] % slots
        cache_k = cache_k.at[:, scatter_pos].set(xk[:, -slots:], unique_indices=True)
        cache_v = cache_v.at[:, scatter_pos].set(xv[:, -slots:], unique_indices=True)

        if positions.shape[0] > 1:
            # prefill
            key, value = repeat_kv(xk, xv, self.repeats)
        else:
            cur_pos = positions[-1] + 1
            key, value = repeat_kv(cache_k, cache_v, self.repeats)
            written = jnp.arange(slots)[None, :] < cur_pos
            mask = jnp.where(written, 0.0, -jnp.inf).astype(x.dtype)

        query = xq.swapaxes(1, 2)
        key = key.swapaxes(1, 2)
        value = value.swapaxes(1, 2)
        # scores : [bsz, n_heads, seqlen | 1, seqlen | slots]
        scores = jnp.matmul(query, key.swapaxes(2, 3)) * self.scale

        if mask is not None:
            scores += mask[None, None, ...]

        scores = scores.astype(jnp.float32)
        scores = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        output = jnp.matmul(scores, value)  # (bs, n_local_heads, slen, head_dim)
        output = output.swapaxes(1, 2).reshape(bsz, seqlen, -1)
        return self.wo(output), (cache_k, cache_v)

    __call__ = forward


class FeedForward(eqx.Module):
    w1: Linear
    w2: Linear
    w3: Linear

    def __init__(self, args: ModelArgs, *, key: PRNGKeyArray) -> None:
        key1, key2, key3 = jax.random.split(key, 3)
        self.w1 = Linear(args.dim, args.hidden_dim, key=key1)
        self.w2 = Linear(args.hidden_dim, args.dim, key=key2)
        self.w3 = Linear(args.dim, args.hidden_dim, key=key3)

    def forward(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return self.w2(jax.nn.silu(self.w1(x)) * self.w3(x))

    __call__ = forward


class RMSNorm(eqx.Module):
    eps: float = eqx.field(static=True)
    weight: Float[Array, "dim"]

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        self.eps = eps
        self.weight = jnp.ones(dim)

    def _norm(self, x: Float32[Array, "*batch dim"]) -> Float32[Array, "*batch dim"]:
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps)

    def forward(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        # rounded before the weight is applied, which is where eqx.nn.RMSNorm differs
        output = self._norm(x.astype(jnp.float32)).astype(x.dtype)
        return output * jnp.broadcast_to(self.weight, output.shape)

    __call__ = forward


class TransformerBlock(eqx.Module):
    n_heads: int = eqx.field(static=True)
    dim: int = eqx.field(static=True)
    attention: Attention
    feed_forward: FeedForward
    attention_norm: RMSNorm
    ffn_norm: RMSNorm
    args: ModelArgs = eqx.field(static=True)

    def __init__(self, args: ModelArgs, *, key: PRNGKeyArray) -> None:
        attention_key, feed_forward_key = jax.random.split(key)
        self.n_heads = args.n_heads
        self.dim = args.dim
        self.attention = Attention(args, key=attention_key)
        self.feed_forward = FeedForward(args=args, key=feed_forward_key)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.args = args

    def forward(
        self,
        x: Float[Array, "bsz seqlen dim"],
        freqs_cis: Complex64[Array, "seqlen half"],
        positions: Int[Array, "seqlen"],
        mask: Float[Array, "seqlen seqlen"] | None,
        cache: Cache,
    ) -> tuple[Float[Array, "bsz seqlen dim"], Cache]:
        r, cache = self.attention.forward(
            self.attention_norm(x), freqs_cis, positions, mask, cache
        )
        h = x + r
        r = self.feed_forward.forward(self.ffn_norm(h))
        out = h + r
        return out, cache

    __call__ = forward


def precompute_freqs_cis(
    dim: int, positions: Int[Array, "seqlen"], theta: float = 10000.0
) -> Complex64[Array, "seqlen half"]:
    # evaluated as it stands: folded by the compiler, the powers differ from torch's in the
    # last bit, which at position 32,768 makes up to 2e-3 of a radian
    with jax.ensure_compile_time_eval():
        exponents = jnp.arange(0, dim, 2)[: (dim // 2)].astype(jnp.float32) / dim
        freqs = 1.0 / (theta**exponents)
    t = positions.astype(jnp.float32)
    freqs = jnp.outer(t, freqs)
    return jax.lax.complex(jnp.cos(freqs), jnp.sin(freqs))  # complex64


class Transformer(eqx.Module):
    args: ModelArgs = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)
    n_layers: int = eqx.field(static=True)
    tok_embeddings: eqx.nn.Embedding
    layers: tuple[TransformerBlock, ...]
    norm: RMSNorm
    output: Linear

    def __init__(self, args: ModelArgs, *, key: PRNGKeyArray) -> None:
        self.args = args
        self.vocab_size = args.vocab_size
        self.n_layers = args.n_layers
        assert self.vocab_size > 0

        embedding_key, output_key, *layer_keys = jax.random.split(key, 2 + args.n_layers)
        self.tok_embeddings = eqx.nn.Embedding(args.vocab_size, args.dim, key=embedding_key)

        self.layers = tuple(
            TransformerBlock(args=args, key=layer_key) for layer_key in layer_keys
        )

        self.norm = RMSNorm(args.dim, eps=args.norm_eps)

        self.output = Linear(args.dim, args.vocab_size, key=output_key)

    def empty_cache(self, bsz: int, seqlen: int) -> tuple[Cache, ...]:
        """For texts of up to `seqlen` tokens, or of any length if there is a window."""
        return tuple(layer.attention.empty_cache(bsz, seqlen) for layer in self.layers)

    @eqx.filter_jit
    def forward(
        self,
        input_ids: Int[Array, "bsz seqlen"],
        positions: Int[Array, "seqlen"],
        cache: tuple[Cache, ...],
    ) -> tuple[Float32[Array, "bsz seqlen vocab_size"], tuple[Cache, ...]]:
        h = jax.vmap(jax.vmap(self.tok_embeddings))(input_ids)
        freqs_cis = precompute_freqs_cis(
            self.args.head_dim, positions, self.args.rope_theta
        )

        mask: Float[Array, "seqlen seqlen"] | None = None
        if input_ids.shape[1] > 1:
            seqlen = input_ids.shape[1]
            tensor = jnp.full((seqlen, seqlen), dtype=h.dtype, fill_value=1)
            mask = jnp.tril(tensor, k=0)
            if self.args.sliding_window is not None:
                # make the mask banded to account for sliding window
                # The reference's quirk, kept: a query sees its own key and sliding_window
                # before it, one more than the rotating buffer holds when decoding. The
                # window as meant is k=1 - self.args.sliding_window.
                mask = jnp.triu(mask, k=-self.args.sliding_window)
            mask = jnp.log(mask)

        new_cache = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h, layer_cache = layer(h, freqs_cis, positions, mask, layer_cache)
            new_cache.append(layer_cache)

        return self.output(self.norm(h)).astype(jnp.float32), tuple(new_cache)

    __call__ = forward

    @staticmethod
    def from_folder(folder: Path, dtype: DTypeLike | None = None) -> "Transformer":
        path = existing(folder, "params.json")
        with blame(path):
            model_args = read_params(path)
        model = eqx.filter_eval_shape(Transformer, model_args, key=jax.random.key(0))
        leaves, treedef = jax.tree_util.tree_flatten_with_path(model)
        # a leaf's path in the model is its name in the checkpoint
        shapes = {
            jax.tree_util.keystr(keys, simple=True, separator="."): leaf.shape
            for keys, leaf in leaves
        }
        path = existing(folder, "consolidated.safetensors", "consolidated.00.pth")
        with blame(path):
            read = open_weights(path)
            check_names(set(read), set(shapes), set())
            if dtype is None:
                on_cpu = jax.default_backend() == "cpu"
                dtype = jnp.float32 if on_cpu else read["norm.weight"]().dtype
            loaded = []
            # the bar shows on a terminal only, and only for a model that takes its time
            for name in tqdm(shapes, desc="loading", unit="tensor", delay=1, disable=None):
                tensor = read[name]()
                if tensor.shape != shapes[name]:
                    shape = f"{tensor.shape}, but {shapes[name]} by params.json"
                    raise ValueError(f"{name} is {shape}")
                loaded.append(jnp.array(tensor, dtype))
        return treedef.unflatten(loaded)


class Tokenizer:
    def __init__(self, model_path: str) -> None:
        with blame(Path(model_path)):
            self._model = SentencePieceProcessor(model_file=model_path)
        assert self._model.vocab_size() == self._model.get_piece_size()

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    @property
    def eos_id(self) -> int:
        return self._model.eos_id()

    @property
    def pad_id(self) -> int:
        return self._model.pad_id()

    def encode(self, s: str) -> list[int]:
        return [self._model.bos_id(), *self._model.encode(s)]

    def decode(self, t: list[int]) -> str:
        return self._model.decode(t)


def generate(
    prompts: list[str], model: Transformer, tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[str], Float32[Array, "bsz n_logprobs"]]:
    """Continues the prompts greedily, `max_tokens` past the shortest, which is prefilled.

    The longer prompts are forced to their end, at the cost of their share of `max_tokens`.
    Returns the texts and the log-probability of each token after the first. No text ends
    early, and there are no texts for `max_tokens=0`.
    """
    if len(prompts) == 0 or max_tokens < 0:
        raise ValueError("generate needs a prompt, and max_tokens of 0 or more")
    encoded_prompts = [tokenizer.encode(prompt) for prompt in prompts]
    if not all(0 <= token < model.vocab_size for x in encoded_prompts for token in x):
        # JAX would clamp or wrap such an index and go on
        raise BadModelError(f"a token is not among the model's {model.vocab_size}")
    prompt_lens = [len(x) for x in encoded_prompts]
    min_prompt_len = min(prompt_lens)
    max_prompt_len = max(prompt_lens)

    input_tokens = np.full((len(prompts), max_prompt_len), tokenizer.pad_id, dtype=np.int32)
    for i, encoded in enumerate(encoded_prompts):
        input_tokens[i, : len(encoded)] = encoded
    input_mask = input_tokens != tokenizer.pad_id

    # pre-fill
    positions = jnp.arange(0, min_prompt_len)
    cache = model.empty_cache(len(prompts), min_prompt_len + max_tokens)
    logits, cache = model.forward(input_tokens[:, :min_prompt_len], positions, cache)
    logprobs = jax.nn.log_softmax(logits, axis=-1)

    # decode
    generated = []
    all_logprobs = [
        jnp.take_along_axis(
            logprobs[:, :-1, :], input_tokens[:, 1:min_prompt_len, None], axis=2
        ).squeeze(-1),
    ]
    cur_pos = min_prompt_len
    for _ in range(max_tokens):
        next_token = jnp.argmax(logprobs[:, -1, :], axis=-1)
        if cur_pos < input_mask.shape[1]:
            next_token = jnp.where(
                input_mask[:, cur_pos], input_tokens[:, cur_pos], next_token
            )
        all_logprobs.append(
            jnp.take_along_axis(logprobs[:, -1, :], next_token[:, None], axis=1),
        )
        generated.append(next_token[:, None])
        logits, cache = model.forward(next_token[:, None], jnp.array([cur_pos]), cache)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        cur_pos += 1

    all_logprobs = jnp.concatenate(all_logprobs, 1)
    res = []
    if max_tokens > 0:
        generated = jnp.concatenate(generated, 1)

        for i, x in enumerate(encoded_prompts):
            res.append(tokenizer.decode(x[:min_prompt_len] + generated[i].tolist()))
    return res, all_logprobs


def demo(model_path: str, max_tokens: int = 35) -> None:
    tokenizer_path = existing(Path(model_path), "tokenizer.model", "tokenizer.model.v3")
    tokenizer = Tokenizer(str(tokenizer_path))
    transformer = Transformer.from_folder(Path(model_path))
    if tokenizer.vocab_size != transformer.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens and the model {transformer.vocab_size}"
        raise BadModelError(f"{model_path}: the tokenizer has {sizes}")

    res, _logprobs = generate(
        [
            "This is a test",
            "This is another test",
            "This is a third test, mistral AI is very good at testing. ",
        ],
        transformer,
        tokenizer,
        max_tokens=max_tokens,
    )
    for x in res:
        print(x)
        print("=====================")


# From here on, what the reference leaves to torch, to fire and to who reads a traceback.


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of the file."""
    try:
        yield
    except Exception as error:
        message = textwrap.shorten(str(error), 300) or type(error).__name__
        raise BadModelError(f"{path} cannot be used: {message}") from error


def existing(folder: Path, *names: str) -> Path:
    """The first of these files that `folder` has."""
    if not folder.is_dir():
        raise BadModelError(f"{folder} is not a folder")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise BadModelError(f"{folder} has no {' or '.join(names)}")


def check_names(found: set[str], required: set[str], optional: set[str]) -> None:
    faults = {"missing": required - found, "unknown": found - required - optional}
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{fault} {', '.join(sorted(names)[:3])}{more}")


def read_params(path: Path) -> ModelArgs:
    params = json.loads(path.read_text(encoding="utf-8"))
    if type(params) is not dict:
        raise ValueError("not a JSON object")
    optional = {"sliding_window", "rope_theta"}
    required = {field.name for field in fields(ModelArgs)} - optional
    check_names(set(params), required, optional)
    for name in {"norm_eps", "rope_theta"} & set(params):
        if type(params[name]) is int:
            params[name] = float(params[name])
    for field in fields(ModelArgs):
        value = params.get(field.name, field.default)
        if not isinstance(value, field.type) or isinstance(value, bool):
            raise ValueError(f"{field.name} cannot be {value!r}")
    return ModelArgs(**params)


def open_weights(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Under each tensor's name the function that reads it."""
    if path.suffix == ".safetensors":
        file = safe_open(path, framework="numpy")
        names = file.keys()
        return {name: partial(file.get_tensor, name) for name in names}
    try:
        import torch
    except ImportError as error:
        raise ImportError("only PyTorch can read it: pip install torch") from error

    def read(tensor: torch.Tensor) -> np.ndarray:
        # by way of bytes, because torch gives NumPy no bfloat16
        dtype = str(tensor.dtype).removeprefix("torch.")
        return tensor.contiguous().view(torch.uint8).numpy().view(dtype)

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: partial(read, tensor) for name, tensor in loaded.items()}
    except Exception as error:  # whose own advice would be to load it unsafely
        raise ValueError("not a complete file of named tensors by torch.save") from error


def main() -> None:
    embedded = Path(__file__).parent / "mistral_eqx" / "tiny_mistral"
    parser = argparse.ArgumentParser(description="Continues three prompts.")
    parser.add_argument(
        "model_path",
        metavar="MODEL_DIR",
        nargs="?",
        default=embedded,
        help="a folder in Mistral's own format; the embedded model if not given",
    )
    parser.add_argument(
        "--max_tokens",
        type=int,
        default=35,
        help="past the shortest prompt; 35 if not given",
    )
    arguments = parser.parse_args()
    if arguments.max_tokens < 0:
        parser.error(f"--max_tokens must be 0 or more, not {arguments.max_tokens}")
    try:
        demo(str(arguments.model_path), arguments.max_tokens)
    except BadModelError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130)


if __name__ == "__main__":
    main()
