"""Trains an image classifier with SGD, SAM or ASAM (Section 5.2 of the paper)."""

from __future__ import annotations

import math
import os
import platform
import time
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2
from tqdm import tqdm

from fairseq_asam import Perturbation
from fairseq_asam.sharpness.directions import DIRECTIONS
from fairseq_asam.sharpness.late_start import first_ascent

from . import data, models
from .batches import Batches, evaluation_loader, seed_of, training_loader
from .options import TrainOptions
from .run_folder import RunFolder
from .update import Measured, Update

# Updates between two readings of the meter, each of which waits for the device.
LOOK_EVERY = 20

# The variables that tell accelerate to divide a model over processes.
DIVIDES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def train(options: TrainOptions) -> dict[str, Any]:
    """Make the run with *options*, or the rest of it, and return its result.

    The result, also in ``result.json`` of the run's folder, is a dict of

    - ``options``: those that decide what is computed;
    - ``epochs``: a record of each, with ``epoch``, ``train_loss`` (of the first pass, with label smoothing
      and augmented images), ``train_accuracy``, ``sharpness`` (the mean of L(w + epsilon) - L(w) where it was
      measured; 0 for sgd), ``test_loss``, ``test_accuracy``, ``test_top5_accuracy`` and ``seconds`` of
      training;
    - ``train_loss``, ``train_accuracy``, ``test_loss``, ``test_accuracy``, ``test_top5_accuracy`` after the
      last epoch: in evaluation mode, without label smoothing and augmentation, but with label noise;
    - ``generalization_gap``: test_loss - train_loss;
    - ``max_test_accuracy``: the best of all epochs, which the paper's tables report;
    - ``diverged``: whether a loss that is not finite ended the run early;
    - ``seconds`` of all epochs and evaluations, and ``hardware``.

    Accuracies are in [0, 1]. A number that is not finite is ``None`` in the file. With ``hold_out``, the
    held-out images take the place of the test images.

    Raises:
        ValueError: a value is not allowed, before training starts.
        FileNotFoundError: the data set is missing.
    """
    return Run(options).finish()


