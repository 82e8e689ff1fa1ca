"""Sharpness-aware training where people train: a module for each of three frameworks.

- :mod:`~fairseq_asam.integrations.huggingface`: ``SharpnessAwareTrainer``, ``SharpnessAwareSeq2SeqTrainer``.
- :mod:`~fairseq_asam.integrations.lightning`: ``SharpnessAwareCallback``.
- :mod:`~fairseq_asam.integrations.accelerate`: ``AccumulatingTwoPasses``.

Each imports its framework, and this package imports none of the three.
"""
