"""HuggingFace's Trainer, sharpness-aware, against a plain loop of Algorithm 1 and the stock Trainer."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_asam import Perturbation, SharpnessAware, TwoPasses
from tests.algorithm1 import (
    Net,
    algorithm_1,
    assert_close,
    assert_far,
    examples,
    gradients_of_outputs,
)
from tests.processes import started

pytest.importorskip("transformers")
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fairseq_asam.integrations.huggingface import (
    SharpnessAwareSeq2SeqTrainer,
    SharpnessAwareTrainer,
)


class Classifier(Net):
    """A model for the Trainer, whose loss is the mean over the batch."""

    def forward(self, x, labels):
        outputs = super().forward(x)
        return {"loss": F.cross_entropy(outputs, labels), "logits": outputs}


class Counting(Net):
    """As HuggingFace's models: its loss is divided by the number of labels in the whole update."""

    def forward(self, x, labels, **options):
        outputs = super().forward(x)
        number = options["num_items_in_batch"]
        return {"loss": F.cross_entropy(outputs, labels, reduction="sum") / number, "logits": outputs}


class Collator:
    """Remembers the batches in the order in which the Trainer uses them."""

    def __init__(self):
        self.batches = []

    def __call__(self, items):
        inputs, labels = zip(*items)
        self.batches.append({"x": torch.stack(inputs), "labels": torch.stack(labels)})
        return dict(self.batches[-1])


def arguments(folder, made_of=TrainingArguments, **options):
    options = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 0.05, **options}
    return made_of(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4, **options
    )


def trainer_of(kind, model, folder, options=None, **settings):
    settings.setdefault("data_collator", Collator())
    data = list(zip(*examples()))
    return kind(model, arguments(folder, **(options or {})), train_dataset=data, **settings)


def logs(trainer, *keys):
    """The values that each log of an update has of *keys*."""
    return [tuple(log.get(key) for key in keys) for log in trainer.state.log_history if "loss" in log]


def in_updates(batches, accumulated):
    """The batches of two epochs, each of 6 batches, by update; the last update of an epoch may have fewer."""
    updates = []
    for start in range(0, len(batches), 6):
        epoch = batches[start : start + 6]
        updates += [epoch[i : i + accumulated] for i in range(0, len(epoch), accumulated)]
    return updates[:4]


def loss_of(model, batch, update):
    """The part of the update's loss, as the stock Trainer defines it."""
    outputs = Net.forward(model, batch["x"])
    if isinstance(model, Counting):
        number = sum(len(each["labels"]) for each in update)
        return F.cross_entropy(outputs, batch["labels"], reduction="sum") / number
    return F.cross_entropy(outputs, batch["labels"]) / len(update)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0, **options)


def clipped_to(norm):
    return lambda weights: nn.utils.clip_grad_norm_(weights, norm)


SETTINGS = [
    {},
    {"normalization": "none"},
    {"normalize_bias": True, "eta": 0.1},
    {"p": math.inf},
    {"normalization": "adam"},
    {"direction": "momentum"},
    {"direction": "random"},
    {"ascent_from": 2},
    {"ascent_scope": "micro-batch"},
]


