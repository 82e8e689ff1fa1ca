from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.translation.scripts import script, succeeded, train


@pytest.fixture(scope="package")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished and scored runs of adam and asam."""
    folder = tmp_path_factory.mktemp("runs")
    finished = [folder / "adam", folder / "asam"]
    for each in finished:
        succeeded(train(corpus, each, each.name))
        succeeded(script("score", corpus, each))
    return finished
