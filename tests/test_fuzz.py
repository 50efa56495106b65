"""Wrong files and wrong calls end in a result or in an error with a name."""

import subprocess
import sys
from pathlib import Path


def test_nothing_but_results_and_named_errors():
    """In a process of its own, because the type checks of the tests would come first.
    `python tests/fuzz.py` tries more."""
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "fuzz.py", "--cases", "1300"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = [line.split()[-3:] for line in done.stdout.splitlines()[1:]]
    # Each kind of input has had results, and errors.
    assert len(counts) == 13 and all(int(n) > 0 for row in counts for n in row[:2])
    assert all(int(row[2]) == 0 for row in counts)


def test_nothing_but_results_and_lines_of_the_command_line():
    """`python tests/fuzz.py --commands` tries more."""
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "fuzz.py", "--commands", "--cases", "25"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    *_, results, refused, others = done.stdout.split()
    assert int(results) > 0 and int(refused) > 0 and int(others) == 0
