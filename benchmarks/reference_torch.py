"""The reference implementation's training, restated in PyTorch.

Written from its description (METHOD sections 1 and 2), on features that were
computed before: PAL-A `f(Pw)` with one `mlp2`, minus the distance, hinge; one
parameter vector a user, drawn from N(0, 1); prototypes Gaussian rows of norm 1;
a batch from a DataLoader, its users' vectors stacked one by one; Adam with
1e-4 and decay 0.01 for the projector, 5e-3 for prototypes and users, 0.1 for
the temperature; no schedule. For new users AdamW 5e-3 on their vector alone,
20 epochs of batches of 4.

Optional: needs torch, of which the CPU's suffices.
"""

import time
from collections.abc import Callable

import numpy as np

from pal_jax.optional import require
from pal_jax.structs import Comparisons

HOW = 'pip install torch'
NEW_USER = {'batch_size': 4, 'num_epochs': 20, 'lr': 5e-3}


def _torch():
  return require('torch', "the reference's recipe", HOW)


class Reference:
  """The model and its optimiser.

  Args:
    features: [M, D] of all candidates.
    num_users: U.
    num_prototypes: K.
    seed: of parameters and the order of batches.
  """

  def __init__(
    self, features: np.ndarray, num_users: int, num_prototypes: int, seed: int
  ):
    torch = self._torch = _torch()
    torch.manual_seed(seed)
    nn = torch.nn
    width = features.shape[1]
    self.num_prototypes = num_prototypes
    self.features = torch.tensor(features, dtype=torch.float32)
    self.projector = nn.Sequential(
      nn.Linear(width, width),
      nn.ReLU(),
      nn.Linear(width, width),
      nn.ReLU(),
      nn.Linear(width, width),
    )
    rows = torch.randn(num_prototypes, width)
    self.prototypes = nn.Parameter(rows / rows.norm(dim=-1, keepdim=True))
    self.users = nn.ParameterDict(
      {f'user_{i}': torch.randn(num_prototypes) for i in range(num_users)}
    )
    self.temperature = nn.Parameter(torch.ones(()))
    self.optimizer = torch.optim.Adam(
      [
        {
          'params': self.projector.parameters(),
          'lr': 1e-4,
          'weight_decay': 0.01,
        },
        {'params': [self.prototypes, *self.users.values()], 'lr': 5e-3},
        {'params': [self.temperature], 'lr': 0.1},
      ]
    )

  def logit(self, user_logits, items):
    """[B] of users' logits [B, K] and rows of candidates [B, 2]."""
    torch = self._torch
    w = torch.softmax(user_logits / self.temperature.clamp(min=1e-2), dim=-1)
    u = self.projector(w @ self.prototypes)
    x = self.projector(self.features[items])
    reward = -(x - u[:, None]).norm(dim=-1)
    return reward[:, 0] - reward[:, 1]

  def logits_of(self, users):
    """[B, K], stacked one by one, as they are stored."""
    return self._torch.stack([self.users[f'user_{int(i)}'] for i in users])

  def loss(self, logit, label):
    """Hinge of margin 1; a label of 0.5 has none."""
    sign = 2.0 * label - 1.0
    return self._torch.relu(1.0 - sign * logit).mean()

  def accuracy(self, comparisons: Comparisons) -> float:
    """Of users of the table."""
    return self._accuracy(self.logits_of(comparisons.user), comparisons)

  def _accuracy(self, user_logits, comparisons: Comparisons) -> float:
    torch = self._torch
    with torch.no_grad():
      items = torch.as_tensor(np.asarray(comparisons.items), dtype=torch.long)
      z = self.logit(user_logits, items).numpy()
    return float(np.mean((z > 0) == (np.asarray(comparisons.label) > 0.5)))

  def _loader(self, comparisons: Comparisons, batch_size: int):
    torch = self._torch
    data = torch.utils.data
    arrays = data.TensorDataset(
      torch.tensor(comparisons.user, dtype=torch.long),
      torch.tensor(comparisons.items, dtype=torch.long),
      torch.tensor(comparisons.label),
    )
    return data.DataLoader(arrays, batch_size=batch_size, shuffle=True)

  def train(
    self,
    comparisons: Comparisons,
    batch_size: int,
    check: Callable[[int, float], bool],
    check_every: int,
  ) -> None:
    """Trains until `check` says stop.

    Args:
      comparisons: [N].
      batch_size: B.
      check: called with (steps, seconds of training) every `check_every`
        steps, on no clock; True ends.
      check_every: steps.
    """
    loader = self._loader(comparisons, batch_size)
    number, spent, begin = 0, 0.0, time.perf_counter()
    while True:
      for users, items, label in loader:
        self.optimizer.zero_grad()
        self.loss(self.logit(self.logits_of(users), items), label).backward()
        self.optimizer.step()
        number += 1
        if number % check_every == 0:
          spent += time.perf_counter() - begin
          if check(number, spent):
            return
          begin = time.perf_counter()

  def adapt(self, support: Comparisons, queries: Comparisons):
    """New users [U, N], one after another: (seconds, accuracy on queries)."""
    torch = self._torch
    for parameter in self.projector.parameters():
      parameter.requires_grad_(False)
    seconds, right = 0.0, []
    for user in range(support.label.shape[0]):
      begin = time.perf_counter()
      mine = torch.nn.Parameter(torch.randn(self.num_prototypes))
      optimizer = torch.optim.AdamW([mine], lr=NEW_USER['lr'])
      loader = self._loader(support[user], NEW_USER['batch_size'])
      for _ in range(NEW_USER['num_epochs']):
        for _, items, label in loader:
          optimizer.zero_grad()
          logit = self.logit(mine.expand(len(label), -1), items)
          self.loss(logit, label).backward()
          optimizer.step()
      seconds += time.perf_counter() - begin
      count = queries.label.shape[1]
      right.append(self._accuracy(mine.expand(count, -1), queries[user]))
    return seconds, float(np.mean(right))