@pytest.mark.parametrize("accumulated", [1, 4], ids=["1 batch", "4 batches"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_weights_are_those_of_algorithm_1(settings, accumulated, tmp_path):
    model, plain, stock = Classifier(), Classifier(), Classifier()
    options = {"gradient_accumulation_steps": accumulated, "seed": 7}
    trainer = trainer_of(SharpnessAwareTrainer, model, tmp_path, options, rho=0.3, **settings)
    trainer.train()
    updates = in_updates(trainer.data_collator.batches, accumulated)
    assert [len(update) for update in updates] == ([1] * 4 if accumulated == 1 else [4, 2, 4, 2])
    losses = algorithm_1(
        plain,
        adamw(plain),
        updates,
        loss_of,
        rho=0.3,
        seed=7,
        clip=clipped_to(1.0),
        factor=lambda number: 1 - number / 4,
        **settings,
    )
    assert_close(model, plain)
    trainer_of(Trainer, stock, tmp_path, options).train()
    assert_far(model, stock)
    logged = logs(trainer, "loss", "sharpness")
    assert len(logged) == len(losses)
    for (loss, sharpness), values in zip(logged, losses):
        at_w, at_w_plus_epsilon = sum(values[0::2]), sum(values[1::2])
        assert loss == pytest.approx(at_w, abs=6e-5)  # the Trainer of 2025 rounds it
        if len(values) == 1:  # an update of one pass
            assert sharpness is None
        else:
            assert sharpness == pytest.approx(at_w_plus_epsilon - at_w, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.1},
        {"max_grad_norm": 0.0},
        {"optim": "sgd"},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_the_options_of_the_trainer_do_what_they_do_there(options, tmp_path):
    """The loss is divided by the number of labels in the update. Only the last gradient is clipped."""
    model, plain = Counting(), Counting()
    options = {"gradient_accumulation_steps": 4, **options}
    trainer = trainer_of(SharpnessAwareTrainer, model, tmp_path, options, rho=0.3)
    trainer.train()
    decay = options.get("weight_decay", 0.0)
    groups = [
        {"params": [plain.first.weight, plain.second.weight], "weight_decay": decay},
        {"params": [plain.first.bias, *plain.norm.parameters(), plain.second.bias], "weight_decay": 0.0},
    ]
    if options.get("optim") == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.05)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.05)
    norm = options.get("max_grad_norm", 1.0)
    algorithm_1(
        plain,
        optimizer,
        in_updates(trainer.data_collator.batches, 4),
        loss_of,
        rho=0.3,
        clip=clipped_to(norm) if norm else lambda weights: None,
        factor=lambda number: 1 - number / 4,
    )
    assert_close(model, plain)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_a_t5_with_tied_weights_is_trained_by_algorithm_1(options, tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes)).double()
    plain, stock = copy.deepcopy(model), copy.deepcopy(model)
    data = [
        {"input_ids": torch.randint(2, 20, (5,)), "labels": torch.arange(2, length)}
        for length in (7, 5, 6, 9, 8, 7, 5, 4)
    ]
    batches = []

    def collate(items):
        source, target = ([item[name] for item in items] for name in ("input_ids", "labels"))
        target = nn.utils.rnn.pad_sequence(target, batch_first=True, padding_value=-100)
        batches.append({"input_ids": torch.stack(source), "labels": target})
        return dict(batches[-1])

    def loss(model, batch, update):
        return F.cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten())

    training = arguments(tmp_path, lr_scheduler_type="constant", **options)
    SharpnessAwareTrainer(model, training, collate, data, rho=0.3).train()
    algorithm_1(plain, adamw(plain), [[batch] for batch in batches], loss, rho=0.3, clip=clipped_to(1.0))
    assert_close(model, plain)
    Trainer(stock, training, collate, data).train()
    assert_far(model, stock)


def test_both_passes_draw_the_same_masks_and_the_next_update_others(tmp_path):
    model = Classifier(dropout=0.4)
    options = {"gradient_accumulation_steps": 2, "max_steps": 2}
    trainer_of(SharpnessAwareTrainer, model, tmp_path, options, rho=0.3).train()
    masks = [mask.flatten().tolist() for mask in model.masks]
    assert masks[0:2] == masks[2:4] and masks[4:6] == masks[6:8] and len(masks) == 8
    assert len({tuple(mask) for mask in masks}) == 4


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 4}], ids=["1 batch", "4 batches"])
def test_rho_0_is_the_stock_trainer_bit_for_bit(options, tmp_path):
    models = Classifier(dropout=0.4), Classifier(dropout=0.4)
    ours = trainer_of(SharpnessAwareTrainer, models[0], tmp_path, options, rho=0.0)
    stock = trainer_of(Trainer, models[1], tmp_path, options)
    for trainer in (ours, stock):
        torch.manual_seed(0)
        trainer.train()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    histories = [
        [{key: value for key, value in log.items() if key not in timed} for log in trainer.state.log_history]
        for trainer in (ours, stock)
    ]
    assert histories[0] == histories[1]


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="transformers resumes no run with it"
)
@pytest.mark.parametrize("settings", [{}, {"direction": "momentum"}, {"direction": "random"}], ids=str)
def test_a_resumed_run_is_the_whole_one_bit_for_bit(settings, tmp_path):
    def run(name, steps, model, **how):
        options = {
            "save_strategy": "steps",
            "save_steps": 2,
            "lr_scheduler_type": "constant",
            "max_steps": steps,
            "gradient_accumulation_steps": 2,
        }
        trainer = trainer_of(SharpnessAwareTrainer, model, tmp_path / name, options, rho=0.3, **settings)
        trainer.train(**how)
        return logs(trainer, "loss", "sharpness")

    models = Classifier(dropout=0.4), Classifier(dropout=0.4)
    whole = run("whole", 4, models[0])
    run("parts", 2, Classifier(dropout=0.4))
    resumed = run("parts", 4, models[1], resume_from_checkpoint=True)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert whole == resumed


