"""Mistral's own files: `params.json` and `consolidated.safetensors`, read and written.

The path of a weight in the model is its name in the file, so nothing here knows what a
Mistral looks like: a skeleton of the model without any numbers says which arrays it needs,
and each is read from the file straight to where it belongs.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike
from jaxtyping import PyTree
from tqdm import tqdm

from .config import ModelConfig
from .transformer import Transformer


_PARAMS = "params.json"
_WEIGHTS = "consolidated.safetensors"
_DTYPES = {"BF16": jnp.bfloat16, "F16": jnp.float16, "F32": jnp.float32}


def load_model(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    shardings: PyTree | None = None,
) -> Transformer:
    """Loads a model from a folder in Mistral's own format.

    **Arguments:**

    - `folder`: holds `params.json` and `consolidated.safetensors`.
    - `dtype`: of the weights. By default they keep the file's, except on a CPU, where
        float32 is both faster and exact and is chosen if the model fits in half of the
        machine's memory that way.
    - `shardings`: a tree like the model with a `jax.sharding.Sharding` at each array, or
        one sharding for all. Each device then reads its own part of the file.

    **Returns:**

    The model.

    **Raises:**

    `FileNotFoundError` for a missing folder or file; `ValueError` for one whose content
    is damaged or does not belong to the other's. The message names the file, the key and
    what to do.
    """
    folder = Path(folder)
    config = read_config(folder)
    skeleton = eqx.filter_eval_shape(Transformer, config, key=jr.key(0))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
    names = [weight_name(path) for path, _ in leaves]
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = [shardings] * len(names)
    else:
        shardings = treedef.flatten_up_to(shardings)

    path = folder / _WEIGHTS
    with _open(path) as file:
        shapes = {name: leaf.shape for name, (_, leaf) in zip(names, leaves)}
        stored = _check(path, file, shapes)
        if dtype is None:
            dtype = _default_dtype(config, stored)
        weights = [
            _read(file, name, shapes[name], dtype, sharding)
            for name, sharding in tqdm(
                list(zip(names, shardings)), "load", unit="tensor", disable=None
            )
        ]
    return jax.tree_util.tree_unflatten(treedef, weights)


def save_model(
    model: Transformer,
    folder: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Writes a model in Mistral's own format, in the dtype that it has.

    **Arguments:**

    - `model`: what to write.
    - `folder`: to be made. It has another name until it is whole.
    - `tokenizer`: the path of a `tokenizer.model` to put beside the weights.

    **Raises:**

    `FileExistsError` if `folder` is there already: nothing is overwritten.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Move it, or save elsewhere.")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, partial / "tokenizer.model")
    params = json.dumps(model.config.to_params(), indent=4)
    (partial / _PARAMS).write_text(params + "\n", encoding="utf-8")
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    weights = {weight_name(path): np.asarray(leaf) for path, leaf in leaves}
    safetensors.numpy.save_file(weights, partial / _WEIGHTS, {"format": "pt"})
    partial.replace(folder)


def read_config(folder: str | os.PathLike) -> ModelConfig:
    """Reads and checks `params.json`. Raises as [`load_model`][] does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    path = folder / _PARAMS
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {_PARAMS} in {folder}. It comes with the weights: download the "
            "whole folder."
        )
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
        return ModelConfig.from_params(params)
    except ValueError as error:  # what json raises is one too
        raise ValueError(f"{path} cannot be used: {error}") from error


def weight_name(path: tuple) -> str:
    """The name of a weight in Mistral's files, from its path in the model:
    `.layers[0].attention.wq.weight` is `layers.0.attention.wq.weight`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _open(path: Path):
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path.name} in {path.parent}, which holds the weights."
        )
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or not whole ({error}). Download it again."
        ) from error


def _check(path: Path, file, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Compares the header with what the model needs; returns the dtype of the file."""
    keys = set(file.keys())
    missing, extra = sorted(shapes.keys() - keys), sorted(keys - shapes.keys())
    if missing or extra:
        told = [
            f"{what} {', '.join(names[:5])}" + (" and more" if len(names) > 5 else "")
            for what, names in (("lacks", missing), ("has the unknown", extra))
            if names
        ]
        raise ValueError(
            f"{path} does not fit {_PARAMS}: it {' and '.join(told)} "
            f"({len(missing)} missing, {len(extra)} too many)."
        )
    dtypes = set()
    for name, shape in shapes.items():
        header = file.get_slice(name)
        if tuple(header.get_shape()) != shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(header.get_shape())}, but "
                f"{_PARAMS} makes it {shape}."
            )
        dtypes.add(header.get_dtype())
    if unknown := dtypes - _DTYPES.keys():
        raise ValueError(
            f"{path} holds numbers of type {', '.join(sorted(unknown))}. Only "
            f"{', '.join(_DTYPES)} can be read: get the weights without quantization."
        )
    return max(dtypes)  # F32 if any is


def _read(file, name: str, shape: tuple[int, ...], dtype, sharding) -> jax.Array:
    rows = file.get_slice(name)
    return jax.make_array_from_callback(
        shape, sharding, lambda index: np.asarray(rows[index]).astype(dtype)
    )


def _default_dtype(config: ModelConfig, stored: str) -> DTypeLike:
    if jax.default_backend() != "cpu":
        return _DTYPES[stored]
    skeleton = eqx.filter_eval_shape(Transformer, config, key=jr.key(0))
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(skeleton))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return jnp.float32 if size <= memory / 2 else _DTYPES[stored]
