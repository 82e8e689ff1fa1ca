"""The vectors of which epsilon is made, by name, in a line or two each."""

import hashlib

import torch


def gaussian(w, *numbers):
    """What a generator draws for the weight *w*, seeded by the *numbers* of the run, the update and w."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randn(w.shape, generator=generator).double()


#: The directions that need a pass at w, and those that do not. A new direction gets a row in one of them.
#: Each is given ``gradients``, at w, or ``None``; ``moments``, the first moments of the base optimizer;
#: ``weights``, those that are trained; ``seed``; and ``number``, that of the update, from 0.
TWO_PASSES = {"gradient": lambda gradients, **others: gradients}
ONE_PASS = {
    "momentum": lambda moments, **others: {name: -m for name, m in moments.items()},
    "random": lambda weights, seed, number, **others: {
        name: gaussian(w, seed, number, i) for i, (name, w) in enumerate(weights.items())
    },
}
VECTORS = {**TWO_PASSES, **ONE_PASS}
