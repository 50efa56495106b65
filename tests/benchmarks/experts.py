"""What a mixture of experts costs, beside every token through every expert.

    python tests/benchmarks/experts.py [DTYPE]

Times one layer of a quarter of Mixtral 8x7B's width (8 experts, 2 a token) in decode, for
1 and 8 rows, and on a prompt of 512 tokens. The two take turns, so that a busy minute hits
both; medians, and the middle half of the times. Operations are counted in the program, at
most: every block that could be needed. The target: faster, and at most 1.3 times the
operations of the experts chosen on the prompt.
"""

import functools
import math
import statistics
import sys
import time


ROUNDS = 15
PARAMS = {
    "dim": 1024,
    "n_layers": 1,
    "head_dim": 128,
    "hidden_dim": 3584,
    "n_heads": 8,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 32000,
}
N_EXPERTS, TOP_K = 8, 2
CASES = {"decode, 1 row": (1, 1), "decode, 8 rows": (8, 1), "prompt of 512": (1, 512)}


def count_flops(jaxpr, platform: str = "cpu") -> int:
    """The operations in the matrix products of a `jax.make_jaxpr`, on a platform, at most:
    of a kernel's tiles as if every expert were chosen, and began in the middle of one."""
    jaxpr, total = getattr(jaxpr, "jaxpr", jaxpr), 0
    for equation in jaxpr.eqns:
        inner = [
            count_flops(part, platform)
            for value in equation.params.values()
            for part in (value if isinstance(value, tuple | list) else [value])
            if hasattr(part, "eqns") or hasattr(part, "jaxpr")
        ]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            length = math.prod(shape[axis] for axis in contracted)
            total += 2 * length * equation.outvars[0].aval.size
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        elif equation.primitive.name == "reduce_sum":
            # A product of one token, written as a sum.
            size = equation.invars[0].aval.size
            total += 2 * size if size > 2**22 else 0
        elif places := equation.params.get("branches_platforms"):
            here = (i for i, names in enumerate(places) if names and platform in names)
            total += inner[next(here, len(places) - 1)]
        elif equation.primitive.name == "cond":
            total += max(inner)
        elif equation.primitive.name == "pallas_call":
            total += kernel_steps(equation) * sum(inner)
        else:
            total += sum(inner)
    return total


def kernel_steps(equation) -> int:
    """Of megablox, whose grid has a step for each expert in each tile of rows."""
    grid, pairs = equation.params["grid_mapping"].grid, equation.invars[2].aval.size
    return math.prod(n if isinstance(n, int) else pairs for n in grid)


def main(dtype: str = "float32") -> int:
    import jax
    import jax.numpy as jnp

    from mistral_eqx import ModelConfig
    from mistral_eqx.config import MoEConfig
    from mistral_eqx.moe import MixtureOfExperts, route

    config = ModelConfig(**PARAMS, moe=MoEConfig(N_EXPERTS, TOP_K))
    moe = jax.jit(lambda key: MixtureOfExperts(config, dtype=dtype, key=key))(
        jax.random.key(0)
    )

    def every_expert(moe, x):
        """In the fastest order of axes: none of the weights is copied."""
        w1, w2, w3 = (getattr(moe.experts, name).weight for name in ("w1", "w2", "w3"))
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        chosen, weights = route(moe.gate(x), moe.top_k)
        inner = jax.nn.silu(product("ti,ehi->eth", x, w1)) * product("ti,ehi->eth", x, w3)
        out = product("eth,eoh->eto", inner.astype(x.dtype), w2)
        shares = jnp.sum(jax.nn.one_hot(chosen, N_EXPERTS) * weights[:, :, None], axis=1)
        return product("eto,te->to", out, shares).astype(x.dtype)

    ways = {"chosen experts": lambda moe, x: moe(x), "every expert": every_expert}
    needed = 2 * 3 * config.dim * config.hidden_dim * TOP_K
    weights = moe.experts.w1.weight.nbytes * 3
    print(f"{dtype}, weights of {weights / 1e6:.0f} MB, medians of {ROUNDS} (quartiles)\n")
    print("| what | way | ms | times needed operations | MB beside the weights |")
    print("|---|---|---|---|---|")
    missed = False
    for case, (batch, seq) in CASES.items():
        x = jax.random.normal(jax.random.key(1), (batch, seq, config.dim), dtype)
        programs, times, flops = {}, {}, {}
        for way, function in ways.items():
            batched = jax.vmap(function, in_axes=(None, 0))
            flops[way] = count_flops(jax.make_jaxpr(batched)(moe, x)) / (
                batch * seq * needed
            )
            programs[way] = jax.jit(batched).lower(moe, x).compile()
            programs[way](moe, x).block_until_ready()
            times[way] = []
        for _ in range(ROUNDS):
            for way, program in programs.items():
                start = time.perf_counter()
                program(moe, x).block_until_ready()
                times[way].append(1e3 * (time.perf_counter() - start))
        for way, program in programs.items():
            low, middle, high = statistics.quantiles(times[way], n=4)
            beside = program.memory_analysis().temp_size_in_bytes / 1e6
            print(
                f"| {case} | {way} | {middle:.1f} ({low:.1f} to {high:.1f}) "
                f"| {flops[way]:.2f} | {beside:.1f} |",
                flush=True,
            )
        chosen, every = (statistics.median(times[way]) for way in ways)
        missed |= chosen > every or (seq > 1 and flops["chosen experts"] > 1.3)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
