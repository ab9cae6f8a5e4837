"""Perplexity read through the cache, against a second reading of the protocol in evaluate.py."""

import fcntl
import functools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, tiny_config
from flax import nnx

from mla import breakdown, evaluate, generate, plots, sharding, tables
from mla import cache as cache_lib
from mla.backends import cpu
from mla.cutting import cut_latent
from mla.data.pipeline import eval_windows, load_data
from mla.errors import UserError
from mla.model import allocate_cache, forward, make_model
from mla.train import train_and_evaluate

ROOT = Path(__file__).parent.parent
LINE = 'A cache is a thing you can hold: {} bytes, “no more”.\n'  # the quotes take three bytes each


@pytest.fixture(scope='module')
def text(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text(''.join(LINE.format(n * n) for n in range(300)))
  return path


@pytest.fixture(scope='module')
def trained(text, tmp_path_factory) -> Callable[[str], Path]:
  """A little-trained run of a variant, so that its predictions differ from place to place."""
  root = tmp_path_factory.mktemp('runs')

  @functools.cache
  def run(arm: str) -> Path:
    fields = {'num_steps': 30, 'eval_every': 30, 'num_layers': 1, 'data__eval_tokens': 64}
    config = tiny_config(arm, data__files=str(text), learning_rate=1e-2, **fields)
    train_and_evaluate(config, root / arm)
    return root / arm

  return run


def read_by_hand(workdir: Path) -> tuple[np.ndarray, np.ndarray, int]:
  """NLL of every target, the first target's index in each window, and the targets' text bytes.

  From the protocol alone: the stream is cut by hand, and the model runs without a cache, a window
  at a time.
  """
  config = evaluate.read_config(workdir)
  data = load_data(config)
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  model, _ = evaluate.load_model(workdir, config, data.tokenizer.vocab_size, data.digest, mesh)
  stream, length = data.validation.tokens, config.seq_len
  nll, cuts = [], []
  logits_of = jax.jit(lambda tokens: jax.nn.log_softmax(forward(model, tokens)))
  for start in range(0, len(stream) - 1, length):
    window = stream[start : start + length + 1]
    inputs = np.zeros(length, np.int32)
    inputs[: len(window) - 1] = window[:-1]  # what is behind the text's end is not looked at
    logits = np.asarray(logits_of(inputs[None]))[0]
    cuts.append(len(nll))
    nll += [-logits[i, target] for i, target in enumerate(window[1:])]
  text_bytes = int(sum(token != 256 for token in stream[1:]))
  return np.array(nll, np.float64), np.array(cuts), text_bytes


@pytest.mark.parametrize('arm', ['mha', 'gqa', 'mqa', 'mla'])
def test_a_second_reading_of_the_protocol_agrees(trained, arm):
  nll, _, text_bytes = read_by_hand(trained(arm))
  exact = evaluate.evaluate_run(trained(arm), 'float32')
  rough = evaluate.evaluate_run(trained(arm), 'bfloat16')
  assert exact['tokens_evaluated'] == rough['tokens_evaluated'] == len(nll)
  assert abs(math.log(exact['perplexity']) - nll.mean()) < 1e-4
  assert abs(math.log(rough['perplexity']) - nll.mean()) < 5e-3
  assert rough['perplexity'] != exact['perplexity']  # the asked dtype was used
  assert exact['bits_per_byte'] == pytest.approx(nll.sum() / (math.log(2) * text_bytes), rel=1e-4)
  low, high = exact['perplexity_ci95']
  assert low < exact['perplexity'] < high
  assert exact['kv_cache_bytes_per_token'] == 2 * rough['kv_cache_bytes_per_token']


def test_a_run_is_read_where_the_backend_that_trained_it_is_not(trained, tmp_path, monkeypatch):
  workdir = shutil.copytree(trained('mla'), tmp_path / 'run')
  usual, _ = evaluate.score_run(workdir, 'float32', max_tokens=64)
  config = json.loads((workdir / 'config.json').read_text())
  (workdir / 'config.json').write_text(json.dumps({**config, 'attention_impl': 'cpu'}))
  monkeypatch.setattr(cpu, 'missing', lambda: 'there is no C++ compiler')
  elsewhere, _ = evaluate.score_run(workdir, 'float32', max_tokens=64)
  assert elsewhere['perplexity'] == pytest.approx(usual['perplexity'], rel=1e-5)


@pytest.mark.parametrize('chunk', [1, 5, 32])
def test_the_chunk_size_changes_nothing(trained, chunk):
  config = evaluate.read_config(trained('mla'))
  data = load_data(config)
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  model, _ = evaluate.load_model(trained('mla'), config, 257, data.digest, mesh)
  windows = eval_windows(data.validation, seq_len=config.seq_len, max_tokens=512)
  read = evaluate.read_through_cache(model, windows, 'float32', mesh, chunk=chunk)
  expected = evaluate.read_through_cache(model, windows, 'float32', mesh, chunk=16)
  np.testing.assert_allclose(read.by_window, expected.by_window, rtol=1e-5)
  cache = allocate_cache(model, batch=2, slots=7, dtype='float32')
  assert read.bytes_per_token == cache.bytes_per_token() == (14 + 4) * 4


def test_every_key_and_value_is_seen_through_the_cache(trained, monkeypatch):
  """Wipe what the cache gives back, and the predictions must fall to those of no context at all."""
  from mla import model as model_lib

  honest = evaluate.evaluate_run(trained('mla'), 'float32')['perplexity']
  append = model_lib.append

  def forgetful(layer, entries, starts, **how):
    nothing = {name: jnp.zeros_like(entry) for name, entry in entries.items()}
    return append(layer, nothing, starts, **how)

  monkeypatch.setattr(model_lib, 'append', forgetful)
  config = evaluate.read_config(trained('mla'))
  data = load_data(config)
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  model, _ = evaluate.load_model(trained('mla'), config, 257, data.digest, mesh)
  blind = nnx.clone(model)  # attention adds nothing
  blind.blocks.attention.w_o[...] = jnp.zeros_like(blind.blocks.attention.w_o[...])
  windows = eval_windows(data.validation, seq_len=config.seq_len, max_tokens=512)
  without, no_context = (
    evaluate.read_through_cache(m, windows, 'float32', mesh).by_window for m in (model, blind)
  )
  np.testing.assert_allclose(without, no_context, rtol=1e-5)
  assert np.exp(no_context.sum() / windows.mask.sum()) > honest * 1.01


def test_the_interval_is_that_of_the_mean():
  """For many equal windows the bootstrap approaches exp(mean +- 1.96 standard errors)."""
  rng = np.random.default_rng(3)
  targets = np.full(400, 32)
  nll = 32 * rng.normal(1.2, 0.3, 400)
  low, high = breakdown.bootstrap_perplexity(nll, targets)
  means = nll / 32
  error = 1.96 * means.std() / math.sqrt(400)
  assert math.log(low) == pytest.approx(means.mean() - error, abs=0.1 * error)
  assert math.log(high) == pytest.approx(means.mean() + error, abs=0.1 * error)


def test_the_interval_covers_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(4)
  targets = np.full(60, 1)
  hits = 0
  for _ in range(200):
    low, high = breakdown.bootstrap_perplexity(rng.normal(1.0, 0.2, 60), targets, resamples=300)
    hits += low <= math.e <= high
  assert 0.88 < hits / 200 < 0.99


def test_few_windows_have_no_interval():
  nll, targets = np.linspace(20.0, 40.0, 100), np.full(100, 32)
  for count in (1, 2, 10, 19, 20, 100):
    interval = breakdown.bootstrap_perplexity(nll[:count], targets[:count], 50)
    assert interval is None if count < 20 else interval[0] < interval[1]


@pytest.mark.parametrize('windows', [1, 19, 20])
def test_a_part_of_the_text_has_an_interval_only_if_that_says_something(trained, windows):
  run, nll = evaluate.score_run(trained('mla'), 'float32', max_tokens=32 * windows)
  assert len(nll) == windows
  assert (json.loads(json.dumps(run))['perplexity_ci95'] is None) == (windows < 20)
  assert ('  -  ' in tables.compare([run]).splitlines()[-1]) == (windows < 20)


def test_the_command_line(trained, tmp_path):
  out, picture = tmp_path / 'eval.json', tmp_path / 'eval.png'
  done = subprocess.run(
    [
      *(sys.executable, str(ROOT / 'eval.py'), f'--workdir={trained("mla")}'),
      *(f'--workdir={trained("mha")}', '--cache_dtype=int8', f'--json={out}', f'--plot={picture}'),
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  runs = json.loads(out.read_text())['runs']
  keys = (
    'workdir attention latent_dim layer_dims params_total params_non_embedding step cache_dtype '
    'kv_cache_bytes_per_token kv_cache_bytes_per_token_per_device perplexity perplexity_ci95 '
    'bits_per_byte tokens_evaluated data_digest loss_by_position loss_by_bigram'
  )
  assert [list(run) for run in runs] == [keys.split()] * 2
  assert [(run['attention'], run['latent_dim']) for run in runs] == [('mla', 14), ('mha', None)]
  assert runs[0]['kv_cache_bytes_per_token'] == 14 + 4 + 2 * 4  # int8, and a scale a vector
  lines = done.stdout.splitlines()
  assert 'users/GiB at 8k' in done.stdout
  assert [line.split()[0] for line in lines[-2:]] == ['mla', 'mha']  # sorted by bytes
  assert picture.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('arm', ['gqa', 'mla'])
@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_on_any_mesh_the_reading_is_that_of_one_device(trained, arm, sizes):
  """Eight windows or more: the cache's rows are split. Fewer than devices: its slots are."""
  config = evaluate.read_config(trained(arm))
  data = load_data(config)
  for tokens, rows in ((512, 32), (32, 1)):
    windows = eval_windows(data.validation, seq_len=config.seq_len, max_tokens=tokens)
    read = []
    for mesh in (mesh_of((1, 1, 1)), mesh_of(sizes)):
      model, _ = evaluate.load_model(trained(arm), config, 257, data.digest, mesh)
      read.append(evaluate.read_through_cache(model, windows, 'int8', mesh))
    one, many = read
    # A loss is what is left of logits of some ten nats: an ulp of those, 1e-6, is its least error.
    np.testing.assert_allclose(many.by_window, one.by_window, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(many.by_position, one.by_position, rtol=1e-5, atol=2e-6)
    assert one.bytes_per_token_per_device == one.bytes_per_token == many.bytes_per_token
    # A latent has no heads for the tensor axis: it is whole along that.
    parts = 8 if arm == 'gqa' or sizes[2] == 1 else 4
    assert many.bytes_per_token_per_device == many.bytes_per_token / parts, rows


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1)])
def test_no_cache_is_gathered_and_weights_only_layer_by_layer(sizes):
  """One window on eight devices, by slots; eight on eight that share weights, by rows."""
  config = tiny_config('mla', seq_len=128, attention_impl='blockwise')
  mesh, batch = mesh_of(sizes), 1 if sizes[0] == 8 else 8
  model = nnx.eval_shape(lambda: make_model(config, 264))
  graphdef, params = nnx.split(model)
  layers = jax.eval_shape(
    lambda: allocate_cache(model, batch=batch, slots=128, dtype='float32').layers
  )
  place = cache_lib.shardings(layers, batch, mesh)
  rows = sharding.everywhere(mesh) if batch == 1 else sharding.rows_sharding(mesh)
  given = (
    sharding.placed(params, sharding.shardings(params, mesh)),
    sharding.placed(layers, place),
    jax.ShapeDtypeStruct((batch, 129), jnp.int32, sharding=rows),
  )
  with jax.set_mesh(mesh):
    program = evaluate.make_score(graphdef, mesh, place, 64).lower(*given).compile().as_text()
  entry = program[program.index('\nENTRY') :]
  gathered = re.findall(r'= \w+\[([\d,]*)\]\S* all-gather', program)
  assert not any('128' in shape.split(',') for shape in gathered), gathered
  if sizes == (1, 8, 1):
    assert '24,32' in gathered and 'all-gather' not in entry  # within the loop
  else:
    assert not gathered and 'all-reduce' in program  # of the softmax and of its values


def test_losses_by_position_are_those_of_the_reading_by_hand(trained):
  """And those of early tokens, which see little, are the highest."""
  nll, cuts, _ = read_by_hand(trained('mla'))
  run = evaluate.evaluate_run(trained('mla'), 'float32')
  seen = np.concatenate([np.arange(1, n + 1) for n in np.diff([*cuts, len(nll)])])
  buckets = run['loss_by_position']
  assert [(b['from'], b['to']) for b in buckets] == [
    (1, 1),
    (2, 3),
    (4, 7),
    (8, 15),
    (16, 31),
    (32, 32),
  ]
  for bucket in buckets:
    inside = (seen >= bucket['from']) & (seen <= bucket['to'])
    assert bucket['targets'] == inside.sum()
    assert bucket['loss'] == pytest.approx(nll[inside].mean(), rel=1e-4)
  assert sum(b['targets'] for b in buckets) == run['tokens_evaluated']


RUN = {
  'workdir': 'runs/x',
  'attention': 'mla',
  'latent_dim': 32,
  'params_non_embedding': 800_000,
  'step': 800,
  'cache_dtype': 'bfloat16',
  'kv_cache_bytes_per_token': 512.0,
  'perplexity': 3.0,
  'perplexity_ci95': [2.9, 3.1],
  'bits_per_byte': 1.58,
}


def test_the_table_says_what_bytes_mean():
  line = tables.compare([RUN]).splitlines()[-1]
  assert f'{2**30 // 512:,}' in line  # tokens in a GiB
  assert line.split()[-1] == f'{2**30 / 512 / 8192:.1f}'


def test_the_table_says_what_a_device_holds_where_devices_share():
  shared = {**RUN, 'kv_cache_bytes_per_token_per_device': 64.0}
  alone = {**RUN, 'kv_cache_bytes_per_token_per_device': 512.0}
  assert ' 64.0 ' in tables.compare([shared, alone]) and ' 512.0 ' in tables.compare(
    [shared, alone]
  )
  assert tables.compare([alone]) == tables.compare([RUN])


def test_the_table_says_which_runs_read_another_text():
  here, there = ({**RUN, 'workdir': name, 'data_digest': name * 2} for name in 'ab')
  assert 'not of one text and tokenizer: a | b.' in tables.compare([here, there])
  assert 'not of one' not in tables.compare([here, here])


@pytest.mark.parametrize('interval', [None, [3.0 + 1e-15, 3.0 - 1e-15]])
def test_a_picture_needs_no_interval(tmp_path, interval):
  """None of too few windows; one turned round by rounding where all windows are alike."""
  plots.save(plots.perplexity, tmp_path / 'x.png', [RUN, RUN | {'perplexity_ci95': interval}])
  assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')


def test_a_run_is_read_without_a_word_written(trained, tmp_path):
  """So a workdir that may only be read will do, and one in which a trainer is at work."""
  run = Path(shutil.copytree(trained('mla'), tmp_path / 'run'))

  def seen() -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mode, p.stat().st_mtime_ns) for p in (run, *run.rglob('*'))}

  for path in (run, *run.rglob('*')):
    path.chmod(0o555 if path.is_dir() else 0o444)
  before = seen()
  with (run / '.lock').open() as lock:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert evaluate.evaluate_run(run, 'float32')['step'] == 30
  assert seen() == before


