"""Combinations of options in which every pair of their values occurs, each trained by fairseq's Trainer and
held against the plain reference.

    python -m tests.tasks.matrix [--out runs/matrix]

prints a Markdown table, one row a combination, and writes ``matrix.md`` and ``matrix.json``. Its columns:
``largest``, the largest difference of a weight from the reference, relative to the weight and never to less
than 0.01; ``distance``, the l2 norm of all differences, relative to that of the way from the first weights;
``base``, the distance of the base optimizer from a reference without epsilon; ``effect``, that between the
two references.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import random
import tempfile
from itertools import chain, combinations, product
from pathlib import Path

import torch
from allpairspy import AllPairs
from fairseq.optim import FP16Optimizer

from tests.commands import BACKENDS, ROOT, SIZES, generate_corpus
from tests.training import configuration, on_workers, trainer_and_batches

from .reference import Reference

UPDATES = 4
ENDS = ("encoder", "decoder")
LSTM = [f"--{end}-{size}" for end in ENDS for size in ("embed-dim=32", "hidden-size=32")]
FCONV = [f"--{end}-{size}" for end in ENDS for size in ("embed-dim=32", "layers=[(32, 3)] * 2")]
MOMENTUM = ["--momentum", "0.9", "--lr", "0.02"]
LAYER_DROP = ["--encoder-layerdrop", "0.5", "--encoder-layers", "3", "--find-unused-parameters"]

#: The values of each option, the default first, and their flags. The radii are large, so that half precision
#: does not hide what epsilon does; test_half_precision.py has small ones.
AXES = {
    "base": {
        "adam": [],
        "sgd": MOMENTUM,
        "nag": MOMENTUM,
        "adagrad": ["--fp16-no-flatten-grads"],
        "adadelta": ["--lr", "1"],
        "adamax": [],
        "adafactor": ["--scale-parameter", "--fp16-no-flatten-grads"],
    },
    "normalization": {
        "sam": [],
        "asam none": ["--normalization", "none"],
        "asam element-wise": ["--normalization", "element-wise"],
        "asam element-wise, biases": ["--normalization", "element-wise", "--normalize-bias"],
        "asam filter-wise": ["--normalization", "filter-wise"],
        "asam filter-wise, biases": ["--normalization", "filter-wise", "--normalize-bias"],
        "asam layer-wise": ["--normalization", "layer-wise"],
    },
    "p": {
        "p 2": ["--rho", "2"],
        "p inf": ["--p-norm", "inf", "--rho", "0.05"],
        "p 1.5": ["--p-norm", "1.5", "--rho", "4"],
    },
    "scope": {"update": [], "micro-batch": ["--ascent-scope", "micro-batch"]},
    "ascent": {
        "every": [],
        "fraction 0.4": ["--ascent-fraction", "0.4"],
        "interval 3": ["--ascent-interval", "3"],
    },
    "perturbed": {
        "all": [],
        "normalization-layers": ["--perturbed-weights", "normalization-layers"],
        "all-but-embeddings": ["--perturbed-weights", "all-but-embeddings"],
    },
    "dropout": {
        "no dropout": [],
        "same masks": ["--dropout", "0.2"],
        "fresh masks": ["--dropout", "0.2", "--fresh-masks"],
    },
    "model": {
        "transformer": ["--arch", "transformer", *SIZES, "--share-all-embeddings"],
        "layer drop": ["--arch", "transformer", *SIZES, "--share-all-embeddings", *LAYER_DROP],
        "batch norm": ["--arch", "batch_normalized_transformer", *SIZES],
        "lstm": ["--arch", "lstm", "--encoder-bidirectional", "--decoder-out-embed-dim", "32", *LSTM],
        "fconv": ["--arch", "fconv", "--decoder-out-embed-dim", "32", *FCONV],
    },
    "criterion": {
        "label-smoothed": [],
        "with a parameter": ["--criterion", "scaled_cross_entropy"],
    },
    "workers": {
        "1 worker": [],
        **{f"2 {backend}": ["--ddp-backend", backend] for backend in BACKENDS},
    },
    "accumulation": {"update-freq 1": [], "update-freq 2": ["--update-freq", "2"]},
    "clipping": {"unclipped": [], "clip 0.05": ["--clip-norm", "0.05"]},
    "average": {"no ema": [], "ema": ["--store-ema", "--ema-decay", "0.5"]},
    "precision": {"float64": [], "float32": [], "fp16": ["--fp16", "--fp16-init-scale", "4"], "bf16": []},
}
#: Biases that a softmax or a batch normalization takes away again. Their gradient is rounding, which some
#: optimizers enlarge to a step.
KEYS = "k_proj.bias"
WITHOUT_EFFECT = {
    "transformer": KEYS,
    "batch_normalized_transformer": (KEYS, "encoder.layers.0.final_layer_norm.bias"),
}
OURS = ("normalization", "p", "scope", "ascent", "perturbed")  # options of the plugin alone
DEFAULTS = {axis: next(iter(values)) for axis, values in AXES.items()}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def combination(*values: str) -> dict[str, str]:
    """The combination of these *values* and otherwise the defaults."""
    axis_of = {value: axis for axis in AXES for value in AXES[axis]}
    return {**DEFAULTS, **{axis_of[value]: value for value in values}}


#: Combinations with further flags that are refused, and how.
REFUSED = [
    (
        combination("fraction 0.4"),
        ["--ascent-interval", "3"],
        "--ascent-fraction does not go with --ascent-interval",
    ),
    (combination("normalization-layers", "lstm"), [], "--perturbed-weights is normalization-layers, but"),
    (combination("normalization-layers", "fconv"), [], "--perturbed-weights is normalization-layers, but"),
    (combination("fp16"), ["--memory-efficient-fp16"], "--memory-efficient-fp16 does not go with"),
    (combination("interval 3"), ["--zero-sharding", "os"], "with --zero-sharding os does not go with"),
    (combination(), ["--use-bmuf"], "--use-bmuf does not go with"),
    *(
        (combination(), ["--ddp-backend", backend], f"--ddp-backend {backend} does not go with")
        for backend in ("fully_sharded", "slowmo")
    ),
    *(
        (
            combination("layer drop", "2 pytorch_ddp", "micro-batch", value),
            [],
            "--find-unused-parameters does not go with",
        )
        for value in ("fraction 0.4", "fresh masks")
        if "pytorch_ddp" in BACKENDS
    ),
]


def allowed(combination: dict[str, str]) -> bool:
    """Whether fairseq and the plugin can do *combination*, of which some options may be missing, and do the
    same as the reference."""
    values = set(combination.values())
    if values >= {"layer drop", "2 pytorch_ddp", "micro-batch"} and values & {"fraction 0.4", "fresh masks"}:
        return False  # see REFUSED
    apart = [
        # Rounding decides on the sign of a gradient near 0, and with p = inf the sign alone makes epsilon.
        {"p inf", "fp16"},
        {"p inf", "bf16"},
        {"normalization-layers", "lstm"},  # they have none
        {"normalization-layers", "fconv"},
        {"ema", "batch norm"},  # fairseq cannot average the counts of batches
        {"ema", "fconv"},  # nor copy normalized weights
    ]
    return not any(values >= pair for pair in apart)


def pairs(combination: dict[str, str]) -> set[tuple]:
    """The pairs of values that *combination* tests."""
    return set(combinations(combination.items(), 2))


def wanted_pairs() -> list[tuple]:
    """All pairs of values that go together."""
    options = [[(axis, value) for value in values] for axis, values in AXES.items()]
    every = (pair for a, b in combinations(options, 2) for pair in product(a, b))
    return [pair for pair in every if allowed(dict(pair))]


def all_pairs() -> list[dict[str, str]]:
    """Combinations that test every pair of values: pairs that do not name a precision in float64."""
    chosen, tested, fixed = [], set(), {}
    draw = random.Random(1)

    def fits(row):  # allpairspy asks for incomplete rows too
        row = dict(zip(AXES, row))
        return allowed(row) and all(row.get(axis, value) == value for axis, value in fixed.items())

    # Left to itself, it stops before the last pairs where some do not go together, and takes the same value
    # wherever any would do.
    generator = AllPairs([list(values) for values in AXES.values()], filter_func=fits)
    for pair in wanted_pairs():
        if pair in tested:
            continue
        fixed.update({"precision": "float64", **dict(pair)})
        for axis in ("scope", "ascent", "perturbed", "model", "workers"):
            value = draw.choice(list(AXES[axis]))
            if axis not in fixed and allowed({**fixed, axis: value}):
                fixed[axis] = value
        chosen.append(dict(zip(AXES, next(generator))))
        tested |= pairs(chosen[-1])
        fixed.clear()
    return chosen


def flags(combination: dict[str, str], plain: bool = False) -> list[str]:
    """The arguments of fairseq-train for *combination*, or for the *plain* base optimizer of it."""
    arguments = ["--lr-scheduler", "fixed", "--warmup-updates", "0", "--max-tokens", "100"]
    for axis, value in combination.items():
        arguments += [] if plain and axis in OURS else AXES[axis][value]
    if plain:
        return [*(flag for flag in arguments if flag != "--fresh-masks"), "--optimizer", combination["base"]]
    prefix, base = combination["normalization"].split()[0], combination["base"]
    return [*arguments, "--optimizer", prefix if base == "adam" else f"{prefix}_{base}"]


def shares(combination, batches, update):
    """The micro-batches of an update, and the worker of each."""
    workers, each = int(combination["workers"][0]), int(combination["accumulation"][-1])
    first = update * workers * each
    micro_batches = [batches[(first + i) % len(batches)] for i in range(workers * each)]
    return micro_batches, [i // each for i in range(workers * each)]


def by_trainer(cfg, combination, rank):
    """The trainer after a few updates, and the batches that made epsilon in each."""
    cfg.common.bf16 = combination["precision"] == "bf16"  # --bf16 would ask for a TPU
    dtype = torch.float64 if combination["precision"] == "float64" else torch.float32
    trainer, batches = trainer_and_batches(cfg, dtype)
    criterion, seen, parts = trainer.get_criterion(), [], []
    forward = criterion.forward
    criterion.forward = lambda model, sample, **kw: seen.append(sample) or forward(model, sample, **kw)
    for update in range(UPDATES):
        seen.clear()
        mine = [batch for batch, worker in zip(*shares(combination, batches, update)) if worker == rank]
        trainer.train_step(mine)
        parts.append(seen[::2] if combination["scope"] == "micro-batch" else seen[: len(mine)])
    assert trainer.get_num_updates() == UPDATES
    return trainer, parts


def by_reference(cfg, combination, parts=None, **options):
    """The state at first, and after the same updates by the reference in float64."""
    trainer, batches = trainer_and_batches(cfg)
    with torch.no_grad():  # half precision begins with rounded weights
        for w in (*trainer.model.parameters(), *trainer.criterion.parameters()):
            w.copy_(w.to(DTYPES[combination["precision"]]))
    start = state(trainer)
    # There fairseq steps with zeros where there is no gradient.
    zeros = combination["workers"] == "2 legacy_ddp" or combination["precision"] in ("fp16", "bf16")
    reference = Reference(trainer, zeros=zeros, **options)
    for update in range(UPDATES):
        micro_batches, workers = shares(combination, batches, update)
        reference.update(micro_batches, parts and parts[update], workers)
    return start, state(trainer)


def state(trainer):
    """A copy of what was trained, by name. In half precision, the weights are their float32 masters."""
    model, criterion = trainer.get_model(), trainer.get_criterion()
    named = {n: w for module in (model, criterion) for n, w in module.named_parameters()}
    if isinstance(trainer.optimizer, FP16Optimizer):
        masters = torch.cat([w.flatten() for w in trainer.optimizer.fp32_optimizer.params])
        parts = masters.split([w.numel() for w in named.values()])
        named = {n: part.view_as(w) for (n, w), part in zip(named.items(), parts)}
    elif trainer.cfg.ema.store_ema and trainer.get_num_updates() > 0:
        named.update({f"average of {n}": w for n, w in trainer.ema.get_model().named_parameters()})
    if trainer.cfg.distributed_training.distributed_world_size == 1:
        named.update({n: b for n, b in model.named_buffers() if "running" in n})
    without_effect = WITHOUT_EFFECT.get(trainer.cfg.model._name, "nothing")
    return {n: w.detach().double().clone() for n, w in named.items() if not n.endswith(without_effect)}


def largest(actual, expected) -> float:
    """The largest difference of a number, relative to itself and never to less than 0.01."""
    return max(
        ((actual[n] - w).abs() / (w.abs() + 0.01)).max().item() for n, w in expected.items() if n in actual
    )


def distance(actual, expected, start) -> float:
    """The l2 norm of the difference, relative to that of the way from *start*."""

    def norm(a, b):
        return math.sqrt(sum((a[n] - b[n]).square().sum().item() for n in actual.keys() & start.keys()))

    return norm(actual, expected) / norm(expected, start)


def measured(cfg, rank, combination, data) -> dict:
    """What :func:`measure` returns, on the first worker."""
    logging.disable(logging.INFO)  # the table is on the same stream
    torch.cuda.current_device = lambda: None  # fairseq's half precision expects a GPU there
    torch.Tensor.cuda = lambda self: self
    try:
        trainer, parts = by_trainer(cfg, combination, rank)
    except (SystemExit, ValueError) as refusal:
        return {"refusal": str(refusal)}
    on_each = [parts]
    if "2" in combination["workers"]:
        on_each = [None, None]
        torch.distributed.all_gather_object(on_each, parts)
    parts = [list(chain(*of_update)) for of_update in zip(*on_each)]

    low_precision = combination["precision"] != "float64"
    if rank > 0 and not low_precision:
        return {}
    plain_cfg = configuration(data, *(flag for flag in flags(combination, plain=True) if flag != "--fp16"))
    if low_precision:
        cfg_in_it = copy.deepcopy(plain_cfg)
        cfg_in_it.common.fp16, cfg_in_it.distributed_training = cfg.common.fp16, cfg.distributed_training
        plain, _ = by_trainer(cfg_in_it, combination, rank)
    if rank > 0:
        return {}

    ours = cfg.optimizer
    start, expected = by_reference(
        plain_cfg,
        combination,
        parts if ours.ascent_fraction < 1 else None,
        rho=ours.rho,
        p=ours.p_norm,
        normalization=str(getattr(ours, "normalization", "none")),
        normalize_bias=getattr(ours, "normalize_bias", False),
        perturbed=str(ours.perturbed_weights),
        scope=str(ours.ascent_scope),
        fresh_masks=ours.fresh_masks,
        interval=ours.ascent_interval,
    )
    actual = state(trainer)
    result = {"largest": largest(actual, expected), "distance": distance(actual, expected, start)}
    if low_precision:
        _, plain_expected = by_reference(plain_cfg, combination, rho=0.0)
        result["base"] = distance(state(plain), plain_expected, start)
        result["effect"] = distance(plain_expected, expected, start)
    return result


def measure(combination: dict[str, str], data: Path, *others: str) -> dict:
    """Train *combination*, with *others* of fairseq's flags, and by the reference; return the columns of the
    table or the ``refusal``, a sentence."""
    workers = int(combination["workers"][0])
    return on_workers(workers, measured, [data, *flags(combination), *others], combination, data)[0]


def verdict(combination: dict[str, str], result: dict) -> str:
    """What *result* says: ``equal`` to the reference, ``within rounding`` that hides what epsilon does,
    ``DIFFERENT``, or the sentence of a refusal.

    How much rounding does depends on the base optimizer and the model: four times what it does to the base
    optimizer alone is allowed. The gradient at w + epsilon is rounded too, where it may change faster: in
    float32 a thousandth of what epsilon does may be lost, in half precision a tenth.
    """
    if "refusal" in result:
        return result["refusal"]
    if combination["precision"] == "float64":
        # fairseq's nag and adamax round the gradient to float32. adagrad makes a step of rounding.
        rounds = combination["base"] in ("nag", "adamax", "adagrad")
        return "equal" if result["largest"] <= (1e-8 if rounds else 1e-10) else "DIFFERENT"
    share = 1e-3 if combination["precision"] == "float32" else 0.1
    if not result["distance"] <= 4 * result["base"] + share * result["effect"]:
        return "DIFFERENT"
    return "equal" if result["distance"] <= result["effect"] / 2 else "within rounding"


def name(combination: dict[str, str]) -> str:
    """The values that are not the defaults."""
    return ", ".join(v for axis, v in combination.items() if v != DEFAULTS[axis]) or "the defaults"


def table_row(cells: list) -> str:
    return f"| {' | '.join(f'{c:.1e}' if isinstance(c, float) else str(c) for c in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "matrix", help="default: runs/matrix")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.INFO)
    os.environ.update(LOGLEVEL="ERROR", PYTHONWARNINGS="ignore")  # of fairseq in the workers
    numbers = ["largest", "distance", "base", "effect"]
    table, rows = [], []

    def show(cells):
        table.append(table_row(cells))
        print(table[-1], flush=True)

    show([*AXES, *numbers, "verdict"])
    show([":--"] * (len(AXES) + 5))
    with tempfile.TemporaryDirectory() as folder:
        data = generate_corpus(Path(folder) / "corpus") / "bin"
        todo = [(combination, []) for combination in all_pairs()] + [row[:2] for row in REFUSED]
        for combination, others in todo:
            try:
                result = measure(combination, data, *others)
                outcome = verdict(combination, result)
            except AssertionError as error:  # the trace of a worker
                result, outcome = {}, f"FAILED: {str(error).strip().splitlines()[-1]}"
            values = [*combination.values()]
            values[-1] = " ".join([values[-1], *others])
            show([*values, *(result.get(number, "") for number in numbers), outcome])
            rows.append({"options": combination, "others": others, **result, "verdict": outcome})
    (out / "matrix.md").write_text("\n".join(table) + "\n")
    (out / "matrix.json").write_text(json.dumps({"updates": UPDATES, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
