"""Data sets by name: what is in them, label noise, held-out images, augmentation, and missing data."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100

from fairseq_asam.vision.batches import Batches, training_loader
from fairseq_asam.vision.data import DATASETS, load, with_noise


def labels_of(dataset):
    return [label for _, label in dataset]


def images_of(dataset):
    return torch.stack([image for image, _ in dataset])


def test_digits_have_the_shape_of_cifar_and_all_images_of_scikit_learn_once():
    data = load("digits", augmentation="none")
    assert (len(data.train), len(data.test), data.num_classes) == (1197, 600, 10)
    images = torch.cat([images_of(data.train), images_of(data.test)])
    assert images.shape == (1797, 3, 32, 32) and images.dtype == torch.float32
    mean, std = DATASETS["digits"].mean[0], DATASETS["digits"].std[0]
    brightness = (images.mean((1, 2, 3)) * std + mean).tolist()
    ours = sorted(zip(brightness, labels_of(data.train) + labels_of(data.test)))
    theirs = sorted(zip((load_digits().data.mean(1) / 16).tolist(), load_digits().target.tolist()))
    assert np.allclose([mean for mean, _ in ours], [mean for mean, _ in theirs], atol=0.03)
    assert Counter(label for _, label in ours) == Counter(label for _, label in theirs)
    assert min(Counter(labels_of(data.test)).values()) >= 58  # each class has its share of 600


def test_training_images_are_normalized():
    images = images_of(load("digits", augmentation="none").train)
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-3)
    assert torch.allclose(images.std((0, 2, 3)), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_label_noise_replaces_exactly_its_share_of_the_training_labels_by_wrong_ones(share):
    clean, noisy = load("digits"), load("digits", label_noise=share, seed=3)
    pairs = [pair for pair in zip(labels_of(clean.train), labels_of(noisy.train)) if pair[0] != pair[1]]
    assert len(pairs) == round(share * 1197)
    assert set(labels_of(noisy.train)) == set(range(10))
    assert labels_of(noisy.test) == labels_of(clean.test)


def test_label_noise_is_uniform_over_the_other_classes():
    clean = torch.arange(90_000) % 10
    noisy = torch.tensor(with_noise(clean.tolist(), 0.5, num_classes=10, seed=0))
    counts = torch.bincount(10 * clean + noisy, minlength=100).view(10, 10)  # by clean and noisy label
    wrong = counts[~torch.eye(10, dtype=bool)]
    assert wrong.sum() == 45_000
    assert (wrong - 500).abs().max() < 5 * 500**0.5  # five standard deviations


def test_the_seed_decides_the_label_noise():
    first, again, other = (labels_of(load("digits", label_noise=0.4, seed=s).train) for s in (1, 1, 2))
    assert first == again != other


def test_held_out_images_are_training_images_with_clean_labels_and_the_test_images_stay_unseen():
    whole = load("digits", augmentation="none")
    parts = load("digits", augmentation="none", hold_out=300, label_noise=0.4, seed=5)
    assert (len(parts.train), len(parts.test)) == (897, 300)
    label_of = {image.numpy().tobytes(): label for image, label in whole.train}
    in_training = {image.numpy().tobytes() for image, _ in parts.train}
    held_out = {image.numpy().tobytes(): label for image, label in parts.test}
    assert in_training | set(held_out) == set(label_of) and not in_training & set(held_out)
    assert all(label_of[image] == label for image, label in held_out.items())
    wrong = sum(label_of[image.numpy().tobytes()] != label for image, label in parts.train)
    assert wrong == round(0.4 * 897)
    assert max(Counter(held_out.values()).values()) <= 31  # in the proportions of the classes


def test_standard_augmentation_of_digits_shifts_and_does_not_mirror():
    plain = images_of(load("digits", augmentation="none").train)
    augmented = load("digits").train
    black = -DATASETS["digits"].mean[0] / DATASETS["digits"].std[0]
    torch.manual_seed(0)
    seen = set()
    for number in range(200):
        padded = torch.nn.functional.pad(plain[number], (4, 4, 4, 4), value=black)
        image = augmented[number][0]
        shifts = [
            (y, x)
            for y in range(9)
            for x in range(9)
            if torch.allclose(image, padded[:, y : y + 32, x : x + 32], atol=1e-5)
        ]
        assert shifts
        seen.update(shifts)
    assert len(seen) > 60  # of 81


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with CIFAR-10 and CIFAR-100 in their own layout, of 10 or 20 random images a file; torchvision
    is told the checksums of these files in place of the published ones."""
    rng = np.random.default_rng(0)

    def write(folder, name, content):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]

    for kind, key, classes, count in ((CIFAR10, "labels", 10, 10), (CIFAR100, "fine_labels", 100, 20)):
        for attribute in ("train_list", "test_list"):
            files = [
                write(
                    kind.base_folder,
                    name,
                    {
                        "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
                        key: rng.integers(0, classes, count).tolist(),
                    },
                )
                for name, _ in getattr(kind, attribute)
            ]
            monkeypatch.setattr(kind, attribute, files)
        names = {kind.meta["key"]: [f"class {number}" for number in range(classes)]}
        _, checksum = write(kind.base_folder, kind.meta["filename"], names)
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksum})
    return tmp_path


