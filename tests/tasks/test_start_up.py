"""What is refused at start-up and what is not; what the plugin leaves alone; --help."""

import sys
from argparse import Namespace

import pytest
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import OmegaConf, open_dict

from fairseq_asam.tasks.start_up import check_configuration
from tests.commands import PLUGIN, checkpoint, recipe

LANGUAGE_MODEL = ["--arch", "transformer_lm", "--decoder-layers", "1", "--decoder-attention-heads", "2"]
LANGUAGE_MODEL += [f"--decoder-{size}-dim=16" for size in ("embed", "input", "output", "ffn-embed")]
ROBERTA = ["--arch", "roberta_base", "--encoder-layers", "1", "--encoder-attention-heads", "2"]
ROBERTA += ["--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "16"]
DUMMY = ["--dict-size", "64", "--dataset-size", "64", "--batch-size", "8", "--disable-validation", "--cpu"]
DUMMY += ["--max-update", "3", "--lr", "0.01", "--log-format", "json", "--log-interval", "1"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--task", "dummy_mt", "--src-len", "8", "--tgt-len", "8", "--arch", "transformer_tiny"],
        pytest.param(
            ["--task", "dummy_lm", "--tokens-per-sample", "16", *LANGUAGE_MODEL], marks=pytest.mark.slow
        ),
        pytest.param(
            ["--task", "dummy_masked_lm", "--tokens-per-sample", "16", *ROBERTA, "--criterion", "masked_lm"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda flags: flags[1],
)
def test_a_task_without_data_trains(fairseq, tmp_path, flags):
    result = fairseq("train", *DUMMY, "--save-dir", tmp_path, *flags, *PLUGIN, "--optimizer", "asam")
    assert result.status == 0, result.output[-3000:]
    assert result.output.count('"sharpness": "') == 3
    assert checkpoint(tmp_path)["optimizer_history"][-1]["num_updates"] == 3


@pytest.mark.parametrize("words", [["--optimizer", "asam"], ["--optimizer=asam"]])
def test_help_lists_our_options_beside_those_of_the_base_optimizer(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fairseq-train", *words, "--help"])
    with pytest.raises(SystemExit) as end:
        options.parse_args_and_arch(options.get_training_parser())
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "--optimizer asam:" in shown and "--rho RHO" in shown and "--adam-betas" in shown
    assert "--lr-scheduler" in shown and "--optimizer sam:" not in shown


def configuration(data, *flags, optimizer="asam"):
    """The whole configuration of a command line that begins with *data*."""
    parser = options.get_training_parser()
    flags = [*recipe(data, "unused", *flags), "--optimizer", optimizer]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, list(map(str, flags))))


@pytest.mark.parametrize("data", ["", "{there}", "{there}:{there}", "{there}:", "{there}/file.yaml"])
def test_data_that_are_there_are_not_refused(tmp_path, data):
    (tmp_path / "file.yaml").touch()
    check_configuration(configuration(data.format(there=tmp_path)))


def test_a_task_that_can_do_without_data_is_not_refused():
    cfg = configuration("unused", "--task", "language_modeling", *LANGUAGE_MODEL)
    cfg.task.data = None
    check_configuration(cfg)


@pytest.mark.parametrize("task", ["translation", "audio_pretraining", "multilingual_translation"])
def test_the_part_of_the_data_that_is_missing_is_named(tmp_path, task):
    """Before the task is set up, which some do without looking at their data."""
    model = ["--arch", "wav2vec2", "--criterion", "wav2vec"] if task == "audio_pretraining" else []
    cfg = configuration(f"{tmp_path}:{tmp_path}/part2", "--task", task, *model)
    sentence = f"^fairseq_asam: there is no data in {tmp_path}/part2: name the data of --task {task}$"
    with pytest.raises(SystemExit, match=sentence):
        tasks.setup_task(cfg.task)


def test_a_task_is_set_up_from_a_part_of_a_configuration(tmp_path):
    """As programs do that do not train."""
    alone = OmegaConf.create({"_name": "dummy_lm", "dict_size": 20, "batch_size": 2, "max_tokens": None})
    assert len(tasks.setup_task(alone).source_dictionary) == 24
    (tmp_path / "dict.txt").write_text("a 1\nb 1\n")
    words = LanguageModelingConfig(data=str(tmp_path), output_dictionary_size=-1)
    arguments = Namespace(task="language_modeling", **vars(words))
    assert len(tasks.setup_task(arguments).source_dictionary) == 6


def test_a_checkpoint_s_task_is_set_up_where_its_data_are_not(tmp_path):
    """The dictionaries of tasks of speech are in the checkpoint."""
    model = ["--arch", "wav2vec2", "--criterion", "wav2vec"]
    cfg = configuration(tmp_path / "elsewhere", "--task", "audio_pretraining", *model)
    assert tasks.setup_task(cfg.task, from_checkpoint=True).cfg.data == str(tmp_path / "elsewhere")


#: What goes with none of our optimizers, or not with an option of theirs: the changes of a configuration that
#: have it, and the beginning of the sentence.
REFUSED = [
    ({"common.bf16": True, "common.tpu": True}, "--bf16"),
    ({"common.tpu": True}, "--tpu"),
    ({"common.memory_efficient_fp16": True}, "--memory-efficient-fp16"),
    ({"common.memory_efficient_bf16": True}, "--memory-efficient-bf16"),
    ({"common.model_parallel_size": 2}, "--model-parallel-size"),
    ({"distributed_training.pipeline_model_parallel": True}, "--pipeline-model-parallel"),
    ({"model.base_layers": 1, "distributed_training.distributed_world_size": 2}, "--base-layers"),
    ({"optimization.use_bmuf": True}, "--use-bmuf"),
    ({"distributed_training.ddp_backend": "slowmo"}, "--ddp-backend slowmo"),
    ({"distributed_training.ddp_backend": "fully_sharded"}, "--ddp-backend fully_sharded"),
    ({"task._name": "online_backtranslation"}, "--task online_backtranslation"),
]
OPTIONS = {
    "--ascent-interval": {"optimizer.ascent_interval": 2},
    "--ascent-direction momentum": {"optimizer.ascent_direction": "momentum"},
    "--normalization adam": {"optimizer.normalization": "adam"},
}
STATES = {
    "--zero-sharding os": {"distributed_training.zero_sharding": "os"},
    "--fp16-adam-stats": {"optimizer.fp16_adam_stats": True},
}
TOGETHER = [
    ({**OPTIONS[option], **STATES[state]}, f"{option} with {state}")
    for option in OPTIONS
    for state in STATES
    if (option, state) != ("--ascent-interval", "--fp16-adam-stats")
]
UNUSED = {
    "distributed_training.find_unused_parameters": True,
    "distributed_training.distributed_world_size": 2,
    "distributed_training.ddp_backend": "pytorch_ddp",
    "optimizer.ascent_scope": "micro-batch",
}
#: The configuration of these tests has --num-workers 0.
DENOISING = {"task._name": "denoising", "dataset.data_buffer_size": 10}
REFUSED += [
    (DENOISING, "--num-workers 0 with a denoising task"),
    ({**UNUSED, "optimizer.fresh_masks": True}, "--find-unused-parameters"),
    ({**UNUSED, "optimizer.ascent_fraction": 0.5}, "--find-unused-parameters"),
]


def changed(cfg, changes):
    """*cfg* with *changes*, such as ``{"common.tpu": True}``."""
    for name, value in changes.items():
        group, option = name.split(".")
        with open_dict(cfg):
            setattr(cfg[group], option, value)
    return cfg


@pytest.mark.parametrize("changes, flags", REFUSED + TOGETHER, ids=[flags for _, flags in REFUSED + TOGETHER])
def test_what_does_not_go_with_sharpness_awareness_is_refused(tmp_path, changes, flags):
    cfg = changed(configuration(tmp_path), changes)
    with pytest.raises(ValueError, match=f"^{flags} does not go with --optimizer asam: .*; use "):
        check_configuration(cfg)


USED = {
    "distributed_training.find_unused_parameters": False,
    "distributed_training.distributed_world_size": 1,
    "distributed_training.ddp_backend": "legacy_ddp",
    "optimizer.ascent_scope": "update",
}
TAKEN = [*OPTIONS.values(), *STATES.values(), UNUSED, {"model.base_layers": 1}]
TAKEN += [{**UNUSED, "optimizer.fresh_masks": True, name: value} for name, value in USED.items()]
TAKEN += [{**DENOISING, "dataset.num_workers": 1}, {**DENOISING, "dataset.data_buffer_size": 0}]
TAKEN += [
    {**DENOISING, "optimizer.fresh_masks": True},
    {**DENOISING, "optimizer.ascent_direction": "momentum"},
]
TAKEN += [{f"common.{precision}": True} for precision in ("fp16", "bf16", "amp")]


@pytest.mark.parametrize("changes", TAKEN)
def test_what_goes_with_sharpness_awareness_is_not_refused(tmp_path, changes):
    check_configuration(changed(configuration(tmp_path), changes))


@pytest.mark.parametrize(
    "flags",
    [
        [],  # a Namespace
        ["--task", "language_modeling", *LANGUAGE_MODEL],  # structured
        ["--task", "masked_lm", *ROBERTA, "--criterion", "masked_lm"],
    ],
    ids=["transformer", "transformer_lm", "roberta"],
)
def test_quantization_noise_is_refused(tmp_path, flags):
    check_configuration(configuration(tmp_path, *flags, "--quant-noise-pq", "0"))
    with pytest.raises(
        ValueError, match=r"^--quant-noise-pq does not go with --optimizer asam: each forward"
    ):
        check_configuration(configuration(tmp_path, *flags, "--quant-noise-pq", "0.1"))


def test_a_model_without_such_an_option_is_not_refused(tmp_path):
    check_configuration(configuration(tmp_path, "--arch", "lstm"))


def test_quantization_noise_is_refused_in_a_structured_transformer(tmp_path):
    """Where it is ``quant_noise.pq``, as in configuration files."""
    cfg = configuration(tmp_path)
    del cfg.model.quant_noise_pq
    cfg.model.quant_noise = Namespace(pq=0.1, pq_block_size=8)
    with pytest.raises(ValueError, match=r"^--quant-noise-pq does not go with --optimizer asam"):
        check_configuration(cfg)
