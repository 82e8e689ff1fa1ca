"""The wheel: built from the checkout, and used from another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.commands import ROOT, recipe

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def run(*command, **options) -> str:
    """Run *command* and return what it prints; if it fails, so does the test."""
    process = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert process.returncode == 0, process.stdout[-3000:]
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the checkout, so that nothing of an earlier build gets into it."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, checkout)
    (file,) = out.glob("*.whl")
    return file


def test_it_has_the_library_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fairseq_asam").rglob("*.py")}
    assert modules | {"fairseq_asam/py.typed"} == {n for n in names if ".dist-info/" not in n}


@pytest.mark.slow
def test_it_works_from_another_folder(wheel, corpus, tmp_path):
    site = tmp_path / "site-packages"
    run(*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel)
    # The rest of the environment comes after it.
    elsewhere = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(site)}}
    without_fairseq = (
        "import sys; sys.modules['fairseq'] = None\n"
        "import fairseq_asam; print(fairseq_asam.__file__)\n"
        "from fairseq_asam import *"
    )
    assert run(sys.executable, "-c", without_fairseq, **elsewhere).strip() == str(
        site / "fairseq_asam" / "__init__.py"
    )

    # fairseq looks for --user-dir beside itself, where pip would have put the wheel.
    import fairseq

    shutil.copytree(Path(fairseq.__file__).parent, site / "fairseq")
    flags = ["--optimizer", "asam", "--max-update", "1", "--user-dir", "fairseq_asam"]
    train = Path(sys.executable).with_name("fairseq-train")
    output = run(train, *recipe(corpus / "bin", tmp_path / "run", *flags), **elsewhere)
    assert '"train_sharpness"' in output
    assert (tmp_path / "run" / "checkpoint_last.pt").exists()