@pytest.mark.parametrize(
  ('there', 'changed'),
  [
    ('"rope_base": 100.0', '"rope_base": 500.0'),
    ('"num_heads": 4', '"num_heads": 2'),
    ('"head_dim": 6', '"head_dim": 2'),
    ('"dtype": "float32"', '"dtype": "bfloat16"'),
    ('"seq_len": 32', '"seq_len": 33'),
  ],
)
def test_a_changed_config_json_evaluates_no_other_model(trained, tmp_path, there, changed):
  run = Path(shutil.copytree(trained('mla'), tmp_path / 'run'))
  path = run / 'config.json'
  assert there in path.read_text()
  path.write_text(path.read_text().replace(there, changed))
  name = changed.split('"')[1]
  with pytest.raises(UserError, match=f'{name}=.*: .*checkpoints/30 was trained with {name}='):
    evaluate.evaluate_run(run, 'float32')


def test_a_flipped_bit_in_the_weights_is_not_evaluated(trained, tmp_path):
  run = Path(shutil.copytree(trained('mla'), tmp_path / 'run'))
  weights = (run / 'checkpoints' / '30' / 'params').rglob('*')
  largest = max(weights, key=lambda path: path.stat().st_size)
  raw = bytearray(largest.read_bytes())
  raw[len(raw) // 2] ^= 1
  largest.write_bytes(raw)
  with pytest.raises(UserError, match='30: cannot be read .*differs from its checksum.*train.py'):
    evaluate.evaluate_run(run, 'float32')


def test_a_nested_run_is_read_at_each_of_its_widths(trained):
  """Through smaller caches, to the losses of smaller models without a cache."""
  workdir = trained('mla_nested')
  found = evaluate.evaluate_caches(workdir, ['float32'])
  assert [run['latent_dim'] for run in found] == [14, 8, 4]
  assert [run['kv_cache_bytes_per_token'] for run in found] == [4 * (c + 4) for c in (14, 8, 4)]
  config = evaluate.read_config(workdir)
  data = load_data(config)
  mesh = mesh_of((1, 1, 1))
  model, _ = evaluate.load_model(workdir, config, data.tokenizer.vocab_size, data.digest, mesh)
  windows = eval_windows(data.validation, seq_len=config.seq_len)
  tokens = jnp.asarray(windows.tokens)
  for run in found:
    smaller, _ = cut_latent(model, config, run['latent_dim'])
    logits = jax.jit(lambda model: jax.nn.log_softmax(forward(model, tokens[:, :-1])))(smaller)
    nll = -np.take_along_axis(np.asarray(logits), windows.tokens[:, 1:, None], -1)[..., 0]
    expected = np.exp(nll[windows.mask].mean())
    assert run['perplexity'] == pytest.approx(expected, rel=1e-5)
  assert len({run['perplexity'] for run in found}) == 3
  # The whole is what a sweep judges, and one width is read alone.
  assert evaluate.evaluate_run(workdir, 'float32') == found[0]
  assert evaluate.evaluate_caches(workdir, ['float32'], latent_dim=8) == [found[1]]
  with pytest.raises(UserError, match=r'^--latent_dim=5: .* has 14, 8, 4; '):
    evaluate.evaluate_caches(workdir, ['float32'], latent_dim=5)


def test_a_nested_run_writes_with_a_part_of_its_latent(trained):
  run = generate.load(trained('mla_nested'), 8)
  took = generate.write(run, ['A'], lambda row, text: None, steps=2, cache_dtype='bfloat16')
  assert took.cache_bytes_per_token == 2 * (8 + 4)
  with pytest.raises(UserError, match='^--latent_dim=8: .* has none, gqa; '):
    generate.load(trained('gqa'), 8)


def test_each_layer_can_have_a_width_of_its_own(trained, tmp_path):
  workdir = trained('mla_nested')
  (alone,) = evaluate.evaluate_caches(workdir, ['float32'], latent_dim=8)
  (by_layer,) = evaluate.evaluate_caches(workdir, ['float32'], layer_dims=[8])
  assert by_layer == {**alone, 'latent_dim': None, 'layer_dims': [8]}
  assert '  8  ' in tables.compare([by_layer])
  plots.save(plots.perplexity, tmp_path / 'plot.png', [by_layer])
  for given, told in ([5], 'can be cut to 4, 8, 14'), ([8, 8], 'has 1 layers'):
    with pytest.raises(UserError, match=f'^--layer_dims=.*: .* {told}'):
      evaluate.evaluate_caches(workdir, ['float32'], layer_dims=given)
  with pytest.raises(UserError, match='^--layer_dims=8: .* can be cut to none'):
    evaluate.evaluate_caches(trained('mla'), ['float32'], layer_dims=[8])


@pytest.mark.parametrize('text', ['', '8,', 'a', '8;4', '-8'])
def test_layer_dims_are_widths(text):
  with pytest.raises(UserError, match='^--layer_dims=.*: write a width for each layer'):
    evaluate.parse_layers(text)
  assert evaluate.parse_layers('64,8') == [64, 8]


def test_the_loss_is_split_by_whether_a_bigram_stood_before(trained):
  """Against the text, target by target: does its pair stand in the window before it?"""
  config = evaluate.read_config(trained('mla'))
  nll, _, _ = read_by_hand(trained('mla'))
  run = evaluate.evaluate_run(trained('mla'), 'float32')
  stream, length = load_data(config).validation.tokens, config.seq_len
  groups: dict[str, list[float]] = {'seen': [], 'new': []}
  for target in range(1, len(stream)):
    start = (target - 1) // length * length
    pair = (stream[target - 1], stream[target])
    before = [(stream[i], stream[i + 1]) for i in range(start, target - 1)]
    groups['seen' if pair in before else 'new'].append(nll[target - 1])
  for name, losses in groups.items():
    found = run['loss_by_bigram'][name]
    assert found['targets'] == len(losses) > 30
    assert found['loss'] == pytest.approx(np.mean(losses), rel=1e-4)
