"""All families of personal reward models under one protocol.

Method: METHOD sections 5, 6 and 7. No paper has this table.

  python -m experiments.benchmark --config=configs/benchmark.py:shipped
  python -m experiments.benchmark --config=configs/benchmark.py:real \\
    --config.paths.persona=FOLDER --config.paths.polis=FOLDER \\
    --config.paths.convarg=FOLDER

'shipped' needs no download: the Persona corpus inside the package and planted
data. 'real' is the published statements and real people. 'tiny' takes seconds.
"""

from ml_collections import ConfigDict

from configs import base


def _entry(data: ConfigDict, num_support: tuple[int, ...]) -> ConfigDict:
  entry = ConfigDict()
  entry.data = data
  entry.num_support = num_support  # n of the few-shot curve
  entry.features = 'text'  # or 'ids': a column an item, nothing else is known
  return entry


def _persona(mixture: float = 0.0) -> ConfigDict:
  data = base.persona_data()
  data.mixture = mixture
  return _entry(data, (0, 1, 2, 5, 10, 20, 50))


def _polis(conversation: str, small: bool = True) -> ConfigDict:
  """Statements of a pair are used once: n ends where the cohort does."""
  data = base.polis_data()
  data.conversation = conversation
  # Few statements, which many people voted on: what is chosen on a tenth of
  # them is chosen by accident.
  data.validation_fraction = 0.2
  if small:
    # A few hundred people: more of them unseen, who answer fewer queries.
    data.unseen_fraction = 0.4
    data.min_support = 3
    data.max_support = 3
    data.min_query = 1
  return _entry(data, (0, 1, 2, 3) if small else (0, 1, 2, 5, 10))


def _planted(data: ConfigDict, **changes) -> ConfigDict:
  data.update(changes)
  return _entry(data, (0, 1, 2, 5, 10, 20, 50))


def _sets() -> ConfigDict:
  sets = ConfigDict()
  sets.persona_partition = _persona()
  sets.persona_mixture = _persona(mixture=1.0)
  sets.bowling_green = _polis('american-assembly.bowling-green', small=False)
  sets.brexit = _polis('brexit-consensus')
  sets.football = _polis('football-concussions')
  sets.convarg = _entry(base.convarg_data(), (0, 1, 2, 5))
  # Votes without texts: items are known by their row alone.
  sets.bowling_green_ids = _polis(
    'american-assembly.bowling-green', small=False
  )
  sets.bowling_green_ids.features = 'ids'
  # Planted, with a known winner or a known ceiling.
  sets.toy = _entry(base.neural_process_data(), (0, 1, 3, 5, 10))
  sets.ideal_points = _planted(base.simulation_data(), mixture=1.0)
  sets.low_rank = _planted(base.low_rank_data())
  sets.homogeneous = _planted(
    base.low_rank_data(), spread=0.0, choice_noise=1.0
  )
  sets.length = _planted(base.length_data())
  return sets


PLANTED = ('toy', 'ideal_points', 'low_rank', 'homogeneous', 'length')
REAL = (
  'persona_partition',
  'persona_mixture',
  'bowling_green',
  'brexit',
  'football',
  'convarg',
)


def _pal() -> ConfigDict:
  """What the settings of PAL start from."""
  config = base.get_config()
  del config.data, config.features
  # New users get the posterior: nobody asks for the point estimate's strength.
  config.adaptation.strength = 1.0
  return config


def get_config(which: str = 'shipped') -> ConfigDict:
  config = ConfigDict()
  config.methods = 'all'  # or names, 'btl,rfm,pal_a'
  config.datasets = ''  # names of config.sets with commas between
  config.seeds = '5'  # so many from 0, or a list: '0,3' ('3,' is only 3)
  # Folders of downloads; an empty one for persona is the shipped corpus.
  config.paths = ConfigDict({'persona': '', 'polis': '', 'convarg': ''})
  config.sets = _sets()
  config.features = base.features()
  config.pal = _pal()
  config.resamples = 5  # random orders of each unseen user's support
  config.validation_share = 0.5  # of the seen users, to tune on
  config.max_candidates = 0  # settings a method may try; 0: all it has
  config.max_steps = 0  # of methods trained by gradient; 0: their own number
  if which == 'shipped':
    names = ('persona_partition', 'persona_mixture', *PLANTED)
  elif which == 'real':
    names = REAL
  elif which == 'planted':
    names = PLANTED
  elif which == 'tiny':
    names = ('persona_partition',)
    config.methods = 'random,length,btl,em,pal_a'
    config.seeds = '2'
    config.resamples = 2
    config.max_candidates = 1
    config.max_steps = 20
    data = config.sets.persona_partition.data
    data.behaviors = ('politically-liberal', 'extraversion')
    data.num_personas = 2
    data.num_seen_users = 20
    data.num_unseen_users = 10
    data.comparisons_per_user = 12
    data.validation_per_user = 5
    data.seen_query = data.unseen_support = data.unseen_query = 10
    config.sets.persona_partition.num_support = (0, 2, 5)
  else:
    raise ValueError(
      f"configs/benchmark.py:{which}: expected 'shipped', 'real', 'planted' or "
      "'tiny'"
    )
  config.datasets = ','.join(names)
  return config.lock()
