"""Faster programs for what the model defines.

The model's own definitions are the mathematics. Here is how the same numbers are computed
where XLA needs help.

| module | what it is |
|---|---|
| `replaced.py` | the mechanism: `replaceable` functions, and what `replaces` them |
| `cpu.py` | products and attention in the loops that XLA runs fast on a CPU |
| `tpu.py` | attention on a TPU, by splash attention |
| `cuda.py` | attention on an NVIDIA GPU, by cuDNN |
| `quantized.py` | weights in eight or four bits, and products with them |
| `dtypes.py` | the best dtype for weights and cache where nobody asks for one |
| `rings.py` | attention to a ring in blocks, for accelerators and meshes |
| `experts.py` | Mixtral's experts at the cost of the chosen ones |
| `grouped.py` | the same on a TPU, by megablox |
"""
