"""Which weights are perturbed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

#: The selections. ``normalization-layers`` are the gains and biases of layer, batch and other normalizations
#: (SAM-ON, Mueller et al., arXiv 2306.04226, finds them better than all weights on images).
SELECTIONS = ("all", "normalization-layers", "all-but-embeddings")


def selected_parameters(module: nn.Module, selection: str = "all") -> Iterator[tuple[str, Tensor]]:
    """Yield name and parameter of the selected parameters of *module*.

    A normalization layer is a module whose class, or a class that it extends, has such a name: LayerNorm,
    BatchNorm2d, RMSNorm. A parameter shared with an embedding counts as one.

    Args:
        module: has the parameters.
        selection: one of :data:`SELECTIONS`.

    Raises:
        ValueError: *selection* is not one of :data:`SELECTIONS`.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}, but it must be one of {', '.join(SELECTIONS)}")
    modules = list(module.modules())
    embeddings = {id(m.weight) for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
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
