"""Mistral's `one_file_ref.py` in JAX and Equinox, to be read beside the original.

The original is `one_file_ref.py` of mistralai/mistral-inference at commit b818190 (Apache
License 2.0). From `ModelArgs` to `demo` this file has its classes, functions and names.

    python one_file_ref.py [MODEL_DIR] [--max_tokens 35]

Without a folder (in Mistral's own format) the model of this repository runs. `# JAX:` marks
a departure where it stands. In general:

- Modules are `eqx.Module`s. Their fields are declared; what is not an array is static.
- `forward` mutates nothing: it takes the cache and returns it with its result.
- Later checkpoints load too: without a window, with a `rope_theta`, as safetensors.
- On a GPU or TPU, float32 is exact under `jax.default_matmul_precision("highest")` only.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Complex64, Float, Float32, Int, PRNGKeyArray
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm


Tokens = Int[Array, "bsz seqlen"]
Logits = Float32[Array, "bsz seqlen vocab_size"]
Hidden = Float[Array, "bsz seqlen dim"]
Heads = Float[Array, "bsz seqlen n_heads head_dim"]
KVHeads = Float[Array, "bsz seqlen n_kv_heads head_dim"]
Freqs = Complex64[Array, "seqlen half"]
Positions = Int[Array, "seqlen"]
Mask = Float[Array, "seqlen seqlen"] | None
# JAX: cache_k and cache_v of one layer, which the reference keeps in Attention
CachedHeads = Float[Array, "bsz slots n_kv_heads head_dim"]
Cache = tuple[CachedHeads, CachedHeads]


class BadModelError(ValueError):
    """Says in one line why a model cannot be used."""


# JAX: torch brings the next five along
class Module(eqx.Module):
    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


class Linear(Module):
    weight: Float[Array, "out in"]

    def __init__(self, in_features: int, out_features: int, *, key: PRNGKeyArray) -> None:
        shape, bound = (out_features, in_features), in_features**-0.5
        self.weight = jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    def forward(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return jnp.einsum("...i,oi->...o", x, self.weight)


view_as_complex = lambda x: jax.lax.complex(x[..., 0], x[..., 1])
view_as_real = lambda x: jnp.stack([x.real, x.imag], axis=-1)
gather = lambda x, index: jnp.take_along_axis(x, index[..., None], axis=-1).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    sliding_window: int | None = None
    norm_eps: float | int
    vocab_size: int
    # JAX: in later checkpoints; v0.1, which has a window, leaves out its theta of 1e4
    rope_theta: float | int | None = None

    def __post_init__(self) -> None:  # JAX: checks, since the numbers are from a file
        if self.rope_theta is None:
            object.__setattr__(self, "rope_theta", 1e4 if self.sliding_window else 1e6)
        for field in fields(self):
            value = getattr(self, field.name)
            known = isinstance(value, field.type) and value is not True
            if not known or (value is not None and not 0 < value < 2**31):
                raise ValueError(f"{field.name} cannot be {value!r}")
        if self.n_heads % self.n_kv_heads != 0 or self.head_dim % 2 != 0:
            numbers = f"{self.n_heads}, {self.n_kv_heads}, {self.head_dim}"
            raise ValueError(f"n_heads, n_kv_heads, head_dim cannot be {numbers}")


def repeat_kv(keys: KVHeads, values: KVHeads, repeats: int) -> tuple[Heads, Heads]:
    return jnp.repeat(keys, repeats, axis=2), jnp.repeat(values, repeats, axis=2)


def _reshape_for_broadcast(
    freqs_cis: Freqs, x: Complex64[Array, "bsz seqlen n_heads half"]
) -> Complex64[Array, "1 seqlen 1 half"]:
    ndim = x.ndim  # JAX: jaxtyping's types say what the reference asserts
    shape = [d if i == 1 or i == ndim - 1 else 1 for i, d in enumerate(x.shape)]
    return freqs_cis.reshape(shape)


def apply_rotary_emb(xq: Heads, xk: KVHeads, freqs_cis: Freqs) -> tuple[Heads, KVHeads]:
    # pairs are neighbours, (x[2i], x[2i+1]); Hugging Face pairs x[i] with x[i + head_dim/2]
    xq_ = view_as_complex(xq.astype(jnp.float32).reshape(*xq.shape[:-1], -1, 2))
    xk_ = view_as_complex(xk.astype(jnp.float32).reshape(*xk.shape[:-1], -1, 2))
    freqs_cis = _reshape_for_broadcast(freqs_cis, xq_)
    xq_out = view_as_real(xq_ * freqs_cis).reshape(xq.shape)
    xk_out = view_as_real(xk_ * freqs_cis).reshape(xk.shape)
    return xq_out.astype(xq.dtype), xk_out.astype(xk.dtype)


class Attention(Module):
    args: ModelArgs = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    n_kv_heads: int = eqx.field(static=True)
    repeats: int = eqx.field(static=True)
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
        self.scale = self.args.head_dim**-0.5
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.wq = Linear(args.dim, args.n_heads * args.head_dim, key=q_key)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim, key=k_key)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim, key=v_key)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim, key=o_key)

    def forward(
        self, x: Hidden, freqs_cis: Freqs, positions: Positions, mask: Mask, cache: Cache
    ) -> tuple[Hidden, Cache]:
        bsz, seqlen, _ = x.shape
        cache_k, cache_v = cache
        slots = cache_k.shape[1]
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.reshape(bsz, seqlen, self.n_heads, self.args.head_dim)
        xk = xk.reshape(bsz, seqlen, self.n_kv_heads, self.args.head_dim)
        xv = xv.reshape(bsz, seqlen, self.n_kv_heads, self.args.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis=freqs_cis)
        # The cache is a rotating buffer
        scatter_pos = positions[-slots:] % slots
        cache_k = cache_k.at[:, scatter_pos].set(xk[:, -slots:], unique_indices=True)
        cache_v = cache_v.at[:, scatter_pos].set(xv[:, -slots:], unique_indices=True)
        if positions.shape[0] > 1:
            # prefill
            key, value = repeat_kv(xk, xv, self.repeats)
        else:
            cur_pos = positions[-1] + 1
            key, value = repeat_kv(cache_k, cache_v, self.repeats)
            # JAX: the reference slices [:, :cur_pos]; fixed shapes need a mask
            written = jnp.arange(slots)[None, :] < cur_pos
            mask = jnp.where(written, 0.0, -jnp.inf).astype(x.dtype)
        query, key, value = (x.swapaxes(1, 2) for x in (xq, key, value))
        # scores : [bsz, n_heads, seqlen | 1, seqlen | slots]
        scores = jnp.matmul(query, key.swapaxes(2, 3)) * self.scale
        if mask is not None:
            scores += mask[None, None, ...]
        scores = scores.astype(jnp.float32)
        scores = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        output = jnp.matmul(scores, value)  # (bs, n_local_heads, slen, head_dim)
        output = output.swapaxes(1, 2).reshape(bsz, seqlen, -1)
        return self.wo(output), (cache_k, cache_v)


class FeedForward(Module):
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


class RMSNorm(Module):
    eps: float = eqx.field(static=True)
    weight: Float[Array, "dim"]

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        self.eps = eps
        self.weight = jnp.ones(dim)

    def _norm(self, x: Float32[Array, "*batch dim"]) -> Float32[Array, "*batch dim"]:
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps)

    def forward(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        # JAX: eqx.nn.RMSNorm rounds after the weight and not before it
        output = self._norm(x.astype(jnp.float32)).astype(x.dtype)
        return output * jnp.broadcast_to(self.weight, output.shape)


class TransformerBlock(Module):
    attention: Attention
    feed_forward: FeedForward
    attention_norm: RMSNorm
    ffn_norm: RMSNorm

    def __init__(self, args: ModelArgs, *, key: PRNGKeyArray) -> None:
        attention_key, feed_forward_key = jax.random.split(key)
        self.attention = Attention(args, key=attention_key)
        self.feed_forward = FeedForward(args=args, key=feed_forward_key)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(
        self, x: Hidden, freqs_cis: Freqs, positions: Positions, mask: Mask, cache: Cache
    ) -> tuple[Hidden, Cache]:
        r, cache = self.attention.forward(
            self.attention_norm(x), freqs_cis, positions, mask, cache
        )
        h = x + r
        r = self.feed_forward.forward(self.ffn_norm(h))
        return h + r, cache


# JAX: for these positions; a table of all positions would be a leaf of the model
def precompute_freqs_cis(dim: int, positions: Positions, theta: float = 10000.0) -> Freqs:
    # JAX: compiled powers differ from torch's, by 2e-3 of a radian at position 32,768
    with jax.ensure_compile_time_eval():
        exponents = jnp.arange(0, dim, 2)[: (dim // 2)].astype(jnp.float32) / dim
        freqs = 1.0 / (theta**exponents)
    freqs = jnp.outer(positions.astype(jnp.float32), freqs)
    return jax.lax.complex(jnp.cos(freqs), jnp.sin(freqs))  # complex64


class Transformer(Module):
    args: ModelArgs = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)
    tok_embeddings: eqx.nn.Embedding
    layers: tuple[TransformerBlock, ...]
    norm: RMSNorm
    output: Linear

    def __init__(self, args: ModelArgs, *, key: PRNGKeyArray) -> None:
        self.args = args
        self.vocab_size = args.vocab_size
        embedding_key, output_key, *layer_keys = jax.random.split(key, 2 + args.n_layers)
        self.tok_embeddings = eqx.nn.Embedding(args.vocab_size, args.dim, key=embedding_key)
        self.layers = tuple(TransformerBlock(args=args, key=key) for key in layer_keys)
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size, key=output_key)

    def empty_cache(self, bsz: int, seqlen: int) -> tuple[Cache, ...]:
        # JAX: made for the batch at hand; without a window no slot is overwritten
        slots = self.args.sliding_window or seqlen
        shape = (bsz, slots, self.args.n_kv_heads, self.args.head_dim)
        zeros = partial(jnp.zeros, shape, self.norm.weight.dtype)  # JAX: of its own dtype
        return tuple((zeros(), zeros()) for _ in self.layers)

    @eqx.filter_jit
    def forward(
        self, input_ids: Tokens, positions: Positions, cache: tuple[Cache, ...]
    ) -> tuple[Logits, tuple[Cache, ...]]:
        h = jax.vmap(jax.vmap(self.tok_embeddings))(input_ids)
        args = self.args
        freqs_cis = precompute_freqs_cis(args.head_dim, positions, args.rope_theta)
        mask: Mask = None
        if input_ids.shape[1] > 1:
            seqlen = input_ids.shape[1]
            tensor = jnp.full((seqlen, seqlen), dtype=h.dtype, fill_value=1)
            mask = jnp.tril(tensor, k=0)
            if args.sliding_window is not None:
                # make the mask banded to account for sliding window
                # The reference's quirk is kept: a query sees its own key and sliding_window
                # keys before it, one more than the rotating buffer holds when decoding.
                mask = jnp.triu(mask, k=-args.sliding_window)
            mask = jnp.log(mask)
        new_cache = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h, layer_cache = layer(h, freqs_cis, positions, mask, layer_cache)
            new_cache.append(layer_cache)
        return self.output(self.norm(h)).astype(jnp.float32), tuple(new_cache)

    @staticmethod  # JAX: for batches of any size, in one dtype, on JAX's own device
    def from_folder(folder: Path, dtype: DTypeLike | None = None) -> "Transformer":
        path = existing(folder, "params.json")
        with blame(path):
            params = json.loads(path.read_text(encoding="utf-8"))
            unused = ("max_batch_size", "max_seq_len", "max_position_embeddings")
            model_args = ModelArgs(**{k: v for k, v in params.items() if k not in unused})
        path = existing(folder, "consolidated.safetensors", "consolidated.00.pth")
        # JAX: a skeleton without numbers is filled; a leaf's path is its name in the file
        model = eqx.filter_eval_shape(Transformer, model_args, key=jax.random.key(0))
        leaves, treedef = jax.tree_util.tree_flatten_with_path(model)
        names = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in leaves]
        with blame(path):
            read = open_weights(path)
            if wrong := sorted(set(read) ^ set(names)):
                raise ValueError(f"{wrong[0]} is missing, or unknown to params.json")
            n_weights = sum(leaf.size for _, leaf in leaves)
            dtype = dtype or default_dtype(n_weights, read[names[0]]().dtype)
            weights = []
            bar = tqdm(names, desc="loading", unit="tensor", delay=1, disable=None)
            for name, (_, leaf) in zip(bar, leaves, strict=True):
                tensor = read[name]()
                if tensor.shape != leaf.shape:
                    raise ValueError(f"{name} is {tensor.shape}, not {leaf.shape}")
                weights.append(jnp.array(tensor, dtype))
        return treedef.unflatten(weights)


class Tokenizer:
    def __init__(self, model_path: str) -> None:
        with blame(Path(model_path)):
            self._model = SentencePieceProcessor(model_file=model_path)
        self.vocab_size: int = self._model.vocab_size()

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
    """Continues prompts greedily, to `max_tokens` past the shortest: texts and logprobs."""
    if len(prompts) == 0 or max_tokens < 0:  # JAX: torch raises less clear errors
        raise ValueError("generate needs a prompt, and max_tokens of 0 or more")
    encoded_prompts = [tokenizer.encode(prompt) for prompt in prompts]
    if not all(0 <= token < model.vocab_size for x in encoded_prompts for token in x):
        # JAX: an index outside would be clamped or wrapped, without an error
        raise BadModelError(f"a token is not among the model's {model.vocab_size}")
    prompt_lens = [len(x) for x in encoded_prompts]
    min_prompt_len = min(prompt_lens)
    max_prompt_len = max(prompt_lens)
    input_tokens = np.full((len(prompts), max_prompt_len), tokenizer.pad_id, dtype=np.int32)
    for i, encoded in enumerate(encoded_prompts):  # JAX: padded on the host
        input_tokens[i, : len(encoded)] = encoded
    input_mask = input_tokens != tokenizer.pad_id

    # pre-fill
    positions = jnp.arange(0, min_prompt_len)
    cache = model.empty_cache(len(prompts), min_prompt_len + max_tokens)
    logits, cache = model.forward(input_tokens[:, :min_prompt_len], positions, cache)
    logprobs = jax.nn.log_softmax(logits, axis=-1)

    # decode
    generated = []
    all_logprobs = [gather(logprobs[:, :-1, :], input_tokens[:, 1:min_prompt_len])]
    cur_pos = min_prompt_len
    for _ in range(max_tokens):
        next_token = jnp.argmax(logprobs[:, -1, :], axis=-1)
        if cur_pos < input_mask.shape[1]:
            given = input_tokens[:, cur_pos]
            next_token = jnp.where(input_mask[:, cur_pos], given, next_token)
        all_logprobs.append(gather(logprobs[:, -1:, :], next_token[:, None]))
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
    if tokenizer.vocab_size != transformer.vocab_size:  # JAX: else it writes nonsense
        sizes = f"{tokenizer.vocab_size} tokens and the model {transformer.vocab_size}"
        raise BadModelError(f"{model_path}: the tokenizer has {sizes}")
    prompts = [
        "This is a test",
        "This is another test",
        "This is a third test, mistral AI is very good at testing. ",
    ]
    res, _logprobs = generate(prompts, transformer, tokenizer, max_tokens=max_tokens)
    for x in res:
        print(x, "=====================", sep="\n")


# JAX: the reference leaves the rest to torch, to fire and to whoever reads a traceback.
@contextmanager
def blame(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        words = "".join(filter(str.isprintable, " ".join(str(error).split())))[:300]
        message = f"{path} cannot be used: {words or type(error).__name__}"
        raise BadModelError(message) from error


def existing(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    fault = f"has no {' or '.join(names)}" if folder.is_dir() else "is not a folder"
    raise BadModelError(f"{folder} {fault}")


def default_dtype(n_weights: int, stored: DTypeLike) -> DTypeLike:
    """float32 on a CPU if the weights then fill half of the memory at most."""
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    fits = jax.default_backend() == "cpu" and 4 * n_weights <= half
    return jnp.float32 if fits else stored


def open_weights(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    if path.suffix == ".safetensors":
        file = safe_open(path, framework="numpy")
        return {name: partial(file.get_tensor, name) for name in file.keys()}
    try:
        import torch

        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # by way of bytes, because torch gives NumPy no bfloat16
        numpy = lambda x: x.contiguous().view(torch.uint8).numpy().view(str(x.dtype)[6:])
        return {name: partial(numpy, tensor) for name, tensor in loaded.items()}
    except ImportError as error:
        raise ImportError("only PyTorch can read it: pip install torch") from error
    except Exception as error:  # torch advises to load it unsafely
        raise ValueError("not a complete file of named tensors by torch.save") from error


def main() -> None:
    embedded = Path(__file__).parent / "mistral_eqx" / "tiny_mistral"
    parser = argparse.ArgumentParser(description="Continues three prompts.")
    add = partial(parser.add_argument, help="(default: %(default)s)")
    add("model_path", metavar="MODEL_DIR", nargs="?", default=embedded)
    add("--max_tokens", type=int, default=35)
    arguments = parser.parse_args()
    if not 0 <= arguments.max_tokens < 2**31:
        parser.error(f"--max_tokens must be 0 or more, not {arguments.max_tokens}")
    try:
        demo(str(arguments.model_path), arguments.max_tokens)
        sys.stdout.flush()
    except (BadModelError, OSError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, OSError):  # Python would complain of standard output again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # a reader has seen enough
            return
        parser.exit(2, f"{parser.prog}: {str(error).splitlines()[0]}\n")
    except KeyboardInterrupt:
        parser.exit(130)


if __name__ == "__main__":
    main()