def test_bf16_is_algorithm_1_within_its_rounding(tmp_path):
    class Single(Classifier):
        def __init__(self):
            super().__init__()
            self.float()

        def forward(self, x, labels):
            return super().forward(x.float(), labels)

    def loss(model, batch, update):
        return model(**batch)["loss"] / len(update)

    model, plain, stock = Single(), Single(), Single()
    options = {"bf16": True, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    trainer = trainer_of(SharpnessAwareTrainer, model, tmp_path, options, rho=0.3)
    trainer.train()
    batches = trainer.data_collator.batches
    trainer_of(Trainer, stock, tmp_path, options).train()

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    algorithm_1(
        plain, adamw(plain), in_updates(batches, 2), loss, rho=0.3, clip=clipped_to(1.0), context=autocast
    )
    assert_close(model, plain, tolerance=2e-3)
    assert max((w - v).abs().max() for w, v in zip(model.parameters(), stock.parameters())) > 1e-2


def test_a_gradient_scaler_changes_nothing_and_skips_an_update_that_overflows(tmp_path):
    """On a CPU the Trainer makes no scaler, so it is given one."""

    class Overflowing(Classifier):
        """Its gradient at w + epsilon is infinite in the second update."""

        passes = 0

        def forward(self, x, labels):
            outputs = super().forward(x, labels)
            self.passes += 1
            return {"loss": outputs["loss"] * (math.inf if self.passes == self.bad else 1.0)}

    def run(bad, scale):
        model = Overflowing()
        model.bad, gradients = bad, gradients_of_outputs(model.second)
        options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        trainer = trainer_of(SharpnessAwareTrainer, model, tmp_path, options, rho=0.3)
        if scale:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        seen = []

        class See(TrainerCallback):
            def on_step_end(self, *arguments, **options):
                seen.append(copy.deepcopy([*model.parameters()]))

        trainer.add_callback(See)
        trainer.train()
        assert len(gradients) == 2 * 4 and (min(gradients) > 1) == bool(scale)
        return seen

    for w, v in zip(run(None, None)[-1], run(None, 1024.0)[-1]):
        torch.testing.assert_close(w, v, rtol=0, atol=1e-12)
    for bad in (3, 4):  # the pass at w, the one at w + epsilon
        seen = run(bad, 1024.0)
        assert all(map(torch.equal, seen[0], seen[1])) and not torch.equal(seen[1][0], seen[2][0])


def test_lora_trains_its_own_weights_alone(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        config = peft.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
        return peft.get_peft_model(Classifier(), config).double()

    model = adapted()
    plain = copy.deepcopy(model)
    start = copy.deepcopy(model)
    options = {"label_names": ["labels"], "lr_scheduler_type": "constant"}
    trainer = trainer_of(SharpnessAwareTrainer, model, tmp_path, options, rho=0.3)
    trainer.train()

    def loss(model, batch, update):
        return model(**batch)["loss"]

    batches = in_updates(trainer.data_collator.batches, 1)
    optimizer = torch.optim.AdamW([w for w in plain.parameters() if w.requires_grad], lr=0.05, weight_decay=0)
    algorithm_1(plain, optimizer, batches, loss, rho=0.3, clip=clipped_to(1.0))
    assert_close(model, plain)
    assert sum(w.requires_grad for w in model.parameters()) == 4
    for w, v in zip(model.parameters(), start.parameters()):
        assert torch.equal(w, v) != w.requires_grad


IN_TWO_PROCESSES = [
    (Classifier, {}, 1),
    (Classifier, {}, 2),
    (Counting, {}, 2),
    (Classifier, {"ascent_scope": "micro-batch"}, 2),
    (Classifier, {"direction": "random"}, 2),
]


def train_in_one_of_them(rank, count, port, folder):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    results = []
    for kind, settings, accumulated in IN_TWO_PROCESSES:
        model = kind()
        options = {"gradient_accumulation_steps": accumulated, "lr_scheduler_type": "constant", "seed": 7}
        trainer = trainer_of(SharpnessAwareTrainer, model, folder, options, rho=0.3, **settings)
        trainer.train()
        results.append((model, trainer.data_collator.batches, logs(trainer, "loss", "sharpness")))
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """What each process had in the end, by run."""
    folder = tmp_path_factory.mktemp("two")
    started(2, train_in_one_of_them, folder)
    return list(zip(*(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2))))


@pytest.mark.parametrize("number", range(len(IN_TWO_PROCESSES)), ids=lambda n: str(IN_TWO_PROCESSES[n][1:]))
def test_two_processes_are_algorithm_1_with_the_batches_of_both(number, of_two_processes):
    kind, settings, accumulated = IN_TWO_PROCESSES[number]
    (model, first, seen), (other, second, _) = of_two_processes[number]
    assert_close(model, other, 0.0)
    plain = kind()
    # An epoch has three batches for each process.
    turns = [slice(start + i, start + min(i + accumulated, 3)) for start in (0, 3, 6, 9) for i in (0, 1, 2)]
    turns = [turn for turn in turns if turn.start % 3 % accumulated == 0][:4]
    updates = [first[turn] + second[turn] for turn in turns]
    losses = algorithm_1(
        plain, adamw(plain), updates, loss_of, rho=0.3, seed=7, clip=clipped_to(1.0), **settings
    )
    assert_close(model, plain)
    assert len(seen) == len(losses)
    for (loss, sharpness), values in zip(seen, losses):
        assert loss == pytest.approx(sum(values[0::2]), abs=6e-5)
        if len(values) > 1:
            assert sharpness == pytest.approx(sum(values[1::2]) - sum(values[0::2]), rel=1e-5)


def test_the_seq2seq_trainer_is_sharpness_aware_too(tmp_path):
    models = Classifier(), Classifier()
    kinds = {SharpnessAwareTrainer: TrainingArguments, SharpnessAwareSeq2SeqTrainer: Seq2SeqTrainingArguments}
    for model, (kind, made_of) in zip(models, kinds.items()):
        trainer = trainer_of(kind, model, tmp_path, {"made_of": made_of}, rho=0.3)
        trainer.train()
    assert isinstance(trainer, Seq2SeqTrainer)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_a_trainer_of_another_kind_keeps_its_own_loss(tmp_path):
    class Half(Trainer):
        def compute_loss(self, *arguments, **options):
            return super().compute_loss(*arguments, **options) / 2

    class Both(SharpnessAwareTrainer, Half):
        pass

    model, plain = Classifier(), Classifier()
    trainer = trainer_of(Both, model, tmp_path, {"lr_scheduler_type": "constant"}, rho=0.3)
    trainer.train()

    def half(*arguments):
        return loss_of(*arguments) / 2

    updates = in_updates(trainer.data_collator.batches, 1)
    algorithm_1(plain, adamw(plain), updates, half, rho=0.3, clip=clipped_to(1.0))
    assert_close(model, plain)


def test_a_stop_between_micro_batches_leaves_nothing_for_the_next_training(tmp_path):
    class Stop(TrainerCallback):
        def on_substep_end(self, arguments, state, control, **options):
            control.should_training_stop = True

    def trained(stop_first):
        model = Classifier()
        options = {"gradient_accumulation_steps": 3, "max_steps": 2}
        trainer = trainer_of(SharpnessAwareTrainer, model, tmp_path, options, rho=0.3)
        if stop_first:
            trainer.add_callback(Stop)
            trainer.train()
            trainer.remove_callback(Stop)
        trainer.train()
        return model

    assert_close(trained(True), trained(False), 0.0)


class ForeignSAM(torch.optim.SGD):
    """As the SAM of many copies: two steps by hand."""

    def first_step(self):
        pass

    def second_step(self):
        pass


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"rho": -1}, {}, "rho is -1, but"),
        ({"direction": "up"}, {}, "direction is 'up', but it must be one of gradient, "),
        ({"normalization": "l2"}, {}, "normalization is 'l2', but it must be one of none, element-wise, "),
        ({"ascent_scope": "epoch"}, {}, "ascent_scope is 'epoch', but it must be one of update, micro-batch"),
        ({"ascent_from": -1}, {}, "ascent_from is -1, but"),
        (
            {"ascent_scope": "micro-batch", "direction": "momentum"},
            {},
            "direction 'momentum' makes one epsilon for the update: choose ascent_scope='update'",
        ),
        ({"direction": "momentum"}, {"optim": "sgd"}, "SGD keeps no first moment"),
        ({"direction": "momentum"}, {"optim": "adafactor"}, "Adafactor keeps no first moment"),
        ({"normalization": "adam"}, {"optim": "sgd"}, "SGD does not keep Adam's second moment"),
        (
            {"optimizer_cls_and_kwargs": (SharpnessAware, {})},
            {},
            "the optimizer is SharpnessAware, which is sharpness-aware already: give the base optimizer",
        ),
    ],
    ids=str,
)
def test_bad_input_is_refused_when_the_trainer_is_made(settings, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(SharpnessAwareTrainer, Classifier(), tmp_path, options, **{"rho": 0.3, **settings})


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            lambda model: SharpnessAware(adamw(model), model, 0.1),
            {},
            "SharpnessAware, which is sharpness-aware",
        ),
        (lambda model: ForeignSAM(model.parameters(), lr=0.1), {}, "ForeignSAM, which is sharpness-aware"),
        (
            lambda model: torch.optim.RMSprop(model.parameters()),
            {"direction": "momentum"},
            "RMSprop keeps no first moment",
        ),
    ],
)
def test_an_optimizer_that_will_not_do_is_refused_when_the_trainer_is_made(make, settings, message, tmp_path):
    model = Classifier()
    with pytest.raises(ValueError, match=message):
        optimizers = (make(model), None)
        trainer_of(SharpnessAwareTrainer, model, tmp_path, optimizers=optimizers, rho=0.3, **settings)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(DistributedType.DEEPSPEED, "DEEPSPEED, which keeps"), (DistributedType.FSDP, "set fsdp_version to 2")],
)
def test_what_divides_a_model_is_refused_when_the_trainer_is_made(kind, message, monkeypatch, tmp_path):
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(ValueError, match=message):
        trainer_of(SharpnessAwareTrainer, Classifier(), tmp_path, rho=0.3)


