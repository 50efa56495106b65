"""Functions that see a whole batch where `jax.vmap` would show them one row."""

from collections.abc import Callable

import jax
from jax.custom_batching import custom_vmap


def batched_as(rule: Callable, *, derivative: Callable) -> Callable[[Callable], Callable]:
    """Decorates a function whose batch is not to be computed as its rows are.

    **Arguments:**

    - `rule`: takes the size of the batch, for each argument whether it has a leading axis
        of that size, and the arguments. Returns the results, and whether they have it.
    - `derivative`: the same function, in a form to differentiate. It takes the place of
        the other where that is asked for.

    **Returns:**

    The decorator.
    """

    def decorate(function: Callable) -> Callable:
        inner = custom_vmap(function)
        inner.def_vmap(rule)

        # A `custom_vmap` alone cannot be differentiated in reverse.
        @jax.custom_jvp
        def outer(*args):
            return inner(*args)

        @outer.defjvp
        def tangent(primals, tangents):
            return jax.jvp(derivative, primals, tangents)

        return outer

    return decorate
