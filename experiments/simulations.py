"""Planted simulations: accuracy at K = 1 and K = K*, and what is recovered.

  python -m experiments.simulations

Partitions with K* = 2, 3, 4, 6 and one mixture, f = identity, five seeds; and
the neural-process toy against its Bayes-optimal curve. Writes results.json,
table.md and a figure to results/simulations.
"""

import shlex
import sys
from pathlib import Path

import matplotlib
import numpy as np
from absl import flags

from configs import simulation
from pal_jax import cli
from pal_jax.sweep import run_seeds
from pal_jax.writer import write_json, write_text

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

_OUT = flags.DEFINE_string('out', 'results/simulations', 'Folder.')
_SEEDS = flags.DEFINE_integer('seeds', 5, 'Number of seeds.', lower_bound=1)

# METHOD section 4, K = 1 on a partition of K* prototypes.
EXPECTED_AT_ONE = {2: 0.80, 3: 0.775, 4: 0.75, 6: 0.73}
SETTINGS = (
  *(('partition', k) for k in EXPECTED_AT_ONE),
  ('mixture', 4),
)


def planted(which: str, true_k: int, k: int):
  """The config of a simulation with K* = true_k fitted with K = k."""
  config = simulation.get_config(which)
  with config.unlocked():
    config.data.num_personas = true_k
    config.model.num_prototypes = k
  return config


def cell(values) -> str:
  """Mean ± standard deviation over seeds, empty without values."""
  values = np.array([v for v in values if v is not None], float)
  if not values.size:
    return ''
  spread = values.std(ddof=1) if values.size > 1 else 0.0
  return f'{values.mean():.3f} ± {spread:.3f}'


def render_planted(rows: list[dict]) -> str:
  lines = [
    '| planted | K = 1 | stated for K = 1 | K = K* | unseen, n = 50 | ARI | '
    'prototype error | ideal point error |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for which, true_k in SETTINGS:
    here = [r for r in rows if r['which'] == which and r['true_k'] == true_k]
    one = [r for r in here if r['num_prototypes'] == 1]
    full = [r for r in here if r['num_prototypes'] == true_k]
    stated = EXPECTED_AT_ONE[true_k] if which == 'partition' else ''
    # Prototypes are not identified for mixtures: their error says nothing.
    error = (
      cell(r['recovery'].get('prototype_error') for r in full)
      if which == 'partition'
      else 'not identified'
    )
    lines.append(
      f'| {which}, K* = {true_k} '
      f'| {cell(r["seen"]["accuracy"] for r in one)} | {stated} '
      f'| {cell(r["seen"]["accuracy"] for r in full)} '
      f'| {cell(r["unseen"]["50"]["accuracy"] for r in full)} '
      f'| {cell(r["ari"] for r in full)} | {error} '
      f'| {cell(r["recovery"].get("ideal_point_error") for r in full)} |'
    )
  return '\n'.join(lines)


def render_toy(rows: list[dict]) -> str:
  counts = sorted(rows[0]['unseen'], key=int)
  lines = ['| n | K = 2 | Bayes-optimal |', '|---|---|---|']
  for n in counts:
    values = cell(r['unseen'][n]['accuracy'] for r in rows)
    lines.append(f'| {n} | {values} | {rows[0]["bayes_accuracy"][n]:.4f} |')
  return '\n'.join(lines)


def draw_toy(path: Path, rows: list[dict]) -> None:
  """The few-shot curve of the toy beside the best there can be."""
  counts = sorted(rows[0]['unseen'], key=int)
  x = np.arange(len(counts))
  values = np.array(
    [[r['unseen'][n]['accuracy'] for n in counts] for r in rows]
  )
  figure, axis = plt.subplots(figsize=(5.5, 3.6))
  axis.plot(x, values.T, 'C0.', alpha=0.4)
  axis.plot(x, values.mean(0), 'C0o-', label='PAL-A, K = 2 (dots: seeds)')
  axis.plot(
    x,
    [rows[0]['bayes_accuracy'][n] for n in counts],
    'k--',
    label='Bayes-optimal',
  )
  axis.set_xticks(x, counts)
  axis.set_xlabel('comparisons of the unseen user, n')
  axis.set_ylabel('accuracy on unseen items')
  axis.grid(alpha=0.3)
  axis.legend()
  figure.savefig(path, dpi=130, bbox_inches='tight')
  plt.close(figure)


def main():
  rows = []
  for which, true_k in SETTINGS:
    for k in (1, true_k):
      title = f'{which}, K* = {true_k}, K = {k}'
      found = run_seeds(planted(which, true_k, k), _SEEDS.value, title)
      rows += [{'which': which, 'true_k': true_k, **row} for row in found]
  toy = run_seeds(simulation.get_config('toy'), _SEEDS.value, 'toy')
  out = Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  command = f'python -m experiments.simulations {shlex.join(sys.argv[1:])}'
  text = (
    '# Simulations\n\nMean and standard deviation over '
    f'{_SEEDS.value} seeds; accuracies on unseen items, of seen users unless '
    'said. Errors are relative.\n\n'
    + render_planted(rows)
    + '\n\n## Neural-process toy\n\nUnseen users after n comparisons.\n\n'
    + render_toy(toy)
    + f'\n\nMade by `{command.strip()}`.\n'
  )
  write_text(out / 'table.md', text)
  draw_toy(out / 'toy.png', toy)
  write_json(
    out / 'results.json',
    {
      'command': command.strip(),
      'runs': rows + [{'which': 'toy', 'true_k': 2, **row} for row in toy],
    },
  )
  print(text)


if __name__ == '__main__':
  cli.run(main)
