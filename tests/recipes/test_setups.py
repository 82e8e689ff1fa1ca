"""What the set-ups ask of fairseq-train. (tests/recipes/translation/test_train.py trains with them.)"""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipes.setups import SETUPS, configuration, count_updates
from tests.commands import ROOT

OF_THE_RUN = ("user_dir", "data", "log_format", "log_interval")


def configured(setup: str, data: Path, *flags: str):
    words = [str(data / "bin"), *SETUPS[setup].flags(), *flags]
    return configuration([word.replace("UPDATES", "1") for word in words], pytest.fail)


def test_the_configuration_for_hydra_is_the_papers_set_up(corpus: Path):
    file = OmegaConf.to_container(OmegaConf.load(ROOT / "recipes/translation/config/asam.yaml"))
    languages = ("--source-lang", file["task"]["source_lang"], "--target-lang", file["task"]["target_lang"])
    cfg = configured("iwslt14", corpus, "--optimizer", file["optimizer"]["_name"], *languages)
    model = file.pop("model")
    assert cfg.model.arch == model.pop("_name")
    assert model.pop("base_layers") == 0  # none, as on a command line
    assert {name: getattr(cfg.model, name) for name in model} == model
    for group, options in file.items():
        for name, value in options.items():
            if group != "checkpoint" and name not in OF_THE_RUN:
                assert cfg[group][name] == value, f"{group}.{name}"


def test_updates_are_counted_with_accumulation_by_epoch_and_at_most_max_update(corpus: Path):
    def count(*flags: str) -> int:
        return count_updates(
            configured("quickstart", corpus, "--optimizer", "adam", "--max-epoch", "3", *flags)
        )

    one_epoch = count() // 3
    assert count() == 3 * one_epoch > 30
    assert count("--update-freq", "1,2") == one_epoch + 2 * -(-one_epoch // 2)
    assert count("--distributed-world-size", "2") == 3 * -(-one_epoch // 2)
    assert count("--max-update", "7") == 7
    assert count("--max-tokens", "2000") < count()


@pytest.mark.parametrize("setup", SETUPS)
def test_a_flag_stands_once_and_the_last_one_wins(setup: str):
    words = SETUPS[setup].flags(
        ["--lr", "1", "--lr=0.5", "-s", "de", "--update-freq", "1", "2", "--lr", "-2"]
    )
    flags = [word for word in words if word.startswith("--")]
    assert len(flags) == len(set(flags))
    assert words[-7:] == ["-s", "de", "--update-freq", "1", "2", "--lr", "-2"]