class Run:
    """A training run, ready to go on after its last epoch. Raises what :func:`train` raises."""

    def __init__(self, options: TrainOptions):
        self.options = options = options.resolved()
        _refuse_to_divide()
        has_gpu = torch.cuda.is_available()
        if options.mixed_precision == "fp16" and not has_gpu:
            raise ValueError("mixed_precision is fp16, which needs a GPU: choose no or bf16 on a CPU")
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            cpu=not has_gpu,  # without it, each process of torchrun would train alone
        )
        options.check_shares(self.accelerator.num_processes)
        self.folder = RunFolder(options.output, options.of_the_run())
        self.result = self.folder.result()
        checkpoint = self.folder.checkpoint() if self.result is None else None
        self._refuse_other_folders(checkpoint)
        if self.result is not None:
            return
        torch.backends.cudnn.deterministic = True
        self._load_data()
        self._build_model()
        self.epochs: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.updates = 0
        if checkpoint is not None:
            self._restore(checkpoint)

    def _refuse_other_folders(self, checkpoint: dict[str, Any] | None) -> None:
        """Raise if processes would go on after different epochs."""
        done = len(checkpoint["epochs"]) if checkpoint else 0
        mine = torch.tensor([self.options.epochs if self.result else done], device=self.accelerator.device)
        if len(self.accelerator.gather(mine).unique()) > 1:
            raise ValueError(
                f"the processes find different runs in '{self.folder.path}', as on several machines: choose "
                "an output on a disk that they share"
            )

    def finish(self) -> dict[str, Any]:
        """Train to the last epoch, or to a loss that is not finite, and return the result."""
        if self.result is not None:
            self._print(f"{self.folder.path} is finished.")
            return self.result
        writer = None
        if self.accelerator.is_main_process:
            writer = SummaryWriter(self.folder.path / "tensorboard", purge_step=len(self.epochs) + 1)
        diverged = False
        while len(self.epochs) < self.options.epochs and not diverged:
            begin = time.perf_counter()
            record = self._epoch(len(self.epochs) + 1)
            diverged = not all(math.isfinite(record[loss]) for loss in ("train_loss", "test_loss"))
            self.epochs.append(record)
            self.seconds += time.perf_counter() - begin
            self._report(writer, record)
            if not diverged and self.accelerator.is_main_process:
                self.folder.save_checkpoint(self._checkpoint())
        if writer is not None:
            writer.close()
        self.result = self._summary(diverged)
        if self.accelerator.is_main_process:
            self.folder.save_result(self.result)
        self.accelerator.wait_for_everyone()
        return self.result

    def _load_data(self) -> None:
        options, accelerator = self.options, self.accelerator
        loading = {name: getattr(options, name) for name in ("label_noise", "hold_out", "seed", "download")}
        with accelerator.local_main_process_first():  # it downloads or unpacks for the others
            augmented = data.load(options.dataset, options.data, **loading, augmentation=options.augmentation)
            plain = data.load(options.dataset, options.data, **loading, augmentation="none")
        if len(augmented.train) < options.batch_size:
            raise ValueError(
                f"batch_size is {options.batch_size}, but {options.dataset} has {len(augmented.train)} "
                "training images: choose a smaller one"
            )
        self.num_classes = augmented.num_classes
        share = (accelerator.process_index, accelerator.num_processes)
        place = (options.workers, accelerator.device)
        self.batches = Batches(len(augmented.train), options.batch_size, options.seed, *share)
        self.first_ascent = first_ascent(options.ascent_from, options.epochs * len(self.batches))
        self.training = training_loader(augmented.train, self.batches, *place)
        self.evaluation_on_training = evaluation_loader(plain.train, *place, *share)
        self.evaluation = evaluation_loader(augmented.test, *place, *share)
        self.cutmix = v2.CutMix(num_classes=self.num_classes) if options.cutmix else None

    def _build_model(self) -> None:
        options = self.options
        set_seed(seed_of(options.seed))
        # Convolutions are faster with channels last.
        self.model = models.build_model(options.model, self.num_classes).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        perturbation = None
        if options.optimizer != "sgd":
            perturbation = Perturbation(
                self.model.named_parameters(),
                rho=options.rho,
                eta=options.eta,
                p=options.p_norm,
                normalization=options.normalization,
                normalize_bias=options.normalize_bias,
                direction=DIRECTIONS[options.ascent_direction](
                    optimizer, seed=options.seed, number=lambda: self.updates
                ),
            )
        self.update = Update(
            self.accelerator,
            prepared,
            self.optimizer,
            perturbation,
            label_smoothing=options.label_smoothing,
            m=options.m,
            statistics_at_w=options.batch_norm_statistics == "first",
        )

    def _epoch(self, epoch: int) -> dict[str, Any]:
        """Train for an epoch, evaluate, and return the record."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * (1 + math.cos(math.pi * (epoch - 1) / self.options.epochs)) / 2
        # Each epoch has its own seed, so that a checkpoint needs no state of random generators.
        set_seed(seed_of(self.options.seed, epoch, self.accelerator.process_index))
        self.batches.epoch = epoch
        self.model.train()
        begin = time.perf_counter()
        meter = Meter(self.accelerator)
        bar = tqdm(
            self.training,
            desc=f"epoch {epoch}/{self.options.epochs}",
            unit="batch",
            disable=None if self.accelerator.is_main_process else True,
            leave=False,
        )
        means = meter.means()
        for count, (images, targets) in enumerate(bar, start=1):
            if self.cutmix is not None:
                images, targets = self.cutmix(images, targets)
            self.updates = (epoch - 1) * len(self.batches) + count - 1
            self.update.ascends = self.updates >= self.first_ascent
            meter.add(self.update(*self._on_device(images, targets)))
            if count % LOOK_EVERY == 0 or count == len(self.batches):
                means = meter.means()
                bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
                if not math.isfinite(means["loss"]):
                    break
        bar.close()
        record = {"epoch": epoch, **{f"train_{k}": means[k] for k in ("loss", "accuracy")}}
        record["sharpness"] = means["sharpness"]
        record["seconds"] = time.perf_counter() - begin
        # Evaluate with the batch-normalization statistics of process 0, as DistributedDataParallel trains.
        broadcast(list(self.model.buffers()))
        record.update({f"test_{k}": v for k, v in self._evaluate(self.evaluation).items()})
        return record

    @torch.inference_mode()
    def _evaluate(self, loader: DataLoader) -> dict[str, float]:
        """Return cross-entropy, accuracy and top-5 accuracy over the images of all processes."""
        self.model.eval()
        totals = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        for images, targets in loader:
            images, targets = self._on_device(images, targets)
            outputs = self.model(images)
            best = outputs.topk(min(5, self.num_classes)).indices == targets[:, None]
            loss = F.cross_entropy(outputs, targets, reduction="sum")
            totals += torch.stack([torch.ones_like(loss) * len(targets), loss, best[:, 0].sum(), best.sum()])
        count, loss, top1, top5 = self.accelerator.reduce(totals, "sum").tolist()
        return {"loss": loss / count, "accuracy": top1 / count, "top5_accuracy": top5 / count}

    def _on_device(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        device = self.accelerator.device
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        return images, targets.to(device, non_blocking=True)

    def _summary(self, diverged: bool) -> dict[str, Any]:
        begin = time.perf_counter()
        train, last = self._evaluate(self.evaluation_on_training), self.epochs[-1]
        return {
            "options": self.folder.options,
            "epochs": self.epochs,
            **{k: last[k] for k in ("test_loss", "test_accuracy", "test_top5_accuracy")},
            "train_loss": train["loss"],
            "train_accuracy": train["accuracy"],
            "generalization_gap": last["test_loss"] - train["loss"],
            "max_test_accuracy": max(record["test_accuracy"] for record in self.epochs),
            "diverged": diverged,
            "seconds": self.seconds + time.perf_counter() - begin,
            "hardware": self._hardware(),
        }

    def _checkpoint(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "num_classes": self.num_classes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "epochs": self.epochs,
            "seconds": self.seconds,
        }

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["num_classes"] != self.num_classes:
            raise ValueError(
                f"{self.folder.checkpoint_file} is of a model with {checkpoint['num_classes']} classes, but "
                f"{self.options.dataset} has {self.num_classes}: choose another output"
            )
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self.epochs, self.seconds = checkpoint["epochs"], checkpoint["seconds"]

    def _report(self, writer: SummaryWriter | None, record: dict[str, Any]) -> None:
        if writer is not None:
            for name in record.keys() - {"epoch"}:
                writer.add_scalar(name.replace("_", "/", 1), record[name], record["epoch"])
            writer.flush()
        values = ", ".join(f"{k} {v:.4f}" for k, v in record.items() if k != "epoch")
        self._print(f"epoch {record['epoch']}/{self.options.epochs}: {values}")

    def _print(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def _hardware(self) -> str:
        device = self.accelerator.device
        name = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        )
        return f"{self.accelerator.num_processes} x {name}, torch {torch.__version__}"


def _refuse_to_divide() -> None:
    """Raise ValueError if accelerate is to divide the model: a run saves whole weights."""
    for variable, name in DIVIDES.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(
                f"accelerate is to use {name} ({variable} is {os.environ[variable]}), but every process of a "
                "run has the whole model: use DistributedDataParallel, as accelerate launch --multi_gpu does"
            )


class Meter:
    """The means over the updates and processes of an epoch. They stay on the device until they are read."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._totals = torch.zeros(5, dtype=torch.float64, device=accelerator.device)

    def add(self, measured: Measured) -> None:
        """Add an update. A sharpness that is not finite, as when fp16 overflows, does not count."""
        loss, accuracy, sharpness = measured
        finite = torch.isfinite(sharpness)
        one = torch.ones_like(loss)
        self._totals += torch.stack([one, loss, accuracy, sharpness.where(finite, 0.0), finite])

    def means(self) -> dict[str, float]:
        """Return the means so far. All processes must call it together."""
        count, loss, accuracy, sharpness, finite = self.accelerator.reduce(self._totals, "sum").tolist()
        return {
            "loss": loss / max(count, 1),
            "accuracy": accuracy / max(count, 1),
            "sharpness": sharpness / finite if finite else math.nan,
        }
