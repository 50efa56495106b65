"""Every test runs with shapes and dtypes checked, and nothing promoted in silence."""

import jax
from jaxtyping import install_import_hook


# Before the first import of what is tested.
install_import_hook(["mistral_eqx", "one_file_ref"], "beartype.beartype")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
