"""What CONTRIBUTING.md names is there."""

import re

from tests.commands import ROOT

#: A name in backticks: of a class, a function, an attribute or a constant, alone or with dots.
NAME = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*?\))?`")
#: A name that stands for any, as in `asam_NAME`.
ANY = re.compile(r"(?<![A-Z])NAME(?![A-Z])")
CODE = ("fairseq_asam", "data_prep", "recipes", "tests")


def words_of_the_code() -> set:
    """Every word of the Python files and scripts, with the names of the files."""
    files = [file for place in CODE for file in (ROOT / place).rglob("*") if file.suffix in (".py", ".sh")]
    words = {part for file in files for part in (file.stem, file.parent.name, file.suffix[1:])}
    return words.union(
        *(re.findall(r"\w+", f.read_text()) for f in files if f.name != "test_contributing.py")
    )


def missing_names(text: str) -> list:
    """The names in backticks of *text* that the code does not have."""
    words = words_of_the_code()
    return [n for n in NAME.findall(text) if not ANY.search(n) and not words.issuperset(n.split("."))]


def test_names_in_backticks_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(NAME.findall(text)) > 20
    assert missing_names(text) == []


def test_a_name_that_the_code_does_not_have_is_found():
    text = "Extend `NormalizationOperator`, and write `flat_norm_and_square(weights)` for `asam_NAME`."
    assert missing_names(text) == ["flat_norm_and_square"]
