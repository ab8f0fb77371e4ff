"""Reads the imports back and holds them against the layout."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'pal_jax'

# Each module or folder imports only what stands before it: from the entry
# point, at the end, a reader goes up this list and never comes back.
ORDER = (
  'structs',
  'errors',
  'preemption',
  'prefetch',
  'distributed',
  'optional',
  'user_cache',
  'numerics',
  'ideal_points',
  'mixtures',
  'losses',
  'metrics',
  'models',
  'data',
  'features',
  'starts',
  'shared_rows',
  'optimizer',
  'user_rows',
  'train_step',
  'parallel',
  'checkpoint',
  'adaptation',
  'recovery',
  'evaluate',
  'user_solves',
  'audit',
  'writer',
  'figures',
  'report',
  'rewards',
  'saved_model',
  'reward_model',
  'convert',
  'export',
  'experiment',
  'stepping',
  'train',
  'grid',
  'sweep_program',
  'sweep',
  'methods',
  'benchmark',
  'cli',
  'main',
)
# A command beside what it runs, not a part of the library: nothing imports it,
# so it may stand on everything.
COMMANDS = {
  'pal_jax.audit.__main__',
  'pal_jax.convert.__main__',
  'pal_jax.data.build_corpus',
  'pal_jax.data.filter_images',
  'pal_jax.export.__main__',
  # Copied beside what is exported: torch alone.
  'pal_jax.export.torch_reward',
}
# A control that is solved, not trained: no linen module, and its loss is part
# of the solver.
SOLVED = 'pal_jax.models.bradley_terry'
# What only `parallel` may say.
DEVICE_WORDS = {
  'Mesh',
  'NamedSharding',
  'PartitionSpec',
  'device_count',
  'devices',
  'local_device_count',
  'local_devices',
  'make_mesh',
  'pmap',
  'shard_map',
  'with_sharding_constraint',
}
# Needed by some encoders only, hence imported inside functions.
OPTIONAL = {
  'pyarrow',
  'sentence_transformers',
  'tensorflow',
  'tensorflow_datasets',
  'tokenizers',
  'torch',
  'transformers',
}


# Whose classes derive from one of TensorFlow Datasets.
BUILDERS = 'pal_jax.data.builders'


def dotted_name(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def python_files(folder: Path) -> dict[str, Path]:
  return {dotted_name(path): path for path in sorted(folder.rglob('*.py'))}


MODULES = python_files(PACKAGE)


def imports_of(path: Path, modules=None) -> set[str]:
  """Dotted names a file imports, `from package import module` resolved."""
  modules = MODULES if modules is None else modules
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      for alias in node.names:
        name = f'{node.module}.{alias.name}'
        found.add(name if name in modules else node.module)
  return found


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def layer(name: str) -> str:
  """'pal_jax.data.persona' -> 'data'."""
  return name.split('.')[1]


def importers_of(package: str) -> set[str]:
  return {
    name
    for name, imports in IMPORTS.items()
    if any(i == package or i.startswith(f'{package}.') for i in imports)
  }


def test_the_order_names_every_module():
  found = {layer(name) for name in MODULES if name != 'pal_jax'}
  assert found == set(ORDER)


@pytest.mark.parametrize('name', sorted(set(MODULES) - COMMANDS - {'pal_jax'}))
def test_imports_point_down(name):
  mine = layer(name)
  for imported in IMPORTS[name]:
    if not imported.startswith('pal_jax.') or layer(imported) == mine:
      continue
    assert ORDER.index(layer(imported)) < ORDER.index(mine), (
      f'{name} imports {imported}, which stands above it'
    )


def test_there_are_no_cycles_inside_a_folder():
  state = {}

  def visit(name, trail):
    if state.get(name) == 'done':
      return
    assert state.get(name) != 'open', ' -> '.join([*trail, name])
    state[name] = 'open'
    for imported in IMPORTS[name]:
      if imported in MODULES:
        visit(imported, [*trail, name])
    state[name] = 'done'

  for name in MODULES:
    visit(name, [])


def test_nothing_imports_the_commands_nor_the_entry_point():
  for name, imports in IMPORTS.items():
    assert not imports & (COMMANDS | {'pal_jax.main'}), name


def test_configs_import_neither_jax_nor_the_library():
  configs = python_files(ROOT / 'configs')
  assert {'configs.base', 'configs.tiny'} <= set(configs)
  for name, path in configs.items():
    top = {i.split('.')[0] for i in imports_of(path)}
    assert top <= {'configs', 'ml_collections'}, name


def test_the_library_does_not_import_configs():
  assert importers_of('configs') <= COMMANDS


@pytest.mark.parametrize(
  ('package', 'allowed'),
  [
    ('orbax', {'pal_jax.checkpoint'}),
    ('matplotlib', {'pal_jax.figures', 'pal_jax.benchmark.plots'}),
    ('absl', {'pal_jax.main', 'pal_jax.cli', *COMMANDS}),
    ('jax.sharding', {'pal_jax.parallel'}),
    ('jax.experimental', set()),
    ('jax._src', {'pal_jax.distributed'}),
    ('time', {'pal_jax.train', 'pal_jax.sweep', 'pal_jax.benchmark.cell'}),
  ],
)
def test_a_package_has_one_home(package, allowed):
  assert importers_of(package) <= allowed


@pytest.mark.parametrize('name', sorted(set(MODULES) - {'pal_jax.parallel'}))
def test_only_parallel_knows_devices(name):
  for node in ast.walk(ast.parse(MODULES[name].read_text(encoding='utf-8'))):
    word = getattr(node, 'id', getattr(node, 'attr', None))
    assert word not in DEVICE_WORDS, f'{name}, line {node.lineno}: {word}'


def test_models_know_no_loss_no_optimizer_and_no_data():
  models = {name for name in MODULES if name.startswith('pal_jax.models')}
  assert SOLVED in models
  for name in models:
    forbidden = {'pal_jax.optimizer', 'pal_jax.data', 'optax'}
    if name != SOLVED:
      forbidden.add('pal_jax.losses')
    for imported in IMPORTS[name]:
      assert not any(
        imported == f or imported.startswith(f'{f}.') for f in forbidden
      ), f'{name} imports {imported}'


def test_the_solved_control_is_no_linen_module():
  assert not any(i.startswith('flax') for i in IMPORTS[SOLVED])


def test_data_and_reports_are_numpy_in_and_numpy_out():
  numpy_only = {'metrics', 'recovery', 'data', 'writer', 'figures', 'report'}
  for name in MODULES:
    if name == 'pal_jax' or name in COMMANDS or layer(name) not in numpy_only:
      continue
    top = {i.split('.')[0] for i in IMPORTS[name]}
    assert not top & {'jax', 'flax', 'optax'}, name


@pytest.mark.parametrize(
  'name', sorted(set(MODULES) - {'pal_jax.export.torch_reward'})
)
def test_optional_packages_are_not_imported_at_the_top(name):
  tree = ast.parse(MODULES[name].read_text(encoding='utf-8'))
  for node in tree.body:
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module]
    found = {n.split('.')[0] for n in names} & OPTIONAL
    if name.startswith(BUILDERS):
      found -= {'tensorflow_datasets'}
    assert not found, name


def test_builders_are_imported_by_themselves_alone():
  """TFDS takes seconds to import: only inside functions, by name."""
  others = {
    name for name in importers_of(BUILDERS) if not name.startswith(BUILDERS)
  }
  assert not others


def test_no_module_at_the_top_shadows_the_standard_library():
  names = {name for name in ORDER if (PACKAGE / f'{name}.py').exists()}
  assert not names & sys.stdlib_module_names


def test_every_module_says_what_it_is():
  for name, path in MODULES.items():
    tree = ast.parse(path.read_text(encoding='utf-8'))
    assert ast.get_docstring(tree), name
