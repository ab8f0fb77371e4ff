"""benchmark.selection: the simplest that is not clearly worse."""

import dataclasses
import functools

import numpy as np
import pytest

from configs import base, benchmark
from pal_jax import data, methods
from pal_jax.benchmark.cell import Protocol
from pal_jax.benchmark.selection import (
  choose,
  few_shot_nll,
  select,
)
from pal_jax.data.dataset import UNSEEN_ITEMS
from pal_jax.data.validation_users import validation_users
from pal_jax.errors import InputError
from pal_jax.methods import catalogue
from pal_jax.structs import FeatureTable
from tests.benchmark.planted_cells import two_way

PROTOCOL = Protocol((0, 5, 20), resamples=2)


def pal(num_prototypes, **changes):
  """Linear rewards; a squared distance is one for items of equal norms only."""
  return catalogue.pal(
    benchmark.get_config().pal,
    'em',
    model__preference='inner_product',
    model__projector='identity',
    model__num_prototypes=num_prototypes,
    train__num_steps=50,
    train__checkpoint_every=50,
    train__log_every=50,
    optimizer__warmup_steps=5,
    **changes,
  )


# The rule.


def choose_users(per_user, count):
  """Users whose comparisons are alike, on items that nobody shares."""
  losses = np.full((*per_user.shape, count.max()), np.nan)
  live = np.arange(count.max()) < count[:, None]
  each = np.broadcast_to((per_user / count)[..., None], losses.shape)
  losses[:, live] = each[:, live]
  return choose(losses, np.arange(2 * live.size).reshape(*live.shape, 2))


def test_the_rule_by_hand():
  # Two users with 2 and 3 comparisons; nats of the three candidates.
  per_user = np.array([[2.0, 4.0], [1.0, 3.5], [2.0, 3.0]])
  found = choose_users(per_user, np.array([2, 3]))
  np.testing.assert_allclose(found.nll, [6 / 5, 4.5 / 5, 1.0])
  # Against the second: differences 1, 0.5 and 1, -0.5 of the users; less the
  # mean times their counts: 0.4, -0.4 and 0.8, -0.8. Twice their squares are
  # 0.64 and 2.56.
  np.testing.assert_allclose(found.error, [0.8 / 5, 0, 1.6 / 5], atol=1e-12)
  # 0.3 is more than 0.16, so not the first; the best has no error.
  assert found.index == 1


def test_the_first_that_is_not_clearly_worse():
  per_user = np.array([[3.0, 4.0], [2.0, 3.0], [1.0, 3.5]])
  found = choose_users(per_user, np.array([2, 3]))
  # 0.5 is more than 0.4; then 0.1 is less than 0.32.
  np.testing.assert_allclose(found.nll - found.nll[2], [0.5, 0.1, 0.0])
  np.testing.assert_allclose(found.error, [0.4, 0.32, 0.0], atol=1e-12)
  assert found.index == 1


def noisy(means, users=200, seed=0):
  """Nats [candidates, users] over 10 comparisons, alike but for the means."""
  rng = np.random.default_rng(seed)
  own = rng.normal(6.0, 2.0, users)
  each = rng.normal(size=(len(means), users))
  return own + each + 10 * np.array(means)[:, None], np.full(users, 10)


@pytest.mark.parametrize('seed', range(5))
def test_a_clearly_better_one_is_chosen(seed):
  # One standard error is 0.01 nats.
  found = choose_users(*noisy([0.0, -0.05, 0.0], seed=seed))
  assert found.index == 1
  np.testing.assert_allclose(found.error[[0, 2]], 0.01, rtol=0.2)


def test_of_equals_the_first_is_chosen():
  per_user, count = noisy([0.0])
  found = choose_users(np.repeat(per_user, 4, axis=0), count)
  assert found.index == 0
  np.testing.assert_array_equal(found.error, 0.0)


def test_the_first_is_chosen_where_others_are_better_by_luck():
  chosen = [
    choose_users(*noisy([0.0, 0.0], seed=seed)).index for seed in range(200)
  ]
  # One-sided, beyond one standard error: 16%; three standard errors are 8%.
  assert 0.08 < np.mean(chosen) < 0.24


def test_what_all_users_share_is_no_error():
  """Differences are paired: how hard a user is does not count."""
  per_user, count = noisy([0.0, -0.05])
  harder = per_user + 1000 * np.random.default_rng(1).random(len(count))
  np.testing.assert_allclose(
    choose_users(harder, count).error,
    choose_users(per_user, count).error,
    rtol=1e-6,
  )


def test_the_error_is_that_of_users_drawn_anew():
  rng = np.random.default_rng(2)
  count = rng.integers(1, 20, 300)
  per_user = count * (0.5 + 0.2 * rng.normal(size=(2, 300)))
  found = choose_users(per_user, count)
  worse = 1 - int(np.argmin(found.nll))
  draws = rng.integers(0, 300, (4000, 300))
  gap = (per_user[worse] - per_user[1 - worse])[draws].sum(-1)
  anew = np.std(gap / count[draws].sum(-1))
  assert found.error[worse] == pytest.approx(anew, rel=0.06)


