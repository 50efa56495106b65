"""Next-token training: the loss, and one step down its gradient."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int

from ..devices.fsdp import Within, gathered
from ..devices.sharding import replicate, rows_here
from ..heads.classifier import Classifier
from ..transformer import Transformer
from .batches import Batch, Labelled
from .lora import trainable


# How many logits a device makes at once. There are as many as tokens times the vocabulary.
_LOGITS = 2**26
# A Transformer or a Classifier.
Model = eqx.Module


def loss(model: Transformer, batch: Batch, *, balance: float = 0.02) -> Float32[Array, ""]:
    """The mean cross-entropy, in nats a token, of each token that is to be learnt after
    those before it; for a Mixtral plus `balance` times [`load_balancing_loss`][], so that
    no expert is left out."""
    total, n, uneven = summed_loss(model, batch, balance=balance)
    return total / jnp.maximum(n, 1).astype(jnp.float32) + uneven


def summed_loss(
    model: Transformer | Classifier, batch: Batch | Labelled, *, balance: float = 0.0
) -> tuple[Float32[Array, ""], Int[Array, ""], Float32[Array, ""]]:
    """The sum of the cross-entropies, the number of tokens or labels in it, and what is to
    be added to their mean for a Mixtral."""
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    if isinstance(batch, Labelled):
        entropies = cross_entropy(model(batch.tokens, batch.lengths), batch.labels)
        total = jnp.sum(jnp.where(batch.learnt, entropies, 0))
        return total, n_learnt(batch), jnp.zeros(())
    moe, uneven = model.config.moe, jnp.zeros(())
    inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
    segments = None if batch.segments is None else batch.segments[:, :-1]
    if moe is None:
        hidden, _ = model.batch(inputs, None, segments)
    else:
        hidden, router_logits = model.with_router_logits(inputs, segments)
        uneven = balance * load_balancing_loss(router_logits, moe.num_experts_per_tok)
    entropies = _entropies(model, hidden, targets)
    n = n_learnt(batch)
    if batch.learnt is not None:
        entropies = jnp.where(batch.learnt[:, 1:], entropies, 0)
    return jnp.sum(entropies), n, uneven


def n_learnt(batch: Batch | Labelled) -> Int[Array, ""]:
    """How many tokens or labels of a batch are to be learnt."""
    if isinstance(batch, Labelled):
        return jnp.sum(batch.learnt, dtype=jnp.int32)
    if batch.learnt is None:
        return jnp.asarray(batch.tokens[:, 1:].size, jnp.int32)
    return jnp.sum(batch.learnt[:, 1:], dtype=jnp.int32)


def _entropies(
    model: Transformer,
    hidden: Float[Array, "batch seq dim"],
    targets: Int[Array, "batch seq"],
) -> Float32[Array, "batch seq"]:
    """The cross-entropy of each target. If there are many logits, they are made for a part
    of the sequence at a time, and again for the gradient."""

    def entropies(hidden, targets):
        logits = jax.vmap(model.logits)(hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    batch, seq = targets.shape
    n_logits = rows_here(batch, model) * seq * model.config.vocab_size
    n_parts = -(-n_logits // _LOGITS)
    if n_parts == 1:
        return entropies(hidden, targets)
    padding = -seq % n_parts

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, n_parts, -1, *x.shape[2:]), 1, 0)

    parts = (cut(hidden), cut(targets))
    out = jax.lax.map(lambda part: jax.checkpoint(entropies)(*part), parts)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1)[:, :seq]


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
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            make_schedule(learning_rate=learning_rate, steps=steps, warmup=warmup),
            b2=0.95,
            weight_decay=weight_decay,
            mask=functools.partial(jax.tree_util.tree_map_with_path, _decays),
        ),
    )


def make_schedule(*, learning_rate: float, steps: int, warmup: int) -> optax.Schedule:
    """The learning rate of each step of [`make_optimizer`][]."""
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup, max(steps, warmup + 1), 0.02 * learning_rate
    )


def _decays(path: tuple, leaf: Array) -> bool:
    return "norm" not in jax.tree_util.keystr(path[-2:])


class TrainState(eqx.Module):
    """What changes while a model is trained: what is written to a checkpoint.

    **Attributes:**

    - `weights`: the model with its trained weights alone, in float32.
    - `optimizer_state`: for those.
    - `step`: how many steps have been made.
    - `dtype`: of the trained weights in the model.
    """

    weights: Model
    optimizer_state: optax.OptState
    step: Int[Array, ""]
    dtype: np.dtype = eqx.field(static=True)

    def model(self, frozen: Model) -> Model:
        """The model with the weights as they are now, beside those that stay."""
        cast = lambda leaf: leaf.astype(self.dtype)
        return eqx.combine(jax.tree.map(cast, self.weights), frozen)


def start(
    model: Model, optimizer: optax.GradientTransformation
) -> tuple[Model, TrainState]:
    """What stays of a model (see [`trainable`][mistral_eqx.learning.lora.trainable]) and
    the state before the first step. Trained float32 arrays of the model become the state's
    own: [`train_step`][] donates them."""
    weights, frozen = eqx.partition(model, trainable(model))
    dtype = jax.tree.leaves(weights)[0].dtype
    if dtype == jnp.float16:
        raise ValueError(
            "A float16 model cannot be trained, because small gradients would be zero: "
            'load it with dtype="bfloat16" or "float32".'
        )
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    state = TrainState(weights, optimizer.init(weights), jnp.zeros((), jnp.int32), dtype)
    # The scalars are committed to the model's devices. Otherwise a step is compiled twice:
    # for uncommitted scalars, and then for the outputs of the first step.
    counts, rest = eqx.partition(state, lambda leaf: leaf.ndim == 0)
    return frozen, eqx.combine(replicate(counts, model), rest)


class Outcome(eqx.Module):
    """What a step has found: the loss before it, and the norm of its whole gradient."""

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]


@eqx.filter_jit(donate="all-except-first")
def train_step(
    frozen: Model,
    state: TrainState,
    batch: Batch | Labelled,
    optimizer: optax.GradientTransformation,
    *,
    parts: int = 1,
    recompute: bool = False,
) -> tuple[TrainState, Outcome]:
    """One step down the gradient.

    **Arguments:**

    - `frozen`, `state`: as `start` returns them. The state is donated and may not be used
        again.
    - `batch`: what to learn.
    - `optimizer`: that of `start`.
    - `parts`: how many parts the rows go through the model in. The step is the same, in
        the memory of one part.
    - `recompute`: whether to keep of every block only what goes in, and compute its insides
        once more for the gradient: less memory for a third more work.
    """
    n_all = jnp.maximum(n_learnt(batch), 1).astype(jnp.float32)

    def loss_of_part(weights: Model, part: Batch | Labelled) -> Float32[Array, ""]:
        model = eqx.tree_at(lambda s: s.weights, state, weights).model(frozen)
        model = _as_trained(model, recompute)
        total, _, uneven = summed_loss(model, part, balance=0.02)
        return total / n_all + uneven / parts

    value_and_grads = eqx.filter_value_and_grad(loss_of_part)
    if parts == 1:
        value, grads = value_and_grads(state.weights, batch)
    else:

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, value_and_grads(state.weights, part)), None

        # Part `i` has rows `i, parts + i, ...`: some of each device's rows.
        cut = lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.weights)
        (value, grads), _ = jax.lax.scan(add, zeros, jax.tree.map(cut, batch))
    updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.weights)
    weights = eqx.apply_updates(state.weights, updates)
    outcome = Outcome(value, optax.tree.norm(grads))
    return TrainState(weights, optimizer_state, state.step + 1, state.dtype), outcome


def _as_trained(model: Model, recompute: bool) -> Model:
    """The model as it is trained: weights along `fsdp` come together block by block, and
    with `recompute` each block's insides are computed again in the backward pass."""
    if isinstance(model, Classifier):
        inner = _as_trained(model.model, recompute)
        return eqx.tree_at(lambda c: c.model, model, inner)
    model = gathered(model)
    if not recompute:
        return model
    # The layers of a pipelined model are in stages.
    blocks = lambda m: m.layers if isinstance(m.layers, tuple) else m.layers.blocks
    again = tuple(Within(block, eqx.filter_checkpoint) for block in blocks(model))
    return eqx.tree_at(blocks, model, again)


@eqx.filter_jit
def evaluate(
    frozen: Model, state: TrainState, batch: Batch | Labelled
) -> tuple[Float32[Array, ""], Int[Array, ""]]:
    """The sum of the losses of a batch's tokens, and how many there are."""
    model = _as_trained(state.model(frozen), recompute=False)
    return summed_loss(model, batch)[:2]
