from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.translation.scripts import script, succeeded, train


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all tests that use `runs` to one worker of pytest-xdist, which trains them once."""
    for item in items:
        if "runs" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("translation"))


@pytest.fixture(scope="package")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished and scored runs of adam and asam, with the checkpoints of their last two epochs."""
    folder = tmp_path_factory.mktemp("runs")
    finished = [folder / "adam", folder / "asam"]
    for each in finished:
        succeeded(train(corpus, each, each.name, "--keep-last-epochs=2"))
        succeeded(script("score", corpus, each))
    return finished
