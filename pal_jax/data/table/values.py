"""Cells of a table as ids, texts and numbers."""

import math
from typing import Any

WRONG = object()  # what a cell becomes that is no such value


def as_id(value: Any) -> Any:
  """A string or a whole number as a string; None if there is nothing.

  Whole numbers become floats in columns with empty cells: 3.0 is '3'.
  """
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return None
  if isinstance(value, bool):
    return WRONG
  if isinstance(value, float):
    return str(int(value)) if value.is_integer() else WRONG
  if isinstance(value, int):
    return str(value)
  return as_text(value) or None if isinstance(value, str) else WRONG


def as_text(value: Any) -> Any:
  """A string that UTF-8 can hold; None if there is nothing."""
  if value is None:
    return None
  if not isinstance(value, str):
    return WRONG
  try:
    value.encode()
  except UnicodeEncodeError:
    return WRONG
  return value


def as_conversation(value: Any) -> Any:
  """(texts before the last, the last) of messages [{'role', 'content'}, ...].

  What TRL and Hugging Face call the conversational format. WRONG if it is
  something else.
  """
  if not isinstance(value, list) or not value:
    return WRONG
  texts = []
  for message in value:
    content = message.get('content') if isinstance(message, dict) else None
    text = as_text(content)
    if text is None or text is WRONG:
      return WRONG
    texts.append(text)
  return '\n'.join(texts[:-1]), texts[-1]


def as_number(value: Any) -> Any:
  """A finite float, from numbers and strings; None if there is nothing."""
  if value is None or value == '':
    return None
  if isinstance(value, bool):
    return float(value)
  if isinstance(value, str):
    try:
      value = float(value)
    except ValueError:
      return WRONG
  if not isinstance(value, int | float):
    try:  # decimals and the like
      value = float(value)
    except (TypeError, ValueError):
      return WRONG
  try:
    value = float(value)
  except OverflowError:
    return WRONG
  return value if math.isfinite(value) else WRONG
