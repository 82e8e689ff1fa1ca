"""The figures that the README quotes from Table 5 are those of the file that it links."""

from __future__ import annotations

import json

from tests.commands import ROOT

README = " ".join((ROOT / "recipes" / "translation" / "README.md").read_text("utf-8").split())


def test_table_5():
    file = ROOT / "recipes" / "results" / "translation" / "table5.json"
    adam, twice, sam, asam = (row["mean"] for row in json.loads(file.read_text("utf-8"))["systems"])
    losses = [f"{row['best_valid_loss']:.3f}" for row in (sam, asam, adam)]
    assert "({} and {} against {}, ± 0.01)".format(*losses) in README
    rise = [f"{row['last_valid_loss'] - row['best_valid_loss']:.2f}" for row in (sam, adam)]
    assert "SAM's rises by {} to the last epoch, Adam's by {}.".format(*rise) in README
    valid = [f"{row['valid BLEU'] - adam['valid BLEU']:.2f}" for row in (sam, asam)]
    assert "On validation SAM is {} and ASAM {} ahead of Adam".format(*valid) in README
    test = [f"{abs(row['test BLEU'] - adam['test BLEU']):.2f}" for row in (sam, asam, twice)]
    assert "On the test set SAM is {} ahead and ASAM {} behind".format(*test) in README
    assert f"it is {test[2]} BLEU worse on the test set." in README
