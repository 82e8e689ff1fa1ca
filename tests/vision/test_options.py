"""The options of a run: the paper's values, the command line, what is refused."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from fairseq_asam.vision.options import TrainOptions, add_options


def test_the_paper_s_defaults():
    def options(dataset, optimizer, model="wrn28_10", **given):
        return TrainOptions(dataset, model, optimizer, Path("run"), **given).resolved()

    for dataset, rho in (("cifar10", (0.0, 0.05, 0.5)), ("cifar100", (0.0, 0.1, 1.0))):
        for optimizer, r, epochs in zip(("sgd", "sam", "asam"), rho, (400, 200, 200)):
            o = options(dataset, optimizer)
            assert (o.rho, o.epochs, o.lr, o.momentum) == (r, epochs, 0.1, 0.9)
            assert (o.weight_decay, o.batch_size, o.m, o.label_smoothing) == (5e-4, 128, None, 0.1)
    imagenet = options("imagenet", "asam", "resnet50")
    assert (imagenet.rho, imagenet.epochs, imagenet.lr, imagenet.m) == (1.0, 100, 0.2, 128)
    assert (imagenet.weight_decay, imagenet.batch_size) == (1e-4, 512)
    assert options("imagenet", "sgd", "resnet50").epochs == 200
    pyramidnet = options("cifar10", "asam", "pyramidnet272")
    assert (pyramidnet.rho, pyramidnet.epochs, pyramidnet.lr, pyramidnet.m) == (1.0, 900, 0.05, 32)
    assert pyramidnet.cutmix and pyramidnet.augmentation == "autoaugment" and pyramidnet.batch_size == 256
    assert options("imagenet", "asam", "resnet50", m=0).m is None


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser


def test_the_command_line_has_every_option_and_its_default(parser, capsys):
    run = ["--dataset", "digits", "--model", "mlp", "--optimizer", "sam", "--output", "run"]
    options = TrainOptions(**vars(parser.parse_args(run)))
    assert options == TrainOptions("digits", "mlp", "sam", Path("run"))
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    help = " ".join(capsys.readouterr().out.split())
    for option in dataclasses.fields(TrainOptions):
        assert f"--{option.name.replace('_', '-')}" in help
        if option.default not in (dataclasses.MISSING, None, False):
            assert f"{option.metadata['help']} (default: {option.default})" in help
    assert "(default: 128; imagenet: 512; digits: 32; pyramidnet272: 256)" in help
    assert "(default: sam none, asam element-wise)" in help


def test_values_of_the_command_line_have_the_types_of_the_fields(parser):
    run = ["--dataset", "digits", "--model", "mlp", "--optimizer", "asam", "--output", "run"]
    given = [
        "--rho",
        "2",
        "--m-sharpness",
        "8",
        "--p-norm",
        "inf",
        "--no-cutmix",
        "--download",
        "--data",
        "x",
    ]
    options = TrainOptions(**vars(parser.parse_args([*run, *given]))).resolved()
    values = (options.rho, options.m, options.p_norm, options.cutmix, options.download, options.data)
    assert values == (2.0, 8, float("inf"), False, True, Path("x"))
    assert options.of_the_run()["p_norm"] == "inf"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "resnet21"}, "model is 'resnet21', but it must be one of densenet121, "),
        ({"normalization": "column-wise"}, "normalization is 'column-wise', but it must be one of none, "),
        ({"augmentation": "all"}, "augmentation is 'all', but it must be one of none, standard, autoaugment"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8', but it must be one of no, bf16, fp16"),
    ],
)
def test_what_is_no_choice_is_refused(given, message):
    run = {"dataset": "digits", "model": "mlp", "optimizer": "asam", "output": Path("run")}
    with pytest.raises(ValueError, match=message):
        TrainOptions(**{**run, **given}).resolved()
