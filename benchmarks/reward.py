"""Milliseconds of `RewardModel`, features given, after a warm-up.

  python -m benchmarks.reward --model=/tmp/pal_persona

Prints the median and the range of 20 calls: one user's rewards of 1,000
responses, 1,000 users' rewards of 1,000 responses, and one `prefer`.
"""

import time

import jax
import numpy as np
from absl import flags

from pal_jax import RewardModel, cli

_MODEL = flags.DEFINE_string('model', None, 'A finished workdir, or a model.')
_REPEATS = 20


def _measure(call) -> str:
  call()
  found = []
  for _ in range(_REPEATS):
    start = time.perf_counter()
    call()
    found.append(1e3 * (time.perf_counter() - start))
  return f'{np.median(found):.1f} ms ({min(found):.1f} to {max(found):.1f})'


def main():
  model = RewardModel.load(_MODEL.value)
  if not model.card['join_prompt']:
    raise SystemExit('this benchmark gives no prompts: use a model of PAL-A')
  width = model.card['feature_width']
  h = np.random.default_rng(0).normal(size=(1000, width)).astype(np.float32)
  users = [model.users[i % len(model.users)] for i in range(1000)]
  device = jax.devices()[0]
  print(f'{device.platform} ({device.device_kind}), jax {jax.__version__}')
  one = users[0]
  for name, call in (
    ('1 user x 1,000 responses', lambda: model.reward(None, h, one)),
    ('1,000 users x 1,000 responses', lambda: model.reward(None, h, users)),
    ('one preference', lambda: model.prefer(None, h[0], h[1], one)),
  ):
    print(f'{name}: {_measure(call)}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['model'])
  cli.run(main)
