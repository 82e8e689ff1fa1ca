"""What the Markdown files name is there, their tables and figures are the results', and their code runs."""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch

from recipes import documents as published
from recipes.document_tables import RESULTS, TABLES, WHOLE
from tests.commands import ROOT

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)[^)]*\)")
OURS = "(?:recipes|fairseq_asam|data_prep|tests)"
#: A name with capitals, such as data_prep/NAME.py, stands for any.
MODULE = re.compile(rf"-m ({OURS}[.a-z_\d]*)(?![A-Z.])")
FILE = re.compile(rf"(?<![\w/.-]){OURS}/[a-z\d_/.-]*\.(?:py|sh|json|png|yaml)\b")


@functools.cache
def documents() -> dict:
    """The text of each Markdown file that git knows."""
    return {file: file.read_text("utf-8") for file in published.documents()}


def anchors(document: Path) -> set:
    """The anchors that GitHub gives to the headings of *document*."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tables_and_figures_are_those_of_the_results():
    wrong = [
        w for file in documents() for w in (*published.wrong_tables(file), *published.wrong_figures(file))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_table_has_its_place():
    places = [name for text in documents().values() for _, name, _ in published.TABLE.findall(text)]
    assert set(places) == set(TABLES)


@pytest.mark.parametrize("pattern", WHOLE)
def test_pages_of_results_are_what_their_commands_print(pattern):
    pages = list(RESULTS.glob(pattern))
    assert pages
    for page in pages:
        found = json.loads(page.with_suffix(".json").read_text("utf-8"))
        assert page.read_text("utf-8").startswith(WHOLE[pattern](found)), page


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


def code_of(document: str) -> list:
    """The Python blocks of *document*."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text("utf-8"), re.DOTALL)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)])
        self.last = torch.nn.Linear(4, 2)

    def forward(self, inputs):
        for layer in self.layers:
            inputs = layer(inputs)
        return self.last(inputs)


def names_of_a_loop() -> dict:
    """What the code of a page takes for granted."""
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(2)]
    inputs, targets = batches[0]
    return {
        "torch": torch,
        "SGD": torch.optim.SGD,
        "model": Model(),
        "loss_of": torch.nn.functional.cross_entropy,
        "batches": batches,
        "micro_batches": batches,
        "inputs": inputs,
        "targets": targets,
        "device": "cpu",
    }


def run_and_see_weights_move(block: str, names: dict) -> None:
    before = [parameter.clone() for parameter in names["model"].parameters()]
    exec(block, names)
    if ".step(" in block:
        after = list(names["model"].parameters())
        assert all(w.isfinite().all() and not torch.equal(w, old) for w, old in zip(after, before)), block


def test_the_pytorch_code_of_the_readme_runs():
    names, blocks = names_of_a_loop(), code_of("README.md")

    def closure():
        names["optimizer"].zero_grad()
        loss = names["loss_of"](names["model"](names["inputs"]), names["targets"])
        loss.backward()
        return loss

    names["closure"] = closure
    assert len(blocks) == 3
    for block in blocks:
        run_and_see_weights_move(block, names)
        assert math.isfinite(names["loss"])


def test_the_code_of_the_step_in_pytorch_runs(tmp_path):
    pytest.importorskip("torch", minversion="2.6", reason="fully_shard is public from torch 2.6 on")
    names, blocks = names_of_a_loop(), code_of("fairseq_asam/sharpness/README.md")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for block in blocks:
            if "fully_shard(" in block:
                names["model"] = Model()  # DistributedDataParallel has the one before
            run_and_see_weights_move(block, names)
        run_and_see_weights_move("two_passes(forward_and_backward, inputs, targets); optimizer.step()", names)
    finally:
        torch.distributed.destroy_process_group()
