"""Accuracy against the number of prototypes K, on the Persona data.

  python -m experiments.persona_k_sweep

Runs K = 1..6 over five seeds, seeds as a vmapped axis. A seed draws personas,
users, splits, comparisons and initialisation anew; every K has the same data,
batches and projector. Writes results.json, table.md and figures to
results/persona_k_sweep. With real statements:

  python -m experiments.persona_k_sweep --out=FOLDER \
    --config.data.path=<folder with persona/*.jsonl>
"""

import shlex
import sys
from pathlib import Path

import matplotlib
import numpy as np
from absl import flags
from ml_collections import config_flags

from pal_jax import cli
from pal_jax.sweep import run_seeds
from pal_jax.writer import write_json, write_text

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file('config')
_OUT = flags.DEFINE_string('out', 'results/persona_k_sweep', 'Folder.')
_SEEDS = flags.DEFINE_integer('seeds', 5, 'Number of seeds.', lower_bound=1)
_MAX_K = flags.DEFINE_integer('max_k', 6, 'Largest K.', lower_bound=1)


def run_sweep(config, num_seeds: int, max_k: int) -> list[dict]:
  """A row for each K and seed: `results.json` of a run, and its seed."""
  rows = []
  for k in range(1, max_k + 1):
    with config.unlocked():
      config.model.num_prototypes = k
    rows += run_seeds(config, num_seeds, f'K = {k}')
  return rows


COLUMNS = (
  ('seen users', lambda r: r['seen']['accuracy']),
  ('unseen, n = 0', lambda r: r['unseen']['0']['accuracy']),
  ('unseen, n = 10', lambda r: r['unseen']['10']['accuracy']),
  ('unseen, n = 50', lambda r: r['unseen']['50']['accuracy']),
  ('NLL, seen', lambda r: r['seen']['nll']),
  ('ARI', lambda r: r['ari']),
  ('ARI, dominant', lambda r: r['ari_dominant']),
)


def column(rows: list[dict], get) -> np.ndarray:
  values = [get(row) for row in rows]
  return np.array([np.nan if v is None else v for v in values], float)


def render_table(rows: list[dict], true_k: int, command: str) -> str:
  """table.md: mean and standard deviation over seeds for each K."""
  counts = sorted({row['num_prototypes'] for row in rows})
  num_seeds = len(rows) // len(counts)
  head = '| K | ' + ' | '.join(name for name, _ in COLUMNS) + ' |'
  lines = [head, '|---|' + '---|' * len(COLUMNS)]
  control = column(
    rows[:num_seeds], lambda r: r['controls']['homogeneous_seen']['accuracy']
  )
  other = column(
    rows[:num_seeds], lambda r: r['controls']['homogeneous_unseen']['accuracy']
  )
  lines.append(
    f'| linear Bradley-Terry | {_cell(control)} | {_cell(other)} |'
    + ' |' * (len(COLUMNS) - 2)
  )
  for k in counts:
    mine = [row for row in rows if row['num_prototypes'] == k]
    cells = ' | '.join(_cell(column(mine, get)) for _, get in COLUMNS)
    mark = ' (K*)' if k == true_k else ''
    lines.append(f'| {k}{mark} | {cells} |')
  return (
    '# Accuracy against K\n\n'
    f'Mean and standard deviation over {num_seeds} seeds, which draw '
    f'personas, users, splits and initialisation; K* = {true_k} true '
    'personas. Everything is on unseen items; n is the number of comparisons '
    'of an unseen user.\n\n' + '\n'.join(lines) + f'\n\nMade by `{command}`.\n'
  )


def _cell(values: np.ndarray) -> str:
  if np.isnan(values).all():
    return ''
  spread = values.std(ddof=1) if values.size > 1 else 0.0
  return f'{values.mean():.3f} ± {spread:.3f}'


def draw(path: Path, rows: list[dict], true_k: int) -> None:
  """Accuracy against K with K* marked; a dot is a seed."""
  counts = sorted({row['num_prototypes'] for row in rows})
  figure, axis = plt.subplots(figsize=(6, 4))
  for (name, get), color in zip(
    COLUMNS[:4], ('C2', 'C7', 'C1', 'C0'), strict=True
  ):
    values = np.array(
      [
        column([r for r in rows if r['num_prototypes'] == k], get)
        for k in counts
      ]
    )  # [K, seeds]
    axis.plot(counts, values.mean(1), 'o-', color=color, label=name)
    axis.plot(counts, values, '.', color=color, alpha=0.35)
  axis.axvline(true_k, color='black', ls=':', label=f'K* = {true_k}')
  axis.set_xlabel('prototypes K')
  axis.set_ylabel('accuracy on unseen items')
  axis.set_xticks(counts)
  axis.grid(alpha=0.3)
  axis.legend(fontsize=8)
  figure.savefig(path, dpi=130, bbox_inches='tight')
  plt.close(figure)


def main():
  config = _CONFIG.value
  rows = run_sweep(config, _SEEDS.value, _MAX_K.value)
  out = Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  true_k = config.data.num_personas
  command = f'python -m experiments.persona_k_sweep {shlex.join(sys.argv[1:])}'
  table = render_table(rows, true_k, command.strip())
  write_text(out / 'table.md', table)
  draw(out / 'accuracy_against_k.png', rows, true_k)
  write_json(
    out / 'results.json',
    {'num_personas': true_k, 'command': command.strip(), 'runs': rows},
  )
  print(table)


if __name__ == '__main__':
  cli.run(main, default_config='configs/persona.py')
