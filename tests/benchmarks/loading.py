"""How fast a checkpoint is loaded, and how much memory it takes beyond the arrays.

    python tests/benchmarks/loading.py

Makes a checkpoint of 2 GB in a temporary folder, loads it in processes of their own with
the numpy loader of safetensors and with this package, and prints a table. The target: half
as long again as the numpy loader at most, and 300 MB beyond the arrays. For Linux alone.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


ROUNDS = 3
PARAMS = {
    "dim": 4096,
    "n_layers": 3,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 40000,
}
# What is done, and what it is compared with: the same bytes read, the same made of them.
WAYS = {
    "safetensors.numpy.load_file": ("numpy", "numpy"),
    "load_model, bfloat16 as stored": ("bfloat16", "numpy"),
    "load_file and astype(float32)": ("numpy, float32", "numpy, float32"),
    "load_model, to float32": ("float32", "numpy, float32"),
}


def make(folder: Path) -> None:
    import numpy as np

    from mistral_eqx import ModelConfig
    from mistral_eqx.files.names import weight_shapes
    from mistral_eqx.files.weights import DTYPES, StoredTensor, write_safetensors

    noise = np.random.default_rng(0).standard_normal((1024, 14336)).astype(DTYPES["BF16"])

    def stored(name, shape):
        def read(index):
            rows = range(shape[0])[index[0]]
            if len(shape) == 1:
                return np.ones(len(rows), DTYPES["BF16"])
            return noise[[row % len(noise) for row in rows], : shape[1]]

        return StoredTensor(folder, name, "BF16", shape, read)

    shapes = weight_shapes(ModelConfig(**PARAMS)).items()
    tensors = {name: stored(name, shape) for name, shape in shapes}
    (folder / "params.json").write_text(json.dumps(PARAMS))
    path = folder / "consolidated.safetensors"
    write_safetensors(path, tensors, None, progress=lambda n: None)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure(folder: Path, way: str) -> None:
    """Loads in this process; prints seconds, bytes of arrays, bytes beyond them."""
    import time

    import jax
    import safetensors.numpy

    from mistral_eqx import load_model

    jax.numpy.zeros(1).block_until_ready()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, start = resident("VmRSS"), time.perf_counter()
    if way.startswith("numpy"):
        arrays = safetensors.numpy.load_file(folder / "consolidated.safetensors")
        if way.endswith("float32"):
            for name in arrays:
                arrays[name] = arrays[name].astype("float32")
    else:
        arrays = jax.block_until_ready(load_model(folder, dtype=way))
    seconds = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    print(json.dumps([seconds, size, resident("VmHWM") - before - size]))


def main() -> int:
    command = [sys.executable, __file__]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        file = folder / "consolidated.safetensors"
        size = file.stat().st_size
        with open(file, "rb") as stream:  # into the page cache, for all alike
            while stream.read(2**24):
                pass
        best = {}
        for _ in range(ROUNDS):
            for way, _ in WAYS.values():
                done = subprocess.run(
                    [*command, str(folder), way], stdout=subprocess.PIPE, check=True
                )
                seconds, _, beyond = json.loads(done.stdout)
                fastest, most = best.get(way, (seconds, beyond))
                best[way] = min(seconds, fastest), max(beyond, most)
    print(f"{size / 1e9:.2f} GB, best of {ROUNDS}\n")
    print("| what | seconds | GB/s of the file | times numpy | MB beyond the arrays |")
    print("|---|---|---|---|---|")
    missed = False
    for title, (way, reference) in WAYS.items():
        seconds, beyond = best[way]
        ratio, speed = seconds / best[reference][0], size / seconds / 1e9
        print(
            f"| {title} | {seconds:.2f} | {speed:.2f} | {ratio:.2f} | {beyond / 1e6:.0f} |"
        )
        missed |= way != reference and (ratio > 1.5 or beyond > 300e6)
    return int(missed)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]), sys.argv[2])
    else:
        sys.exit(main())
