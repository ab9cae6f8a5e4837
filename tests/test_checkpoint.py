"""Checkpoints: damage is found and set aside; what is whole is neither moved nor misread."""

import errno
import os
import random
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import plain_user, tiny_config
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mla import checkpoint, files
from mla import config as config_lib
from mla.checkpoint import Checkpoints
from mla.errors import MachineError, UserError

RUN = {'config': config_lib.to_json(tiny_config('mla')), 'data': 'the digest of a text'}
STEPS = (1, 2, 3)


def params(step: int) -> dict:
  weights = jax.random.normal(jax.random.key(step), (16, 24))
  return {'layer': {'weights': weights, 'gain': jnp.full(24, step, jnp.float32)}}


def training(step: int) -> tuple:
  moments = jax.tree.map(jnp.square, params(step))
  return moments, jnp.int32(step), jnp.arange(2, dtype=jnp.uint32) + step


def placed(tree, sharding=None):
  """What to restore into: on one device, unless a sharding is given."""
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or one), tree
  )


def restore(workdir: Path, run: dict = RUN, sharding=None) -> checkpoint.Restored | None:
  with Checkpoints(workdir, 3) as checkpoints:
    checkpoints.open()
    return checkpoints.restore(placed(params(0), sharding), placed(training(0)), run)


def read_params(workdir: Path, run: dict = RUN):
  return Checkpoints(workdir).read_params(placed(params(0)), run)


def same(found, wanted) -> bool:
  return all(
    np.array_equal(np.asarray(a), np.asarray(b))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
  )


def is_saved(found: checkpoint.Restored | None, step: int) -> bool:
  return (
    found is not None
    and (found.step, found.batches) == (step, step)
    and same(found.params, params(step))
    and same(found.training, training(step))
  )


def contents(folder: Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file() and path.name not in ('.lock', '.saved')
  }


def save(workdir: Path, place=lambda tree: tree) -> None:
  with Checkpoints(workdir, 3) as checkpoints:
    checkpoints.open()
    for step in STEPS:
      checkpoints.save(step, place(params(step)), training(step), {**RUN, 'batches': step})


def save_as_before(workdir: Path) -> None:
  """As this program did before it knew of checksums: through Orbax' manager, Grain's state too."""
  manager = ocp.CheckpointManager(
    workdir / 'checkpoints', options=ocp.CheckpointManagerOptions(max_to_keep=3, create=True)
  )
  batches = iter(grain.MapDataset.range(100).to_iter_dataset())
  for step in STEPS:
    next(batches)
    manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(checkpoint.flatten(params(step))),
        training=ocp.args.StandardSave(checkpoint.flatten(training(step))),
        data=grain.checkpoint.CheckpointSave(batches),
        run=ocp.args.JsonSave(RUN),
      ),
    )
  manager.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp('saved')
  save(workdir)
  return workdir


