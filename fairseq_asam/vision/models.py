"""The networks of Section 5.2 of the paper, and small ones for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torchvision
from pytorchcv.models import shakedropresnet_cifar
from pytorchcv.models.preresnet import PreResUnit
from pytorchcv.models.pyramidnet import PyrUnit
from pytorchcv.models.pyramidnet_cifar import get_pyramidnet_cifar
from pytorchcv.models.resnet_cifar import CIFARResNet, get_resnet_cifar
from pytorchcv.models.resnext_cifar import get_resnext_cifar
from pytorchcv.models.wrn_cifar import get_wrn_cifar
from torch import Tensor, nn

# Probability that the last residual branch lives (p_L of Yamada et al. 2019). It falls linearly to this.
_LAST_LIFE = 0.5


class ShakeDrop(nn.Module):
    """ShakeDrop regularization (Yamada et al. 2019) of a residual branch, N x C x H x W.

    The branch lives with the probability *life*. Otherwise each image's output is multiplied by an alpha that
    is uniform in [-1, 1], and its gradient by a beta that is uniform in [0, 1].
    """

    def __init__(self, life: float):
        super().__init__()
        self.life = life

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return self.life * branch
        lives = torch.bernoulli(branch.new_full((1,), self.life))
        alpha = branch.new_empty(len(branch), 1, 1, 1).uniform_(-1, 1)
        return shakedropresnet_cifar.ShakeDrop.apply(branch, lives, alpha)


def pyramidnet272(num_classes: int) -> nn.Module:
    """Return PyramidNet-272 (alpha = 200, bottlenecks) with ShakeDrop at the end of every residual branch."""
    model = get_pyramidnet_cifar(num_classes, blocks=272, alpha=200, bottleneck=True)
    units = [module for module in model.modules() if isinstance(module, PyrUnit)]
    for number, unit in enumerate(units, start=1):
        unit.bn = nn.Sequential(unit.bn, ShakeDrop(1 - (1 - _LAST_LIFE) * number / len(units)))
    return model


def vgg19_bn(num_classes: int) -> nn.Module:
    """Return VGG-19 with batch normalization and one linear layer for the 512 numbers that the convolutions
    leave of a 32 x 32 image. For ImageNet there are three."""
    model = torchvision.models.vgg19_bn()
    model.avgpool = nn.Identity()
    model.classifier = nn.Linear(512, num_classes)
    return model


def resnet8(num_classes: int) -> nn.Module:
    """Return a ResNet for a CPU: one block a stage, half the width, and a first convolution that halves the
    image."""
    model = CIFARResNet([[8], [16], [32]], init_block_channels=8, bottleneck=False, num_classes=num_classes)
    model.features.init_block.conv.stride = (2, 2)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def mlp(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Return a network for a CPU: two hidden layers of 128 with batch normalization and *dropout*, which see
    8 x 8 pixels of an image."""
    layers: list[nn.Module] = [nn.AvgPool2d(4), nn.Flatten()]
    for inputs in (3 * 8 * 8, 128):
        layers += [nn.Linear(inputs, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(128, num_classes))


def wide_resnet(num_classes: int, blocks: int, width_factor: int, dropout: float = 0.0) -> nn.Module:
    """Return a wide ResNet with *dropout* between the two convolutions of each block (Zagoruyko and Komodakis
    2016, Section 2.4)."""
    model = get_wrn_cifar(num_classes, blocks=blocks, width_factor=width_factor)
    if dropout:
        for unit in [module for module in model.modules() if isinstance(module, PreResUnit)]:
            unit.body.conv2 = nn.Sequential(nn.Dropout(dropout), unit.body.conv2)
    return model


#: Name -> function of the number of classes. ``resnet50`` takes images of ImageNet, the others take 32 x 32
#: pixels. So does ``densenet121``: it is made for ImageNet, but its paper has no other of this depth. Where
#: the shape changes, the shortcuts of the CIFAR ResNets are projections (option B of He et al. 2016).
MODELS: dict[str, Callable[..., nn.Module]] = {
    "densenet121": lambda num_classes: torchvision.models.densenet121(num_classes=num_classes),
    "mlp": mlp,
    "resnet8": resnet8,
    "resnet20": partial(get_resnet_cifar, blocks=20, bottleneck=False),
    "resnet32": partial(get_resnet_cifar, blocks=32, bottleneck=False),
    "resnet56": partial(get_resnet_cifar, blocks=56, bottleneck=False),
    "vgg19_bn": vgg19_bn,
    "resnext29_32x4d": partial(get_resnext_cifar, blocks=29, cardinality=32, bottleneck_width=4),
    "wrn16_8": partial(wide_resnet, blocks=16, width_factor=8),
    "wrn28_2": partial(wide_resnet, blocks=28, width_factor=2),
    "wrn28_10": partial(wide_resnet, blocks=28, width_factor=10),
    "pyramidnet272": pyramidnet272,
    "resnet50": lambda num_classes: torchvision.models.resnet50(num_classes=num_classes),
}

#: The models that can be built with dropout.
WITH_DROPOUT = ("mlp", "wrn16_8", "wrn28_2", "wrn28_10")


def build_model(name: str, num_classes: int, dropout: float | None = None) -> nn.Module:
    """Return a new network with weights from torch's global random number generator.

    Raises:
        ValueError: there is no such model, or it does not take so many classes or dropout.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model '{name}': choose one of {', '.join(sorted(MODELS))}")
    if name != "resnet50" and num_classes not in (10, 100):
        raise ValueError(
            f"{name} takes 32 x 32 images of 10 or 100 classes, not of {num_classes}: use resnet50 instead"
        )
    if dropout is None:
        return MODELS[name](num_classes)
    if name not in WITH_DROPOUT:
        raise ValueError(f"{name} has no dropout: leave it out, or choose one of {', '.join(WITH_DROPOUT)}")
    return MODELS[name](num_classes, dropout=dropout)
