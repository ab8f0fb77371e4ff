"""From the reference's tensors to a model of this library.

A state dict does not say which reward it was trained for, nor the activation:
these are `Options`. Of the batch norm the running averages count, of texts the
one vector the model scores (the last token's).
"""

import dataclasses

import ml_collections
import numpy as np

from pal_jax import models
from pal_jax.adaptation import Prior
from pal_jax.adaptation.prior import SPREAD, choose_atoms
from pal_jax.adaptation.users import UserTable
from pal_jax.convert.state_dict import Matched
from pal_jax.errors import InputError
from pal_jax.ideal_points import PREFERENCES
from pal_jax.models.projectors import ACTIVATIONS
from pal_jax.numerics import log_mean_weights
from pal_jax.saved_model import SavedModel, make_card

_BATCH_NORM = {
  'weight': ('params', 'scale'),
  'bias': ('params', 'bias'),
  'running_mean': ('batch_stats', 'mean'),
  'running_var': ('batch_stats', 'var'),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """What the tensors do not say; '' is the reference's default."""

  preference: str = ''  # PAL-A: distance, PAL-B: cosine
  point: str = 'f(Pw)'  # of PAL-A
  activation: str = 'gelu'  # the exact one
  residual: bool = False


def convert(
  matched: Matched, base: ml_collections.ConfigDict, options: Options
) -> SavedModel:
  """A model that scores as the checkpoint does.

  Its people keep their trained weights; somebody new starts from them, each
  equally likely.

  Args:
    matched: from `state_dict.match`.
    base: a config with the parts `model`, `features` and `adaptation`.
    options: what the tensors do not say.

  Raises:
    InputError: naming tensors that are missing or do not fit together.
  """
  _check(matched, options)
  kind = 'pal_b' if matched.prompt else 'pal_a'
  preference = options.preference or (
    'cosine' if kind == 'pal_b' else 'distance'
  )
  item, form = _projector(matched.item, 'the item projector')
  params: dict = {'projector': item['params']}
  stats = {'projector': item['batch_stats']}
  if kind == 'pal_b':
    maps = [
      _projector(matched.prompt[k], f'prompt projector {k}')
      for k in sorted(matched.prompt)
    ]
    if any(f != form for _, f in maps):
      raise InputError(
        f'the prompt projectors have the forms {[f for _, f in maps]}, the '
        f'item projector {form}: expected one form'
      )
    params['prompt_projectors'] = _stack([m['params'] for m, _ in maps])
    stats['prompt_projectors'] = _stack([m['batch_stats'] for m, _ in maps])
  else:
    params['prototypes'] = matched.prototypes
  ids = tuple(matched.users)
  logits = np.stack([matched.users[i] for i in ids])
  # A model has at least as many users as prototypes; nobody has these rows.
  rows = max(len(ids), logits.shape[1])
  logits = np.pad(logits, ((0, rows - len(ids)), (0, 0)))
  temperature = _scalar(matched, 'temperature', 1.0)
  if not temperature > 0:
    raise InputError(
      f'softmax_w.temperature is {temperature}: it must be positive'
    )
  _check_form(matched, options, form)
  params['user_logits'] = logits
  params['log_temperature'] = np.float32(np.log(temperature))
  # Only the cosine is scaled there.
  scale = _scalar(matched, 'logit_scale', 0.0)
  params['log_scale'] = np.float32(scale if preference == 'cosine' else 0.0)
  config = ml_collections.ConfigDict(base.to_dict())
  config.model.update(
    name=kind,
    num_prototypes=logits.shape[1],
    width=form['width'],
    preference=preference,
    membership='convex',
    projector=f'mlp{form["hidden"]}',
    activation=options.activation,
    residual=options.residual,
    batch_norm=form['batch_norm'],
    use_bias=form['use_bias'],
    dropout=0.0,
    matryoshka=(),
  )
  if kind == 'pal_a':
    config.model.point = options.point
  model = models.create(
    config.model, num_users=rows, feature_width=form['inputs']
  )
  variables = {'params': params}
  if form['batch_norm']:
    variables['batch_stats'] = stats
  prior = _population(model, variables, len(ids))
  card = make_card(
    config,
    num_users=rows,
    feature_width=form['inputs'],
    encoder=None,
    data={'converted_from': 'a checkpoint of the PyTorch implementation'},
    metrics={},
  )
  card['trained_users'] = list(ids)
  users = UserTable(model, variables, prior, method=base.adaptation.method)
  return SavedModel(model, variables, prior, users, card)


def _check(matched: Matched, options: Options) -> None:
  for field, known in (
    ('preference', ('', *PREFERENCES)),
    ('point', ('Pw', 'f(P)w', 'f(Pw)', '|f(P)|w')),
    ('activation', tuple(ACTIVATIONS)),
  ):
    value = getattr(options, field)
    if value not in known:
      raise InputError(f'{field}={value!r} is unknown: expected one of {known}')
  missing = []
  if not matched.item:
    missing.append('item_learner.projector.mlp.layers.*')
  if not matched.users:
    missing.append('user_learner.W.*')
  if matched.prototypes is None and not matched.prompt:
    missing.append(
      'user_learner.P (PAL-A) or user_learner.projectors.* (PAL-B)'
    )
  if missing:
    raise InputError(
      f'the checkpoint lacks {"; ".join(missing)}\n{matched.listing()}'
    )
  if matched.prompt and sorted(matched.prompt) != list(
    range(len(matched.prompt))
  ):
    raise InputError(
      f'prompt projectors {sorted(matched.prompt)} are there: expected 0, 1, '
      'and so on without a gap'
    )
  if not matched.prompt and matched.prototypes.ndim != 2:
    raise InputError(
      f'user_learner.P has the shape {matched.prototypes.shape}: expected '
      '(K, D)'
    )
  number = (
    len(matched.prompt) if matched.prompt else matched.prototypes.shape[0]
  )
  for user, logits in matched.users.items():
    if logits.shape != (number,):
      raise InputError(
        f'user_learner.W.{user} has the shape {logits.shape}; with {number} '
        f'prototypes it must be ({number},)'
      )


def _projector(layers: dict, what: str) -> tuple[dict, dict]:
  """({'params', 'batch_stats'}, form) of a stack of layers by position."""
  dense, norms = [], []
  for place in sorted(layers):
    layer = layers[place]
    if 'weight' not in layer:
      raise InputError(f'{what}, layer {place}: has no weight')
    (dense if layer['weight'].ndim == 2 else norms).append((place, layer))
  if not dense:
    raise InputError(f'{what}: none of its layers has a matrix of weights')
  hidden = len(dense) - 1
  shapes = [layer['weight'].shape for _, layer in dense]  # [out, in]
  width = shapes[-1][0]
  fits = all(out == width for out, _ in shapes) and all(
    inputs == width for _, inputs in shapes[1:]
  )
  if not fits:
    raise InputError(
      f'{what} has layers of the shapes {shapes} (out, in): expected hidden '
      'layers as wide as the output'
    )
  if len(norms) not in (0, hidden):
    raise InputError(
      f'{what} has {len(norms)} batch norms for {hidden} hidden layers: '
      'expected one each, or none'
    )
  biased = [('bias' in layer) for _, layer in dense]
  if len(set(biased)) > 1:
    raise InputError(f'{what}: some layers have a bias and some have none')
  out: dict = {'params': {}, 'batch_stats': {}}
  for i, (_, layer) in enumerate(dense):
    out['params'][f'Dense_{i}'] = {'kernel': layer['weight'].T} | (
      {'bias': layer['bias']} if biased[0] else {}
    )
  for i, (place, layer) in enumerate(norms):
    name = f'MaskedBatchNorm_{i}'
    for field, (collection, ours) in _BATCH_NORM.items():
      if field not in layer:
        raise InputError(f'{what}, layer {place}: the norm lacks {field}')
      out[collection].setdefault(name, {})[ours] = layer[field]
  return out, {
    'hidden': hidden,
    'inputs': shapes[0][1],
    'width': width,
    'batch_norm': bool(norms),
    'use_bias': biased[0],
  }


def _stack(trees: list[dict]) -> dict:
  """Of equal trees of arrays, a leading axis."""
  return {
    name: _stack([tree[name] for tree in trees])
    if isinstance(value, dict)
    else np.stack([tree[name] for tree in trees])
    for name, value in trees[0].items()
  }


def _scalar(matched: Matched, name: str, default: float) -> float:
  value = matched.scalars.get(name, np.array([default]))
  if value.size != 1:
    raise InputError(f'{name} has the shape {value.shape}: expected one number')
  return float(value.ravel()[0])


def _check_form(matched: Matched, options: Options, form: dict) -> None:
  """What only shows when the projector's sizes are known."""
  inputs, width = form['inputs'], form['width']
  if options.residual and inputs != width:
    raise InputError(
      f'residual: the projector maps {inputs} to {width}; a residual one needs '
      'them equal'
    )
  if matched.prompt:
    return
  expected = width if options.point == 'Pw' else inputs
  if matched.prototypes.shape[1] != expected:
    raise InputError(
      f'user_learner.P has the shape {matched.prototypes.shape}: with point='
      f'{options.point!r} prototypes are {expected} wide (the projector maps '
      f"{inputs} to {width}); 'Pw' mixes them behind the projector, the others "
      'before it'
    )


def _population(model, variables, number: int) -> Prior:
  """The people of the checkpoint, each equally likely, and some at vertices."""
  everybody = np.arange(number)
  seen = model.apply(variables, everybody, method='user_log_weights')
  atoms = choose_atoms(model, seen)
  # People come first, then the vertices and the centre.
  people = max(len(atoms) - model.num_prototypes - 1, 1)
  masses = np.full(len(atoms), SPREAD / len(atoms))
  masses[:people] += (1.0 - SPREAD) / people
  return Prior(
    log_weights=log_mean_weights(seen),
    strength=np.float32(1.0),
    log_atoms=atoms,
    log_masses=np.float32(np.log(masses)),
    evidence=np.float32(1.0),
    pooling=np.float32(0.0),
  )