@pytest.mark.parametrize(("name", "train", "test"), [("cifar10", 50, 10), ("cifar100", 20, 20)])
def test_cifar_is_read_from_its_own_files(cifar, name, train, test):
    data = load(name, cifar, augmentation="none")
    assert (len(data.train), len(data.test)) == (train, test)
    folder = {"cifar10": "cifar-10-batches-py/data_batch_1", "cifar100": "cifar-100-python/train"}[name]
    content = pickle.loads((cifar / folder).read_bytes())
    image, label = data.train[3]
    assert label == content["labels" if name == "cifar10" else "fine_labels"][3]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (DATASETS[name].mean, DATASETS[name].std))
    assert torch.allclose(
        image * std + mean, torch.tensor(content["data"][3]).view(3, 32, 32) / 255, atol=1e-6
    )


def test_cifar_is_cropped_from_a_padded_image_and_mirrored_every_other_time(cifar):
    plain, augmented = (load("cifar10", cifar, augmentation=a).train for a in ("none", "standard"))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (DATASETS["cifar10"].mean, DATASETS["cifar10"].std))
    padded = torch.nn.functional.pad(plain[0][0] * std + mean, (4, 4, 4, 4))
    crops = {
        (mirrored, y, x): (crop.flip(2) if mirrored else crop)
        for mirrored in (False, True)
        for y in range(9)
        for x in range(9)
        for crop in [padded[:, y : y + 32, x : x + 32]]
    }
    torch.manual_seed(0)
    mirrored = 0
    for _ in range(100):
        image = augmented[0][0] * std + mean
        (found,) = [place for place, crop in crops.items() if torch.allclose(image, crop, atol=1e-5)]
        mirrored += found[0]
    assert 35 <= mirrored <= 65


def test_autoaugment_makes_images_that_no_crop_makes(cifar):
    torch.manual_seed(0)
    augmented = load("cifar100", cifar, augmentation="autoaugment").train
    images = torch.stack([augmented[0][0] for _ in range(20)])
    assert images.shape == (20, 3, 32, 32) and torch.isfinite(images).all()
    assert len({image.numpy().tobytes() for image in images}) == 20


def imagenet(root, train=("n1", "n2", "n3"), val=("n1", "n2", "n3"), devkit=("n1", "n2", "n3")):
    """Write ImageNet as torchvision unpacks it, an image a class, and return its folder."""
    torch.save(({name: (f"class {name}",) for name in devkit}, []), root / "meta.bin")
    for split, names, size in (("train", train, (300, 400)), ("val", val, (500, 280))):
        (root / split).mkdir()
        for name in names:
            write_image(root / split / name / "image.JPEG", size)
    return root


