"""Models of ours in transformers, and of transformers in ours: the same logits at every position,
whole and through both caches, and the same greedy text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import ARMS, tiny_config
from planted import cached_logits, opened, params, plant, their_logits

from configs import base
from mla import generate as generate_lib
from mla import rope_scaling
from mla.convert import exporting, importing, vocabulary
from mla.data.tokenizers import ByteTokenizer
from mla.errors import UserError
from mla.evaluate import score_run
from mla.model import allocate_cache, forward, generate
from mla.sweep import joined, report
from mla.workdir import read_config

LENGTH = 160  # beyond the original context of the scaled cases
BAR = 1e-4
YARN = 'yarn:factor=4,original=64,beta_fast=8,beta_slow=1'
EQUAL, UNEQUAL = f'{YARN},mscale=0.7,mscale_all_dim=0.7', f'{YARN},mscale=1.2,mscale_all_dim=0.6'
LLAMA3 = 'llama3:factor=8,original=64,low=1,high=4'
# Beside those of every arm: name -> arm, format, fields.
CASES = {
  **{arm: (arm, 'auto', {}) for arm in ARMS if arm not in ('mha_partial_rope', 'mla_nested')},
  'deepseek_v2': ('mla_query_latent', 'deepseek_v2', {}),
  'tied': ('gqa', 'auto', {'tie_embeddings': True}),
  'tied_mla': ('mla', 'auto', {'tie_embeddings': True}),
  'epsilon': ('mla', 'auto', {'norm_eps': 1e-3}),
  'llama3': ('gqa', 'auto', {'rope_scaling': LLAMA3}),
  'yarn_llama': ('gqa', 'auto', {'rope_scaling': EQUAL}),
  'yarn_unequal_llama': ('mha', 'auto', {'rope_scaling': UNEQUAL}),
  'yarn_equal': ('mla', 'auto', {'rope_scaling': EQUAL}),
  'yarn_unequal': ('mla_query_latent', 'auto', {'rope_scaling': UNEQUAL}),
  'yarn_plain': ('mla', 'deepseek_v2', {'rope_scaling': YARN}),
}


def tokens_of(vocab: int, length: int = LENGTH) -> np.ndarray:
  return np.random.default_rng(1).integers(0, vocab, (2, length)).astype(np.int32)


def compare(model, peer, vocab: int) -> None:
  tokens = tokens_of(vocab)
  expected = their_logits(peer, tokens)
  assert expected.std() > 0.1
  np.testing.assert_allclose(forward(model, jnp.asarray(tokens)), expected, atol=BAR)
  np.testing.assert_allclose(cached_logits(model, tokens, 40), expected, atol=BAR)
  np.testing.assert_allclose(their_logits(peer, tokens, 40), expected, atol=BAR)


@pytest.mark.parametrize('case', CASES)
def test_exported_and_imported_again(case, text, tmp_path):
  arm, kind, fields = CASES[case]
  values = 10 if ARMS[arm]['attention'] == 'mla' else 0  # a Llama's are as wide as its keys
  config = tiny_config(arm, value_head_dim=values, rope_base=500.0, **fields)
  workdir = plant(config, tmp_path / 'run', text)
  exporting.export(workdir, tmp_path / 'out', kind)
  model, tokenizer = opened(workdir)
  peer, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not any(info.values()), info
  compare(model, peer, tokenizer.vocab_size)
  importing.import_folder(tmp_path / 'out', base.get_config(), tmp_path / 'again')
  again, theirs = opened(tmp_path / 'again')
  assert theirs.vocab_size == tokenizer.vocab_size and theirs.bos == tokenizer.bos
  ours = params(model)
  assert ours.keys() == params(again).keys()
  for name, value in params(again).items():
    np.testing.assert_array_equal(value, ours[name], err_msg=name)
  before, after = config, read_config(tmp_path / 'again')
  for name in ('attention', 'norm_eps', 'rope_base', 'tie_embeddings', 'ffn_dim'):
    assert after[name] == before[name], name
  assert rope_scaling.parse(after.rope_scaling) == rope_scaling.parse(before.rope_scaling)


def test_an_imported_run_stands_in_a_report(text, tmp_path):
  """But not with the run it came from, whose tokens are bytes and not those of a tokenizer.json."""
  workdir = plant(tiny_config('gqa', value_head_dim=0), tmp_path / 'run', text)
  exporting.export(workdir, tmp_path / 'out', 'auto')
  fields = base.get_config()
  fields.data.files, fields.data.eval_tokens = str(text), 256
  importing.import_folder(tmp_path / 'out', fields, tmp_path / 'one')
  figures, nll = score_run(tmp_path / 'one', 'bfloat16', max_tokens=256)
  line = joined.join(tmp_path / 'report', tmp_path / 'one')
  assert line['loss'] == pytest.approx(nll.sum() / figures['tokens_evaluated'], abs=1e-6)
  assert 'one: one seed, so no interval' in report.write(tmp_path / 'report')
  with pytest.raises(UserError, match='nats a token of the two cannot be compared'):
    joined.join(tmp_path / 'report', workdir)


def test_the_least_width_of_a_nested_run(text, tmp_path):
  workdir = plant(tiny_config('mla_nested'), tmp_path / 'run', text)
  exporting.export(workdir, tmp_path / 'out', 'auto', latent_dim=4)
  run = generate_lib.load(workdir, 4)
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  assert peer.config.kv_lora_rank == 4
  compare(run.model, peer, run.tokenizer.vocab_size)


@pytest.mark.parametrize('tied', [False, True])
def test_what_rounds_the_vocabulary_stays_here(tied, text, tmp_path):
  config = tiny_config('gqa', value_head_dim=0, round_to=8, tie_embeddings=tied)
  workdir = plant(config, tmp_path / 'run', text)
  exporting.export(workdir, tmp_path / 'out', 'auto')
  model, tokenizer = opened(workdir)
  assert model.embedding[...].shape[0] > tokenizer.vocab_size
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  tokens = tokens_of(tokenizer.vocab_size)
  ours = forward(model, jnp.asarray(tokens))[..., : tokenizer.vocab_size]
  np.testing.assert_allclose(ours, their_logits(peer, tokens), atol=BAR)


@pytest.mark.parametrize('arm', ['gqa', 'mla', 'mla_query_latent'])
def test_a_server_finds_what_it_asks_for(arm, text, tmp_path):
  """Its config, as transformers' own classes read it, from which servers take theirs."""
  config = tiny_config(arm, value_head_dim=10 if arm != 'gqa' else 0, rope_scaling=YARN)
  exporting.export(plant(config, tmp_path / 'run', text), tmp_path / 'out', 'auto')
  found = transformers.AutoConfig.from_pretrained(tmp_path / 'out')
  (architecture,) = found.architectures
  assert getattr(transformers, architecture).config_class is type(found)
  assert found.rope_parameters['rope_theta'] == config.rope_base
  assert found.rope_parameters['rope_type'] == 'yarn'
  assert found.max_position_embeddings == 4 * 64
  if arm == 'gqa':
    assert (found.head_dim, found.num_key_value_heads) == (6, 2)
    return
  assert found.first_k_dense_replace == found.num_hidden_layers == config.num_layers
  assert found.num_mtp_layers == 0 and found.rope_interleave
  assert found.q_lora_rank == (config.query_latent_dim or None)
  sizes = (found.kv_lora_rank, found.qk_nope_head_dim, found.qk_rope_head_dim, found.v_head_dim)
  assert sizes == (14, 6, 4, 10)


