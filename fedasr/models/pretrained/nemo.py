"""NeMo's archives of CTC models, `*.nemo`: as if they were folders of Hugging Face's libraries.

An archive is a tar of a configuration (YAML), weights (pickled by PyTorch) and a tokenizer. Weights
are read without PyTorch, by an unpickler that knows arrays and nothing else.
"""

import io
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError, pass_exhaustion

SUFFIX = ".nemo"
_CONFIG, _WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_NAMES = (  # theirs, and what a folder has
    (r"^encoder\.pre_encode\.conv\.", "encoder.subsampling.layers."),
    (r"^encoder\.pre_encode\.out\.", "encoder.subsampling.linear."),
    (r"\.conv\.batch_norm\.", ".conv.norm."),
    (r"^decoder\.decoder_layers\.0\.", "ctc_head."),
    (r"\.linear_([qkv])\.", r".\1_proj."),
    (r"\.linear_out\.", ".o_proj."),
    (r"\.linear_pos\.", ".relative_k_proj."),
    (r"\.pos_bias_([uv])$", r".bias_\1"),
)
_LEFT_OUT = ("preprocessor.", "loss.", "spec_augmentation.")
_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "DoubleStorage": np.dtype(np.float64),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "BoolStorage": np.dtype(np.bool_),
}


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any], Mapping[str, Callable]]:
    """What an archive holds, as a folder would say it.

    Args:
      path: of the archive.

    Returns:
      config.json, what is said beside it, and what reads each tensor, by name.

    Raises:
      UserError: it cannot be read, or is of another kind of model.
    """
    try:
        with tarfile.open(path) as archive:
            members = {Path(member.name).name: member for member in archive.getmembers()}
            if missing := [name for name in (_CONFIG, _WEIGHTS) if name not in members]:
                raise UserError(f"{path} holds no {missing[0]}, so it is no model of NeMo")
            parts = [archive.extractfile(members[name]) for name in (_CONFIG, _WEIGHTS)]
            texts = [part.read() if part else b"" for part in parts]
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error
    said = _yaml(path, texts[0])
    try:
        config, beside = _config(said)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} lacks {error} in {_CONFIG}: it is of another kind") from error
    return config, beside, _tensors(path, texts[1])


def _yaml(path: Path, content: bytes) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise UserError("archives of NeMo need PyYAML: pip install 'fedasr[pretrained]'") from error
    try:
        found = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {_CONFIG} cannot be read: fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: {_CONFIG} holds no settings: fetch it again")
    return found


def _config(said: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and what is said beside it, by NeMo's settings."""
    encoder, heard = said["encoder"], said["preprocessor"]
    rate = heard["sample_rate"]
    bias = encoder.get("use_bias", True)
    vocabulary = len(said["decoder"]["vocabulary"]) + 1
    plain = {
        "self_attention_model": "rel_pos",
        "conv_norm_type": "batch_norm",
        "causal_downsampling": False,
        "reduction": None,
        "untie_biases": True,
    }
    for name, value in plain.items():
        if (found := encoder.get(name, value)) != value:
            raise UserError(
                f"the archive has encoder.{name}={found!r}, of which only {value!r} is known here: "
                "choose another model"
            )
    for name, value in {"normalize": "per_feature", "log": True, "frame_splicing": 1}.items():
        if (found := heard.get(name, value)) != value:
            raise UserError(
                f"the archive has preprocessor.{name}={found!r}, of which only {value!r} is known "
                "here: choose another model"
            )
    channels = encoder.get("subsampling_conv_channels", -1)
    config = {
        "model_type": "parakeet_ctc",
        "vocab_size": vocabulary,
        "pad_token_id": vocabulary - 1,
        "encoder_config": {
            "hidden_size": encoder["d_model"],
            "num_hidden_layers": encoder["n_layers"],
            "num_attention_heads": encoder["n_heads"],
            "intermediate_size": encoder["d_model"] * encoder.get("ff_expansion_factor", 4),
            "num_mel_bins": encoder["feat_in"],
            "subsampling_conv_channels": encoder["d_model"] if channels < 1 else channels,
            "subsampling_factor": encoder["subsampling_factor"],
            "subsampling": encoder.get("subsampling", "striding"),
            "conv_kernel_size": encoder["conv_kernel_size"],
            "attention_bias": bias,
            "convolution_bias": bias,
            "scale_input": encoder.get("xscaling", True),
        },
    }
    beside = {
        "n_fft": heard.get("n_fft", 512),
        "win_length": round(heard["window_size"] * rate),
        "hop_length": round(heard["window_stride"] * rate),
        "sampling_rate": rate,
        "preemphasis": heard.get("preemph", 0.97),
    }
    return config, beside


class _Storage:
    """Where a tensor's numbers lie: read when they are asked for."""

    def __init__(self, dtype: np.dtype, read: Callable[[], bytes]) -> None:
        self.dtype, self.read = dtype, read


class _Lazy:
    """A tensor that is not read yet."""

    def __init__(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> None:
        self._storage, self._offset, self._size, self._stride = storage, offset, size, stride

    def __call__(self) -> np.ndarray:
        """The array."""
        flat = np.frombuffer(self._storage.read(), self._storage.dtype)[self._offset :]
        steps = [step * flat.dtype.itemsize for step in self._stride]
        reach = sum((n - 1) * s for n, s in zip(self._size, self._stride, strict=True))
        if len(flat) <= reach or min((0, *self._size, *self._stride)) < 0:
            raise ValueError("the numbers of a tensor are missing")
        return np.lib.stride_tricks.as_strided(flat, self._size, steps).copy()


def _parameter(data: Any, *_: Any) -> Any:
    return data


class _Unpickler(pickle.Unpickler):
    """Of state dicts alone: any other name is refused, so that nothing is run."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _Lazy if name == "_rebuild_tensor_v2" else _parameter
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage."""
        _, dtype, key, *_ = pid
        return _Storage(dtype, lambda: self._archive.read(f"{self._folder}/data/{key}"))


def _tensors(path: Path, content: bytes) -> dict[str, Callable[[], np.ndarray]]:
    """What reads each tensor, by the names that a folder has."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        stored = _Unpickler(archive, pickled.removesuffix("/data.pkl")).load()
        stored = stored.get("state_dict", stored)
        found: dict[str, Callable[[], np.ndarray]] = {}
        for name, value in stored.items():
            if name.startswith(_LEFT_OUT) or not isinstance(value, _Lazy):
                continue
            for theirs, ours in _NAMES:
                name = re.sub(theirs, ours, name)
            found[name] = value
        return found
    except UserError:
        raise
    except Exception as error:  # of many kinds: zipfile, pickle, and what damage leads to
        pass_exhaustion(error, f"reading {path}")
        raise UserError(f"{path}: {_WEIGHTS} cannot be read ({error}): fetch it again") from error
