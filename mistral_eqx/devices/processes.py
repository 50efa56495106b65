"""Programs of several processes, each with some of the devices."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 30,
) -> None:
    """Joins the processes of a program that runs on several hosts; before anything else is
    asked of JAX. Then `jax.devices()` are those of all of them, and a mesh may span them.

    **Arguments:**

    - `coordinator`: the host and the port of process 0. It is found without on a TPU
        slice and under Slurm.
    - `num_processes`, `process_id`: how many there are, and which one this is.
    - `heartbeat_timeout`: seconds of silence after which a process counts as dead, and
        those that are left end with a message.

    **Raises:**

    `ValueError` for an address or a number that cannot be.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError("Give coordinator, num_processes and process_id together.")
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"The coordinator must be HOST:PORT, got {coordinator!r}.")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise ValueError(
                f"A process of {num_processes} must have an id from 0 to "
                f"{num_processes - 1}, got {process_id}."
            )
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=120,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )


def wait_for_all(what: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_process(*here: bool) -> tuple[bool, ...]:
    """Whether each of these is so in any of the processes. All of them have to ask."""
    if jax.process_count() == 1:
        return here
    everywhere = multihost_utils.process_allgather(np.array(here))
    return tuple(everywhere.any(axis=0).tolist())


def to_host(tree: PyTree[Array]) -> PyTree[np.ndarray]:
    """The numbers of arrays, wherever they are; other processes' devices too."""

    def fetch(x: Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)
