from __future__ import annotations

from pathlib import Path

from tests.commands import ROOT
from tests.recipes.translation.scripts import run, succeeded

CLUSTER = ROOT / "recipes" / "translation" / "cluster.sh"


def test_a_dry_run_shows_the_jobs_of_a_cluster(corpus: Path, tmp_path: Path):
    values = ("common.seed=1,2,3", "optimizer.rho=0.1,0.2", "hydra.launcher.partition=gpu")
    out = tmp_path / "sweep"
    printed = succeeded(run(CLUSTER, "--dry-run", corpus, out, *values)).stdout
    assert "#SBATCH --array=0-5%6\n" in printed
    assert "#SBATCH --partition=gpu\n" in printed
    assert f"-m submitit.core._submit {out}/.submitit/%j" in printed
    jobs = [line for line in printed.splitlines() if line.startswith("#5 : ")]
    assert len(jobs) == 1 and jobs[0].endswith("common.seed=3 optimizer.rho=0.2")
    assert not out.exists()

    wrong = run(CLUSTER, "--dry-run", tmp_path, out)
    assert wrong.returncode == 1
    assert f"'{tmp_path}' holds no corpus" in wrong.stderr
