"""The READMEs of the recipes and of their results."""

import re
from pathlib import Path

import pytest

from tests.commands import ROOT


@pytest.mark.parametrize(
    "readme", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in ROOT.glob("recipes/**/*.md")]
)
def test_every_file_that_a_readme_links_to_is_there(readme: Path):
    links = re.findall(r"\]\(([^)#]+)", readme.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (readme.parent / link).exists()]
    assert not missing
