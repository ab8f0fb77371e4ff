"""Checks of texts and vectors, with errors that name the row."""

from collections.abc import Sequence

import numpy as np

from pal_jax.errors import InputError

# Bounds the boolean temporary of isfinite to some tens of MB.
_CHUNK = 16_384


def excerpt(text: str, length: int = 60) -> str:
  """`text` quoted on one line, cut to `length` characters."""
  return repr(text if len(text) <= length else text[: length - 3] + '...')


def first_bad_row(vectors: np.ndarray) -> int | None:
  """The first row of [N, D] with a NaN or an infinity; None if all are fine."""
  for start in range(0, len(vectors), _CHUNK):
    finite = np.isfinite(vectors[start : start + _CHUNK]).all(axis=1)
    if not finite.all():
      return start + int(np.argmin(finite))
  return None


def check_texts(texts: Sequence[str]) -> None:
  """Checks that `texts` is a sequence of strings that UTF-8 can hold.

  Raises:
    InputError: a single string, or a row that is no text.
  """
  if isinstance(texts, str):
    raise InputError(
      f'texts is one string, {excerpt(texts)}; expected a sequence of them. '
      'Put it in a list.'
    )
  for row, text in enumerate(texts):
    if not isinstance(text, str):
      raise InputError(
        f'texts, row {row}: expected a string, got '
        f'{type(text).__name__} {excerpt(str(text))}. Convert or drop it.'
      )
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise InputError(
        f'texts, row {row}: {excerpt(text)} is not valid Unicode ({error}). '
        "Read the file with encoding='utf-8', errors='replace'."
      ) from error


def to_dtype(
  vectors: np.ndarray,
  dtype: str,
  texts: Sequence[str],
  rows: Sequence[int] | None = None,
) -> np.ndarray:
  """`vectors` [N, D] in `dtype`, finite both before and after.

  Args:
    vectors: [N, D], any float dtype.
    dtype: 'float16' or 'float32'.
    texts: N texts, for messages.
    rows: [N], the row that messages give each text; by default 0 to N - 1.

  Raises:
    InputError: names the first bad row and its text.
  """
  with np.errstate(over='ignore'):
    cast = vectors.astype(dtype, copy=False)
  bad = first_bad_row(cast)
  if bad is None:
    return cast
  where = f'texts, row {bad if rows is None else rows[bad]}'
  if np.isfinite(vectors[bad]).all():
    raise InputError(
      f'{where}, {excerpt(texts[bad])}: its vector reaches '
      f'{np.abs(vectors[bad]).max():.3g}, beyond the {np.finfo(dtype).max:.3g} '
      f'that {dtype} holds. Set features.dtype to float32.'
    )
  raise InputError(
    f'{where}, {excerpt(texts[bad])}: its vector holds NaN or infinity; '
    "expected finite numbers. Check this text and the encoder's weights."
  )
