"""One mechanism: a plain definition, and the programs that compute the same faster.

The model marks a function as replaceable. A module of this wing, or of `devices/`, says for
which platform it has another program. The model names no platform.

```python
@replaceable(shared=("weight",))
def product(x, weight): ...  # the mathematics, for one sequence

@replaces(product, on="cpu")
def product_on_cpu(x, weight): ...  # the same numbers, for a batch of sequences
```
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jaxtyping import PyTree


# Every replaceable function of the package, by its name.
REPLACEABLE: dict[str, Callable] = {}
_switch = {"plain": False, "target": None}


def replaceable(*, shared: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Marks a plain function, for which there may be other programs.

    The plain function acts on one sequence. Another program sees a whole batch: each of
    its arguments has a leading axis `batch`, but for those that are shared. Under `vmap`
    the rows of the batch go through it together, also under several. If a shared argument
    is batched, the plain function runs. Derivatives are those of the plain function, or of
    a program that says so, and only those that are asked for.

    **Arguments:**

    - `shared`: the arguments that all rows of a batch have in common, as weights are.

    **Returns:**

    A decorator. The decorated function has the attributes `plain`, the function itself;
    `batched`, the same for a batch; `on_one_device`, the program for a batch that lies on
    one device; and `others`, the programs by their platform.
    """

    def decorate(plain: Callable) -> Callable:
        names = list(inspect.signature(plain).parameters)
        is_shared = tuple(name in shared for name in names)
        batched_plain = jax.vmap(plain, tuple(None if alone else 0 for alone in is_shared))
        others: dict[str, Callable] = {}
        derived: set[str] = set()

        def programs() -> dict[str, Callable]:
            return {"plain": batched_plain, **others}

        on_batch = _rows_together(programs, is_shared)

        # A `custom_vmap` alone has no derivative in reverse.
        @jax.custom_jvp
        def differentiable(*args):
            return on_batch(*args)

        # Symbolic zeros: a weight that is not trained has no gradient to be computed.
        @functools.partial(differentiable.defjvp, symbolic_zeros=True)
        def derivative(primals, tangents):
            leaves, treedef = jax.tree.flatten(primals)
            tangents = treedef.flatten_up_to(tangents)
            moving = [not isinstance(t, SymbolicZero) for t in tangents]
            pick = lambda values: [v for v, moves in zip(values, moving) if moves]

            def of_moving(*some):
                rest = iter(some)
                both = (next(rest) if m else leaf for leaf, m in zip(leaves, moving))
                return batched_plain(*treedef.unflatten(both))

            return jax.jvp(of_moving, pick(leaves), pick(tangents))

        # If other programs have gradients of their own, these are what is computed.
        def of_rows(grads, moving, still):
            # A shared argument has a gradient for each row, if those are asked for.
            shared_parts = [part for part, alone in zip(moving, is_shared) if alone]
            if jax.tree.leaves(shared_parts):
                return _run(gradient_programs(), (grads, *moving, *still))
            return gradients(grads, *moving, *still)

        def of_one_device(grads, moving, still):
            return _where_it_runs(gradient_programs(), (grads, *moving, *still))

        def pulled_back(way: Callable) -> Callable:
            def gradients(grads, *halves):
                moving, still = halves[: len(names)], halves[len(names) :]
                run = lambda *moving: way(*eqx.combine(moving, still))
                return jax.vjp(run, *moving)[1](grads)

            return gradients

        def gradient_programs() -> dict[str, Callable]:
            ways = {"plain": batched_plain, **{place: others[place] for place in derived}}
            return {place: pulled_back(way) for place, way in ways.items()}

        gradients = _rows_together(gradient_programs, (False, *is_shared, *is_shared))
        in_reverse = _with_gradients(lambda args: on_batch(*args), of_rows)
        on_one_device = _with_gradients(
            lambda args: _where_it_runs(programs(), args), of_one_device
        )

        @functools.wraps(plain)
        def call(*args):
            if _switch["plain"] or not others:
                return plain(*args)
            one = lambda arg: jax.tree.map(lambda leaf: leaf[None], arg)
            rows = [arg if alone else one(arg) for arg, alone in zip(args, is_shared)]
            # Programs for accelerators take no part where there is none, so a model has all
            # kinds of derivatives there.
            own = "any" in derived or derived and _target() != "cpu"
            out = in_reverse(tuple(rows)) if own else differentiable(*rows)
            return jax.tree.map(lambda x: x[0], out)

        call.plain, call.batched = plain, batched_plain
        call.others, call.derived = others, derived
        call.on_one_device = lambda *args: on_one_device(args)
        REPLACEABLE[plain.__name__] = call
        return call

    return decorate