def test_one_user_is_no_reason_to_doubt():
  found = choose_users(np.array([[3.0], [2.0]]), np.array([4]))
  assert found.index == 1


def test_few_items_are_not_many_people():
  """Ten statements: better on them is not better on others."""
  wrong = {'users': 0, 'both': 0}
  for seed in range(100):
    rng = np.random.default_rng(seed)
    gap, rows = two_way(rng, 100, 10, 5, 0.1, 0.5, 0.5)
    losses = np.stack([np.zeros_like(gap), gap])
    wrong['both'] += choose(losses, rows).index
    apart = np.arange(rows.size).reshape(rows.shape)
    wrong['users'] += choose(losses, apart).index
  # By luck a sixth, and more, because ten items tell little of their own
  # spread; counted as a hundred people, nearly half.
  assert wrong['both'] < 36 < 40 <= wrong['users']


# What is judged.


def test_the_judge_is_the_mean_over_n_and_orders():
  rng = np.random.default_rng(3)
  z = rng.normal(size=(3, 2, 4, 5)).astype(np.float32)
  label = rng.choice([0.0, 1.0, 0.5], (4, 5)).astype(np.float32)
  label[1, 2:] = np.nan
  label[3] = np.nan
  nats = few_shot_nll(
    {f'unseen/{UNSEEN_ITEMS}/logit': z, f'unseen/{UNSEEN_ITEMS}/label': label}
  )
  assert np.isfinite(nats).sum(-1).tolist() == [5, 2, 5, 0]
  for user, q in np.argwhere(np.isfinite(nats)):
    each = [
      -label[user, q] * np.log(p) - (1 - label[user, q]) * np.log(1 - p)
      for p in (1 / (1 + np.exp(-z[:, :, user, q].astype(float)))).ravel()
    ]
    assert nats[user, q] == pytest.approx(np.mean(each), rel=1e-5)


# Choosing among methods.

SIZES = {
  'dimension': 8,
  'num_items': 150,
  'num_seen_users': 40,
  'num_unseen_users': 5,
  'comparisons_per_user': 30,
  'validation_per_user': 10,
  'seen_query': 5,
  'unseen_support': 5,
  'unseen_query': 5,
  'validation_fraction': 0.2,
}


def planted(config, **changes):
  config.update(SIZES | changes)
  dataset = data.create(config)
  return dataset, FeatureTable(dataset.item_features, dataset.prompt_features)


@functools.cache
def homogeneous():
  # Without noise, which would be in training alone: there those who are too
  # sure of themselves would be right.
  return planted(
    base.low_rank_data(), spread=0.0, label_noise=0.0, support_noise=0.0
  )


@functools.cache
def contradicting():
  return planted(base.simulation_data(), num_personas=2)


def test_people_who_are_alike_need_one_prototype():
  found = select([pal(1), pal(4)], *homogeneous(), PROTOCOL)
  assert found.index == 0
  assert found.losses.shape[:2] == (2, 20)
  assert np.isfinite(found.losses[0]).sum() == 200


def test_people_who_contradict_each_other_need_several():
  found = select([pal(1), pal(4)], *contradicting(), PROTOCOL)
  assert found.index == 1
  assert found.nll[1] < found.nll[0] - 0.05


def test_each_candidate_is_reported_as_it_is_done():
  done = []
  candidates = [methods.Random(), methods.BradleyTerry()]
  found = select(
    candidates, *homogeneous(), PROTOCOL, share=0.2, on_done=done.append
  )
  assert done == [1, 2]
  assert found.index == 1
  assert found.nll[0] == pytest.approx(np.log(2), abs=1e-3)
  assert np.isfinite(found.losses).sum(-1).tolist() == [[10] * 8] * 2


def test_a_selection_is_of_validation_users_alone():
  dataset, table = contradicting()
  held = validation_users(dataset, 0.2, 20, 7)
  every = {'share': 0.2, 'seed': 7}
  first = select([methods.Random()], dataset, table, PROTOCOL, **every)
  # Whatever the unseen users and the test sets say.
  other = dataclasses.replace(
    dataset,
    seen={},
    unseen={},
    support=dataset.support[:0],
    unseen_user_ids=(),
  )
  again = select([methods.Random()], other, table, PROTOCOL, **every)
  np.testing.assert_array_equal(first.losses, again.losses)
  asked = held.unseen[UNSEEN_ITEMS].mask.sum(-1)
  np.testing.assert_array_equal(np.isfinite(first.losses[0]).sum(-1), asked)
  assert first.index == 0 and first.error.tolist() == [0.0]


def test_nothing_to_choose_from_is_refused():
  with pytest.raises(InputError, match='nothing to choose from'):
    select([], *homogeneous(), PROTOCOL)


def test_candidates_that_read_prompts_differently_are_refused():
  with pytest.raises(InputError, match='PAL-A and PAL-B'):
    select([pal(1), pal(1, model__name='pal_b')], *homogeneous(), PROTOCOL)
