"""Packaging of c2f_jax: `pip install .`, with extras for speech synthesis, hub ids, development and parity."""

from setuptools import find_packages, setup

TENSORFLOW = [  # TFDS prepares and clu logs with it; the CPU build, for jax has the accelerator to itself
    "tensorflow-cpu>=2.18; platform_system != 'Darwin'",
    "tensorflow>=2.18; platform_system == 'Darwin'",
]
# The package carries espeak-ng, which is GPL-3: only to make spoken_scenes and for `c2f search --say`.
SPEECH = ["espeakng-loader>=0.2"]

setup(
    name="c2f_jax",
    version="0.1.0",
    description="Speech-image retrieval, coarse to fine, in JAX and Flax",
    python_requires=">=3.11",
    packages=find_packages(include=["c2f_jax", "c2f_jax.*"]),
    package_data={"c2f_jax": ["reports/*.css", "py.typed"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.7",
        "orbax-checkpoint>=0.11",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",  # tensorflow-datasets imports it without asking for it
        "array_record>=0.8",
        "grain>=0.2.12",
        "clu>=0.0.12",
        "tensorboard>=2.18",  # clu's writers import it without asking for it
        *TENSORFLOW,
        "ml-collections>=1.0",
        "absl-py>=2",
        "etils[epath]>=1.10",
        "librosa>=0.11",
        "soundfile>=0.13",
        "soxr>=0.5",
        "pillow>=11",
        "matplotlib>=3.9",
        "scipy>=1.14",
        "tqdm>=4.66",
        "safetensors>=0.5",
        "numpy>=2",
    ],
    extras_require={
        "speech": SPEECH,
        "hub": ["huggingface_hub>=0.30"],  # hub ids for `c2f convert`
        "dev": [*SPEECH, "pytest>=8", "ruff>=0.8"],
        "parity": [
            "torch>=2.6",
            "transformers>=5",
        ],  # the references of the parity tests and benchmarks/
    },
    entry_points={"console_scripts": ["c2f=c2f_jax.main:main"]},
)
