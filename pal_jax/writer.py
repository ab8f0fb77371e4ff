"""metrics.jsonl and the progress bar; small files written whole or not."""

import json
import math
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm


def write_text(path: str | Path, text: str) -> None:
  """Writes a file so that a kill leaves the old one or the new one."""
  path = Path(path)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  temporary.write_text(text, encoding='utf-8')
  temporary.replace(path)


def to_json(value):
  """Numpy and NaN to plain JSON values; NaN and infinities become null."""
  if isinstance(value, dict):
    return {str(k): to_json(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [to_json(v) for v in value]
  if isinstance(value, np.ndarray):
    return to_json(value.tolist())
  if isinstance(value, bool | np.bool_):
    return bool(value)
  if isinstance(value, int | np.integer):
    return int(value)
  if isinstance(value, float | np.floating):
    return float(value) if math.isfinite(value) else None
  return value


def write_json(path: str | Path, value) -> None:
  write_text(path, json.dumps(to_json(value), indent=2) + '\n')


class MetricsWriter:
  """Appends one JSON object a line; a resumed run drops what it will redo.

  Args:
    path: of metrics.jsonl.
    resume_step: lines of later steps, and a line cut short, are removed.
  """

  def __init__(self, path: str | Path, resume_step: int):
    self._path = Path(path)
    kept = []
    if self._path.exists():
      # Bytes that are no text make their line malformed, hence dropped.
      text = self._path.read_text(encoding='utf-8', errors='replace')
      for line in text.splitlines():
        try:
          if json.loads(line)['step'] <= resume_step:
            kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
          continue
    write_text(self._path, ''.join(f'{line}\n' for line in kept))

  def write(self, step: int, **values) -> None:
    line = json.dumps(to_json({'step': step, **values}))
    with self._path.open('a', encoding='utf-8') as file:
      file.write(line + '\n')


class Progress:
  """A bar with loss, accuracy, comparisons per second and time left."""

  def __init__(self, total: int, initial: int, enabled: bool = True):
    self._bar = tqdm(
      total=total,
      initial=initial,
      disable=not enabled,
      unit='step',
      desc='train',
      mininterval=0.5,
    )

  def update(self, loss: float, accuracy: float, rate: float) -> None:
    self._bar.set_postfix_str(
      f'loss {loss:.3f}, accuracy {accuracy:.3f}, {rate:,.0f} comparisons/s',
      refresh=False,
    )

  def advance(self) -> None:
    self._bar.update(1)

  def close(self) -> None:
    self._bar.close()
