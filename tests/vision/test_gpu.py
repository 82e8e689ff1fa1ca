"""What needs a GPU."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from fairseq_asam import Perturbation
from fairseq_asam.vision.models import build_model
from fairseq_asam.vision.options import TrainOptions
from fairseq_asam.vision.train import Meter, train
from fairseq_asam.vision.update import Update

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def accelerator_of_its_own():
    """accelerate allows one precision in a process."""
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.mark.parametrize("m", [None, 4])
@pytest.mark.parametrize("normalization", [None, "none", "element-wise"])
def test_an_update_does_not_stall_the_device(normalization, m):
    accelerator = Accelerator()
    model = build_model("resnet8", 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    perturbation = None
    if normalization is not None:
        perturbation = Perturbation(model.named_parameters(), 0.5, normalization=normalization)
    update, meter = Update(accelerator, prepared, optimizer, perturbation, m=m), Meter(accelerator)
    images = torch.randn(16, 3, 32, 32, device="cuda")
    targets = torch.arange(16, device="cuda") % 10
    meter.add(update(images, targets))
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter.add(update(images, targets))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.means()["loss"] > 0


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_learns_digits_the_same_way_twice(precision, tmp_path):
    """The same way to the bit; in half precision, with weights in float32."""
    results, weights = [], []
    for run in ("one", "two"):
        options = TrainOptions("digits", "resnet8", "asam", tmp_path / run, mixed_precision=precision)
        results.append(train(options))
        weights.append(torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["model"])
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"] > 0.9
    assert all(record["sharpness"] > 0 for record in results[0]["epochs"])
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    assert all(w.dtype in (torch.float32, torch.int64) for w in weights[0].values())
