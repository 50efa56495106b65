"""One vector for a text, and a head that makes logits of labels from it."""

from typing import NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from ..config import ModelConfig
from ..layers import Linear, RMSNorm
from ..transformer import Transformer


POOLINGS = ("last", "mean")


class NoOutput(eqx.Module):
    """In place of the output of a model that has none."""

    def __call__(self, hidden: Float[Array, "seq dim"]) -> NoReturn:
        raise ValueError(
            "This model was loaded without the output that text is written with: it makes "
            "vectors (embed) or labels (classify)."
        )


def without_output(model: Transformer) -> Transformer:
    """A model that can no longer write."""
    is_none = lambda node: node is None
    return eqx.tree_at(lambda m: m.output, model, NoOutput(), is_leaf=is_none)


def pool(
    model: Transformer,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, "batch"],
    pooling: str,
) -> Float[Array, "batch dim"]:
    """A vector for each row, of the output of the last norm.

    **Arguments:**

    - `model`: whose output is not used.
    - `tokens`: rows of any lengths, with anything behind their ends.
    - `lengths`: of the rows.
    - `pooling`: `"last"` for what stands at a row's last token, which has seen all of it;
        `"mean"` for the mean over its tokens, in float32.
    """
    hidden, _ = model.batch(tokens)
    hidden = jax.vmap(model.norm)(hidden)
    if pooling == "last":
        return jax.vmap(lambda row, n: row[n - 1])(hidden, lengths)
    inside = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
    total = jnp.sum(jnp.where(inside[:, :, None], hidden.astype(jnp.float32), 0), axis=1)
    return total / lengths[:, None].astype(jnp.float32)


class Classifier(eqx.Module):
    """A model that says which label a text has: `MistralForSequenceClassification`.

    **Attributes:**

    - `model`: without an output.
    - `score`: makes a logit for every label from the vector of a text's last token.
    - `labels`: their names.
    - `pad_id`: what Hugging Face's file calls the pad; `None` if it does not say.
    """

    model: Transformer
    score: Linear
    labels: tuple[str, ...] = eqx.field(static=True)
    pad_id: int | None = eqx.field(static=True)

    def __init__(
        self,
        model: Transformer,
        labels: tuple[str, ...],
        *,
        pad_id: int | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `model`: what the vectors come from.
        - `labels`: their names, two at least.
        - `pad_id`: for Hugging Face's file.
        - `key`: for the new head.
        """
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"There must be two or more different labels, got {labels}.")
        self.model, self.labels, self.pad_id = without_output(model), labels, pad_id
        self.score = Linear(model.config.dim, len(labels), dtype=model.dtype, key=key)

    # What every function that trains, spreads or saves a model asks for.
    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def norm(self) -> RMSNorm:
        return self.model.norm

    @property
    def dtype(self):
        return self.model.dtype

    def __call__(
        self, tokens: Int[Array, "batch seq"], lengths: Int[Array, "batch"]
    ) -> Float32[Array, "batch labels"]:
        """The logits of the labels. Arguments are those of [`pool`][]."""
        vectors = pool(self.model, tokens, lengths, "last")
        return self.score(vectors).astype(jnp.float32)
