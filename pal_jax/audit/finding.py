"""What a check found, and how it is shown."""

import dataclasses

SEVERITIES = ('leak', 'warning', 'ok')


@dataclasses.dataclass(frozen=True)
class Finding:
  """One check's answer, in numbers and in words."""

  name: str
  severity: str  # one of SEVERITIES
  message: str  # what was found, what it means, what to do
  accuracy: float | None = None  # on held-out comparisons, in [0, 1]
  interval: tuple[float, float] | None = None  # 95%, of the accuracy
  chance: float | None = None  # what the accuracy is held against
  count: int | None = None  # of what a structural check looks for


def has_leak(findings: list[Finding]) -> bool:
  return any(f.severity == 'leak' for f in findings)


def _numbers(finding: Finding) -> str:
  if finding.accuracy is not None:
    text = f'accuracy {finding.accuracy:.3f}'
    if finding.interval is not None:
      text += f' [{finding.interval[0]:.3f}, {finding.interval[1]:.3f}]'
    return f'{text}, chance {finding.chance:.3f}'
  return '' if finding.count is None else f'{finding.count:,} found'


def render(findings: list[Finding]) -> str:
  """Markdown: a line that sums up, then a list, the gravest first."""
  totals = [f'{sum(f.severity == s for f in findings)} {s}' for s in SEVERITIES]
  lines = [f'# Audit: {", ".join(totals)}', '']
  for finding in sorted(findings, key=lambda f: SEVERITIES.index(f.severity)):
    numbers = _numbers(finding)
    numbers = f' ({numbers})' if numbers else ''
    lines.append(
      f'- **{finding.severity}: {finding.name}**{numbers}. {finding.message}'
    )
  return '\n'.join(lines) + '\n'
