"""Right and wrong answers to the exercises of notebook 04. The notebook shows the right."""

import mistral_eqx as mx


def slot(position, slots):
    return position % slots


def slot_wrong(position, slots):
    return min(position, slots - 1)


def slot_wrong_2(position, slots):
    return position // slots


def slot_wrong_3(position, slots):
    return position % (slots - 1)


def held_by(slot, written, slots):
    last = written - 1
    token = last - (last - slot) % slots
    return token if token >= 0 else None


def held_by_wrong(slot, written, slots):
    return written - written % slots + slot


def held_by_wrong_2(slot, written, slots):
    return slot


def held_by_wrong_3(slot, written, slots):
    last = written - 1
    return last - (last - slot) % slots


def unrotate(keys, cos, sin):
    return mx.rope.rotate(keys, cos, -sin)


def unrotate_wrong(keys, cos, sin):
    return mx.rope.rotate(keys, sin, cos)


def unrotate_wrong_2(keys, cos, sin):
    return mx.rope.rotate(keys, cos, sin)


def unrotate_wrong_3(keys, cos, sin):
    return mx.rope.rotate(keys, -cos, sin)
