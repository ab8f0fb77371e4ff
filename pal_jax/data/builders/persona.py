"""Anthropic's model-written persona evaluations as a TFDS builder.

Perez et al. 2022, Discovering Language Model Behaviors with Model-Written
Evaluations (arXiv 2212.09251), github.com/anthropics/evals, CC BY 4.0. A
statement a record, with the answer of somebody who has the behaviour.

`checksums.tsv` beside this file has the size and SHA-256 of the files of the
commit below, 99 of them; others are not downloaded.
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from pal_jax.data.builders.local import LocalBuilder
from pal_jax.data.persona import read_file
from pal_jax.errors import InputError

_URL = (
  'https://raw.githubusercontent.com/anthropics/evals/'
  'f6059a593f6feb0a500e8fe01f422a8ccfbdac09/persona/{}.jsonl'
)
HOW = (
  'fetch persona/*.jsonl of github.com/anthropics/evals (CC BY 4.0) into one '
  'folder, or let the builder download them'
)


@dataclasses.dataclass
class BehaviorsConfig(tfds.core.BuilderConfig):
  """Which files.

  Attributes:
    behaviors: names of files without .jsonl; () is all of the folder, or all
      whose checksums are known.
  """

  behaviors: tuple[str, ...] = ()


def behaviors_config(behaviors) -> BehaviorsConfig:
  """A config of some files, with a name of its own."""
  digest = hashlib.sha256('\0'.join(behaviors).encode()).hexdigest()
  return BehaviorsConfig(
    name=f'behaviors_{digest[:12]}', behaviors=tuple(behaviors)
  )


class PersonaStatements(LocalBuilder):
  """Statements, and whether somebody with a behaviour would say them."""

  name = 'persona_statements'
  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = [BehaviorsConfig(name='all')]
  MANUAL_DOWNLOAD_INSTRUCTIONS = HOW
  SUFFIXES = ('.jsonl',)
  all_checksums_known = True
  url = _URL

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      homepage='https://github.com/anthropics/evals',
      features=tfds.features.FeaturesDict(
        {
          'behavior': tfds.features.Text(),
          'statement': tfds.features.Text(),
          'question': tfds.features.Text(),
          'matches': np.bool_,  # whether who has the behaviour would say it
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(self._files(dl_manager))}

  def _files(self, dl_manager) -> dict[str, Path]:
    """{behaviour: file}."""
    wanted = self.builder_config.behaviors
    files = self.local_files(dl_manager)
    if files:
      found = {path.stem: path for path in files}
      missing = [name for name in wanted if name not in found]
      if missing:
        raise InputError(f'{files[0].parent}: has no {missing[0]}.jsonl; {HOW}')
      return {name: found[name] for name in wanted or found}
    names = wanted or tuple(
      Path(url).stem for url in self.url_infos if url.endswith('.jsonl')
    )
    return {
      name: Path(path)
      for name, path in dl_manager.download(
        {name: self.url.format(name) for name in names}
      ).items()
    }

  def _generate_examples(self, files):
    number = 0
    for behavior, path in files.items():
      for statement in read_file(path, behavior):
        yield (
          number,
          {
            'behavior': behavior,
            'statement': statement.text,
            'question': statement.question,
            'matches': statement.matches,
          },
        )
        number += 1
