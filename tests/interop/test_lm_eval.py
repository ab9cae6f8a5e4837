"""lm-evaluation-harness reads an exported folder: its model `hf` on a task of files of our own."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config
from planted import opened, plant

from mla.convert import exporting
from mla.model import forward

TEXTS = ('We the people.', 'Bottles on the wall; und Käse.')


@pytest.mark.parametrize('arm', ['gqa', 'mla'])
def test_its_log_likelihoods_are_ours(arm, text, tmp_path, monkeypatch):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  from lm_eval import simple_evaluate
  from lm_eval.models.huggingface import HFLM

  values = 10 if arm == 'mla' else 0
  workdir = plant(tiny_config(arm, value_head_dim=values, seq_len=64), tmp_path / 'run', text)
  exporting.export(workdir, tmp_path / 'out', 'auto')
  data = tmp_path / 'texts.jsonl'
  data.write_text(''.join(json.dumps({'text': one}) + '\n' for one in TEXTS))
  task = {
    'task': 'ours',
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'test': str(data)}},
    'test_split': 'test',
    'output_type': 'loglikelihood_rolling',
    'doc_to_text': '',
    'doc_to_target': '{{text}}',
    'metric_list': [{'metric': 'bits_per_byte'}],
  }
  peer = HFLM(str(tmp_path / 'out'), dtype='float32', device='cpu', add_bos_token=False)
  found = simple_evaluate(peer, tasks=[task], bootstrap_iters=0)
  assert found is not None
  model, tokenizer = opened(workdir)
  nats = 0.0
  for one in TEXTS:
    tokens = np.array([[tokenizer.bos, *tokenizer.encode(one)]], np.int32)
    logits = forward(model, jnp.asarray(tokens[:, :-1]))
    nats += float(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).sum())
  expected = nats / np.log(2) / sum(len(one.encode()) for one in TEXTS)
  assert found['results']['ours']['bits_per_byte,none'] == pytest.approx(expected, rel=1e-5)
