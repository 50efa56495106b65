"""Every test runs with shapes and dtypes checked, and nothing promoted in silence."""

import ast
import importlib.util
import os
import shutil
from pathlib import Path


# The command line keeps compiled programs in the user's folder: tests leave that alone.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import hypothesis
import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook


# Before the first import of what is tested.
install_import_hook(["mistral_eqx", "one_file_ref"], "beartype.beartype")

# Every run tries the same examples, so that a change is all that can make a test fail.
# `--hypothesis-profile=default` tries others.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def needs_torch(path):
    """Whether a file of tests imports torch or transformers before its first test."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return bool(names & {"torch", "transformers"})


if importlib.util.find_spec("torch") is None:
    tests = Path(__file__).parent.rglob("test_*.py")
    collect_ignore = [str(path) for path in tests if needs_torch(path)]


@pytest.fixture(scope="module", autouse=True)
def no_program_outlives_its_file():
    """Each holds pieces of the memory map, of which a process may have some 65,000. All
    programs of all tests have more, and XLA crashes."""
    yield
    jax.clear_caches()


# Their tests make many programs and run each of them once or twice.
QUICK = {"apps", "devices", "files", "heads", "learning"}


@pytest.fixture(scope="module", autouse=True)
def compiled_in_less_time(request):
    """LLVM leaves programs of these tests as they are. The other tests have it do all that
    it does for a user."""
    quick = request.path.parent.name in QUICK
    jax.config.update("jax_disable_most_optimizations", quick)
    # For the commands that these tests start.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]


@pytest.fixture
def unchecked():
    """What a user sees, who has no type checker on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def promote():
    """See `trains` in models.py."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder in Mistral's format: random weights and the embedded model's tokenizer."""
    from models import random_model

    from mistral_eqx import save
    from mistral_eqx.text import TINY_MISTRAL

    path = tmp_path_factory.mktemp("saved") / "model"
    model = random_model(vocab_size=2048)
    save(model, path, tokenizer=TINY_MISTRAL / "tokenizer.model")
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(saved, tmp_path / "model")
