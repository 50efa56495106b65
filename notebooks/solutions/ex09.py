"""Right and wrong answers to the exercises of notebook 09. The notebook shows the right."""

import equinox as eqx
import jax


def all_but_embedding(model):
    everything = jax.tree.map(lambda _: True, model)
    return eqx.tree_at(lambda m: m.tok_embeddings.weight, everything, False)


def all_but_embedding_wrong(model):
    return jax.tree.map(lambda _: True, model)


def all_but_embedding_wrong_2(model):
    nothing = jax.tree.map(lambda _: False, model)
    return eqx.tree_at(lambda m: m.tok_embeddings.weight, nothing, True)


def all_but_embedding_wrong_3(model):
    return eqx.tree_at(lambda m: m.tok_embeddings.weight, model, None)


def first_state(optimizer, model):
    return optimizer.init(eqx.filter(model, eqx.is_inexact_array))


def first_state_wrong(optimizer, model):
    return optimizer.init(model)


def first_state_wrong_2(optimizer, model):
    return optimizer.init(jax.tree.leaves(eqx.filter(model, eqx.is_array)))


def first_state_wrong_3(optimizer, model):
    return eqx.filter(model, eqx.is_inexact_array)


largest_rank = 704 * 256 // (704 + 256)


largest_rank_wrong = 256


largest_rank_wrong_2 = 188


largest_rank_wrong_3 = 128
