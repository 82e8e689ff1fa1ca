"""What the Markdown files name is there, and their figures are those of the files that they link.

A figure is checked where it is marked in one of two ways:

- a table whose paragraph before links a file of ``recipes/results``: each number in its rows;
- a link to such a file with numbers in its text, as in ``[1.96](recipes/results/benchmark/step_cost.json)``.
"""

import functools
import math
import re
import subprocess
from pathlib import Path

import torch

from tests.commands import ROOT

RESULTS = ROOT / "recipes" / "results"
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
#: A number that is not a part of a name, such as that of ResNet-20.
NUMBER = re.compile(r"(?<![\w.-])-?\d[\d,]*(?:\.\d+)?(?![\w.]*\w)")
#: A README may show percent, milliseconds or megabytes of a share, seconds or bytes.
SCALES = (1, 100, 1e3, 1e-6)
OURS = "(?:recipes|fairseq_asam|data_prep|tests)"
#: A name with capitals, such as data_prep/NAME.py, stands for any.
MODULE = re.compile(rf"-m ({OURS}[.a-z_\d]*)(?![A-Z.])")
FILE = re.compile(rf"(?<![\w/.-]){OURS}/[a-z\d_/.-]*\.(?:py|sh|json|png|yaml)\b")


@functools.cache
def documents() -> dict:
    """The text of each Markdown file that git knows."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True)
    return {ROOT / name: (ROOT / name).read_text() for name in listed.stdout.splitlines()}


def anchors(document: Path) -> set:
    """The anchors that GitHub gives to the headings of *document*."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def numbers_of(text: str) -> list:
    return [number.replace(",", "") for number in NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))]


@functools.cache
def numbers_in(file: Path) -> set:
    """All numbers in *file*, also those within the strings of JSON."""
    text = file.read_text()
    if file.suffix == ".json":
        # Unlike numbers_of, take 1e-05 too.
        return {float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)}
    return {float(n) for n in numbers_of(text)}


def figures(document: Path, text: str) -> list:
    """The marked figures of *document*, and the files that are said to have each."""

    def linked(paragraph):
        targets = [(words, (document.parent / target).resolve()) for words, target in LINK.findall(paragraph)]
        return [(w, t) for w, t in targets if RESULTS in t.parents and t.suffix in (".json", ".md")]

    found = []
    paragraphs = re.split(r"\n\s*\n", text)
    for before, paragraph in zip(["", *paragraphs], paragraphs):
        found += [(number, [file]) for words, file in linked(paragraph) for number in numbers_of(words)]
        files = [file for _, file in linked(before)]
        if paragraph.startswith("|") and files and not before.startswith("|"):
            found += [(number, files) for row in paragraph.splitlines()[2:] for number in numbers_of(row)]
    return found


def is_in(number: str, file: Path) -> bool:
    """Whether *file* has a number that rounds to *number*."""
    unit = 10 ** -len(number.partition(".")[2])
    # a little more than half, for binary fractions
    return any(abs(s * n - float(number)) <= 0.5001 * unit for n in numbers_in(file) for s in SCALES)


def test_figures_are_those_of_the_linked_files():
    marked = [(d, *figure) for d, text in documents().items() for figure in figures(d, text)]
    assert marked
    wrong = [
        f"{document.relative_to(ROOT)}: {number} is not in {', '.join(file.name for file in files)}"
        for document, number, files in marked
        if not any(is_in(number, file) for file in files)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_figure_that_is_not_in_its_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_readmes.RESULTS", tmp_path)
    file = tmp_path / "step_cost.json"
    file.write_text('{"ratio": 1.9582}')
    for number, expected in ("1.96", True), ("1.97", False):
        for text in (
            f"Ratios ([JSON]({file})):\n\n| | adam |\n|:--|--:|\n| asam | {number} |",
            f"asam takes [{number}]({file}) times as long as adam.",
        ):
            assert figures(tmp_path / "README.md", text) == [(number, [file])]
            assert is_in(number, file) == expected


def test_links_lead_somewhere():
    broken = []
    for document, text in documents().items():
        for _, target in LINK.findall(text):
            if re.match(r"https?://|mailto:", target):
                continue
            path, _, anchor = target.partition("#")
            file = document.parent / path if path else document
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def test_named_commands_and_files_exist():
    missing = []
    for document, text in documents().items():
        if document.name == "CHANGELOG.md":  # names what is no more
            continue
        for module in MODULE.findall(text):
            path = ROOT / module.rstrip(".").replace(".", "/")
            if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
                missing.append(f"{document.relative_to(ROOT)}: python -m {module}")
        for file in FILE.findall(text):
            if not (ROOT / file).exists():
                missing.append(f"{document.relative_to(ROOT)}: {file}")
    assert not missing, "\n".join(missing)


def test_the_pytorch_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 3
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    names = {
        "torch": torch,
        "SGD": torch.optim.SGD,
        "model": model,
        "loss_of": torch.nn.functional.cross_entropy,
    }
    names["batches"] = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(2)]

    def closure():
        names["optimizer"].zero_grad()
        loss = names["loss_of"](model(names["batches"][0][0]), names["batches"][0][1])
        loss.backward()
        return loss

    names["closure"] = closure
    for block in blocks:
        before = [parameter.clone() for parameter in model.parameters()]
        exec(block, names)
        assert math.isfinite(names["loss"])
        assert not any(torch.equal(w, old) for w, old in zip(model.parameters(), before))
