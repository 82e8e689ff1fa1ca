from __future__ import annotations

import pytest

from fairseq_asam.vision.options import TrainOptions


def assert_runs_of_the_paper(runs: list[TrainOptions], dataset: str, rhos: dict[str, float]) -> None:
    """Assert that these are the runs of Table 2 or 3: eight networks, three optimizers, five seeds."""
    assert len(runs) == 8 * 3 * 5
    assert len({run.output for run in runs}) == len(runs)
    for run in runs:
        pyramid = run.model == "pyramidnet272"
        rho = {"sgd": 0.0, "sam": 0.05, "asam": 1.0} if pyramid else {"sgd": 0.0, **rhos}
        assert (run.dataset, run.rho, run.eta) == (dataset, rho[run.optimizer], 0.01)
        assert run.epochs == (900 if pyramid else 200) * (2 if run.optimizer == "sgd" else 1)
        assert (run.lr, run.batch_size) == ((0.05, 256) if pyramid else (0.1, 128))
        assert run.m == (32 if pyramid and run.optimizer != "sgd" else None)
        assert (run.momentum, run.weight_decay, run.label_smoothing) == (0.9, 5e-4, 0.1)
        assert run.label_noise == 0 and run.hold_out == 0


def test_the_hyper_parameters_of_table_2_are_the_paper_s(commands):
    assert_runs_of_the_paper(commands("tables", "2"), "cifar10", {"sam": 0.05, "asam": 0.5})


def test_rows_choose_networks(commands):
    runs = commands("tables", "2", "--rows", "WRN-28-2", "VGG19-BN", "--seeds", "1")
    assert [run.model for run in runs] == ["wrn28_2"] * 3 + ["vgg19_bn"] * 3


def test_a_row_that_is_not_in_the_table_is_refused(main, capsys):
    with pytest.raises(SystemExit) as end:
        main("tables", "2", "--rows", "ResNet-18")
    assert end.value.code == 2 and "invalid choice: 'ResNet-18'" in capsys.readouterr().err


def test_the_hyper_parameters_of_table_3_are_the_paper_s(commands):
    assert_runs_of_the_paper(commands("tables", "3"), "cifar100", {"sam": 0.1, "asam": 1.0})


def test_the_hyper_parameters_of_table_4_are_the_paper_s(commands):
    runs = commands("tables", "4")
    assert len(runs) == 3 * 3
    for run in runs:
        assert (run.dataset, run.model, run.lr, run.batch_size) == ("imagenet", "resnet50", 0.2, 512)
        assert (run.weight_decay, run.label_smoothing) == (1e-4, 0.1)
        assert (run.epochs, run.m) == ((200, None) if run.optimizer == "sgd" else (100, 128))
        assert run.rho == {"sgd": 0.0, "sam": 0.05, "asam": 1.0}[run.optimizer]


def test_on_digits_m_is_the_same_share_of_the_batch(commands):
    runs = commands("tables", "4", "--digits", "--seeds", "1")
    assert [(run.optimizer, run.m) for run in runs] == [("sgd", None), ("sam", 16), ("asam", 16)]


def test_every_noise_rate_has_every_optimizer_and_seed(commands):
    runs = commands("tables", "6")
    found = [(run.label_noise, run.optimizer, run.seed) for run in runs]
    noise = (0.0, 0.2, 0.4, 0.6, 0.8)
    assert found == [(n, o, s) for n in noise for o in ("sgd", "sam", "asam") for s in (1, 2, 3)]
    assert {(run.dataset, run.model) for run in runs} == {("cifar10", "resnet32")}
    assert [run.label_noise for run in commands("tables", "6", "--rows", "40%", "--seeds", "1")] == [0.4] * 3
