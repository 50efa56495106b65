"""Next-token training: the loss, one step, and a loop that survives being killed."""

import functools
import os
import zlib
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int, Integer
from tqdm import tqdm

from .. import arguments
from ..devices.sharding import n_row_groups, replicate, shard_rows
from ..kernels.quantized import is_quantized
from ..transformer import Transformer
from .checkpoints import read_checkpoint, write_checkpoint


def loss(
    model: Transformer, tokens: Int[Array, "batch seq"], *, balance: float = 0.02
) -> Float32[Array, ""]:
    """The mean cross-entropy, in nats a token, of each token after those before it; for a
    Mixtral plus `balance` times [`load_balancing_loss`][], so that no expert is left out.
    """
    moe = model.config.moe
    if moe is None or balance == 0:
        (hidden, _), uneven = model.batch(tokens[:, :-1]), 0
    else:
        hidden, router_logits = model.with_router_logits(tokens[:, :-1])
        uneven = balance * load_balancing_loss(router_logits, moe.num_experts_per_tok)
    logits = jax.vmap(model.logits)(hidden)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(entropy) + uneven


def load_balancing_loss(
    router_logits: Float[Array, "*layers experts"], top_k: int
) -> Float32[Array, ""]:
    """`experts` times the sum over the experts of the share of tokens that chose one and
    the mean probability it was given: `top_k` if all are used alike, more otherwise.

    Switch Transformers (arXiv 2101.03961), equations 4 to 6, over all layers together, as
    `load_balancing_loss_func` in transformers.

    **Arguments:**

    - `router_logits`: as they come from the router, of every token in every layer.
    - `top_k`: how many experts each token chooses.
    """
    n_experts = router_logits.shape[-1]
    logits = router_logits.reshape(-1, n_experts).astype(jnp.float32)
    _, chosen = jax.lax.top_k(logits, top_k)
    used = jnp.sum(jax.nn.one_hot(chosen, n_experts, dtype=jnp.float32), axis=1)
    probabilities = jax.nn.softmax(logits, axis=-1)
    return n_experts * jnp.sum(jnp.mean(used, axis=0) * jnp.mean(probabilities, axis=0))


def make_optimizer(
    *, learning_rate: float, steps: int, warmup: int, weight_decay: float = 0.1
) -> optax.GradientTransformation:
    """AdamW with clipped gradients. The learning rate rises over `warmup` steps and falls
    along a cosine to a fiftieth at `steps`. Norms are not decayed."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup, max(steps, warmup + 1), 0.02 * learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.95,
            weight_decay=weight_decay,
            mask=functools.partial(jax.tree_util.tree_map_with_path, _decays),
        ),
    )


def _decays(path: tuple, leaf: Array) -> bool:
    return "norm" not in jax.tree_util.keystr(path[-2:])


class TrainState(eqx.Module):
    """All that a run needs to go on: what is written to its checkpoint."""

    model: Transformer
    optimizer_state: optax.OptState
    step: Int[Array, ""]


def start(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. The model's arrays become its own: `train_step`
    donates them."""
    state = TrainState(model, optimizer.init(model), jnp.zeros((), jnp.int32))
    # The scalars are committed to the model's devices. Otherwise a step is compiled twice:
    # for uncommitted scalars, and then for the outputs of the first step.
    counts, rest = eqx.partition(state, lambda leaf: leaf.ndim == 0)
    return eqx.combine(replicate(counts, model), rest)


@eqx.filter_jit(donate="all")
def train_step(
    state: TrainState,
    tokens: Int[Array, "batch seq"],
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Float32[Array, ""]]:
    """One step down the gradient. Returns the new state and the loss before it; the state
    given is donated and may not be used again."""
    value, grads = eqx.filter_value_and_grad(loss)(state.model, tokens)
    updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.model)
    model = eqx.apply_updates(state.model, updates)
    return TrainState(model, optimizer_state, state.step + 1), value


_evaluate = eqx.filter_jit(functools.partial(loss, balance=0.0))


def sample_batch(
    tokens: Integer[np.ndarray, "length"],
    *,
    batch_size: int,
    seq_len: int,
    bos_id: int,
    seed: int,
    step: int,
) -> Int[np.ndarray, "batch seq"]:
    """`batch_size` random slices of `seq_len` tokens, each behind a BOS. They depend on the
    seed and the step alone, so that a resumed run sees what an unbroken one does."""
    starts = np.random.default_rng((seed, step)).integers(
        0, len(tokens) - seq_len + 1, batch_size
    )
    slices = tokens[starts[:, None] + np.arange(seq_len)[None, :]]
    return np.concatenate(
        [np.full((batch_size, 1), bos_id, np.int32), slices.astype(np.int32)], axis=1
    )