def test_rho_is_asked_for(tmp_path):
    with pytest.raises(TypeError, match="SharpnessAwareTrainer needs rho, the radius"):
        trainer_of(SharpnessAwareTrainer, Classifier(), tmp_path)


def test_a_training_that_ends_before_the_first_ascent_is_refused_before_a_weight_moves(tmp_path):
    model, before = Classifier(), Classifier()
    trainer = trainer_of(SharpnessAwareTrainer, model, tmp_path, rho=0.3, ascent_from=4)
    with pytest.raises(ValueError, match="ascent_from is 4, but training ends after 4 updates"):
        trainer.train()
    assert_close(model, before, 0.0)


def test_the_output_of_a_teacher_may_be_an_argument():
    """transformers' outputs are dictionaries, but they refuse to be filled again as those are."""
    torch.manual_seed(0)
    student, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(student.state_dict())
    inputs, output = torch.randn(4, 3), SequenceClassifierOutput(logits=torch.randn(4, 2))
    logits = output.logits

    def distill(model, logits):
        loss = F.mse_loss(model(inputs), logits)
        loss.backward()
        return loss

    def distill_from(output):
        output["logits"] = output.logits - 1.0
        return distill(student, output.logits)

    TwoPasses(Perturbation(student.named_parameters(), 0.3), [student])(distill_from, output)
    TwoPasses(Perturbation(other.named_parameters(), 0.3), [other])(distill, other, logits - 1.0)
    assert torch.equal(student.weight.grad, other.weight.grad)


class Unsized(torch.utils.data.IterableDataset):
    """Five batches of an epoch, whose number the Trainer does not know."""

    def __iter__(self):
        return iter(list(zip(*examples()))[:20])


def test_an_update_may_begin_in_one_epoch_of_unknown_length_and_end_in_the_next(tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_steps": 6}
    stock, ours = Classifier(), Classifier()
    for kind, model, own in ((Trainer, stock, {}), (SharpnessAwareTrainer, ours, {"rho": 1e-9})):
        trainer = trainer_of(kind, model, tmp_path, options, **own)
        trainer.train_dataset = Unsized()
        assert trainer.train().global_step == 6
    assert_close(stock, ours, 1e-6)