@pytest.mark.parametrize('arm', ['gqa', 'mla'])
def test_greedy_text_is_the_same(arm, text, tmp_path):
  values = 10 if arm == 'mla' else 0
  config = tiny_config(arm, value_head_dim=values)
  workdir = plant(config, tmp_path / 'run', text)
  exporting.export(workdir, tmp_path / 'out', 'auto')
  model, tokenizer = opened(workdir)
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  prompt = np.concatenate([[tokenizer.bos], tokenizer.encode('99 bottles of')])[None]
  expected = peer.generate(
    torch.tensor(prompt), max_new_tokens=40, do_sample=False, eos_token_id=-1, pad_token_id=0
  )
  cache = allocate_cache(model, batch=1, slots=prompt.shape[1] + 40, dtype='float32')
  written, _ = generate(
    model,
    cache,
    jnp.asarray(prompt, jnp.int32),
    jnp.array([prompt.shape[1]]),
    jax.random.key(0),
    steps=40,
    temperature=0.0,
  )
  np.testing.assert_array_equal(written[0], expected[0, prompt.shape[1] :])


@pytest.mark.parametrize('arm', ['mla', 'gqa'])
def test_our_cache_is_as_large_as_theirs(arm, text, tmp_path):
  """transformers keeps MLA's latents too, in a cache of its own."""
  config = tiny_config(arm, value_head_dim=10 if arm == 'mla' else 0)
  workdir = plant(config, tmp_path / 'run', text)
  exporting.export(workdir, tmp_path / 'out', 'auto')
  model, _ = opened(workdir)
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  with torch.no_grad():
    cache = peer(torch.zeros((1, 9), dtype=torch.long), use_cache=True).past_key_values
  kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 9
  ours = allocate_cache(model, batch=1, slots=9, dtype='float32').bytes_per_token()
  assert ours == kept