def fit(
    model: Transformer,
    tokens: Integer[np.ndarray, "length"],
    held_out: Integer[np.ndarray, "held_out_length"],
    *,
    bos_id: int,
    steps: int,
    batch_size: int = 8,
    seq_len: int = 256,
    learning_rate: float = 2e-3,
    warmup: int = 200,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 250,
) -> Transformer:
    """Trains `model` to predict each token of `tokens` from those before it.

    **Arguments:**

    - `model`: where to start. It is donated: use the one that is returned.
    - `tokens`, `held_out`: two streams of token ids. The second is only ever measured.
    - `bos_id`: put before each sequence.
    - `steps`, `batch_size`, `seq_len`: how much to train; `steps` counts from the start
        of the run, those before an interruption included.
    - `learning_rate`, `warmup`: see [`make_optimizer`][].
    - `seed`: for the choice of sequences.
    - `checkpoint`: a file for the state of the run. If it is there, the run goes on from
        it, or from the one before it, if it is damaged.
    - `checkpoint_every`: steps from one checkpoint, and one held-out loss, to the next.

    **Returns:**

    The trained model.

    **Raises:**

    `ValueError` if `tokens` or `held_out` are shorter than a sequence, if the checkpoint is
    of another run (other arguments, text or model), or if the model is quantized.
    """
    if is_quantized(model):
        raise ValueError(
            "A quantized model cannot be trained: its numbers are whole. Train the model "
            "that it was made from."
        )
    integer = arguments.integer
    steps, warmup = integer("steps", steps), integer("warmup", warmup)
    batch_size = integer("batch_size", batch_size, least=1)
    seq_len = integer("seq_len", seq_len, least=1)
    checkpoint_every = integer("checkpoint_every", checkpoint_every, least=1)
    seed = integer("seed", seed, most=2**63 - 1)
    learning_rate = arguments.number("learning_rate", learning_rate)
    if not 0 < learning_rate < np.inf:
        raise ValueError(f"learning_rate must be above 0, got {learning_rate}.")
    for name, stream in (("tokens", tokens), ("held_out", held_out)):
        if len(stream) < seq_len:
            raise ValueError(
                f"{name} has {len(stream)} ids, fewer than one sequence of {seq_len}."
            )
    if batch_size % n_row_groups(model) != 0:
        raise ValueError(
            f"batch_size ({batch_size}) cannot be divided among the {n_row_groups(model)} "
            "groups of devices along the mesh's data and fsdp: make it a multiple of that."
        )
    optimizer = make_optimizer(learning_rate=learning_rate, steps=steps, warmup=warmup)
    state = start(model, optimizer)
    run = {
        "steps": steps,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "seed": seed,
        "text": zlib.crc32(np.asarray(tokens, np.int32).tobytes()),
    }
    if checkpoint is not None:
        checkpoint = Path(arguments.path("checkpoint", checkpoint))
        stored = read_checkpoint(checkpoint, state, run)
        state = state if stored is None else stored
    measured = sample_batch(
        held_out, batch_size=64, seq_len=seq_len, bos_id=bos_id, seed=0, step=0
    )
    begun = int(state.step)
    with tqdm(
        total=steps, initial=begun, unit="step", desc="train", disable=None
    ) as progress:
        shown = {}
        for step in range(begun, steps):
            batch = sample_batch(
                tokens,
                batch_size=batch_size,
                seq_len=seq_len,
                bos_id=bos_id,
                seed=seed,
                step=step,
            )
            batch = shard_rows(jnp.asarray(batch), state.model)
            state, value = train_step(state, batch, optimizer)
            done = step + 1
            if done % 10 == 0:
                shown["loss"] = f"{float(value):.3f}"
            if done % checkpoint_every == 0 or done == steps:
                shown["held out"] = f"{float(_evaluate(state.model, measured)):.3f}"
                if checkpoint is not None:
                    write_checkpoint(checkpoint, state, run)
            progress.set_postfix(shown, refresh=False)
            progress.update()
    return state.model
