"""Texts of comparisons."""


def normalise_text(text: str) -> str:
  """Without differences of white space and case."""
  return ' '.join(text.split()).casefold()


def together(prompt: str | None, response: str) -> str:
  """What PAL-A encodes: prompt and response as one text."""
  return f'{prompt}\n{response}' if prompt else response
