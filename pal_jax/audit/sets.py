"""A dataset's comparisons in one numbering of its users."""

import jax
import numpy as np

from pal_jax.data import SEEN_ITEMS, UNSEEN_ITEMS, Dataset
from pal_jax.structs import Comparisons

SHOWN = ('train', 'support')
# What no shown item should help with, for probes of texts: with few items a
# probe can remember which of them people like by their looks.
UNSEEN = ('validation', f'seen, {UNSEEN_ITEMS}', f'unseen, {UNSEEN_ITEMS}')
HELD_OUT = (*UNSEEN, f'seen, {SEEN_ITEMS}', f'unseen, {SEEN_ITEMS}')


def named_sets(dataset: Dataset) -> dict[str, Comparisons]:
  """Every set of the dataset, [N] without padding, by SHOWN and HELD_OUT.

  Unseen users count from the number of seen users on.
  """
  sets = {'train': dataset.train, 'validation': dataset.validation}
  sets |= {f'seen, {where}': c for where, c in dataset.seen.items()}
  unseen = {'support': dataset.support}
  unseen |= {f'unseen, {where}': c for where, c in dataset.unseen.items()}
  for name, c in unseen.items():
    sets[name] = c.replace(user=c.user + dataset.num_users)
  flat = {name: c.flatten() for name, c in sets.items()}
  return {name: c[np.asarray(c.mask)] for name, c in flat.items()}


def join(sets: dict[str, Comparisons], names) -> Comparisons:
  """The named sets, one after the other: [N]."""
  return jax.tree.map(
    lambda *x: np.concatenate(x), *(sets[name] for name in names)
  )


def decided(comparisons: Comparisons) -> Comparisons:
  """Without ties."""
  return comparisons[comparisons.label != 0.5]
