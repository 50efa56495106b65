"""Faster programs for what the model defines.

The model's own definitions are the mathematics. Here is how the same numbers are computed
where XLA needs help.

| module | what it is |
|---|---|
| `batching.py` | a decorator: under `jax.vmap` a function gets the whole batch |
| `cpu.py` | products and attention in the loops that XLA runs fast on a CPU |
"""