def replaces(
    function: Callable, *, on: str, derived: bool = False
) -> Callable[[Callable], Callable]:
    """Says that the decorated program computes what a replaceable function does.

    **Arguments:**

    - `function`: the replaceable function.
    - `on`: a platform of JAX (`"cpu"`, `"cuda"`, `"rocm"`, `"tpu"`); `"any"` for all of
        those without a program of their own; or `"mesh"`, for arrays that are spread over
        several devices, whatever these are.
    - `derived`: whether gradients are those of this program, and not of the plain
        function. There are no derivatives forwards then: on `"any"` never, otherwise
        where there is an accelerator.
    """

    def decorate(other: Callable) -> Callable:
        function.others[on] = other
        if derived:
            function.derived.add(on)
        return other

    return decorate


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside, only plain functions run."""
    with _switched("plain", True):
        yield


@contextlib.contextmanager
def made_for(platform: str) -> Iterator[None]:
    """Inside, programs are made for a platform that need not be here: `"tpu"`, say."""
    with _switched("target", platform):
        yield


@contextlib.contextmanager
def _switched(name: str, value) -> Iterator[None]:
    """Compiled programs are dropped at both ends, because they do not know how they were
    made."""
    before, _switch[name] = _switch[name], value
    jax.clear_caches()
    try:
        yield
    finally:
        _switch[name] = before
        jax.clear_caches()


def _with_gradients(run: Callable, gradients: Callable) -> Callable:
    """A function of a tuple of arguments, and what gives their gradients from that of its
    output, from the arguments that have one and from the others."""
    in_reverse = eqx.filter_custom_vjp(run)
    in_reverse.def_fwd(lambda perturbed, args: (run(args), None))

    @in_reverse.def_bwd
    def backward(_, grads, perturbed, args):
        return gradients(grads, *eqx.partition(args, perturbed))

    return in_reverse


def _rows_together(
    programs: Callable[[], Mapping[str, Callable]], is_shared: Sequence[bool]
) -> Callable:
    """A function of a batch. Under `vmap`, also under several, it sees all rows together.

    **Arguments:**

    - `programs`: gives what computes it, by the place that it is for.
    - `is_shared`: which arguments have no rows.
    """

    @custom_vmap
    def on_batch(*args):
        return _run(programs(), args)

    @on_batch.def_vmap
    def on_batches(size, batched, *args):
        is_batched = [any(jax.tree.leaves(leaves)) for leaves in batched]
        if any(b and alone for b, alone in zip(is_batched, is_shared)):
            in_axes = jax.tree.map(lambda leaf: 0 if leaf else None, tuple(batched))
            out = jax.vmap(programs()["plain"], in_axes)(*args)
            return out, jax.tree.map(lambda _: True, out)

        def merged(leaf, is_batched):
            if not is_batched:
                leaf = jnp.broadcast_to(leaf[None], (size, *leaf.shape))
            return leaf.reshape(-1, *leaf.shape[2:])

        out = on_batch(
            *(
                arg if alone else jax.tree.map(merged, arg, leaves)
                for arg, leaves, alone in zip(args, batched, is_shared)
            )
        )
        split = lambda x: x.reshape(size, -1, *x.shape[1:])
        return jax.tree.map(split, out), jax.tree.map(lambda _: True, out)

    return on_batch


def _run(ways: Mapping[str, Callable], args: Sequence[PyTree]) -> PyTree:
    if any(map(_on_a_mesh, jax.tree.leaves(args))):
        return ways.get("mesh", ways["plain"])(*args)
    return _where_it_runs(ways, args)


def _where_it_runs(ways: Mapping[str, Callable], args: Sequence[PyTree]) -> PyTree:
    target, default = _target(), ways.get("any", ways["plain"])
    if target == "cpu":  # no other is here, and none need be traced
        return ways.get("cpu", default)(*args)
    here = {name: way for name, way in ways.items() if name in ("cpu", target)}
    return jax.lax.platform_dependent(*args, **here, default=default)


def _target() -> str:
    """The platform that programs are made for. There is always a CPU besides it."""
    if _switch["target"] is not None:
        return _switch["target"]
    backend = jax.extend.backend.get_backend()
    is_cuda = backend.platform == "gpu" and "cuda" in backend.platform_version
    return "cuda" if is_cuda else backend.platform


def _on_a_mesh(leaf) -> bool:
    return isinstance(leaf, jax.Array) and not jax.typeof(leaf).sharding.mesh.empty
