"""What a compiled program does, read from what XLA says about it.

For programs that run elsewhere: how much memory they need, which collectives they have,
whether the cache is written in place, and whether any weight or ring is copied.
"""

import collections
import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator

import jax


COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# What makes no new array, or makes one in the place of an old one.
_FREE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("opt-barrier", "constant", "after-all", "dynamic-update-slice", "copy-start"),
    *("async-start", "async-update", "send", "recv", "domain", "iota"),
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[([\d,]*)\]([^=]*?)\s([a-z][\w\-]*)\("
)
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, on each device.

    **Attributes:**

    - `seconds`: how long it took to compile.
    - `arguments`, `temporaries`, `aliased`: bytes of what comes in, of what is made on the
        way, and of outputs that lie where an input lay.
    - `collectives`: how many there are of each kind; those in a loop count once. `None` if
        this JAX cannot read what a newer compiler has written.
    - `copies`: the arrays as large as a weight or a ring of the cache that it makes anew;
        `None` for a training step, which makes new weights, and if `collectives` is.
    - `accessed`: bytes that its operations read and write, those in a loop once, and those
        that are fetched ahead twice; `None` if the compiler does not say.
    """

    seconds: float
    arguments: int
    temporaries: int
    aliased: int
    collectives: dict[str, int] | None
    copies: tuple[str, ...] | None
    accessed: float | None


def read_program(
    compiled: jax.stages.Compiled,
    seconds: float,
    large: Iterable[tuple[int, ...]] | None,
) -> Program:
    """Reads a compiled program. `large` are the shapes of the weights and of the rings, as
    a device has them and as a whole."""
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    collectives = copies = None
    # A newer libtpu writes operations that an older jaxlib does not know.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        instructions = list(_instructions(compiled.as_text()))
        kinds = (operation.removesuffix("-start") for *_, operation in instructions)
        collectives = dict(collections.Counter(k for k in kinds if k in COLLECTIVES))
        copies = None if large is None else tuple(_copies(instructions, large))
    return Program(
        seconds,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        collectives,
        copies,
        cost.get("bytes accessed"),
    )


def _copies(
    instructions: list[tuple[str, str, tuple[int, ...], str]],
    large: Iterable[tuple[int, ...]],
) -> Iterator[str]:
    """The instructions whose output is as large as a weight or a ring. XLA may drop axes of
    length 1 and change the order of the others. Only shapes are compared, so activations of
    1,024 tokens are taken for a weight of 1,024 rows, as `wk` of a 7B is."""
    essence = lambda shape: tuple(sorted(n for n in shape if n > 1))
    wanted = {essence(shape) for shape in large}
    for name, dtype, shape, operation in instructions:
        if operation in _FREE or essence(shape) not in wanted:
            continue
        # A fusion is named after what it does.
        if "dynamic-update-slice" in name or "dynamic_update_slice" in name:
            continue
        yield f"{operation} {name} {dtype}[{','.join(map(str, shape))}]"


def _instructions(text: str) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """The name, dtype, shape and operation of every instruction that XLA runs by itself:
    those inside of a fusion make nothing in memory."""
    # In long tuples, every fifth part has its number.
    text = re.sub(r"/\*index=\d+\*/", "", text)
    fused = set()
    # What a TPU puts back from the memory on the chip was fetched or made there.
    put_back = set(re.findall(r"%([\w.\-]+) = .*S\(1\).* copy-start\(", text))
    for line in text.splitlines():
        if " fusion(" in line or "to_apply=" in line:
            fused |= set(_CALLED.findall(line))
    inside = None
    for line in text.splitlines():
        if (header := _COMPUTATION.match(line)) is not None:
            inside = header[2]
        elif inside not in fused and (found := _INSTRUCTION.match(line)) is not None:
            done = re.search(r" copy-done\(%?([\w.\-]+)\)", line)
            if done is not None and done[1] in put_back:
                continue
            shape = tuple(int(n) for n in found[3].split(",") if n)
            # A TPU fetches what it needs next into the memory on the chip.
            if "S(1)" not in found[4] or found[5].removesuffix("-start") in COLLECTIVES:
                yield found[1], found[2], shape, found[5]