@pytest.fixture(scope='module')
def saved_before(tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp('before')
  save_as_before(workdir)
  return workdir


@pytest.fixture
def copy(saved, tmp_path) -> Path:
  return Path(shutil.copytree(saved, tmp_path / 'run'))


@pytest.fixture
def old(saved_before, tmp_path) -> Path:
  return Path(shutil.copytree(saved_before, tmp_path / 'old'))


def flip(path: Path, rng: random.Random) -> None:
  raw = bytearray(path.read_bytes())
  if raw:
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


# Damage is found.


def test_a_flipped_bit_anywhere_is_found_or_harmless(saved, tmp_path):
  """Each in a copy of its own, one file after the other; train's reading and eval's."""
  rng = random.Random(14)
  names = sorted(name for name in contents(saved) if name.startswith('checkpoints/3/'))
  assert any('SHA256SUMS' in name for name in names)
  chosen = [names[i % len(names)] for i in range(max(40, len(names)))]
  found_damaged = 0
  for case, name in enumerate(chosen):
    run = Path(shutil.copytree(saved, tmp_path / str(case)))
    flip(run / name, rng)
    before = contents(run)
    try:
      step, read = read_params(run)
      assert step == 3 and same(read, params(3)), name
    except UserError as error:
      assert 'checkpoints/3: cannot be read' in str(error), name
    assert contents(run) == before, name
    if is_saved(restored := restore(run), 3):
      assert contents(run) == before, name
    else:
      found_damaged += 1
      assert is_saved(restored, 2), name
      aside = {n.replace('checkpoints/3', 'checkpoints-damaged/3'): b for n, b in before.items()}
      assert contents(run) == aside, name
  assert found_damaged > len(chosen) // 2


def test_the_checksums_are_what_sha256sum_reads(saved):
  for step in STEPS:
    folder = saved / 'checkpoints' / str(step)
    done = subprocess.run(
      ['sha256sum', '--check', '--quiet', 'SHA256SUMS'], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    listed = {line.split('  ')[1] for line in (folder / 'SHA256SUMS').read_text().split('\n')[1:-1]}
    assert listed == {name for name in contents(folder) if name.split('/')[1:]}


def test_checksums_do_not_depend_on_devices(tmp_path):
  """Saved over eight devices, found whole and read on one and on four."""
  eight = NamedSharding(Mesh(np.array(jax.devices()), 'x'), PartitionSpec('x'))
  save(tmp_path, place=lambda tree: jax.device_put(tree, eight))
  assert is_saved(restore(tmp_path), 3)
  four = NamedSharding(Mesh(np.array(jax.devices()[:4]), 'x'), PartitionSpec('x'))
  assert is_saved(restore(tmp_path, sharding=four), 3)


def put_a_link(path: Path) -> None:
  shutil.move(path, path.parent.parent.parent.parent / 'elsewhere')
  path.symlink_to(path.parent.parent.parent.parent / 'elsewhere')


def put_a_pipe(path: Path) -> None:
  path.unlink()
  os.mkfifo(path)


@pytest.mark.parametrize(
  ('name', 'damage'),
  [
    ('SHA256SUMS', Path.unlink),
    ('SHA256SUMS', lambda path: path.write_bytes(b'')),
    ('SHA256SUMS', lambda path: path.write_bytes(path.read_bytes()[:-80])),
    ('run/metadata', Path.unlink),
    ('run/metadata', lambda path: path.write_text('{"data": "the digest of a text"}')),
    ('run/metadata', put_a_pipe),
    ('params/_METADATA', put_a_link),
    ('params/manifest.ocdbt', lambda path: os.truncate(path, 10)),
    ('training', shutil.rmtree),
  ],
  ids=lambda value: getattr(value, '__name__', value),
)
def test_damage_of_any_kind_is_set_aside(copy, name, damage, caplog):
  damage(copy / 'checkpoints' / '3' / name)
  assert is_saved(restore(copy), 2)
  assert 'checkpoint 3 is damaged' in caplog.text
  assert os.listdir(copy / 'checkpoints-damaged') == ['3']


# Checkpoints of before, without checksums.


def test_a_checkpoint_of_before_is_restored(old):
  assert is_saved(restore(old), 3)
  assert read_params(old)[0] == 3
  with Checkpoints(old, 3) as checkpoints:  # and the run goes on beside them
    checkpoints.open()
    checkpoints.save(4, params(4), training(4), {**RUN, 'batches': 4})
  assert is_saved(restore(old), 4)
  assert Checkpoints(old).steps() == [2, 3, 4]


@pytest.mark.parametrize(
  ('name', 'damage'),
  [
    ('training', shutil.rmtree),
    ('run/metadata', lambda path: path.write_text('{"data": ')),
    ('params/_METADATA', lambda path: path.write_text('{')),
    (
      'params/ocdbt.process_0',
      lambda path: [os.truncate(f, 20) for f in path.rglob('*') if f.is_file()],
    ),
  ],
  ids=lambda value: getattr(value, '__name__', value),
)
def test_without_checksums_only_what_cannot_be_read_is_damage(old, name, damage):
  damage(old / 'checkpoints' / '3' / name)
  assert is_saved(restore(old), 2)
  assert os.listdir(old / 'checkpoints-damaged') == ['3']


# What is no damage moves nothing.


def out_of_memory() -> Exception:
  return ValueError('RESOURCE_EXHAUSTED: out of memory allocating 12 bytes')


REFUSALS = [
  (PermissionError(errno.EACCES, 'Permission denied'), UserError, 'Permission denied.*permit'),
  (ValueError('PERMISSION_DENIED: cannot open [OS error 13: EACCES]'), UserError, 'permit that'),
  (OSError(errno.ENOSPC, 'No space left on device'), MachineError, 'no space is left'),
  (OSError(errno.EMFILE, 'Too many open files'), MachineError, 'limit on open files'),
  (OSError(errno.EIO, 'Input/output error'), MachineError, 'the disk reports an error'),
  (MemoryError(), MachineError, 'too little memory'),
  (out_of_memory(), MachineError, 'too little memory'),
  (ValueError('the mesh has other axes'), UserError, 'does not fit this run, though its files'),
  (KeyError('a name that some later version writes'), UserError, 'go on with the version'),
  (RuntimeError('whatever'), UserError, 'whatever.*or use another --workdir'),
]


@pytest.mark.parametrize(
  ('error', 'kind', 'said'), REFUSALS, ids=[repr(error) for error, _, _ in REFUSALS]
)
@pytest.mark.parametrize('of', ['now', 'before'])
def test_what_proves_nothing_is_refused(request, monkeypatch, of, error, kind, said):
  run = request.getfixturevalue('copy' if of == 'now' else 'old')
  before = contents(run)

  def fails(*_, **__):
    raise error

  monkeypatch.setattr(ocp.StandardCheckpointHandler, 'restore', fails)
  if of == 'before':
    said = said.replace('its files', 'nothing proves it damaged')
  for read in (restore, read_params):
    with pytest.raises(kind, match=said):
      read(run)
  assert contents(run) == before


@pytest.mark.skipif(os.geteuid() != 0, reason='needs root, to become somebody else')
@pytest.mark.parametrize('name', ['params/_METADATA', 'SHA256SUMS', 'run/metadata', 'training'])
def test_denied_files_are_no_damage(saved, name):
  with tempfile.TemporaryDirectory() as folder:  # pytest's own lets nobody else in
    run = Path(shutil.copytree(saved, Path(folder) / 'run'))
    for path in (Path(folder), run, *run.rglob('*')):
      os.chmod(path, 0o777)
    os.chmod(run / 'checkpoints' / '3' / name, 0)
    for read in (restore,) if name == 'training' else (restore, read_params):
      with plain_user(), pytest.raises(UserError, match='cannot be .*Permission denied.*; permit'):
        read(run)
    assert contents(run) == contents(saved)


def test_other_shapes_and_names_are_refused(copy):
  before = contents(copy)
  wider, named = params(0), params(0)
  wider['layer']['weights'] = jnp.zeros((16, 25))
  named['layer']['bias'] = named['layer'].pop('gain')
  for changed in (wider, named):
    with pytest.raises(
      UserError, match='params: does not fit this run, though its files are whole'
    ):
      Checkpoints(copy).read_params(placed(changed), RUN)
    with pytest.raises(UserError, match='does not fit'), Checkpoints(copy, 3) as checkpoints:
      checkpoints.open()
      checkpoints.restore(placed(changed), placed(training(0)), RUN)
  assert contents(copy) == before


def test_another_config_is_refused_by_name(copy):
  before = contents(copy)
  run = {**RUN, 'config': {**RUN['config'], 'rope_base': 110.0}}
  for read in (restore, read_params):
    with pytest.raises(
      UserError, match=r'rope_base=110.0: .*trained with rope_base=100.0; restore'
    ):
      read(copy, run)
    with pytest.raises(UserError, match='another text'):
      read(copy, {**RUN, 'data': 'another'})
  assert contents(copy) == before
  free = {**RUN, 'config': {**RUN['config'], 'log_every': 17, 'remat': 'full'}}
  assert is_saved(restore(copy, free), 3)


# What lies in checkpoints-damaged stays.


def test_nothing_set_aside_is_ever_overwritten(copy):
  earlier = copy / 'checkpoints-damaged' / '3'
  earlier.mkdir(parents=True)
  (earlier / 'mine').write_text('the only good one')
  for again in range(2):
    os.truncate(copy / 'checkpoints' / str(3 - again) / 'params' / 'manifest.ocdbt', 5)
    shutil.copytree(copy / 'checkpoints' / str(3 - again), copy / 'kept' / str(again))
  assert is_saved(restore(copy), 1)
  assert (earlier / 'mine').read_text() == 'the only good one'
  assert contents(copy / 'checkpoints-damaged' / '3-2') == contents(copy / 'kept' / '0')
  assert contents(copy / 'checkpoints-damaged' / '2') == contents(copy / 'kept' / '1')


@pytest.mark.parametrize('kind', ['link', 'dangling link', 'file'])
def test_where_nothing_can_be_set_aside_nothing_moves(copy, tmp_path, kind):
  os.truncate(copy / 'checkpoints' / '3' / 'params' / 'manifest.ocdbt', 5)
  elsewhere = tmp_path / 'elsewhere'
  if kind == 'link':
    (elsewhere / '3').mkdir(parents=True)
    (elsewhere / '3' / 'thesis.tex').write_text('ten years of work')
  if kind == 'file':
    (copy / 'checkpoints-damaged').write_text('')
  else:
    (copy / 'checkpoints-damaged').symlink_to(elsewhere)
  before = contents(tmp_path)
  with pytest.raises(UserError, match='checkpoints-damaged'):
    restore(copy)
  assert contents(tmp_path) == before


def test_a_run_that_has_lost_all_its_checkpoints_does_not_start_anew(copy, saved, tmp_path):
  for path in (copy / 'checkpoints').rglob('_METADATA'):
    path.unlink()
  for _ in range(2):  # the second time nothing is left to be set aside
    with pytest.raises(UserError, match='every checkpoint is damaged; they lie in .*-damaged'):
      restore(copy)
  assert sorted(os.listdir(copy / 'checkpoints-damaged')) == ['1', '2', '3']
  shutil.rmtree(copy / 'checkpoints-damaged')
  with pytest.raises(UserError, match='holds no checkpoint, but the run has had some'):
    restore(copy)
  assert restore(tmp_path) is None  # of a run that is new
  shutil.copytree(saved / 'checkpoints', copy / 'checkpoints', dirs_exist_ok=True)
  assert is_saved(restore(copy), 3)


# Writing.


def test_links_are_not_written_through(copy, tmp_path):
  shutil.move(copy / 'checkpoints', tmp_path / 'elsewhere')
  (copy / 'checkpoints').symlink_to(tmp_path / 'elsewhere')
  before = contents(tmp_path / 'elsewhere')
  with pytest.raises(UserError, match='checkpoints: is a link'):
    restore(copy)
  assert contents(tmp_path / 'elsewhere') == before


def test_what_a_kill_left_unfinished_goes_and_nothing_else(copy):
  for name in ('4.orbax-checkpoint-tmp', 'notes', '5.bak'):
    (copy / 'checkpoints' / name).mkdir()
    (copy / 'checkpoints' / name / 'file').write_text('x')
  assert is_saved(restore(copy), 3)
  assert sorted(os.listdir(copy / 'checkpoints')) == ['1', '2', '3', '5.bak', 'notes']


def test_a_run_at_work_may_be_read(copy, monkeypatch):
  """Its trainer takes the newest away while it is read, as another has come."""
  whole = Checkpoints._check_whole

  def check(self, step, parts):
    if step == 3:
      shutil.copytree(copy / 'checkpoints' / '3', copy / 'checkpoints' / '7')
      shutil.rmtree(copy / 'checkpoints' / '3')
    whole(self, step, parts)

  monkeypatch.setattr(Checkpoints, '_check_whole', check)
  step, read = read_params(copy)
  assert step == 7 and same(read, params(3))


def test_reading_writes_nothing(copy):
  def seen() -> dict[str, tuple]:
    found = {str(p): (p.stat().st_mode, p.stat().st_mtime_ns) for p in (copy, *copy.rglob('*'))}
    assert all(stat.S_ISREG(mode) or stat.S_ISDIR(mode) for mode, _ in found.values())
    return found

  before = seen()
  assert read_params(copy)[0] == 3
  assert seen() == before


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.EACCES, 'Permission denied'),
    ValueError('Error writing "x" [OS error 122: EDQUOT Disk quota exceeded]'),
    RuntimeError('nothing that is known'),
  ],
  ids=repr,
)
def test_a_checkpoint_that_cannot_be_written_leaves_those_before_it(copy, monkeypatch, error):
  def fails(*_):
    raise error

  before = contents(copy)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.checksums, 'write', fails)
    checkpoints = Checkpoints(copy, 3)
    checkpoints.open()
    checkpoints.save(4, params(4), training(4), {**RUN, 'batches': 4})
    with pytest.raises((UserError, MachineError), match='checkpoint 4 cannot be written') as told:
      checkpoints.close()
  assert '\n' not in str(told.value)
  assert isinstance(told.value, UserError) == isinstance(files.refusal(error), PermissionError)
  assert contents(copy) == before
  assert is_saved(restore(copy), 3)
