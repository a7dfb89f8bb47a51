"""Package definition; lint and test settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

SPEECH = ["soundfile>=0.12", "soxr>=0.4"]
QUICKSTART = [*SPEECH, "espeakng-loader>=0.2.4"]
FUSION = ["evosax>=0.3", "scikit-learn>=1.4"]
SAFETENSORS = ["safetensors>=0.8"]  # checkpoints that others made
SUBWORDS = {  # read tokenizers that were learned elsewhere
    "sentencepiece": ["sentencepiece>=0.2"],
    "tokenizers": ["tokenizers>=0.20"],
}
PRETRAINED = [  # models that others trained
    *SAFETENSORS,
    *SUBWORDS["tokenizers"],
    "PyYAML>=6.0",  # settings in NeMo's archives
]
ONNX = ["jax2onnx>=0.17", "onnxruntime>=1.24"]  # graphs for other runtimes; 0.17.1 needs jax<0.12
NEURAL = ["scipy>=1.13"]  # reads MATLAB files
G2P = ["g2p_en>=2.1"]  # pronounces words as the published speech decoders' labels were
RESCORING = ["torch>=2.4", "transformers>=4.45"]  # judges n-best lists by a causal language model
HUGGINGFACE = ["pyarrow>=15"]  # reads parquet files and what save_to_disk writes
TRACKERS = {  # told of a run's metrics by `fedasr train --track`
    "wandb": ["wandb>=0.18"],
    "mlflow": ["mlflow>=2.16"],
    "trackio": ["trackio>=0.4"],
}
REMOTE = ["fsspec>=2024.6", "gcsfs>=2024.6", "s3fs>=2024.6"]  # work directories in buckets
SEARCH = ["optuna>=4.0"]  # `fedasr sweep --search=optuna`
COMPILERS = [  # of accelerators that are not there: `fedasr compile`
    "jax[tpu]>=0.8",  # libtpu of the same release
    "jax-cuda13-plugin>=0.8",
    "jax-cuda13-pjrt>=0.8",
    "nvidia-cuda-nvcc>=13",  # ptxas
]
DOCS = [
    "mkdocs>=1.6,<2",  # the site of docs/
    "mkdocstrings[python]>=1.0",  # its reference of the API, from the source's docstrings
]
CHECKS = [
    "import-linter>=2.17",  # contracts of which package may import which
    "mypy>=1.15",  # types of the package
]

setup(
    name="fedasr",
    version="0.1.0",
    description="Federated learning of speech recognisers with user-level differential privacy",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fedasr", "fedasr.*"]),
    package_data={"fedasr": ["py.typed"]},
    entry_points={"console_scripts": ["fedasr = fedasr.cli.main:main"]},
    install_requires=[
        "absl-py>=2.1",
        "anyascii>=0.3.2",  # transliterates Latin letters
        "array_record>=0.8.1",
        "attrs>=23.1",  # dp-accounting's events are its classes
        "chex>=0.1.88",
        "dp-accounting>=0.6",
        "flax>=0.12",
        "ftfy>=6.3",  # repairs encoding damage of transcripts
        "importlib_resources>=6.0",  # tensorflow-datasets imports it without declaring it
        "jax>=0.8",
        "jax-privacy>=2.0",
        "matplotlib>=3.9",
        "ml_collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.25",
        "rapidfuzz>=3.9",
        "rich>=13.0",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",
    ],
    extras_require={
        "speech": SPEECH,
        "quickstart": QUICKSTART,
        "fusion": FUSION,
        "merging": SAFETENSORS,
        "pretrained": PRETRAINED,
        "neural": NEURAL,
        "g2p": G2P,
        "rescoring": RESCORING,
        "onnx": ONNX,
        "huggingface": HUGGINGFACE,
        "docs": DOCS,
        **TRACKERS,
        "remote": REMOTE,
        "search": SEARCH,
        "compilers": COMPILERS,
        **SUBWORDS,
        "dev": [*CHECKS, "pre-commit>=4.0"],  # .pre-commit-config.yaml runs them, beside ruff
        "cuda": ["jax[cuda12]>=0.8"],
        "tpu": ["jax[tpu]>=0.8"],
        "test": [
            *QUICKSTART,
            *FUSION,
            *PRETRAINED,
            *NEURAL,
            *HUGGINGFACE,
            *CHECKS,
            *DOCS,
            *SEARCH,
            *SUBWORDS["sentencepiece"],
            "hypothesis>=6.100",
            "ipykernel>=6.29",  # with nbclient and nbformat: runs the notebook
            "flask-cors>=4.0",  # with moto: its server
            "jiwer>=4.0",  # word error rates by other code
            "moto[s3]>=5.0",  # an emulated S3
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pytest>=8.0",
            "pytest-cov>=6.0",
            "pytest-xdist>=3.5",
            "PyYAML>=6.0",  # reads the SkyPilot task that the sweep writes
            "ruff>=0.11",
            "s3fs>=2024.6",
            "setuptools>=70.1",  # builds wheels by itself
        ],
    },
)
