"""From the files of a workdir to a page a person understands."""

import json
from pathlib import Path

import numpy as np

from pal_jax import figures
from pal_jax.writer import write_text

_COLUMNS = (
  ('accuracy', 'accuracy'),
  ('user_accuracy', 'over users'),
  ('worst_decile_accuracy', 'worst 10% of users'),
  ('nll', 'NLL'),
  ('brier', 'Brier'),
  ('ece', 'ECE'),
)


def _table(rows: list[tuple[str, dict]]) -> str:
  head = '| | ' + ' | '.join(title for _, title in _COLUMNS) + ' |'
  rule = '|---|' + '---|' * len(_COLUMNS)
  body = [
    f'| {name} | '
    + ' | '.join(f'{metrics[key]:.3f}' for key, _ in _COLUMNS)
    + ' |'
    for name, metrics in rows
  ]
  return '\n'.join([head, rule, *body])


def _interval(pair) -> str:
  return f'{pair[0]:.3f} to {pair[1]:.3f}'


def _summary(results: dict, config: dict) -> str:
  seen, unseen = results['seen'], results['unseen']
  last = str(max(int(n) for n in unseen))
  control, sizes = results['controls'], results['sizes']
  each = sizes['train_comparisons'] / sizes['seen_users']
  lines = [
    f'A {_name(config)} with K = {results["num_prototypes"]} prototypes was '
    f'trained on {sizes["seen_users"]} people, {each:.3g} comparisons each, '
    f'and then met {sizes["unseen_users"]} people it had never seen. '
    'All of the following is on '
    + (
      'the rows that the data keep for testing.'
      if results['given_splits']
      else 'items that nobody compared in training.'
    ),
    '',
    f'- **Seen people:** it predicts {seen["accuracy"]:.1%} of their choices '
    f'(95% interval over users {_interval(results["intervals"]["seen"])}).',
    f'- **One score for everybody** (a linear Bradley-Terry model, the same '
    f'pairs): {control["homogeneous_seen"]["accuracy"]:.1%}.',
    f'- **Unseen people:** {unseen["0"]["accuracy"]:.1%} before they answered '
    f'anything, {unseen[last]["accuracy"]:.1%} after {last} comparisons.',
    f"- **Is it personal?** Given another person's weights the model falls to "
    f'{control["swapped_users"]["accuracy"]:.1%}.',
  ]
  if results['ari'] is not None:
    lines.append(
      f'- **Did it find the groups?** Adjusted Rand index against the true '
      f'personas: {results["ari"]:.2f} with k-means on the weights, '
      f'{results["ari_dominant"]:.2f} by largest weight (1 is perfect, 0 is '
      'chance).'
    )
  return '\n'.join(lines)


def _name(config: dict) -> str:
  model = config['model']
  point = f', `{model["point"]}`' if model['name'] == 'pal_a' else ''
  return (
    f'{model["name"].replace("_", "-").upper()} model '
    f'(`{model["preference"]}`{point}, `{model["membership"]}`)'
  )


def _noise(results: dict) -> str:
  noise = results['noise']
  if noise is None:
    return (
      "Labels are people's own: how many of them anybody could know is not "
      'known.'
    )
  rate = noise['label_noise']
  accuracy = results['seen']['accuracy']
  if not rate:
    return (
      'Labels are clean: the ceiling of every accuracy here is 1.0. The model '
      f'agrees with {noise["train_accuracy"]:.1%} of the training labels.'
    )
  return '\n'.join(
    [
      f'{rate:.0%} of the training labels were flipped; test labels are clean.',
      '',
      '| | model | ceiling |',
      '|---|---|---|',
      f'| agreement with the (noisy) training labels | '
      f'{noise["train_accuracy"]:.3f} | {noise["ceiling"]:.3f} |',
      f'| accuracy against noisy test labels (expected) | '
      f'{noise["noisy_accuracy"]:.3f} | {noise["ceiling"]:.3f} |',
      f'| accuracy against clean test labels | {accuracy:.3f} | 1.000 |',
      '',
      f'Nobody can agree with more than {noise["ceiling"]:.0%} of labels of '
      'which that share is right: this is the noise ceiling, and it accounts '
      f'for {100 * rate:.1f} of the '
      f'{100 * (1 - noise["noisy_accuracy"]):.1f} points that are missed when '
      'test labels are as noisy as the training labels. What is left, '
      f'{100 * (1 - accuracy):.1f} points against clean labels, is '
      'estimation and the features, as it is without noise, only larger: a '
      f'label flipped with probability {rate:.2f} carries a fraction '
      f'(1 - 2 x {rate:.2f})^2 = {(1 - 2 * rate) ** 2:.2f} of the '
      'information of a clean one near a decision boundary, so the model '
      'learns as if from that many fewer comparisons. It is also as unsure as '
      'its labels were, which clean labels punish: NLL '
      f'{results["seen"]["nll"]:.3f} and ECE {results["seen"]["ece"]:.3f} '
      f'against clean test labels, {noise["noisy_nll"]:.3f} and '
      f'{noise["noisy_ece"]:.3f} against labels as noisy as the training '
      'ones.',
    ]
  )