def write_image(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def test_imagenet_is_read_from_the_folders_that_torchvision_unpacks(tmp_path):
    imagenet(tmp_path)
    for augmentation in DATASETS["imagenet"].augmentations:
        data = load("imagenet", tmp_path, augmentation=augmentation)
        assert labels_of(data.train) == labels_of(data.test) == [0, 1, 2]
        assert images_of(data.train).shape == images_of(data.test).shape == (3, 3, 224, 224)


def test_imagenet_without_some_classes_has_the_labels_of_the_whole(tmp_path):
    data = load("imagenet", imagenet(tmp_path, train=("n1", "n3"), val=("n1", "n3")))
    assert labels_of(data.train) == labels_of(data.test) == [0, 2]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"val": ("n1", "n3")}, "/val' lacks the class folder 'n2', which '.*/train' has"),
        ({"train": ("n2", "n3")}, "/train' lacks the class folder 'n1', which '.*/val' has"),
        ({"val": ("n3",)}, "/val' lacks the class folder 'n1' and 1 more, which"),
        ({"train": ("n1", "n2"), "val": ("n2", "n3")}, "/train' lacks the class folder 'n3', which"),
        (
            {"val": ("n1", "n2", "n3", "lost+found")},
            r"/val' has 'lost\+found', no class of ImageNet's devkit",
        ),
        (
            {"val": ()},
            "/val' has no class folders: move each image into the folder of its class, such as 'n1'",
        ),
    ],
)
def test_splits_of_imagenet_with_other_classes_are_refused(folders, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load("imagenet", imagenet(tmp_path, **folders))


@pytest.mark.parametrize(
    "name",
    [
        "train/.ipynb_checkpoints/image.png",
        "val/.thumbnails/image.png",
        "train/n1/.ipynb_checkpoints/image-checkpoint.JPEG",
        "val/n2/._image.JPEG",
    ],
)
def test_hidden_files_and_folders_of_imagenet_are_no_images(name, tmp_path):
    root = tmp_path / ".cache"  # a hidden folder above hides nothing
    root.mkdir()
    write_image(imagenet(root) / name)
    data = load("imagenet", root)
    assert labels_of(data.train) == labels_of(data.test) == [0, 1, 2]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("other", [None, "readme.txt", ".image.JPEG"])
def test_a_class_folder_of_imagenet_without_an_image_is_named(split, other, tmp_path):
    image = imagenet(tmp_path) / split / "n2" / "image.JPEG"
    image.unlink() if other is None else image.rename(image.with_name(other))
    with pytest.raises(FileNotFoundError, match=f"/{split}' cannot be read: Found no valid file .* n2"):
        load("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("absent", "asked"),
    [
        (["meta.bin"], "get ILSVRC2012_devkit_t12.tar.gz from"),
        (["meta.bin", "val"], "get ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_val.tar from"),
        (["train"], "get ILSVRC2012_img_train.tar from"),
    ],
)
def test_the_missing_part_of_imagenet_is_asked_for(absent, asked, tmp_path):
    imagenet(tmp_path)
    for name in absent:
        (tmp_path / name).rename(tmp_path / f"{name}.old")
    with pytest.raises(FileNotFoundError, match=f"has only a part of ImageNet, or nothing: {asked}"):
        load("imagenet", tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 300])
def test_a_damaged_list_of_imagenet_s_classes_is_named(kept, tmp_path):
    file = imagenet(tmp_path) / "meta.bin"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"meta.bin' is damaged .*: remove it, and put ILSVRC2012_devkit"):
        load("imagenet", tmp_path)


def test_a_damaged_archive_of_imagenet_is_named(tmp_path):
    (imagenet(tmp_path) / "meta.bin").unlink()
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"half of it")
    with pytest.raises(FileNotFoundError, match=r"archive ILSVRC2012_devkit_t12.tar.gz .* corrupted"):
        load("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("form", "share", "workers"),
    [
        ("JPEG", 0.9, 0),
        ("JPEG", 0.5, 1),
        ("JPEG", 0.001, 0),
        ("JPEG", 0.0, 0),
        ("PNG", 0.5, 0),
        ("WEBP", 0.5, 0),
    ],
)
def test_a_truncated_image_is_named(form, share, workers, tmp_path):
    file = imagenet(tmp_path) / "train" / "n2" / "image.JPEG"
    Image.effect_noise((300, 400), 50).convert("RGB").save(file, form)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    images = load("imagenet", tmp_path).train
    loader = training_loader(images, Batches(3, 3, seed=0), workers, torch.device("cpu"))
    with pytest.raises(
        OSError, match=r"the image '.*/train/n2/image.JPEG' cannot be read .*: fetch it again"
    ):
        next(iter(loader))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, "no data set 'mnist': choose one of cifar10, cifar100, imagenet, digits"),
        ({"augmentation": "autoaugment"}, "no augmentation 'autoaugment': choose one of none, standard"),
        ({"label_noise": 1.0}, r"label_noise is 1.0, but .*\[0, 1\)"),
        ({"label_noise": -0.1}, "label_noise is -0.1"),
        ({"hold_out": 9}, "hold_out is 9, but digits can hold out 0 or 10 to 1187 images"),
        ({"hold_out": 1188}, "hold_out is 1188"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**{"name": "digits", **arguments})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", "has no CIFAR10, .* in 'cifar-10-batches-py': fetch it with --download, or unpack http"),
        ("cifar100", "has no CIFAR100, .* in 'cifar-100-python': fetch it with --download"),
        (
            "imagenet",
            "has only a part of ImageNet, or nothing: get ILSVRC2012_devkit_t12.tar.gz, .* from image",
        ),
    ],
)
def test_missing_data_is_told_with_the_remedy(tmp_path, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        load(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="needs a folder"):
        load(name)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cifar_is_as_good_as_none(cifar):
    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(b"half a file")
    with pytest.raises(FileNotFoundError, match="whole and unchanged"):
        load("cifar10", cifar)
