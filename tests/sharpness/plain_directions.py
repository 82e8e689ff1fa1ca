"""The vectors of which epsilon is made, by name, in a line or two each."""

import hashlib

import torch


def gaussian(w, *numbers):
    """What ``torch.randn`` draws for the weight *w*, seeded by the *numbers* of run, update and weight."""
    seed = int(hashlib.sha256(" ".join(map(str, numbers)).encode()).hexdigest()[:16], 16)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(w.shape, generator=generator, dtype=torch.promote_types(w.dtype, torch.float32))


#: Each is given ``at_w``, a function that returns the gradients at w; ``moments``, the first moments of the
#: base optimizer; the trained ``weights``; ``seed``; and ``number``, that of the update, from 0.
#: A new direction gets a row here.
VECTORS = {
    "gradient": lambda at_w, **others: at_w(),
    "momentum": lambda moments, **others: {name: -m for name, m in moments.items()},
    "random": lambda weights, seed, number, **others: {
        name: gaussian(w, seed, number, i) for i, (name, w) in enumerate(weights.items())
    },
}
