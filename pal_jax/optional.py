"""Optional packages: imported when first needed, with a way out if absent."""

import importlib
import types

from pal_jax.errors import InputError


def require(module: str, purpose: str, install: str) -> types.ModuleType:
  """Imports `module`.

  Args:
    module: dotted name of the module.
    purpose: what needs it; the subject of the error's sentence.
    install: the exact command that installs it.

  Raises:
    InputError: the module, or something that it imports, is missing.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise InputError(
      f'{purpose} needs the package {module.partition(".")[0]}, which cannot '
      f'be imported ({error}). Install it with: {install}'
    ) from error
