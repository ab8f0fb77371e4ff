"""Features of how a text looks, not of what it says; once per text."""

import functools
import re
from collections.abc import Sequence

import numpy as np

from pal_jax.data.texts import normalise_text

_CHUNK = 10_000  # texts at a time, which bounds memory
# Characters that are counted; shares of the text's length.
_CLASSES = {
  'punctuation': '.,;:!?',
  'brackets': '()[]{}<>',
  'quotes': '"\'`“”‘’«»',
  'newlines': '\n\r',
  'markdown': '*#_|~`',
}
SHARES = (*_CLASSES, 'digits', 'upper case', 'non-ASCII')
MARKS = (
  'starts with a bracket',
  'ends with a bracket',
  'starts with a quote',
  'ends with a quote',
  'looks like a Python list or dict',
  'has markdown',
  'starts with whitespace',
  'ends with whitespace',
)
LENGTHS = ('characters', 'words', 'log characters', 'log words')

_OPEN, _CLOSE = tuple('([{<'), tuple(')]}>')
_QUOTES = tuple(_CLASSES['quotes'])
_LITERAL = re.compile(
  r"""\s*(\[\s*(["'\d\[{(].*)?\]|\{\s*(["'\d].*)?\})\s*""", re.DOTALL
)
_MARKDOWN = re.compile(r'^(#{1,6} |[-*+] |\d+\. |> |```)|\*\*', re.MULTILINE)


def text_ids(texts: Sequence[str]) -> np.ndarray:
  """[M] int64, equal where the normalised texts are."""
  ids: dict[str, int] = {}
  found = [ids.setdefault(normalise_text(text), len(ids)) for text in texts]
  return np.array(found, np.int64)


@functools.cache
def _tables() -> dict[str, np.ndarray]:
  """By what is counted, whether each code point is one: [0x110000] bool."""
  everything = [chr(i) for i in range(0x110000)]
  tables = {
    name: np.isin(np.arange(0x110000), [ord(c) for c in members])
    for name, members in _CLASSES.items()
  }
  for name, test in (
    ('digits', str.isdigit),
    ('upper case', str.isupper),
    ('space', str.isspace),
  ):
    tables[name] = np.fromiter(map(test, everything), bool, 0x110000)
  tables['non-ASCII'] = np.arange(0x110000) > 127
  return tables


def _counts(texts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Counts of characters [m, len(SHARES)], lengths [m] and words [m]."""
  codes = np.frombuffer(
    ''.join(texts).encode('utf-32-le', 'surrogatepass'), np.uint32
  )
  length = np.array([len(text) for text in texts], np.int64)
  end = np.cumsum(length)
  start = end - length

  def count(flags):
    total = np.concatenate([[0], np.cumsum(flags)])
    return total[end] - total[start]

  tables = _tables()
  space = tables['space'][codes]
  # A word begins where no space follows a space or the text's beginning.
  before = np.concatenate([[True], space])
  before[start] = True
  words = count(~space & before[:-1])
  return np.stack([count(tables[n][codes]) for n in SHARES], -1), length, words


def _marks(text: str) -> tuple[bool, ...]:
  inner = text.strip()
  return (
    inner.startswith(_OPEN),
    inner.endswith(_CLOSE),
    inner.startswith(_QUOTES),
    inner.endswith(_QUOTES),
    _LITERAL.fullmatch(text) is not None,
    _MARKDOWN.search(text) is not None,
    text[:1].isspace(),
    text[-1:].isspace(),
  )


def features(texts: Sequence[str]) -> tuple[np.ndarray, ...]:
  """Features of each text, float32.

  Returns:
    marks [M, len(MARKS)], 0 or 1; shares [M, len(SHARES)], counts per
    character, in [0, 1]; lengths [M, len(LENGTHS)].
  """
  marks, shares, lengths = [], [], []
  for begin in range(0, len(texts), _CHUNK):
    chunk = texts[begin : begin + _CHUNK]
    counts, length, words = _counts(chunk)
    marks.append(np.array([_marks(text) for text in chunk], np.float32))
    shares.append(counts / np.maximum(length, 1)[:, None])
    lengths.append(
      np.stack([length, words, np.log1p(length), np.log1p(words)], -1)
    )
  return tuple(
    np.concatenate(parts).astype(np.float32)
    for parts in (marks, shares, lengths)
  )
