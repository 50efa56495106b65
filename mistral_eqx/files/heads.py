"""Folders of models that make labels or vectors, as Hugging Face's format has them."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from .. import arguments
from ..devices.sharding import settled
from ..heads.classifier import Classifier, without_output
from ..tokenizer import Tokenizer, load_checked_tokenizer
from ..transformer import Transformer
from .checkpoint import Checkpoint, load_checkpoint, open_trunk
from .export import tokenizer_files, write_folder
from .folders import HUGGINGFACE, located, read_json_file
from .hub import local_folder
from .names import model_tensors, stored_array
from .weights import StoredTensor


_SCORE = "score.weight"
_CLASS = "MistralForSequenceClassification"


def load_embedder(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    quantize: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Loads a model for [`embed`][mistral_eqx.embed] and its tokenizer, without the output
    that text is written with, which the folders of embedding models do not have.

    **Arguments:**

    - `folder`: in any format that [`load`][mistral_eqx.load] reads.
    - `dtype`, `quantize`, `mesh`: those of `load`.

    **Raises:**

    As `load` does.
    """
    folder, tokenizer, checkpoint = _open(folder)
    checkpoint, _ = _headless(checkpoint)
    checkpoint.check()
    options = {"dtype": dtype, "quantize": quantize, "mesh": mesh}
    return without_output(load_checkpoint(checkpoint, **options)), tokenizer


def load_classifier(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    quantize: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Classifier, Tokenizer]:
    """Loads a `MistralForSequenceClassification` and its tokenizer.

    **Arguments:**

    - `folder`: in Hugging Face's format.
    - `dtype`, `quantize`, `mesh`: those of [`load`][mistral_eqx.load]; a mesh without an
        axis `pipe`.

    **Raises:**

    As `load` does; `ValueError` also if the folder is of another kind of model.
    """
    if mesh is not None and mesh.shape.get("pipe", 1) > 1:
        raise ValueError("A classifier cannot be in stages: give a mesh without pipe.")
    folder, tokenizer, checkpoint = _open(folder)
    if not is_classifier(folder):
        raise ValueError(
            f"{folder} is no {_CLASS}: load it with load, or make a Classifier of it."
        )
    labels = labels_of(folder)
    checkpoint, score = take_head(checkpoint, len(labels))
    checkpoint.check()
    options = {"dtype": dtype, "quantize": quantize, "mesh": mesh}
    model = load_checkpoint(checkpoint, **options)
    pad_id = read_json_file(folder / "config.json").get("pad_token_id")
    pad_id = pad_id if type(pad_id) is int else None
    classifier = Classifier(model, labels, pad_id=pad_id, key=jax.random.key(0))
    weight = score.array((slice(None), slice(None)), np.dtype(model.dtype))
    weight = jnp.asarray(weight)
    classifier = eqx.tree_at(lambda c: c.score.weight, classifier, weight)
    return settled(classifier), tokenizer


def take_head(checkpoint: Checkpoint, n_labels: int) -> tuple[Checkpoint, StoredTensor]:
    """The checkpoint of a classifier without its head, and the head. Raises `ValueError` if
    it is not there, or of another shape."""
    checkpoint, score = _headless(checkpoint)
    shape = (n_labels, checkpoint.config.dim)
    if score is None or score.shape != shape:
        found = "none" if score is None else f"one of shape {score.shape}"
        raise ValueError(
            f"{checkpoint.folder} must have a {_SCORE} of shape {shape} for its {n_labels} "
            f"labels, and has {found}."
        )
    return checkpoint, score


def _headless(checkpoint: Checkpoint) -> tuple[Checkpoint, StoredTensor | None]:
    tensors = dict(checkpoint.tensors)
    score = tensors.pop(_SCORE, None)
    return dataclasses.replace(checkpoint, tensors=tensors), score


def save_classifier(
    classifier: Classifier,
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    tokenizer: Tokenizer | None = None,
    companions: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> None:
    """Writes a classifier in Hugging Face's format, as transformers loads it.

    **Arguments:**

    - `classifier`: without an adapter: merge it first.
    - The others are those of [`save`][mistral_eqx.save].

    **Raises:**

    As `save` does.
    """
    labels = dict(enumerate(classifier.labels))
    pad_id = classifier.pad_id
    changes = {
        "architectures": [_CLASS],
        "id2label": {str(i): label for i, label in labels.items()},
        "label2id": {label: i for i, label in labels.items()},
        "problem_type": "single_label_classification",
        # transformers asks for one to read a batch.
        "pad_token_id": 0 if pad_id is None else pad_id,
        "tie_word_embeddings": False,
    }
    tensors = model_tensors(classifier.model)
    tensors[_SCORE] = stored_array(_SCORE, classifier.score.weight, ())
    write_folder(
        classifier.config,
        tensors,
        Path(arguments.path("folder", folder)),
        format=HUGGINGFACE,
        dtype=dtype,
        companions=tokenizer_files(tokenizer) | dict(companions or {}),
        changes=changes,
        force=force,
    )


def is_classifier(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a classifier."""
    config = local_folder(folder) / "config.json"
    if not config.is_file():
        return False
    architectures = read_json_file(config).get("architectures")
    return isinstance(architectures, list) and _CLASS in architectures


def _open(folder: str | os.PathLike) -> tuple[Path, Tokenizer, Checkpoint]:
    folder = local_folder(arguments.path("folder", folder))
    tokenizer = load_checked_tokenizer(folder)
    return located(folder)[0], tokenizer, open_trunk(folder)


def labels_of(folder: str | os.PathLike) -> tuple[str, ...]:
    """The names of a classifier's labels, in the order of their numbers."""
    path = local_folder(folder) / "config.json"
    values = read_json_file(path)
    named = values.get("id2label")
    if named is None:
        # transformers' own names, of as many as it says, or two.
        n = values.get("num_labels", 2)
        named = {str(i): f"LABEL_{i}" for i in range(n if type(n) is int else 0)}
    numbers = [str(i) for i in range(len(named))]
    if not isinstance(named, Mapping) or set(named) != set(numbers) or len(named) < 2:
        raise ValueError(
            f"{path} must have two or more labels in id2label, numbered from 0, got "
            f"{arguments.shown(named)}."
        )
    return tuple(str(named[number]) for number in numbers)
