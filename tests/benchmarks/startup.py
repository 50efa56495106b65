"""How long a new process takes to its first token, without and with compiled programs kept.

    python tests/benchmarks/startup.py

Each round starts two processes on the embedded model with one folder for the programs: the
first finds it empty, the second full. The time is from the first import to the first token
of a prompt; starting Python comes before it.
"""

import os
import statistics
import subprocess
import sys
import tempfile


ROUNDS = 5
CHILD = """
import time
start = time.perf_counter()
import mistral_eqx as mx
imported = time.perf_counter()
model, tokenizer = mx.load()
loaded = time.perf_counter()
next(mx.stream(model, tokenizer, "To be, or not", max_tokens=32))
print(imported - start, loaded - imported, time.perf_counter() - loaded)
"""


def first_token(folder: str) -> list[float]:
    """The seconds to import, to load, and to the first token after that."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return [float(number) for number in run.stdout.split()]


def main() -> None:
    rounds = []
    for i in range(ROUNDS):
        print(f"round {i + 1} of {ROUNDS}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            rounds.append((first_token(folder), first_token(folder)))
    print("| seconds | import | load | first token | together |")
    print("|---|---|---|---|---|")
    for name, runs in zip(("nothing kept", "programs kept"), zip(*rounds)):
        columns = [*zip(*runs), [sum(run) for run in runs]]
        cells = [
            f"{statistics.median(column):.2f} ({min(column):.2f} to {max(column):.2f})"
            for column in columns
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
