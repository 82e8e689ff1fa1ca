"""Starting embeddings in which pieces that translate one another lie near one another.

A Transformer trained for minutes spends most of them finding out which words correspond. Word counts tell it
that in seconds: IBM's model 1 (Brown et al. 1993) aligns the pieces of the training pairs, and a singular
value decomposition of the aligned counts gives every piece of either language a place in one space.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ITERATIONS = 5
POWER_ITERATIONS = 5


def aligned_counts(
    german: Sequence[Sequence[int]], english: Sequence[Sequence[int]], pieces: int
) -> np.ndarray:
    """How often each German piece (row) is expected to stand for each English one (column).

    `german` and `english` are the segmented pairs, as numbers below `pieces`.
    """
    links, places, place = [], [], 0
    for source, target in zip(german, english):
        if not source:
            continue
        links.append(np.add.outer(np.asarray(target), np.asarray(source) * pieces).ravel())
        places.append(np.repeat(np.arange(place, place + len(target)), len(source)))
        place += len(target)
    link, position = np.concatenate(links), np.concatenate(places)

    likely = np.ones(pieces * pieces)
    for _ in range(ITERATIONS):
        weight = likely[link]
        weight /= np.bincount(position, weight)[position]  # each English piece comes from one German one
        counts = np.bincount(link, weight, minlength=pieces * pieces).reshape(pieces, pieces)
        likely = (counts / np.maximum(counts.sum(1, keepdims=True), 1e-9)).ravel()
    return counts


def embeddings(counts: np.ndarray, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of `dimension` for the German and the English pieces of `aligned_counts`.

    A piece without counts gets a random direction. Beyond as many numbers as there are pieces all are 0.
    Deterministic.
    """
    rng = np.random.default_rng(0)
    rows, columns = (np.sqrt(np.maximum(counts.sum(axis, keepdims=True), 1)) for axis in (1, 0))
    association = counts / rows / columns

    # Randomized singular value decomposition: some of the largest of thousands of singular values are wanted.
    basis = rng.standard_normal((len(counts), min(dimension, len(counts))))
    for _ in range(POWER_ITERATIONS):
        basis = np.linalg.qr(association @ (association.T @ basis))[0]
    u, s, v = np.linalg.svd(basis.T @ association, full_matrices=False)

    sides = []
    for side in (basis @ u * np.sqrt(s), v.T * np.sqrt(s)):
        length = np.linalg.norm(side, axis=1, keepdims=True)
        side = np.where(length > 1e-6, side, rng.standard_normal(side.shape))
        side /= np.linalg.norm(side, axis=1, keepdims=True)
        sides.append(np.pad(side, ((0, 0), (0, dimension - side.shape[1]))))
    return sides[0], sides[1]
