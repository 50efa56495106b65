"""LoRA: a layer keeps its weight and learns a product of two thin matrices beside it.

Hu et al. (arXiv 2106.09685). The trained model is `merge_lora`d into a plain one, or its
thin matrices are written by themselves as an adapter.
"""

import math
import re
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import arguments
from ..devices.sharding import settled
from ..kernels.quantized import QuantizedLinear, is_quantized
from ..layers import Linear, product


# All linear layers but the output and the routers.
LAYERS = r"attention\.w|feed_forward\.(experts\.)?w"
Model = TypeVar("Model", bound=eqx.Module)


class LoRALinear(eqx.Module):
    """In place of a linear layer: `base(x) + scale * (x @ a.T) @ b.T`.

    **Attributes:**

    - `base`: the layer itself, also a quantized one.
    - `a`, `b`: the thin matrices, float32. With `b` zero nothing is added.
    - `scale`: Mistral's `scaling`, PEFT's `lora_alpha / r`.
    """

    base: Linear | QuantizedLinear
    a: Float[Array, "*stack rank in"]
    b: Float[Array, "*stack out rank"]
    scale: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*seq in"]) -> Float[Array, "*seq out"]:
        return self.base(x) + self.added(x)

    def added(self, x: Float[Array, "*seq in"]) -> Float[Array, "*seq out"]:
        """What the adapter adds to the layer's output."""
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        return self.scale * product(product(x, a), b)


def add_lora(
    model: Model,
    *,
    rank: int = 16,
    scale: float = 2.0,
    layers: str = LAYERS,
    key: PRNGKeyArray,
) -> Model:
    """A model with a new adapter, which changes nothing until it is trained: `b` is zero.

    **Arguments:**

    - `model`: a [`Transformer`][mistral_eqx.Transformer], also a quantized or a sharded
        one. It stays as it is.
    - `rank`: of the adapter's matrices.
    - `scale`: what their product is multiplied by.
    - `layers`: a regular expression, which is searched for in the names of the layers:
        `"layers.0.attention.wq"`, `"layers.0.feed_forward.w1"`, `"output"`. A Mixtral's
        experts are `"layers.0.feed_forward.experts.w1"`, all of a layer together.
    - `key`: for `a`, which is uniform as in both Mistral's and Hugging Face's trainers.

    **Raises:**

    `ValueError` for a rank below 1, a scale that is not finite, a pattern that fits no
    layer, or a model that has an adapter already.
    """
    rank = arguments.integer("rank", rank, least=1)
    scale = arguments.number("scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}.")
    if has_lora(model):
        raise ValueError("The model has an adapter already: merge it first.")
    try:
        pattern = re.compile(arguments.text("layers", layers))
    except re.error as error:
        raise ValueError(
            f"layers must be a regular expression, got {layers!r}: {error}."
        ) from error
    keys = iter(jr.split(key, len(jax.tree.leaves(model))))

    def thin(layer: Linear | QuantizedLinear) -> LoRALinear:
        *stack, n_out, n_in = weight_shape(layer)
        bound = 1 / math.sqrt(n_in)
        a = jr.uniform(next(keys), (*stack, rank, n_in), minval=-bound, maxval=bound)
        return LoRALinear(layer, a, jnp.zeros((*stack, n_out, rank)), scale)

    chosen = {name for name, _ in linear_layers(model) if pattern.search(name)}
    if not chosen:
        raise ValueError(
            f"No layer's name fits {layers!r}. The model has layers such as "
            f"{', '.join(name for name, _ in linear_layers(model)[:7])}."
        )
    instead = lambda name, layer: thin(layer) if name in chosen else layer
    return settled(replace_layers(model, instead))


def merge_lora(model: Model) -> Model:
    """The plain model that writes as the one with an adapter does: the weight of each layer
    is `weight + scale * b @ a`, summed in float32.

    **Raises:**

    `ValueError` if a weight is quantized, as its whole numbers cannot hold the sum.
    """

    def merged(name: str, layer: Any) -> Any:
        if not isinstance(layer, LoRALinear):
            return layer
        if isinstance(layer.base, QuantizedLinear):
            raise ValueError(
                f"{name} is quantized, and cannot hold an adapter. Load the model that it "
                "was made from with adapter=..., which also quantizes the sum."
            )
        weight = merged_weight(layer.base.weight, layer.a, layer.b, layer.scale)
        return eqx.tree_at(lambda linear: linear.weight, layer.base, weight)

    return replace_layers(model, merged)


@eqx.filter_jit
def merged_weight(
    weight: Float[Array, "*stack out in"],
    a: Float[Array, "*stack rank in"],
    b: Float[Array, "*stack out rank"],
    scale: float,
) -> Float[Array, "*stack out in"]:
    """`weight + scale * b @ a` in the weight's dtype."""
    added = jnp.matmul(
        b.astype(jnp.float32), a.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return (weight.astype(jnp.float32) + scale * added).astype(weight.dtype)


def has_lora(model: eqx.Module) -> bool:
    return any(isinstance(layer, LoRALinear) for _, layer in linear_layers(model))


def trainable(model: Model) -> PyTree[bool]:
    """Which arrays of a model are trained: those of its adapter if it has one, and of a
    classifier's head, and otherwise all. A filter for `eqx.partition`.

    **Raises:**

    `ValueError` for a quantized model without an adapter: its numbers are whole.
    """
    of_adapter = has_lora(model)
    if not of_adapter and is_quantized(model):
        raise ValueError(
            "A quantized model cannot be trained: its numbers are whole. Add an adapter "
            "with add_lora, or train the model that it was made from."
        )

    def is_trained(path: tuple, _: Array) -> bool:
        if not of_adapter or getattr(path[0], "name", None) == "score":
            return True
        return getattr(path[-1], "name", None) in ("a", "b")

    return jax.tree_util.tree_map_with_path(is_trained, model)


def weight_shape(layer: Linear | QuantizedLinear) -> tuple[int, ...]:
    """`(*stack, out, in)`, of the weight that a layer has or stands for."""
    if isinstance(layer, Linear):
        return layer.weight.shape
    # Two numbers of int4 are in a byte.
    halves = 2 if layer.values.dtype == jnp.uint8 else 1
    return (*layer.values.shape[:-1], halves * layer.values.shape[-1])


def linear_layers(model: eqx.Module) -> list[tuple[str, Any]]:
    """The linear layers of a model and their names."""
    found = []
    replace_layers(model, lambda name, layer: found.append((name, layer)) or layer)
    return found


def replace_layers(model: Model, replace: Any) -> Model:
    """The model with every linear layer replaced by what a function of its name and itself
    returns."""
    is_layer = lambda node: isinstance(node, Linear | QuantizedLinear | LoRALinear)

    def instead(path: tuple, node: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return replace(name, node) if is_layer(node) else node

    return jax.tree_util.tree_map_with_path(instead, model, is_leaf=is_layer)
