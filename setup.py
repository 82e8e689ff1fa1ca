from setuptools import find_packages, setup

VISION = [
    "accelerate>=0.30",
    "pytorchcv>=0.0.67",
    "scikit-learn>=1.0",
    "tensorboard>=2.10",
    "torchvision>=0.16",
    "tqdm>=4.60",
]
RECIPES = [
    *VISION,
    # For Ubuntu's packages; tarfile reads them from Python 3.14.
    "backports.zstd>=1.0; python_version<'3.14'",
    "matplotlib>=3.7",
    "sacrebleu>=2.3",
    "sacremoses>=0.1",
    "scipy>=1.7",
    "sentencepiece>=0.1.99",
    "subword-nmt>=0.3.8",
]
CLUSTER = [
    "hydra-submitit-launcher>=1.0",
    # submitit 1.5.4 fails on Python 3.9, and earlier ones need pkg_resources.
    "submitit<1.5.4; python_version<'3.10'",
    "setuptools<81; python_version<'3.10'",
]
ZERO = ["fairscale>=0.4.13"]
TRANSFORMERS = ["accelerate>=1.1", "transformers>=4.57"]
LIGHTNING = ["lightning>=2.5"]

setup(
    name="fairseq_asam",
    version="0.1.0",
    description="Sharpness-aware training (SAM and ASAM) for fairseq and plain PyTorch",
    license="MIT",
    python_requires=">=3.9",
    packages=find_packages(include=["fairseq_asam", "fairseq_asam.*"]),
    package_data={"fairseq_asam": ["py.typed"]},
    install_requires=[
        "torch>=2.1",
        # fairseq 0.12.2 pins hydra and omegaconf releases that Python 3.11 cannot import.
        "fairseq==0.12.2; python_version<'3.11'",
        "fairseq-fixed==0.12.3.1; python_version>='3.11'",
        # fairseq 0.12.2 uses names that numpy 1.24 removed; torch 2.4 and newer want a newer numpy.
        "numpy<1.24; python_version<'3.11'",
        "torch<2.4; python_version<'3.11'",
    ],
    extras_require={
        # python -m fairseq_asam.vision
        "vision": VISION,
        "recipes": RECIPES,
        # recipes/translation/cluster.sh
        "cluster": CLUSTER,
        # --zero-sharding os
        "zero": ZERO,
        # fairseq_asam.integrations
        "transformers": TRANSFORMERS,
        "lightning": LIGHTNING,
        "test": [
            *RECIPES,
            *CLUSTER,
            *ZERO,
            *TRANSFORMERS,
            *LIGHTNING,
            "peft>=0.17",
            "allpairspy>=2.5",
            # It checks against the types of the newer torch.
            "mypy==2.4.1; python_version>='3.11'",
            # pytest-xdist 3.8 keeps no group of tests together with newer ones.
            "pytest>=7,<9.2",
            "pytest-xdist>=3",
            "ruff==0.17.6",
        ],
    },
)
