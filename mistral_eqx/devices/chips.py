"""Chips that are not here, as their compilers know them.

JAX compiles for a slice of TPUs with libtpu and for a GPU with the CUDA plugin, without the
hardware, and tells what the program needs. `JAX_PLATFORMS=cpu` keeps JAX from looking for
the chips.
"""

import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """What decides how fast a chip can be.

    **Attributes:**

    - `platform`: JAX's name for it: `"tpu"` or `"cuda"`.
    - `kinds`: how the names begin that JAX has for the kinds of such devices.
    - `operations`: in products of bfloat16, a second.
    - `bandwidth`: of its memory, in bytes a second.
    - `memory`: in bytes.
    - `cores`: of a GPU.
    - `capability`: of a GPU: `(9, 0)`.
    """

    platform: str
    kinds: tuple[str, ...]
    operations: float
    bandwidth: float
    memory: float
    cores: int = 0
    capability: tuple[int, int] = (0, 0)


# From the makers' data sheets.
CHIPS = {
    "v5e": Chip("tpu", ("TPU v5 lite", "TPU v5e"), 197e12, 819e9, 16e9),
    "v5p": Chip("tpu", ("TPU v5",), 459e12, 2.765e12, 95e9),
    "v6e": Chip("tpu", ("TPU v6",), 918e12, 1.64e12, 32e9),
    "tpu7x": Chip("tpu", ("TPU7", "TPU v7"), 2307e12, 7.37e12, 192e9),
    "a100": Chip("cuda", ("NVIDIA A100",), 312e12, 2.039e12, 80e9, 108, (8, 0)),
    "h100": Chip("cuda", ("NVIDIA H100",), 989e12, 3.352e12, 80e9, 132, (9, 0)),
    "h200": Chip("cuda", ("NVIDIA H200",), 989e12, 4.8e12, 141e9, 132, (9, 0)),
    # The machine itself, whose speed only a measurement tells.
    "cpu": Chip("cpu", ("cpu",), math.nan, math.nan, math.nan),
}
_INSTALL = {
    "tpu": "pip install 'mistral_eqx[tpu-compiler]', for Linux on x86",
    "cuda": "pip install 'mistral_eqx[cuda-compiler]', for Linux",
}
# A GPU as its compiler wants it described. What a program may use of a core differs little
# between those above.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared_core}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  core_count: {cores}  fpus_per_core: {fpus}  clock_rate_ghz: 1.7
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  device_memory_size: {memory}  l2_cache_size: {cache}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""


def chip_here() -> Chip | None:
    """What this process has; `None` if it is none of those above."""
    kind = jax.devices()[0].device_kind
    return next((chip for chip in CHIPS.values() if kind.startswith(chip.kinds)), None)


def chip_named(name: str) -> Chip:
    """The chip of `"v5e:2x4"` or `"h100"`. Raises `ValueError` for another name."""
    kind = name.partition(":")[0]
    if kind not in CHIPS:
        raise ValueError(f"There is no chip {kind!r}: it is one of {', '.join(CHIPS)}.")
    return CHIPS[kind]


def described_devices(name: str) -> tuple[Chip, list[jax.Device]]:
    """Devices to compile for and nothing else.

    **Arguments:**

    - `name`: `"v5e:2x4"`, `"v6e:2x2"`, `"v5p:2x2x1"`, `"tpu7x:2x2x1"`: a slice and its
        shape; or `"h100"`, `"h200"`, `"a100"`: one GPU; or `"cpu"`, the devices that are
        here.

    **Raises:**

    `ValueError` for another name; `ImportError` without the compiler, which says what to
    install.
    """
    chip, (kind, _, shape) = chip_named(name), name.partition(":")
    if chip.platform != "tpu" and shape:
        raise ValueError(f"{name}: only a TPU comes in slices. Say {kind}.")
    if chip.platform == "cpu":
        return chip, jax.devices("cpu")
    if chip.platform == "tpu" and not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise ValueError(f"Give the shape of a slice, as in {kind}:2x4, got {name!r}.")
    options = {"topology_name": name}
    if chip.platform == "cuda":
        options = {
            "topology_name": "",
            "topology": "1x1x1",
            "target_config": _description(kind, chip),
        }
    # libtpu would ask a cloud's metadata server for half a minute.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        topology = topologies.get_topology_desc(platform=chip.platform, **options)
    except Exception as error:  # JAX, libtpu and the plugin have one of their own each
        told = str(error).strip().split("\n")[0][:200]
        raise ImportError(
            f"The compiler for {name} cannot be asked ({told}). It comes with "
            f"{_INSTALL[chip.platform]}."
        ) from error
    return chip, list(topology.devices)


def _description(name: str, chip: Chip) -> str:
    major, minor = chip.capability
    is_hopper = major == 9
    return _GPU.format(
        shared=232448 if is_hopper else 166912,
        shared_core=233472 if is_hopper else 167936,
        cores=chip.cores,
        fpus=128 if is_hopper else 64,
        bandwidth=int(chip.bandwidth),
        memory=int(chip.memory),
        cache=52428800 if is_hopper else 41943040,
        major=major,
        minor=minor,
        name=name,
    )
