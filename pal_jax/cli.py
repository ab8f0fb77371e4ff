"""Runs a program so that a person's mistakes become messages."""

import difflib
import re
import sys
from collections.abc import Callable

from absl import app, flags, logging

from configs import base
from pal_jax.errors import InputError


def _explain(error: Exception, argv: list[str], fields) -> str:
  """What was wrong with the flags, naming the one that is to blame."""
  name = re.sub(r'[^\w.]', ' ', str(error)).split()
  overrides = [a for a in argv[1:] if a.startswith('--config.')]
  for argument in overrides:
    key = argument[2:].split('=')[0].split('.')[1:]
    here = fields()
    for depth, part in enumerate(key):
      if not hasattr(here, 'keys'):
        break
      if part not in here and (part in name or not name):
        known = sorted(here.keys())
        close = difflib.get_close_matches(part, known, 1)
        where = '.'.join(['config', *key[:depth]])
        hint = f' (did you mean {close[0]!r}?)' if close else ''
        return (
          f'{argument}: {where} has no field {part!r}{hint}; it has '
          f'{", ".join(known)}'
        )
      if part not in here:
        break
      here = here[part]
  shown = f' (overrides: {" ".join(overrides)})' if overrides else ''
  return f'{error}{shown}'


def parse_flags(argv: list[str], fields=base.get_config) -> list[str]:
  """absl's parser; a bad config override exits with status 2.

  Args:
    argv: of the program.
    fields: gives a config with all the fields there are.
  """
  try:
    rest = app.parse_flags_with_usage(argv)
    # A config file that is missing says so only when it is read.
    if 'config' in flags.FLAGS:
      hasattr(flags.FLAGS.config, 'seed')
    return rest
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    print(f'error: {_explain(error, argv, fields)}', file=sys.stderr)
    sys.exit(2)


def run(
  main: Callable[[], None], fields=base.get_config, default_config: str = ''
) -> None:
  """Calls main() after parsing flags; an InputError exits with status 2.

  Args:
    main: without arguments.
    fields: as in `parse_flags`.
    default_config: what --config is if it is not given. Not the default of
      the flag: overrides of that are read when the flag is defined, where
      nobody can explain a mistake.
  """
  given = any(a.split('=')[0] in ('--config', '-config') for a in sys.argv)
  if default_config and not given:
    sys.argv.insert(1, f'--config={default_config}')

  def guarded(argv):
    # orbax announces every file; the progress bar is enough.
    logging.set_verbosity(logging.WARNING)
    try:
      if len(argv) > 1:
        raise InputError(
          f'unexpected arguments {argv[1:]}; options begin with --'
        )
      main()
    except InputError as error:
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)

  app.run(guarded, flags_parser=lambda argv: parse_flags(argv, fields))
