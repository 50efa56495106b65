"""One model on many devices.

A model and a mesh come in; a model comes out whose arrays are spread over the mesh. The
engine then puts caches and batches where the model needs them.

| module | what it is |
|---|---|
| `mesh.py` | the axes of a mesh, and which sizes a model can be divided by |
| `sharding.py` | which part of every weight, cache and batch each device holds |
| `fsdp.py` | weights along `fsdp`, whole again where a block is trained |
| `stages.py` | pipeline parallelism: layers in stages, batches in microbatches |
| `attention.py` | each device attends with its own heads |
| `experts.py` | expert parallelism: each device computes what its own experts contribute |
| `chips.py` | chips that are not here, as their compilers know them |
| `programs.py` | what a compiled program needs and does |
| `processes.py` | several hosts: how processes find each other, and share arrays |
"""

from .processes import connect as connect
