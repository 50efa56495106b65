"""Tensors in files: any slice, in pieces, from safetensors and from torch."""

import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch
from layouts import assert_same_bits, halve, weights_of, write_raw, write_torch

from mistral_eqx import convert, load_model
from mistral_eqx.files import weights


@pytest.mark.parametrize("suffix", ["pth", "pt"])
@pytest.mark.parametrize("n_files", [1, 3])
def test_torch_files(suffix, n_files, tmp_path):
    folder = write_raw(tmp_path / "raw")
    (folder / "consolidated.safetensors").unlink()
    tensors = weights_of("v0.3")
    sizes = [len(tensors)] if n_files == 1 else [3, 4, len(tensors) - 7]
    write_torch(folder, tensors, sizes, "consolidated.{:02}." + suffix)
    assert_same_bits(folder, "v0.3")
    convert(folder, tmp_path / "again", format="mistral")
    assert_same_bits(tmp_path / "again", "v0.3")


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PIECE", 1)
    array = np.arange(1000 * 6, dtype=np.float32).reshape(1000, 6)
    safetensors.numpy.save_file({"x": array}, tmp_path / "x.safetensors")
    tensor = weights.open_safetensors(tmp_path / "x.safetensors")["x"]
    index = (slice(100, 900), slice(1, 5))
    assert [piece.shape for _, piece in tensor.pieces(index)] == [
        (256, 4), (256, 4), (256, 4), (32, 4)
    ]  # fmt: skip
    np.testing.assert_array_equal(tensor.array(index, np.dtype(np.float32)), array[index])


def test_a_torch_file_that_is_cut_or_split_or_incomplete(tmp_path):
    folder = write_raw(tmp_path / "raw")
    (folder / "consolidated.safetensors").unlink()
    tensors = weights_of("v0.3")
    sizes = [3, 4, len(tensors) - 7]
    write_torch(folder, tensors, sizes, "consolidated.{:02}.pth")
    halve(folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="consolidated.01.pth is damaged or not whole"):
        load_model(folder)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(FileNotFoundError, match="lacks consolidated.01.pth, but has"):
        load_model(folder)
    (folder / "consolidated.02.pth").unlink()
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="both hold .* split across files"):
        load_model(folder)


def test_without_torch(tmp_path, monkeypatch):
    folder = write_raw(tmp_path / "raw")
    (folder / "consolidated.safetensors").unlink()
    torch.save({}, folder / "consolidated.00.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="only be read with PyTorch: install torch"):
        load_model(folder)
