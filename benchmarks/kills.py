"""Kills a tiny run again and again, and compares what it ends with.

  python -m benchmarks.kills --kills=50 --out=results/benchmarks/kills.json

A run is killed by SIGKILL at a random moment, on every third occasion while a
checkpoint is being written, and started again; after ten kills it may finish,
and another begins. Each must end with the files of a run that nobody
disturbed, byte for byte: results.json, the saved model, and metrics.jsonl but
for its speeds. The JSON is a list of rows {run, seconds, during, step}, a
table stands beside it.
"""

import dataclasses
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path

from absl import flags

from benchmarks.tiny_runs import FIELDS, Kill, run_kills, run_undisturbed
from pal_jax import cli
from pal_jax.errors import InputError
from pal_jax.writer import write_json, write_text

_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
_KILLS = flags.DEFINE_integer('kills', 50, 'How many.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the moments.')


def render(kills: list[Kill], made_by: str) -> str:
  runs = len({k.run for k in kills})
  when = Counter(k.during for k in kills)
  lines = [
    '# A tiny run, killed again and again',
    '',
    f'{len(kills)} times SIGKILL in {runs} runs of '
    f'{FIELDS["train.num_steps"]} steps, a checkpoint every '
    f'{FIELDS["train.checkpoint_every"]}. Each ended with the `results.json`, '
    'the saved model and the metrics of an undisturbed run, byte for byte.',
    '',
    '| while | kills |',
    '|---|---|',
    *(f'| {name} | {n} |' for name, n in when.most_common()),
    '',
    '| run | seconds after its start | while | last step logged |',
    '|---|---|---|---|',
    *(f'| {k.run} | {k.seconds:.2f} | {k.during} | {k.step} |' for k in kills),
    '',
    f'Made by `{made_by}`.',
    '',
  ]
  return '\n'.join(lines)


def main() -> None:
  out = Path(_OUT.value)
  if out.suffix != '.json':
    raise InputError(f'--out={out}: expected a file that ends in .json')
  out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    wanted = Path(folder) / 'undisturbed'
    kills = run_kills(
      Path(folder),
      _KILLS.value,
      _SEED.value,
      wanted,
      run_undisturbed(wanted),
      lambda line: print(line, file=sys.stderr, flush=True),
    )
  made_by = shlex.join(['python', '-m', 'benchmarks.kills', *sys.argv[1:]])
  write_json(out, [dataclasses.asdict(k) for k in kills])
  write_text(out.with_suffix('.md'), render(kills, made_by))
  print(f'{len(kills)} kills, nothing lost: {out}')


if __name__ == '__main__':
  flags.mark_flag_as_required('out')
  cli.run(main)
