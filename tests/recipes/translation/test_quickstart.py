from __future__ import annotations

import json
from pathlib import Path

from tests.recipes.translation.scripts import FLAGS, lines, script, succeeded


def test_each_optimizer_trains_and_translates_once(corpus: Path, tmp_path: Path):
    command = ("quickstart", tmp_path, "--data", corpus, *FLAGS, "--max-epoch", "1")
    succeeded(script(*command))
    logs = {name: (tmp_path / name / "log").read_text() for name in ("adam", "sam", "asam")}
    for name, log in logs.items():
        assert log.count("done training") == 1 and ("sharpness" in log) == (name != "adam")
        assert len(lines(tmp_path / name / "test.hyp")) == len(lines(corpus / "test.en"))
        assert json.loads((tmp_path / name / "run.json").read_text())["options"]["optimizer"] == name
    succeeded(script(*command))
    assert logs == {name: (tmp_path / name / "log").read_text() for name in logs}
