"""What --ascent-fraction draws from a batch: the batch that fairseq would have made of these sentences."""

import collections
import copy
import json
import re

import numpy as np
import pytest
import torch
from fairseq import utils
from fairseq.logging import metrics

from fairseq_asam.tasks.fraction import extrapolate_, random_part
from tests.commands import FOR_INFERENCE_TOO, PLUGIN, SIZES, recipe
from tests.training import FLOAT64_THROUGHOUT, configuration, trainer_and_batches

ENCODER, DECODER = SIZES[: len(SIZES) // 2], SIZES[len(SIZES) // 2 :]
LETTERS = "abcdefgh"
HEADS = [f for f in SIZES if "layers" not in f]
TTS_LAYERS = ["--encoder-transformer-layers=1", "--decoder-transformer-layers=1", "--encoder-conv-layers=1"]
TTS_LAYERS += ["--prenet-dropout=0"]  # which is in force at all times
POSTNET = ["--postnet-layers=2", "--postnet-conv-dim=16", "--output-frame-dim=8"]
S2T = ["--task", "speech_to_text", "--arch", "s2t_transformer_xs", *SIZES, "--conv-channels", "16"]
S2S = ["--task", "speech_to_speech", "--arch", "s2ut_transformer", *SIZES, "--conv-channels", "16"]
S2S += ["--target-is-code", "--target-code-size=8", "--vocoder=code_hifigan", "--criterion=speech_to_unit"]
SPEECH = {
    "tts_transformer": [
        *("--task", "text_to_speech", "--criterion", "tacotron2", "--arch", "tts_transformer", *HEADS),
        *(*TTS_LAYERS, *POSTNET, "--use-guided-attention-loss"),
    ],
    "two frames at a time": [
        *("--task", "text_to_speech", "--criterion", "tacotron2", "--arch", "tts_transformer", *HEADS),
        *(*TTS_LAYERS, *POSTNET, "--n-frames-per-step", "2"),
    ],
    "fastspeech2": [
        *("--task", "text_to_speech", "--criterion", "fastspeech2", "--arch", "fastspeech2"),
        *("--encoder-layers=1", "--decoder-layers=1", "--encoder-embed-dim=16", "--decoder-embed-dim=16"),
        *("--fft-hidden-dim=16", "--var-pred-hidden-dim=16", "--var-pred-n-bins=8", "--add-postnet"),
        *POSTNET,
    ],
    "speech_to_speech": S2S,
    "two units at a time": [*S2S, "--n-frames-per-step", "2"],
    "s2t_transformer": S2T,
    "s2t_transformer with CTC": [
        *(*S2T, "--criterion", "label_smoothed_cross_entropy_with_ctc", "--ctc-weight", "0.3"),
    ],
}
SOME_SENTENCES = ["--tokens-per-sample", "60", "--sample-break-mode", "complete"]
TEXT = {
    "translation": [],
    "translation, padded on the right": ["--left-pad-source"],  # the flag means right
    "translation, padded on the left": ["--left-pad-target"],
    "lstm": [
        *("--arch", "lstm", "--encoder-embed-dim=16", "--encoder-hidden-size=16", "--decoder-embed-dim=16"),
        *("--decoder-hidden-size=16", "--decoder-out-embed-dim=16"),
    ],
    "language_modeling": [
        *("--task", "language_modeling", "--arch", "transformer_lm", *DECODER, *SOME_SENTENCES),
    ],
    "masked_lm": [
        *("--task", "masked_lm", "--arch", "masked_lm", *ENCODER, "--criterion", "masked_lm"),
        *SOME_SENTENCES,
    ],
    "denoising": [
        *("--task", "denoising", "--arch", "bart_base", *SIZES, "--criterion", "cross_entropy"),
        *("--mask", "0.3", "--mask-length", "span-poisson", "--replace-length", "1", *SOME_SENTENCES),
        *("--data-buffer-size", "0"),  # the plugin asks for it
    ],
}
if FOR_INFERENCE_TOO:
    del TEXT["denoising"]  # fairseq 0.12.2's own parser refuses this task with a Transformer


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A manifest for all of fairseq's tasks of speech: each letter has a feature of its own for some time."""
    random, root = np.random.RandomState(0), tmp_path_factory.mktemp("speech")
    root.joinpath("dict.txt").write_text("".join(f"{letter} 1\n" for letter in LETTERS))
    root.joinpath("config.yaml").write_text(
        "vocab_filename: dict.txt\ninput_feat_per_channel: 8\n"
        "features: {sample_rate: 16000, pitch_min: -3, pitch_max: 3, energy_min: -3, energy_max: 3}\n"
    )
    for split, sentences in ("train", 60), ("valid", 6):
        lines = ["id\taudio\tn_frames\ttgt_text\tduration\tpitch\tenergy"]
        lines[0] += "\tsrc_audio\tsrc_n_frames\ttgt_audio\ttgt_n_frames"
        for i in range(sentences):
            letters = random.randint(0, len(LETTERS), random.randint(2, 9))
            durations = random.randint(4, 8, len(letters))
            features = np.repeat(np.eye(8)[letters], durations, axis=0)
            features += 0.1 * random.randn(*features.shape)
            pitch, energy = random.randn(2, len(letters))
            paths = []
            for kind, array in ("audio", features), ("pitch", pitch), ("energy", energy):
                paths.append(root / f"{kind}-{split}-{i}.npy")
                np.save(paths[-1], array.astype(np.float32))
            texts = [" ".join(LETTERS[letter] for letter in letters), " ".join(map(str, durations))]
            audio, units = [paths[0], len(features)], [" ".join(map(str, letters)), len(letters)]
            lines.append("\t".join(map(str, [i, *audio, *texts, *paths[1:], *audio, *units])))
        root.joinpath(f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def float64_throughout(monkeypatch):
    for name, replacement in FLOAT64_THROUGHOUT.items():
        monkeypatch.setattr(utils, name, replacement)


def as_float64(sample):
    return utils.apply_to_sample(lambda x: x.double() if x.is_floating_point() else x, sample)


def assert_same_batch(part, alone, order, name=""):
    """Assert that *part* is *alone*, whose rows fairseq may have sorted otherwise."""
    if isinstance(part, torch.Tensor):
        assert torch.equal(part, alone[order]), (name, part.shape, alone.shape)
        assert part.is_contiguous()
    elif isinstance(part, dict):
        assert part.keys() == alone.keys()
        for key in part:
            # denoising: the length of a sentence, and how its collater sorted what it was given
            if key not in ("sort_order", "nsentences"):
                assert_same_batch(part[key], alone[key], order, f"{name}.{key}")
    elif isinstance(part, list):
        assert part == [alone[i] for i in order], name
    else:
        assert part == alone, name


@pytest.mark.parametrize("task", [*TEXT, *SPEECH])
def test_a_part_is_the_batch_of_its_sentences(task, request, float64_throughout):
    """Field by field, and in its loss."""
    flags = {**TEXT, **SPEECH}[task]
    fixture = "speech" if task in SPEECH else "monolingual" if SOME_SENTENCES[0] in flags else "corpus"
    data = request.getfixturevalue(fixture) / ("bin" if fixture == "corpus" else "")
    trainer, _ = trainer_and_batches(configuration(data, "--optimizer", "asam", *flags))
    dataset, criterion, narrower = trainer.task.dataset("train"), trainer.criterion, 0
    model = trainer.model.eval()
    for seed in range(6):
        torch.manual_seed(seed)
        # Some datasets draw noise whenever they are asked for a sentence.
        sentences = {i: dataset[i] for i in torch.randperm(len(dataset))[:12].tolist()}
        batch = dataset.collater(list(sentences.values()))
        part = random_part(batch, 0.3, criterion.padding_idx)
        alone = dataset.collater([sentences[i] for i in part["id"].tolist()])
        order = [alone["id"].tolist().index(i) for i in part["id"].tolist()]
        assert_same_batch(part, alone, order)
        assert part["nsentences"] == len(part["id"]) == 4
        with torch.no_grad():
            losses = [criterion(model, as_float64(sample))[:2] for sample in (part, alone)]
        assert losses[0][0].item() == pytest.approx(losses[1][0].item(), rel=1e-9)
        assert losses[0][1] == losses[1][1]
        widths = [b["net_input"]["src_tokens"].size(1) for b in (part, batch)]
        narrower += widths[0] < widths[1]
    assert narrower > 0


@pytest.mark.parametrize("task", SPEECH)
def test_speech_trains_with_a_fraction(task, fairseq, speech, tmp_path):
    flags = [*SPEECH[task], "--optimizer", "asam", "--ascent-fraction", "0.4", "--max-epoch", "3"]
    result = fairseq("train", *recipe(speech, tmp_path / "run", *flags), *PLUGIN)
    assert result.status == 0, result.output[-3000:]
    lines = [json.loads(line) for line in re.findall(r"\| valid \| (\{.*\})", result.output)]
    losses = [float(line["valid_loss"]) for line in lines]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("task", SPEECH)
def test_the_loss_that_is_logged_is_that_of_the_part(task, speech, monkeypatch):
    """Also of criterions whose loss is a mean and not a sum."""
    flags = [*SPEECH[task], "--optimizer", "asam", "--ascent-fraction", "0.3"]
    trainer, batches = trainer_and_batches(configuration(speech, *flags), torch.float32)
    criterion, logs = trainer.get_criterion(), []
    forward = criterion.forward

    def noting_forward(*args, **kwargs):
        result = forward(*args, **kwargs)
        logs.append(copy.deepcopy(result[-1]))
        return result

    monkeypatch.setattr(criterion, "forward", noting_forward)
    stats = trainer.train_step([max(batches, key=lambda batch: batch["nsentences"])])
    with metrics.aggregate(new_root=True) as of_part:
        type(criterion).reduce_metrics(logs[:1])
    assert stats["loss"] == pytest.approx(float(of_part["loss"].avg), abs=2e-3)


def test_sums_that_are_logged_are_extrapolated_and_counts_are_those_of_the_whole():
    part = {"loss": torch.tensor(2.0), "ntokens": 3, "n_correct": 2, "has_nan": True, "unit": "bits"}
    extrapolate_(part, {"loss": torch.tensor(5.0), "ntokens": 7}, 2.5)
    assert part == {"loss": 5.0, "ntokens": 7, "n_correct": 5.0, "has_nan": True, "unit": "bits"}
    assert part["has_nan"] is True


def test_a_refusal_is_a_sentence(fairseq, monolingual, tmp_path):
    flags = ["--task", "language_modeling", *TEXT["language_modeling"], "--optimizer", "asam"]
    flags += ["--ascent-fraction", "0.5", "--pad-to-fixed-bsz", "--batch-size", "500"]
    result = fairseq("train", *recipe(monolingual, tmp_path / "run", *flags), *PLUGIN)
    assert result.status not in (0, None) and "Traceback" not in result.output
    assert re.fullmatch(
        r"fairseq_asam: --ascent-fraction cannot take a part of this task's batches: 'net_input.src_tokens', "
        r"of shape \(500, \d+\), does not have a row for each of \d+ sentences; use --ascent-fraction 1",
        result.output.splitlines()[-1],
    )
    assert not list(tmp_path.glob("run/*.pt"))


def test_a_part_of_what_other_tasks_have_in_a_batch():
    Pair = collections.namedtuple("Pair", "text rows")
    sample = {"nsentences": 3, "texts": ["a", "b", "c"], "pair": Pair("abc", torch.tensor([5, 6, 7]))}
    part = random_part(sample, 0.4, padding=1)
    (row,) = ("abc".index(text) for text in part["texts"])
    assert part["pair"] == ("abc", torch.tensor([row + 5]))
    speech = {"nsentences": 2, "net_input": {"source": torch.arange(8).view(2, 4)}}
    part = random_part({"de": {}, "en": speech}, 0.5, padding=None)
    assert part["de"] == {} and part["en"]["net_input"]["source"].shape == (1, 4)
    assert random_part(speech, 0.01, padding=None)["nsentences"] == 1
    by_layer = {"nsentences": 2, "alignment of each layer": [torch.tensor([0, 1]), torch.tensor([2, 3])]}
    first, second = random_part(by_layer, 0.5, padding=None)["alignment of each layer"]
    assert len(first) == 1 and torch.equal(second, first + 2)


def test_other_sentences_are_drawn_with_each_seed_and_no_mask_is_another():
    sample, drawn = {"id": torch.arange(9), "nsentences": 9}, set()
    for seed in range(10):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        drawn.add(tuple(random_part(sample, 0.4, padding=1)["id"].tolist()))
        assert torch.equal(torch.get_rng_state(), state)
    assert len(drawn) > 1


LENGTHS = torch.tensor([5, 3, 3, 2])
TOKENS = torch.where(torch.arange(5) < LENGTHS[:, None], 7, 1)


def part_without_the_longest(sample):
    for seed in range(100):
        torch.manual_seed(seed)
        part = random_part(copy.deepcopy(sample), 0.5, padding=1)
        if 0 not in part["id"]:
            return part
    raise AssertionError("the longest was drawn a hundred times")


def test_the_targets_of_further_tasks_are_cut_by_their_own_lengths():
    """As those of speech_to_text with --multitask-config-yaml, which CTC wants without padding to spare."""
    further = {"target": TOKENS, "target_lengths": LENGTHS, "ntokens": 13}
    further["net_input"] = {"prev_output_tokens": TOKENS}
    sample = {"id": torch.arange(4), "nsentences": 4, "multitask": {"letters": further}}
    part = part_without_the_longest(sample)["multitask"]["letters"]
    assert part["target"].shape == part["net_input"]["prev_output_tokens"].shape == (2, 3)
    assert part["ntokens"] == part["target_lengths"].sum() == (part["target"] != 1).sum()


def test_targets_without_a_decoder_are_cut_by_their_own_lengths():
    """As those of CTC alone."""
    sample = {"id": torch.arange(4), "nsentences": 4, "target": TOKENS, "target_lengths": LENGTHS}
    sample["net_input"] = {"src_tokens": torch.zeros(4, 9, 2), "src_lengths": torch.tensor([9, 9, 9, 9])}
    assert part_without_the_longest(sample)["target"].shape == (2, 3)


def test_targets_may_be_no_tokens():
    """As the class of a sentence is."""
    sample = {"id": torch.arange(4), "nsentences": 4, "ntokens": 13, "target": torch.arange(4)}
    sample["net_input"] = {"src_tokens": TOKENS, "src_lengths": LENGTHS}
    part = part_without_the_longest(sample)
    assert torch.equal(part["target"], part["id"])
    assert part["net_input"]["src_tokens"].shape == (2, 3)
    assert part["ntokens"] == part["net_input"]["src_lengths"].sum()


def test_tokens_are_counted_in_the_target_if_the_source_has_as_many():
    sample = {"id": torch.arange(4), "nsentences": 4, "ntokens": 13, "target": TOKENS}
    sample["net_input"] = {"src_tokens": TOKENS.flip(0), "src_lengths": LENGTHS.flip(0)}
    sample["net_input"]["prev_output_tokens"] = TOKENS
    for seed in range(10):
        torch.manual_seed(seed)
        part = random_part(copy.deepcopy(sample), 0.5, padding=1)
        assert part["ntokens"] == (part["target"] != 1).sum()


def test_nothing_is_cut_beside_what_may_belong_to_it():
    """A task may have a field of its own for each token: all stay as wide as they are."""
    sample = {"id": torch.arange(4), "nsentences": 4, "ntokens": 13, "target": TOKENS}
    sample["net_input"] = {"src_tokens": TOKENS, "src_lengths": LENGTHS}
    sample["net_input"]["tgt_speaker"] = torch.zeros(4, 5)  # a vector for each sentence, by chance as wide
    part = part_without_the_longest(sample)["net_input"]
    assert part["src_tokens"].shape == (2, 3) and part["tgt_speaker"].shape == (2, 5)
    sample["net_input"]["parts_of_speech"] = TOKENS
    part = part_without_the_longest(sample)
    assert part["net_input"]["src_tokens"].shape == part["target"].shape == (2, 5)
    assert part["net_input"]["parts_of_speech"].shape == (2, 5)


def test_nothing_is_cut_where_the_padding_is_at_neither_end():
    sample = {"id": torch.arange(4), "nsentences": 4}
    sample["net_input"] = {"src_tokens": TOKENS.roll(1, dims=1), "src_lengths": LENGTHS}
    assert part_without_the_longest(sample)["net_input"]["src_tokens"].shape == (2, 5)


@pytest.mark.parametrize(
    "sample, reason",
    [
        (
            {"nsentences": 4, "target": {"edge": torch.zeros(7)}},
            r"'target\.edge', of shape \(7,\), .* 4 sentences",
        ),
        ({"nsentences": 4, "masks": [torch.zeros(3, 4)]}, r"'masks\[0\]', of shape \(3, 4\), .* 4 sentences"),
        (
            {"id": torch.arange(4), "net_input": {"source": torch.zeros(4, 9)}},
            "no 'nsentences', but 'id', 'net_",
        ),
        ({"nsentences": 4, "alignments": torch.zeros(7, 2)}, "'alignments'"),
    ],
)
def test_a_batch_whose_sentences_cannot_be_told_apart_is_refused(sample, reason):
    with pytest.raises(SystemExit, match=rf"a part of this task's .*{reason}.*; use --ascent-fraction 1"):
        random_part(sample, 0.5, padding=1)
