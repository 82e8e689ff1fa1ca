"""``python -m fairseq_asam.vision`` with models that train in no time."""

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_asam.vision.__main__ import main
from fairseq_asam.vision.models import MODELS


class Tiny(nn.Module):
    """A network of two layers on images of 8 x 8."""

    def __init__(self, num_classes, noise):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 16), noise, nn.ReLU(), nn.Linear(16, num_classes))

    def forward(self, images):
        return self.layers(F.avg_pool2d(images, 4)[:, 0].flatten(1))


class TinyInFloat64(Tiny):
    """Without noise and in float64, where several processes must agree with one."""

    def __init__(self, num_classes):
        super().__init__(num_classes, nn.Identity())
        self.double()

    def forward(self, images):
        return super().forward(images.double())


def noisy(num_classes):
    """Batch normalization and dropout: all that a resumed run may get wrong."""
    return Tiny(num_classes, nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.2)))


MODELS.update(tiny=noisy, tiny_float64=TinyInFloat64)

if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
