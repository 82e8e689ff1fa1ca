"""The networks by name: sizes against their papers, and that every weight learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_asam.vision.models import MODELS, ShakeDrop, build_model


def weights_in(model: nn.Module) -> int:
    """Parameters outside batch normalization, which the papers' figures leave out."""
    return sum(
        parameter.numel()
        for module in model.modules()
        if not isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters(recurse=False)
    )


@pytest.mark.parametrize(
    ("name", "classes", "stated", "unit"),
    [
        # He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, Table 6 (million parameters)
        ("resnet20", 10, 0.27, 0.01),
        ("resnet32", 10, 0.46, 0.01),
        ("resnet56", 10, 0.85, 0.01),
        # Zagoruyko and Komodakis, "Wide Residual Networks", 2016, Table 4
        ("wrn16_8", 10, 11.0, 0.1),
        ("wrn28_10", 10, 36.5, 0.1),
        # Han et al., "Deep Pyramidal Residual Networks", CVPR 2017, Table 4
        ("pyramidnet272", 10, 26.0, 0.1),
        # Xie et al., "Aggregated Residual Transformations", CVPR 2017, Table 1
        ("resnet50", 1000, 25.5, 0.1),
    ],
)
def test_a_model_has_the_size_that_its_paper_states(name, classes, stated, unit):
    assert abs(weights_in(build_model(name, classes)) / 1e6 - stated) <= unit / 2


def test_vgg19_has_the_size_that_its_paper_states_with_the_paper_s_classifier():
    classifier = (512 * 7 * 7 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * 1000
    ours = weights_in(build_model("vgg19_bn", 10)) - (512 + 1) * 10
    # Simonyan and Zisserman, ICLR 2015, Table 2, network E: 144 million
    assert abs((ours + classifier) / 1e6 - 144) <= 0.5


def densenet121(classes: int) -> int:
    """Huang et al., CVPR 2017, Table 1: growth 32, bottlenecks of 4 x 32 channels, compression 0.5."""
    count, channels = 3 * 64 * 7**2, 64
    for layers in (6, 12, 24, 16):
        for _ in range(layers):
            count += channels * 128 + 128 * 32 * 3**2
            channels += 32
        if layers != 16:
            count += channels * channels // 2
            channels //= 2
    return count + (channels + 1) * classes


def resnext29_32x4d(classes: int) -> int:
    """Xie et al., Section 5.3: three stages of three blocks, whose outputs have 256, 512 and 1024 channels,
    and C (d_in d + 3 * 3 * d * d + d d_out) weights in a block of cardinality C (Equation 4)."""
    count, channels = 3 * 64 * 3**2, 64
    for outputs, d in ((256, 4), (512, 8), (1024, 16)):
        count += channels * outputs  # the shortcut of the first block
        for _ in range(3):
            count += 32 * (channels * d + 3**2 * d * d + d * outputs)
            channels = outputs
    return count + (channels + 1) * classes


def wrn28_2(classes: int) -> int:
    """Zagoruyko and Komodakis, Table 1 with k = 2 and N = (28 - 4) / 6 = 4."""
    count, channels = 3 * 16 * 3**2, 16
    for outputs in (32, 64, 128):
        count += channels * outputs  # the shortcut of the first block
        for _ in range(4):
            count += (channels + outputs) * outputs * 3**2
            channels = outputs
    return count + (channels + 1) * classes


@pytest.mark.parametrize("by_hand", [densenet121, resnext29_32x4d, wrn28_2])
def test_a_model_whose_size_no_paper_states_has_the_layers_of_its_paper(by_hand):
    assert weights_in(build_model(by_hand.__name__, 100)) == by_hand(100)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_finite_gradient(name):
    torch.manual_seed(0)
    model = build_model(name, 10)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    F.cross_entropy(logits, torch.tensor([3, 7])).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


def test_shakedrop_scales_output_and_gradient_of_branches_that_do_not_live():
    torch.manual_seed(0)
    layer, branch = ShakeDrop(life=0.25), torch.ones(4, 2, 3, 3, requires_grad=True)
    lived, alphas, betas = 0, [], []
    for _ in range(2000):
        branch.grad = None
        output = layer(branch)
        output.sum().backward()
        # one factor for an image, over all its channels and pixels
        assert (output == output[:, :1, :1, :1]).all() and (branch.grad == branch.grad[:, :1, :1, :1]).all()
        if torch.allclose(output, torch.ones(())):
            lived += 1
            assert torch.allclose(branch.grad, torch.ones(()))
        else:
            alphas.append(output[:, 0, 0, 0].detach())
            betas.append(branch.grad[:, 0, 0, 0])
    assert lived / 2000 == pytest.approx(0.25, abs=0.03)
    for factors, low in ((torch.cat(alphas), -1), (torch.cat(betas), 0)):
        assert low <= factors.min() < low + 0.01 and 0.99 < factors.max() <= 1
        assert factors.mean().item() == pytest.approx((low + 1) / 2, abs=0.03)
    assert torch.equal(layer.eval()(branch), 0.25 * branch)


def test_pyramidnet_drops_branches_ever_more_often_towards_the_end():
    lives = [
        module.life for module in build_model("pyramidnet272", 10).modules() if isinstance(module, ShakeDrop)
    ]
    assert len(lives) == 90
    assert lives == pytest.approx([1 - 0.5 * (number + 1) / 90 for number in range(90)])


def test_dropout_is_between_the_convolutions_of_each_block_and_on_hidden_layers():
    wide, plain = build_model("wrn28_2", 10, dropout=0.3), build_model("wrn28_2", 10, dropout=0.0)
    assert plain.state_dict().keys() == build_model("wrn28_2", 10).state_dict().keys()
    names = [name for name, module in wide.named_modules() if isinstance(module, nn.Dropout)]
    assert names == [f"features.stage{i}.unit{j}.body.conv2.0" for i in (1, 2, 3) for j in (1, 2, 3, 4)]
    assert all(wide.get_submodule(name).p == 0.3 for name in names)
    images = torch.randn(2, 3, 32, 32)
    for model, is_random in ((wide, True), (plain, False), (build_model("mlp", 10, dropout=0.3), True)):
        assert torch.equal(model(images), model(images)) is not is_random
        assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize("name", ["resnet20", "vgg19_bn"])
def test_dropout_is_refused_where_a_model_has_none(name):
    with pytest.raises(ValueError, match=f"{name} has no dropout: .*one of mlp, wrn16_8"):
        build_model(name, 10, dropout=0.0)


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("resnet18", 10, "there is no model 'resnet18': choose one of densenet121, mlp, pyramidnet272"),
        ("wrn16_8", 1000, "of 10 or 100 classes, not of 1000"),
    ],
)
def test_a_model_that_does_not_exist_is_refused(name, classes, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, classes)
