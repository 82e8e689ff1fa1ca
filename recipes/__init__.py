"""The paper's experiments, benchmarks and fault injection.

Run them from the repository root: ``python -m recipes.translation.table5 --help``.
"""
