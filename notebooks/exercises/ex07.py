"""The checkers of notebook 07."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx

from . import call, number, todo, verdict


def check_look_up_here(look_up_here: Callable) -> bool | None:
    table = jax.random.normal(jax.random.key(4), (12, 3))
    tokens = jnp.array([0, 11, 5, 4, 3, 7], jnp.int32)
    total, wrong = jnp.zeros((6, 3)), None
    for first in (0, 4, 8):
        part = table[first : first + 4]
        answer, wrong = call(look_up_here, part, tokens, first)
        if answer is NotImplemented:
            return todo("look_up_here")
        if wrong is None:
            rows, wrong = call(lambda: np.asarray(answer, np.float32))
        if wrong is None and rows.shape != (6, 3):
            wrong = f"The shape is {rows.shape}, and each token has a row: (6, 3)."
        if wrong is not None:
            break
        mine = (tokens >= first) & (tokens < first + 4)
        if not np.allclose(rows[~mine], 0):
            bad = int(tokens[~mine][np.abs(rows[~mine]).max(1).argmax()])
            wrong = (
                f"The device with rows {first} to {first + 3} gives something for token "
                f"{bad}, which another device holds: the sum would count it too."
            )
            break
        if not np.allclose(rows[mine], table[tokens[mine]], atol=1e-6):
            wrong = (
                f"The device with rows {first} to {first + 3} does not give its own tokens "
                f"{tokens[mine].tolist()} their rows: row 0 of its part is token {first}."
            )
            break
        total += rows
    return verdict("look_up_here", wrong, "The sum over the devices is the embedding.")


def check_close(close: Callable) -> bool | None:
    partial = jnp.arange(12.0).reshape(4, 3) + 1  # of four devices
    residual = jnp.array([10.0, 20.0, 30.0])
    psum = lambda x: jax.lax.psum(x, "model")

    def here(part):
        out = close(residual, part, psum)
        return NotImplemented if out is NotImplemented else jnp.asarray(out, jnp.float32)

    try:
        if close(residual, partial[0], lambda x: x) is NotImplemented:
            return todo("close")
    except Exception as error:
        told = f"It raised {type(error).__name__}: {error}"
        return verdict("close", told)
    answer, wrong = call(jax.vmap(here, axis_name="model"), partial)
    if wrong is None and np.shape(answer) != (4, 3):
        wrong = f"A device returns {np.shape(answer)[1:]}, not the residual's shape (3,)."
    if wrong is None:
        answer, whole = np.asarray(answer), np.asarray(residual + partial.sum(0))
        if np.allclose(answer, 4 * residual + partial.sum(0)):
            wrong = "The residual is counted four times, once by each device."
        elif np.ptp(answer, axis=0).max() > 1e-6:
            wrong = "The devices disagree: each has added its own partial product alone."
        elif np.allclose(answer, partial.sum(0)):
            wrong = "The sum of the parts is right, but the residual is not in it."
        elif np.allclose(answer, 4 * whole):
            wrong = "Everything is there four times: it has been summed twice."
        elif not np.allclose(answer, whole):
            wrong = f"Device 0 gives {answer[0].tolist()}, not {whole.tolist()}."
    return verdict("close", wrong, "One message, and the residual once.")


def check_message_bytes(message_bytes) -> bool | None:
    """For a token of Mistral 7B in bfloat16, from the config of its release."""
    if message_bytes is NotImplemented:
        return todo("message_bytes")
    given, message_bytes = message_bytes, number(message_bytes)
    config = mx.RELEASED["mistral-7b-v0.3"]
    one = 2 * config.dim
    right = (2 * config.n_layers + 1) * one
    if message_bytes is None:
        wrong = f"Give a whole number of bytes, not {given!r}."
    elif message_bytes == right:
        wrong = None
    elif message_bytes == right - one:
        wrong = "One message is missing: the embeddings are summed too."
    elif message_bytes == 2 * right:
        wrong = "That is twice too much: a number of bfloat16 has two bytes."
    elif message_bytes in (8 * right, right // 8):
        wrong = (
            "The width is not divided: every device puts a whole vector into each sum, "
            "and this asks for one device."
        )
    else:
        wrong = f"It is not {int(message_bytes):,}. How many sums, and how wide is each?"
    return verdict("message_bytes", wrong, "Half a megabyte for a token.")
