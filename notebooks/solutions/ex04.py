"""Right and wrong answers to the exercises of notebook 04. The notebook shows the right."""

import mistral_eqx as mx


def slot(position, slots):
    return position % slots


def slot_wrong(position, slots):
    return min(position, slots - 1)


def held_by(slot, written, slots):
    last = written - 1
    token = last - (last - slot) % slots
    return token if token >= 0 else None


def held_by_wrong(slot, written, slots):
    return written - written % slots + slot


def unrotate(keys, cos, sin):
    return mx.rope.rotate(keys, cos, -sin)


def unrotate_wrong(keys, cos, sin):
    return mx.rope.rotate(keys, sin, cos)
