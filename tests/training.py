"""fairseq's Trainer in this process, in float64, on one worker or as one of several."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from fairseq import options, tasks, utils
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model, register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel, base_architecture
from fairseq.trainer import Trainer

import fairseq_asam.tasks  # noqa: F401  registers the optimizers
from tests.commands import recipe
from tests.processes import started


def clip_grad_norm_(parameters, max_norm, aggregate_norm_fn=None):
    return torch.nn.utils.clip_grad_norm_(list(parameters), max_norm if max_norm > 0 else math.inf)


def softmax(x, dim, onnx_trace=False):
    return x.softmax(dim, dtype=torch.promote_types(x.dtype, torch.float32))


def log_softmax(x, dim, onnx_trace=False):
    return x.log_softmax(dim, dtype=torch.promote_types(x.dtype, torch.float32))


#: fairseq takes softmax and gradient norms in float32 even in float64, where its rounding would hide ours.
FLOAT64_THROUGHOUT = {"clip_grad_norm_": clip_grad_norm_, "softmax": softmax, "log_softmax": log_softmax}


@register_criterion("scaled_cross_entropy", dataclass=CrossEntropyCriterionConfig)
class ScaledCrossEntropy(CrossEntropyCriterion):
    """A criterion with a parameter of its own."""

    def __init__(self, task, sentence_avg):
        super().__init__(task, sentence_avg)
        self.scale = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, model, sample, reduce=True):
        loss, sample_size, logging_output = super().forward(model, sample, reduce)
        return loss * self.scale.square().sum(), sample_size, logging_output


class FeatureBatchNorm(torch.nn.BatchNorm1d):
    """Batch normalization of what fairseq's layers pass on, (tokens, sentences, features)."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


@register_model("batch_normalized_transformer")
class BatchNormalizedTransformer(TransformerModel):
    """A Transformer that normalizes what its encoder passes to the decoder."""

    @classmethod
    def build_encoder(cls, args, src_dict, embed_tokens):
        encoder = super().build_encoder(args, src_dict, embed_tokens)
        encoder.layer_norm = FeatureBatchNorm(embed_tokens.embedding_dim)
        return encoder


register_model_architecture("batch_normalized_transformer", "batch_normalized_transformer")(base_architecture)


def configuration(data: Path, *flags):
    """The fairseq configuration of a small model without dropout."""
    parser = options.get_training_parser()
    arguments = recipe(data, data, "--dropout", "0", "--max-tokens", "300", *flags)
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [str(a) for a in arguments]))


def trainer_and_batches(cfg, dtype=torch.float64, weights=None):
    """A Trainer in *dtype*, unless *cfg* asks for half precision, with the given *weights* or the same
    random ones in every call, and the batches of an epoch."""
    torch.manual_seed(1)
    task = tasks.setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    if weights is not None:
        model.load_state_dict(weights)
    trainer = Trainer(cfg, task, model.to(dtype), criterion)
    iterator = trainer.get_train_iterator(epoch=1, shard_batch_itr=False)
    trainer.begin_epoch(1)
    return trainer, list(iterator.next_epoch_itr(shuffle=True))


def mean_sharpness(trainer, batches, updates: int = 40) -> float:
    """The mean of L(w + epsilon) - L(w) over so many updates, as fairseq logs it."""
    seen = [trainer.train_step([batches[i % len(batches)]])["sharpness"] for i in range(updates)]
    return sum(seen) / len(seen)


def merged(trainer, batches):
    """One batch of all the sentences of *batches*."""
    dataset = trainer.task.dataset("train")
    return dataset.collater([dataset[i] for batch in batches for i in batch["id"].tolist()])


def on_workers(world_size: int, function, cfg_arguments: list, *arguments) -> list:
    """Run ``function(cfg, rank, *arguments)`` on *world_size* CPU workers that know each other through
    gloo, and return what each returned, which must be picklable. A worker that hangs fails the test."""
    flags = ["--distributed-world-size", world_size, "--distributed-rank", 0, "--distributed-no-spawn"]
    flags += ["--distributed-backend", "gloo", "--distributed-init-method", "tcp://127.0.0.1:1"]
    # fairseq needs a second to make a configuration, hence one for all workers.
    cfg = configuration(*cfg_arguments, *(flags if world_size > 1 else []))
    return started(world_size, _worker, function, cfg, arguments)


def _worker(rank, world_size, port, function, cfg, arguments):
    for name, replacement in FLOAT64_THROUGHOUT.items():
        setattr(utils, name, replacement)
    # fairseq names a device even where there is none, which torch's DDP refuses.
    ddp = distributed_fairseq_model.DistributedDataParallel
    distributed_fairseq_model.DistributedDataParallel = lambda *args, **kwargs: ddp(
        *args, **{**kwargs, "device_ids": None, "output_device": None}
    )
    if world_size > 1:
        cfg.distributed_training.distributed_rank = rank
        cfg.distributed_training.distributed_init_method = f"tcp://127.0.0.1:{port}"
    results = []
    distributed_utils.call_main(cfg, lambda cfg: results.append(function(cfg, rank, *arguments)))
    return results[0]
