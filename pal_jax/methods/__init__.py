"""Families of personal reward models behind one interface."""

from pal_jax.methods.base import (
  Method,
  Pairs,
  Task,
  adapt_users,
  gather,
  make_task,
  predict_users,
)
from pal_jax.methods.distributional import Distributional
from pal_jax.methods.em import Em
from pal_jax.methods.homogeneous import BradleyTerry, BradleyTerryMlp, Random
from pal_jax.methods.neighbours import Neighbours
from pal_jax.methods.neural_process import NeuralProcess
from pal_jax.methods.pal import Pal
from pal_jax.methods.per_user import PerUser
from pal_jax.methods.reward_features import RewardFeatures
from pal_jax.methods.router import ContextRouter
from pal_jax.methods.variational import Variational

__all__ = [
  'BradleyTerry',
  'BradleyTerryMlp',
  'ContextRouter',
  'Distributional',
  'Em',
  'Method',
  'Neighbours',
  'NeuralProcess',
  'Pairs',
  'Pal',
  'PerUser',
  'Random',
  'RewardFeatures',
  'Task',
  'Variational',
  'adapt_users',
  'gather',
  'make_task',
  'predict_users',
]
