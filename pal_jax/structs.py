"""Arrays that cross modules, and the glossary of axis letters.

`B` comparisons in a batch, `U` users, `N` comparisons of one user, `K`
prototypes, `C` candidates of a comparison (2), `D` encoder width, `P` width of
the preference space, `T` tokens, `M` items, `Q` prompts.
"""

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Comparisons:
  """Comparisons of two candidates; any leading shape `[...]`, often [B].

  Ids are rows of the user table and of the feature table, so that a text is
  stored once however many comparisons share it.
  """

  user: Array  # [...] int32, row of the user table
  prompt: Array  # [...] int32, row of FeatureTable.prompts
  items: Array  # [..., C] int32, rows of FeatureTable.items
  label: Array  # [...] float32 in [0, 1], probability that the first is better
  weight: Array  # [...] float32 >= 0, weight in the training loss
  mask: Array  # [...] bool, False for padding

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.label.shape)

  def __getitem__(self, index) -> 'Comparisons':
    """Indexes the leading axes of every array alike."""
    return jax.tree.map(lambda x: x[index], self)

  def flatten(self) -> 'Comparisons':
    """Folds all leading axes into one: [U, N] becomes [U * N]."""
    lead = self.label.ndim
    return jax.tree.map(lambda x: x.reshape((-1, *x.shape[lead:])), self)


@flax.struct.dataclass
class Batch:
  """Comparisons and the distinct texts in them, so that each is placed once.

  Counts say how many comparisons that are not masked show a row; padding has
  0, so that means over rows with these weights are means over comparisons.
  """

  comparisons: Comparisons  # [B], whose ids are places in the rows below
  items: Array  # [S] int32, rows of FeatureTable.items
  item_count: Array  # [S] float32
  prompts: Array  # [T] int32, rows of FeatureTable.prompts
  prompt_count: Array  # [T] float32
  # [B] int32, the distinct users, then rows past the table, where a step works
  # on their rows alone; `comparisons.user` are then places among them.
  users: 'Array | None' = None
  # [S, D] and [T, D] of these rows, where the table is not on the device.
  features: 'FeatureTable | None' = None


@flax.struct.dataclass
class FeatureTable:
  """Frozen encoder features of every distinct text of an experiment.

  Arrays; on the host also what reads rows from a file when it is indexed.
  """

  items: Array  # [M, D] float16 or float32, candidates
  prompts: Array  # [Q, D] float16 or float32, prompts

  @property
  def nbytes(self) -> int:
    return self.items.nbytes + self.prompts.nbytes


def make_comparisons(
  user, items, label, *, prompt=None, weight=None, mask=None
) -> Comparisons:
  """Numpy comparisons with the defaults filled in.

  Args:
    user: [...] rows of the user table.
    items: [..., 2] rows of the item table.
    label: [...] probabilities in [0, 1].
    prompt: [...] rows of the prompt table; row 0 if not given.
    weight: [...] loss weights; 1 if not given.
    mask: [...] False for padding; True if not given.
  """
  label = np.asarray(label, np.float32)
  ones = np.ones_like(label)
  return Comparisons(
    user=np.broadcast_to(np.asarray(user, np.int32), label.shape),
    prompt=np.zeros(label.shape, np.int32)
    if prompt is None
    else np.asarray(prompt, np.int32),
    items=np.asarray(items, np.int32),
    label=label,
    weight=ones if weight is None else np.asarray(weight, np.float32),
    mask=ones.astype(bool) if mask is None else np.asarray(mask, bool),
  )