def _adaptation(results: dict) -> str:
  info = results['adaptation']
  if info['method'] == 'posterior':
    text = (
      'Everything but the weights is frozen. A new user starts from a discrete '
      f'prior with {info["atoms"]} atoms (as spread out as '
      f'{info["effective_atoms"]:.1f} equal ones), fitted on the seen '
      "users' validation comparisons; the posterior is in closed form, and "
      'predictions integrate over it.'
    )
    if info['belief_curve']:
      text += (
        ' On the seen users, treated as new, an evidence power of '
        f'{info["evidence"]:g} and a logarithmic share of {info["pooling"]:g} '
        'predicted best: '
        f'{min(info["belief_curve"].values()):.3f} nats a comparison, against '
        f"{info['belief_curve']['1/0']:.3f} by Bayes' rule as it stands (power "
        '1, share 0).'
      )
    return text
  text = (
    'Everything but the weights is frozen. A new user starts from the mean '
    "of the seen users' weights and is pulled back to it with strength "
    f'{info["strength"]:g} (nats per unit of KL)'
  )
  if info['strength_curve']:
    text += (
      ', the best of '
      + ', '.join(info['strength_curve'])
      + " on the seen users' validation comparisons"
    )
  certificate = (
    'the largest relative gap, a bound on the suboptimality, is '
    f'{info["largest_relative_gap"]:.1e}'
    if info['convex']
    else 'this form is not convex: points are stationary, with a KKT residual '
    f'of at most {info["largest_residual"]:.1e}'
  )
  return (
    f'{text}. {info["fits"]} fits took {info["mean_iterations"]:.1f} '
    f'iterations on average ({info["max_iterations"]} at most); '
    f'{info["not_converged"]} did not converge; {certificate}.'
  )


def _recovery(results: dict) -> str:
  names = {
    'rank_correlation': "Spearman's correlation of rewards with the true "
    'utilities over unseen items, mean over users',
    'ideal_point_error': "relative error of the users' ideal points",
    'prototype_error': 'relative error of the prototypes, up to relabelling',
  }
  rows = [
    f'| {names[key]} | {value:.3f} |'
    for key, value in results['recovery'].items()
  ]
  note = (
    'Prototypes are identified for f = identity and a partition; for mixtures '
    "only the users' ideal points are, and with a learned f only the order of "
    'distances.'
  )
  return '\n'.join(['| planted | |', '|---|---|', *rows, '', note])


def render(results: dict, timing: dict, config: dict, notes: list[str]) -> str:
  """The text of report.md."""
  grid = results['grid']
  seen, unseen = grid['seen_users'], grid['unseen_users']
  counts = sorted(results['unseen'], key=int)
  last = counts[-1]
  quarters = [
    ('seen users, seen items', seen['seen_items']),
    ('seen users, unseen items', seen['unseen_items']),
    (f'unseen users (n = {last}), seen items', unseen['seen_items'][last]),
    (f'unseen users (n = {last}), unseen items', unseen['unseen_items'][last]),
  ]
  controls = [
    ('homogeneous, seen users', results['controls']['homogeneous_seen']),
    ('homogeneous, unseen users', results['controls']['homogeneous_unseen']),
    *(
      (f'length only, {who} users', results['controls'][f'length_{who}'])
      for who in ('seen', 'unseen')
      if f'length_{who}' in results['controls']
    ),
    ('no adaptation (n = 0)', results['unseen']['0']),
    ('swapped users', results['controls']['swapped_users']),
  ]
  sections = [
    f'# {config["data"]["name"]}: what happened',
    _summary(results, config),
    '## The data',
    '\n'.join(
      [notes[0], '', *(f'- {note}' for note in notes[1:])] if notes else []
    ),
    '## Seen and unseen, people and items',
    'Accuracies are in [0, 1], NLL in nats; ECE has 15 equal-mass bins.',
    _table(quarters),
    '## People never seen before',
    '![few-shot curve](few_shot.png)',
    f'Unseen users, unseen items, {config["evaluation"]["resamples"]} random '
    'orders of the support; support and queries share no pair.',
    _table([(f'n = {n}', results['unseen'][n]) for n in counts]),
    _adaptation(results),
    '## Controls',
    _table(controls),
    '## Label noise',
    _noise(results),
  ]
  if results['bayes_accuracy']:
    sections += [
      '## Against the Bayes-optimal predictor',
      '\n'.join(
        ['| n | model | Bayes-optimal |', '|---|---|---|']
        + [
          f'| {n} | {results["unseen"][n]["accuracy"]:.3f} | '
          f'{results["bayes_accuracy"][n]:.3f} |'
          for n in counts
        ]
      ),
    ]
  if results['recovery']:
    sections += ['## Recovery of what was planted', _recovery(results)]
  sections += [
    '## Who weighs what',
    '![weights](weights.png)',
    'Each row is a person, each column a prototype. White lines part the true '
    'personas, which the model was never told.',
    '## The preference space',
    '![preference space](space.png)',
    'Items, prototypes and people in the two directions of most variance. '
    'The nearer an item is to a person, the better they like it; distances in '
    'the plane are only part of those in the whole space.',
    '## The run',
    f'{results["train"]["steps"]} steps; the last process took '
    f'{timing["seconds"]:.1f} s, {timing["comparisons_per_second"]:,.0f} '
    'comparisons/s. The config is in `config.json`, all numbers in '
    '`results.json`, the training curve in `metrics.jsonl`.',
  ]
  return '\n\n'.join(section for section in sections if section) + '\n'


def write_report(workdir: Path, results: dict, timing: dict) -> None:
  """Writes report.md and its figures from results and the workdir's files."""
  # As they will stand in results.json, with its string keys.
  results = json.loads(json.dumps(results))
  config = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
  with np.load(workdir / 'analysis.npz', allow_pickle=False) as file:
    arrays = dict(file)
  figures.draw_few_shot(workdir / 'few_shot.png', results)
  figures.draw_weights(workdir / 'weights.png', arrays)
  figures.draw_space(workdir / 'space.png', arrays)
  notes = [str(note) for note in arrays['notes']]
  write_text(workdir / 'report.md', render(results, timing, config, notes))
