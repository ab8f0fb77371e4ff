"""Finished cells on disk: found again by what they were made from."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import ml_collections
import numpy as np

from pal_jax.benchmark.summary import Finished
from pal_jax.writer import to_json

# Raise it when cells of older code must not be used again.
VERSION = 2


def describe(method) -> dict:
  """A method's name and hyper-parameters as plain values."""
  if isinstance(method, ml_collections.ConfigDict):
    return to_json(method.to_dict())
  if dataclasses.is_dataclass(method):
    fields = {
      f.name: describe(getattr(method, f.name))
      for f in dataclasses.fields(method)
    }
    return {'class': type(method).__name__, **fields}
  return to_json(method)


def digest(*parts) -> str:
  """12 hex digits that change when any part does."""
  text = json.dumps(
    [VERSION, *(to_json(part) for part in parts)], sort_keys=True
  )
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def cell_path(
  folder: Path, dataset: str, method: str, seed: int, key: str
) -> Path:
  return folder / dataset / method / f'seed{seed}-{key}.npz'


def save_cell(path: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
  """Writes a cell whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  with temporary.open('wb') as file:
    np.savez_compressed(
      file, meta=np.array(json.dumps(to_json(meta))), **arrays
    )
  temporary.replace(path)


def load_cell(path: Path, dataset: str, method: str, seed: int):
  """A finished cell, or None where there is none that can be read."""
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays.pop('meta')))
  except Exception:  # zip, deflate, npy headers, JSON: each fails in its way
    return None
  return Finished(dataset, method, seed, arrays, meta)
