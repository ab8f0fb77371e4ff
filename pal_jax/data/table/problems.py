"""What is wrong with a table, all of it, with row numbers."""

import dataclasses

from pal_jax.errors import InputError

SHOWN = 10  # rows of each kind


@dataclasses.dataclass
class _Kind:
  count: int = 0
  shown: list[str] = dataclasses.field(default_factory=list)


class Problems:
  """Counts problems by kind and keeps the first few of each."""

  def __init__(self):
    self._kinds: dict[str, _Kind] = {}

  def add(self, kind: str, where: str) -> None:
    """One problem.

    Args:
      kind: what is wrong and what was expected, the same for all of a kind.
      where: the row (from 1, without the header) and what stands there.
    """
    found = self._kinds.setdefault(kind, _Kind())
    found.count += 1
    if len(found.shown) < SHOWN:
      found.shown.append(where)

  def __bool__(self) -> bool:
    return bool(self._kinds)

  @property
  def counts(self) -> dict[str, int]:
    return {kind: found.count for kind, found in self._kinds.items()}

  def report(self) -> str:
    """One paragraph a kind, the most frequent first."""
    lines = []
    kinds = sorted(self._kinds.items(), key=lambda k: -k[1].count)
    for kind, found in kinds:
      lines.append(f'- {kind}: {found.count:,}')
      lines += [f'    {where}' for where in found.shown]
      if found.count > len(found.shown):
        lines.append(f'    and {found.count - len(found.shown):,} more')
    return '\n'.join(lines)

  def refuse(self, path, hint: str) -> None:
    """Raises InputError if there is any."""
    if self._kinds:
      total = sum(found.count for found in self._kinds.values())
      raise InputError(
        f'{path}: {_number(total, "problem")} of '
        f'{_number(len(self._kinds), "kind")}\n{self.report()}\n{hint}'
      )


def _number(count: int, what: str) -> str:
  return f'{count:,} {what}{"" if count == 1 else "s"}'
