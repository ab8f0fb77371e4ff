"""The rows of the user table that a batch has to do with, and no others.

With millions of users a step must neither read nor write the whole table: what
it works on, and what the optimiser sees, are the rows of the batch's users and
their moments. Adam is then the lazy one (`torch.optim.SparseAdam`, TensorFlow
Addons' `LazyAdam`): a row and its moments move when its user is in the batch,
and rest otherwise; the count of steps, for the bias of the moments, is that of
all steps.
"""

import jax

TABLE = 'user_logits'
# A table that is split over devices has a multiple of this many rows, whatever
# their number, so that a checkpoint knows nothing of them.
ROW_MULTIPLE = 1024


def is_table(path) -> bool:
  """Whether a leaf is the user table, or a moment of it."""
  return bool(path) and getattr(path[-1], 'key', None) == TABLE


def map_table(function, tree, *rest):
  """Applies a function to the tables [U, K] of a tree; keeps the rest."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x, *other: function(x, *other) if is_table(path) else x,
    tree,
    *rest,
  )


def take_rows(tree, users: jax.Array):
  """Tables [U, K] -> [R, K], the rows of users [R]; 0 past the table."""
  return map_table(lambda x: x.at[users].get(mode='fill', fill_value=0.0), tree)


def put_rows(tree, rows, users: jax.Array):
  """The tables of `tree` with those rows in them, and the rest of `rows`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, old, new: (
      old.at[users].set(new, mode='drop') if is_table(path) else new
    ),
    tree,
    rows,
  )


def trim(tree, num_users: int):
  """Tables without the rows that only fill them up."""
  return map_table(lambda x: x[:num_users], tree)
