"""How sure a difference between two systems is: by a bootstrap over seeds and sentences, and by a t test.

A bootstrap over few seeds gives intervals that are too narrow: five seeds have not shown how far a sixth can
be away. The t test knows that, but counts the seeds alone. So the tables show both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from recipes.reporter import mean_and_sd
from recipes.translation.score import METRICS

SAMPLES = 2000


def t_interval(values: Sequence[float]) -> dict:
    """Return the number of values, their mean (None without any) and its 95 % t interval (None below two)."""
    mean, sd = mean_and_sd(values)
    interval = None
    if sd is not None:
        half = stats.t.ppf(0.975, len(values) - 1) * sd / len(values) ** 0.5
        interval = [float(mean - half), float(mean + half)]
    return {"n": len(values), "mean": mean, "interval": interval}


def t_test(baseline: Sequence[float], system: Sequence[float]) -> dict[str, Any]:
    """Test by Student's t whether *system* scores another mean over the seeds than *baseline*.

    Args:
        baseline: The score of each seed.
        system: Those of the system, in the same order of seeds.

    Returns:
        The `t_interval` of 95 % around the difference between the mean scores, and `t_p_value`, which has two
        sides. Both are None with a single seed.
    """
    differences = [its - others for others, its in zip(baseline, system)]
    if len(differences) < 2:
        return {"t_interval": None, "t_p_value": None}
    # All alike, they have no deviation, which ttest_1samp would divide by.
    p_value = stats.ttest_1samp(differences, 0).pvalue if np.ptp(differences) else differences[0] == 0
    return {"t_interval": t_interval(differences)["interval"], "t_p_value": float(p_value)}


def paired_bootstrap(
    metric: str, baseline: Sequence[Sequence[str]], system: Sequence[Sequence[str]], references: Sequence[str]
) -> dict[str, Any]:
    """Test whether *system* scores another mean over the seeds than *baseline*.

    Each of 2,000 samples draws seeds and sentences with replacement, the same for both systems, and takes the
    difference between the mean scores. So the interval covers what another seed and what another test set
    would change. The test has two sides; sacrebleu's paired bootstrap counts one, so that its p is about half
    of this one where a difference is clear.

    Args:
        metric: "BLEU" or "chrF2".
        baseline: The translations of each seed.
        system: Those of the system, in the same order of seeds.
        references: One for each sentence.

    Returns:
        The `difference` between the mean scores, the `interval` of 95 % around it, and `p_value`, the share
        of samples whose difference is as far from the mean of all samples as `difference` is from 0.
    """
    scorer = METRICS[metric](references=[references])
    # sacrebleu has no public way to the counts of a sentence; test_significance.py compares with its scores.
    counts = np.array(
        [[scorer._extract_corpus_statistics(run, None) for run in runs] for runs in (baseline, system)]
    )

    def score(sums: np.ndarray) -> float:
        return scorer._compute_score_from_stats(sums.tolist()).score

    def difference(seeds: np.ndarray, times: np.ndarray) -> float:
        """Return that of the given *seeds*, with each sentence as many *times*."""
        scores = {seed: [score(times @ counts[side, seed]) for side in (0, 1)] for seed in set(seeds)}
        return float(np.mean([scores[seed][1] - scores[seed][0] for seed in seeds]))

    _, seeds, sentences, _ = counts.shape
    seen = difference(np.arange(seeds), np.ones(sentences))
    random = np.random.default_rng(12345)
    samples = np.array(
        [
            difference(
                random.integers(seeds, size=seeds),
                np.bincount(random.integers(sentences, size=sentences), minlength=sentences).astype(float),
            )
            for _ in range(SAMPLES)
        ]
    )
    as_far = np.abs(samples - samples.mean()) >= abs(seen)
    return {
        "difference": seen,
        "interval": [float(bound) for bound in np.percentile(samples, [2.5, 97.5])],
        "p_value": float((as_far.sum() + 1) / (SAMPLES + 1)),
    }
