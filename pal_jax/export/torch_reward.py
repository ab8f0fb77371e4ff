"""One user's reward in PyTorch. Needs torch and safetensors, nothing else.

  reward = PalReward.from_file('reward.safetensors')
  reward(features)                        # [B, D] -> [B]

Features are the encoder's vectors of prompt and response as one text (PAL-A),
as card.json says. A model of prompt and response apart (PAL-B) takes two:
`reward(response_features, prompt_features)`.

With TRL, whose trainers take functions of prompts and completions:

  GRPOTrainer(reward_funcs=trl_reward(reward, encode), ...)

where `encode` turns a list of texts into a tensor [B, D].
"""

import json

import torch
from safetensors import safe_open
from torch import nn

_ACTIVATIONS = {'gelu': nn.functional.gelu, 'relu': nn.functional.relu}
_FORMAT = 'pal_jax reward 1'
_TINY = 1e-12


def _unit(x):
  return x / x.norm(dim=-1, keepdim=True).clamp_min(_TINY)


class _Layers(nn.Module):
  """Dense layers with an activation between them; none: the input."""

  def __init__(self, tensors, prefix, form):
    super().__init__()
    self.activation = _ACTIVATIONS.get(form['activation'], lambda x: x)
    self.residual = form['residual']
    self.dense = nn.ModuleList()
    for i in range(form['hidden_layers'] + 1):
      weight = tensors[f'{prefix}.{i}.weight']
      layer = nn.Linear(weight.shape[1], weight.shape[0])
      with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(tensors[f'{prefix}.{i}.bias'])
      self.dense.append(layer)

  def forward(self, h):
    x = h
    for i, layer in enumerate(self.dense):
      x = layer(self.activation(x) if i else x)
    return x + h if self.residual and len(self.dense) else x


class PalReward(nn.Module):
  """Features [B, D] (and prompts [B, D]) -> rewards [B], in log odds.

  Differences of one user's rewards (PAL-B: for one prompt) are the log odds of
  its preferences; their origin means nothing.
  """

  def __init__(self, tensors, form):
    super().__init__()
    self.form = form
    self.layers = _Layers(tensors, 'layers', form)
    self.prompts = nn.ModuleList(
      _Layers(tensors, f'prompts.{k}', form)
      for k in range(form.get('prompts', 0))
    )
    for name in ('head.weight', 'points', 'weights', 'masses'):
      if name in tensors:
        self.register_buffer(name.split('.')[0], tensors[name])

  @classmethod
  def from_file(cls, path):
    """Reads what pal_jax.export wrote."""
    with safe_open(path, framework='pt') as file:
      form = json.loads((file.metadata() or {}).get('form', '{}'))
      if form.get('format') != _FORMAT:
        raise ValueError(f'{path}: is not what pal_jax.export wrote')
      tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return cls(tensors, form).eval().requires_grad_(False)

  def _scaled(self, h):
    h = h.to(next(self.buffers()).dtype)  # encoders give bfloat16
    if self.form['normalize'] == 'none':
      return h
    return h / h.square().mean(-1, keepdim=True).sqrt().clamp_min(_TINY)

  def forward(self, features, prompts=None):
    f = self.layers(self._scaled(features))
    head = self.form['head']
    if self.prompts:
      if prompts is None:
        raise ValueError('this reward needs the features of the prompts, too')
      h = self._scaled(prompts)
      g = torch.stack([layers(h) for layers in self.prompts], -2)  # [B, K, P]
      return self._mean(head, f, self.weights @ g)
    if head in ('distance', 'normalized_distance'):
      return self._mean(head, f, self.points)
    if head == 'f,|f|^2':
      f = torch.cat([f, f.square().sum(-1, keepdim=True)], -1)
    elif head == 'f/|f|':
      f = _unit(f)
    return f @ self.head[0]

  def _mean(self, preference, f, points):
    """Mean over ideal points [..., A, P] of rewards, times the scale."""
    x = f[..., None, :]
    if preference in ('cosine', 'normalized_distance'):
      x, points = _unit(x), _unit(points)
    if preference == 'squared_distance':
      reward = 2 * (x * points).sum(-1) - x.square().sum(-1)
    elif preference in ('inner_product', 'cosine'):
      reward = (x * points).sum(-1)
    else:
      reward = -(x - points).norm(dim=-1)
    return self.form['scale'] * reward @ self.masses


def _text(message):
  """A string, or the last content of a conversation."""
  return message if isinstance(message, str) else message[-1]['content']


def trl_reward(reward, encode, name='pal_reward'):
  """A reward function for TRL: (prompts, completions, ...) -> floats.

  Args:
    reward: a PalReward.
    encode: texts -> features [B, D], with the encoder that card.json names.
    name: under which TRL logs it.
  """

  @torch.no_grad()
  def function(prompts, completions, **kwargs):
    del kwargs
    asked = [_text(p) for p in prompts]
    answered = [_text(c) for c in completions]
    if reward.prompts:
      return reward(encode(answered), encode(asked)).tolist()
    both = [
      f'{p}\n{c}' if p else c for p, c in zip(asked, answered, strict=True)
    ]
    return reward(encode(both)).tolist()

  function.__name__ = name
  return function
