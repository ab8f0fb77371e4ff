"""Runs a program so that a person's mistakes become messages."""

import difflib
import re
import sys
from collections.abc import Callable

from absl import app, flags, logging

from pal_jax.errors import InputError
from pal_jax.preemption import EXIT_CODE, Preempted
from pal_jax.user_cache import keep_compiled


def _chosen(argv: list[str]):
  """The config that --config names, without overrides; None if none does."""
  following = [*argv[1:], '']
  for argument, after in reversed(list(zip(argv, following, strict=True))):
    name, given, value = argument.partition('=')
    if name in ('--config', '-config'):
      parser = flags.FLAGS['config'].parser
      return parser.parse(value if given else after)
  return None


def _explain(error: Exception, argv: list[str]) -> str:
  """What was wrong with the flags, naming the one that is to blame."""
  name = re.sub(r'[^\w.]', ' ', str(error)).split()
  overrides = [a for a in argv[1:] if a.startswith('--config.')]
  # A file that cannot be read has no fields to tell of.
  config = None if isinstance(error, OSError) else _chosen(argv)
  for argument in overrides:
    key = argument[2:].split('=')[0].split('.')[1:]
    here = config
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


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser; a bad config override exits with status 2."""
  try:
    rest = app.parse_flags_with_usage(argv)
    # A config file that is missing says so only when it is read.
    if 'config' in flags.FLAGS:
      hasattr(flags.FLAGS.config, 'seed')
    return rest
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    print(f'error: {_explain(error, argv)}', file=sys.stderr)
    sys.exit(2)


def run(main: Callable[[], None], default_config: str = '') -> None:
  """Calls main() after parsing flags.

  An InputError exits with status 2, a run that SIGTERM stopped with 75.

  Args:
    main: without arguments.
    default_config: what --config is if it is not given. Not the default of
      the flag: overrides of that are read when the flag is defined, where
      nobody can explain a mistake.
  """
  given = any(a.split('=')[0] in ('--config', '-config') for a in sys.argv)
  if default_config and not given:
    sys.argv.insert(1, f'--config={default_config}')

  def guarded(argv):
    # orbax announces every file, and logs with its traceback what it raises.
    logging.set_verbosity(logging.FATAL)
    keep_compiled()
    try:
      if len(argv) > 1:
        raise InputError(
          f'unexpected arguments {argv[1:]}; options begin with --'
        )
      main()
    except InputError as error:
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)
    except Preempted as error:
      print(error, file=sys.stderr)
      sys.exit(EXIT_CODE)

  app.run(guarded, flags_parser=parse_flags)
