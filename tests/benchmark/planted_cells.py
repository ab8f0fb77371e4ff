"""Cells made by hand: random log odds that are right as often as is planted."""

import zlib

import numpy as np

from pal_jax.benchmark.cell import CONTROLS, WHERE
from pal_jax.benchmark.summary import Finished


def answers(seed, users, queries, padded=False):
  """Labels [users, queries], some of them ties or padding, and items."""
  rng = np.random.default_rng([seed, 1])
  label = rng.choice([0.0, 1.0], (users, queries)).astype(np.float32)
  if padded:
    label[:3, -5:] = np.nan
    label[3:5, 0] = 0.5
    label[5] = 0.5
  items = rng.integers(0, 20, (users, queries, 2)).astype(np.int32)
  return label, items


def log_odds(rng, label, right, lead=()):
  """Logits [*lead, ...] that are right with a probability of `right`."""
  shape = (*lead, *label.shape)
  size = np.abs(rng.normal(size=shape)) + 0.1
  side = np.where(label > 0.5, 1.0, -1.0)
  sign = np.where(rng.random(shape) < right, side, -side)
  return (size * sign).astype(np.float32)


def make_cell(
  method='m',
  seed=0,
  *,
  right=0.7,
  counts=(0, 3),
  resamples=1,
  users=12,
  queries=15,
  padded=False,
  repeated=True,
  group=None,
):
  """Methods with the same seed have the same people and labels."""
  rng = np.random.default_rng([seed, zlib.crc32(method.encode())])
  arrays = {'num_support': np.array(counts), 'temperature': np.array(1.7)}
  seen = users + 4
  for number, where in enumerate(WHERE):
    for who, size, lead in (
      ('unseen', users, (len(counts), resamples)),
      ('seen', seen, ()),
    ):
      label, items = answers(
        10 * seed + number + size, size, queries, padded and who == 'unseen'
      )
      key = f'{who}/{where}'
      arrays[f'{key}/label'], arrays[f'{key}/items'] = label, items
      arrays[f'{key}/logit'] = log_odds(rng, label, right, lead)
  for name in CONTROLS:  # of unseen users on unseen items, the last label
    label = arrays[f'unseen/{WHERE[1]}/label']
    arrays[f'control/{name}'] = log_odds(rng, label, 0.5)
  meta = {
    'unseen_users': [f'person {i}' for i in range(users)],
    'seen_users': [f'known {i}' for i in range(seen)],
    'repeated_people': repeated,
    'data': {'name': 'polis' if repeated else 'low_rank'},
    'group': None if group is None else list(group),
  }
  return Finished('planted', method, seed, arrays, meta)


def two_way(rng, users, items, each, own, shared, alone):
  """A gap [users, each] of effects of users, of items, and of neither."""
  rows = np.stack([rng.permutation(items)[: 2 * each] for _ in range(users)])
  rows = rows.reshape(users, each, 2)
  effect = shared * rng.normal(size=items)
  gap = own * rng.normal(size=(users, 1)) + effect[rows].sum(-1)
  return gap + alone * rng.normal(size=(users, each)), rows