VOCAB = 300  # more than the bytes that its tokenizer has
SIZES = {
  'vocab_size': VOCAB,
  'hidden_size': 32,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'initializer_range': 0.2,
}
LATENT = {
  'kv_lora_rank': 14,
  'q_lora_rank': None,
  'qk_nope_head_dim': 6,
  'qk_rope_head_dim': 4,
  'v_head_dim': 10,
  'num_key_value_heads': 4,
}
DENSE = {**LATENT, 'first_k_dense_replace': 2}
FOREIGN = {
  'llama': lambda t: t.LlamaConfig(**SIZES, num_key_value_heads=2, rms_norm_eps=1e-5),
  'llama_tied_mqa': lambda t: t.LlamaConfig(
    **SIZES, num_key_value_heads=1, head_dim=6, tie_word_embeddings=True
  ),
  'v3': lambda t: t.DeepseekV3Config(**SIZES, **DENSE),
  'v3_halves': lambda t: t.DeepseekV3Config(**SIZES, **DENSE, rope_interleave=False),
  'v3_query_latent': lambda t: t.DeepseekV3Config(**SIZES, **{**DENSE, 'q_lora_rank': 18}),
  'v2': lambda t: t.DeepseekV2Config(**SIZES, **DENSE, rms_norm_eps=1e-4),
  'minicpm3': lambda t: t.MiniCPM3Config(
    **SIZES, **{**LATENT, 'q_lora_rank': 18}, scale_emb=3, scale_depth=0.9, dim_model_base=8
  ),
  'minicpm3_untied': lambda t: t.MiniCPM3Config(
    **SIZES, **{**LATENT, 'q_lora_rank': 18}, tie_word_embeddings=False
  ),
}


def save_foreign(config, folder, dtype=torch.float32, **saving):
  """A random model of transformers in a folder, with a tokenizer; the model as it was saved."""
  torch.manual_seed(0)
  peer = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for weight in peer.parameters():
      if weight.ndim == 1:
        weight.uniform_(0.5, 1.5)
  peer.to(dtype).save_pretrained(folder, **saving)
  for name, content in vocabulary.to_files(ByteTokenizer()).items():
    (folder / name).write_text(content)
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize('case', FOREIGN)
def test_a_foreign_model(case, tmp_path):
  peer = save_foreign(FOREIGN[case](transformers), tmp_path / 'their')
  importing.import_folder(tmp_path / 'their', base.get_config(), tmp_path / 'run')
  compare(opened(tmp_path / 'run')[0], peer, VOCAB)


def test_bfloat16_in_shards(tmp_path):
  peer = save_foreign(
    FOREIGN['v3'](transformers), tmp_path / 'their', torch.bfloat16, max_shard_size='8KB'
  )
  assert len(list((tmp_path / 'their').glob('*.safetensors'))) > 2
  importing.import_folder(tmp_path / 'their', base.get_config(), tmp_path / 'run')
  compare(opened(tmp_path / 'run')[0], peer, VOCAB)


def test_shards_of_ours(text, tmp_path):
  config = tiny_config('mla')
  workdir = plant(config, tmp_path / 'run', text)
  exporting.export(workdir, tmp_path / 'out', 'auto', shard=20_000)
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 2
  model, tokenizer = opened(workdir)
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  compare(model, peer, tokenizer.vocab_size)
