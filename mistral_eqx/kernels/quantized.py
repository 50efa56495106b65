"""Weights in eight or four bits, and products with them.

A weight is stored as whole numbers and their scales. In int8 a row of the matrix has one
scale, or each 32 numbers of it have one. In int4 it is always the latter, with two numbers
in a byte. That is how GGUF files have their Q8_0 and Q4_0, which stay exactly as they are.
The whole numbers become floats while they are read.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, UInt8

from ..layers import Linear
from . import cpu
from .replaced import replaceable, replaces


SCHEMES = ("int8", "int4")
# How many numbers of a row share a scale, where a row has several.
GROUP = 32
# How many numbers of a block stay in a CPU's cache.
_NEAR = 2**20
Values = Int8[Array, "*stack out in"] | UInt8[Array, "*stack out half"]
Scales = Float[Array, "*stack out groups"]
Model = TypeVar("Model", bound=eqx.Module)


class QuantizedLinear(eqx.Module):
    """In place of a [`Linear`][mistral_eqx.layers.Linear] whose weight is
    `values * scales`.

    int4 keeps numbers from -8 to 7 as 0 to 15. The low halves of a group's 16 bytes are
    its first 16 numbers, and the high halves its last 16.
    """

    values: Values
    scales: Scales

    def __call__(self, x: Float[Array, "*seq in"]) -> Float[Array, "*seq out"]:
        return quantized_product(x, self.values, self.scales)


@replaceable(shared=("values", "scales"))
def quantized_product(
    x: Float[Array, "*seq in"], values: Values, scales: Scales
) -> Float[Array, "*seq out"]:
    """[`mistral_eqx.layers.product`][] with a weight in eight or four bits. The weight is
    in the dtype of `x`, and sums are in float32."""
    x, weight, factor = _together(x, values, scales)
    out = jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)
    return (jnp.broadcast_to(factor, out.shape) * out).astype(x.dtype)


@replaces(quantized_product, on="cpu")
def quantized_product_on_cpu(
    x: Float[Array, "batch *seq in"], values: Values, scales: Scales
) -> Float[Array, "batch *seq out"]:
    """[`quantized_product`][]. The barrier makes the weight depend on `x`: otherwise XLA
    converts all weights before the loop of decode steps."""
    x, values, scales = jax.lax.optimization_barrier((x, values, scales))
    rows = x.reshape(-1, x.shape[-1])
    multiply = product_of_few_rows if rows.shape[0] < 4 else _product_of_many_rows
    out = multiply(rows, values, scales)
    return out.reshape(*x.shape[:-1], -1).astype(x.dtype)


def product_of_few_rows(
    x: Float[Array, "rows in"], values: Values, scales: Scales
) -> Float32[Array, "rows out"]:
    """On a CPU, in one loop that makes floats of the weight while it reads it; in two for
    the halves of int4."""
    width, groups = values.shape[1], scales.shape[1]
    n = cpu.n_pieces(width, 1 if groups == 1 else width // groups)
    cut = lambda array: array.reshape(len(array), n, -1)
    # In float32 the halves of int4 are written to memory, and not computed in the loop.
    x = cut(x if values.dtype == jnp.int8 else x.astype(jnp.float32))
    pairs, factor = _parts(x, cut(values), scales if groups == 1 else cut(scales))
    return factor[None] * sum(cpu.product_of_pieces(*pair) for pair in pairs)


def _product_of_many_rows(
    x: Float[Array, "rows in"], values: Values, scales: Scales
) -> Float32[Array, "rows out"]:
    """On a CPU, in blocks of the weight that are still in its cache when they have become
    floats. The last block overlaps the one before it, so that all are of one size."""
    n_out, width = values.shape[0], x.shape[1]
    size = min(n_out, max(64, _NEAR // width // 2 * 2))
    # A 1 and a 0 that XLA must take from `x`: what does not depend on `x`, XLA makes for
    # all layers at once, each in memory of its own.
    one = cpu.one(x)
    zero = (one - 1).astype(values.dtype)

    def fill(i, out):
        start = jnp.minimum(i * size, n_out - size)
        take = lambda part: jax.lax.dynamic_slice_in_dim(part, start, size)
        rows, weight, factor = _together(x, take(values) + zero, take(scales))
        product = factor[None] * cpu.project(rows, weight)
        return jax.lax.dynamic_update_slice_in_dim(out, product, start, axis=1)

    out = jnp.broadcast_to(one, (len(x), n_out))
    return jax.lax.fori_loop(0, -(-n_out // size), fill, out)


def _together(
    x: Float[Array, "*seq in"], values: Values, scales: Scales
) -> tuple[Float[Array, "*seq in"], Float[Array, "out in"], Float32[Array, "out"]]:
    """`x` and the weight in the same order of columns, and a factor of their product."""
    pairs, factor = _parts(x, values, scales)
    # XLA:CPU computes the sum of two such products wrongly where a softmax follows.
    join = lambda arrays: jnp.concatenate(arrays, axis=-1) if arrays[1:] else arrays[0]
    xs, weights = zip(*pairs)
    return join(xs), join([weight.astype(x.dtype) for weight in weights]), factor


def _parts(
    x: Float[Array, "*seq in"], values: Values, scales: Float[Array, "*all groups"]
) -> tuple[
    list[tuple[Float[Array, "*seq part"], Float32[Array, "*outs part"]]],
    Float32[Array, "factors"],
]:
    """Columns of `x` and of the weight that belong together. The sum of their products,
    times the factor, is the product."""
    if scales.shape[-1] == 1 and values.dtype == jnp.int8:
        return [(x, values.astype(jnp.float32))], scales[:, 0].astype(jnp.float32)
    ones = jnp.ones(values.shape[0], jnp.float32)
    if values.dtype == jnp.int8:
        return [(x, _scaled(values, scales))], ones
    # The two numbers of a byte are half a group apart.
    halves = x.reshape(*x.shape[:-1], -1, 2, GROUP // 2)
    part = lambda i: halves[..., i, :].reshape(*x.shape[:-1], -1)
    nibbles = enumerate(_nibbles(values))
    return [(part(i), _scaled(half, scales)) for i, half in nibbles], ones


def _nibbles(values: UInt8[Array, "*shape"]) -> list[Int8[Array, "*shape"]]:
    return [half.astype(jnp.int8) - 8 for half in (values & 15, values >> 4)]


def _scaled(
    values: Int8[Array, "*outs part"], scales: Float[Array, "*all groups"]
) -> Float32[Array, "*outs part"]:
    groups = values.reshape(*scales.shape, -1).astype(jnp.float32)
    return (groups * scales.astype(jnp.float32)[..., None]).reshape(values.shape)


def quantized(weight: Float[Array, "*stack out in"], scheme: str) -> tuple[Values, Scales]:
    """The values and scales nearest to a weight: in int8 one scale for each row, float32;
    in int4 one for each group, float16, as llama.cpp makes a Q4_0."""
    weight = weight.astype(jnp.float32)
    if scheme == "int8":
        scales = jnp.max(jnp.abs(weight), axis=-1, keepdims=True) / 127
        return jnp.round(weight * _inverse(scales)).astype(jnp.int8), scales
    groups = weight.reshape(*weight.shape[:-1], -1, GROUP)
    # The number that is farthest from zero becomes -8, which has no positive partner.
    farthest = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    scales = jnp.take_along_axis(groups, farthest, axis=-1) / -8
    numbers = jnp.clip(jnp.floor(groups * _inverse(scales) + 8.5), 0, 15)
    return packed(numbers.astype(jnp.uint8)), scales[..., 0].astype(jnp.float16)


def packed(numbers: UInt8[Array, "*shape groups 32"]) -> UInt8[Array, "*shape half"]:
    """Numbers from 0 to 15, two in a byte."""
    low, high = numbers[..., : GROUP // 2], numbers[..., GROUP // 2 :]
    return (low | (high << 4)).reshape(*numbers.shape[:-2], -1)


def _inverse(scales: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return jnp.where(scales == 0, 0, 1 / scales)


def quantize(model: Model, scheme: str) -> Model:
    """A model with its weights in eight or four bits, but for embeddings, norms and
    routers. It writes and scores as any other; it cannot be trained. If its embeddings are
    its output as well, it gets an output of its own.

    **Arguments:**

    - `model`: a [`Transformer`][mistral_eqx.Transformer]. It stays as it is.
    - `scheme`: `"int8"`, with a scale for each row, which costs next to no quality; or
        `"int4"`, with a scale for each 32 numbers, in half of the memory.

    **Raises:**

    `ValueError` for another scheme, for a model that is quantized already, or for a width
    that int4 cannot cut into groups of 32.
    """
    if is_quantized(model):
        raise ValueError("The model is quantized already: quantize the one it comes from.")
    check_scheme(scheme)
    parts = jax.jit(quantized, static_argnames="scheme")

    def make(name: str, weight: Array) -> QuantizedLinear:
        check_width(name, weight.shape[-1], scheme)
        return QuantizedLinear(*parts(weight, scheme=scheme))

    def instead(path: tuple, node: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        takes_part = isinstance(node, Linear) and not name.endswith(".gate")
        return make(name, node.weight) if takes_part else node

    is_linear = lambda node: isinstance(node, Linear)
    small = jax.tree_util.tree_map_with_path(instead, model, is_leaf=is_linear)
    if model.output is None:  # its embeddings are its output
        output = make("output", model.tok_embeddings.weight)
        is_none = lambda node: node is None
        small = eqx.tree_at(lambda m: m.output, small, output, is_leaf=is_none)
    return small


def check_scheme(scheme: str) -> None:
    """Raises `ValueError` for what is none."""
    if scheme not in SCHEMES:
        raise ValueError(f'quantize must be "int8" or "int4", got {scheme!r}.')


def check_width(name: str, width: int, scheme: str) -> None:
    """Raises `ValueError` for a weight that has no groups of 32."""
    if scheme == "int4" and width % GROUP != 0:
        raise ValueError(
            f"{name} is {width} wide, and int4 needs a multiple of {GROUP}: use int8."
        )


def is_quantized(model: eqx.Module) -> bool:
    is_one = lambda node: isinstance(node, QuantizedLinear)
    return any(map(is_one, jax.tree.leaves(model, is_leaf=is_one)))
