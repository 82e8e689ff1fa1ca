"""Which weights are perturbed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

#: ``all``; ``normalization-layers``, the gains and biases of layer, batch and other normalizations alone
#: (SAM-ON, Mueller et al., arXiv 2306.04226, found this better than all on images);
#: ``all-but-embeddings``.
SELECTIONS = ("all", "normalization-layers", "all-but-embeddings")


def selected_parameters(module: nn.Module, selection: str = "all") -> Iterator[tuple[str, Tensor]]:
    """Yield name and parameter of those parameters of *module* that *selection*, one of
    :data:`SELECTIONS`, names.

    A normalization layer is a module whose class, or a class that it extends, is called so (LayerNorm,
    BatchNorm2d, RMSNorm ...). A parameter shared with an embedding is an embedding.

    Raises:
        ValueError: *selection* is not one of :data:`SELECTIONS`.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}, but it must be one of {', '.join(SELECTIONS)}")
    modules = list(module.modules())
    embeddings = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    normalizations = {
        id(p)
        for m in modules
        if any(re.search(r"Norm(\dd)?$", kind.__name__) for kind in type(m).__mro__)
        for p in m.parameters(recurse=False)
    }
    for name, parameter in module.named_parameters():
        if (
            selection == "all"
            or (selection == "normalization-layers" and id(parameter) in normalizations)
            or (selection == "all-but-embeddings" and id(parameter) not in embeddings)
        ):
            yield name, parameter
