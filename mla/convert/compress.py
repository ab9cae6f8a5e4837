"""A trained MHA, GQA or MQA model becomes MLA after the fact, without training.

Keys and values are linear in a layer's normed input x, so a latent of their joint rank gives them
back exactly. Rotation stands in the way: MLA turns one key of R dims that all heads share. Written
as complex numbers z_g = (a + ib)_g, one a pair of dims and key head g, keys turn by a common factor
at each frequency. There the R/2 kept frequencies keep their strongest combination over the heads,
s = u^H z (an eigenvector of E[z z^H], as TransMLA does it, arXiv 2502.07864, heads weighted by what
their queries would lose): it turns as z does. What is left of them, z - u s, and the other
frequencies stay, but are no longer turned: that is the rotary loss, which no rank mends. Instead of
e^(-i w d) at distance d they are multiplied by its mean over the distances that the query head
looks at, the constant nearest to it: none where they would turn many times. A model of one key head
whose R is all that turns loses nothing.

Then M x, all heads' position-free keys and values, is made of a latent of C dims, M ~ U E:
  svd         of M as it is
  whitened    least error on what x is: of M S^1/2, S = E[x x^T] from calibration text
  two_sided   that, and a key's error seen through its queries, E[q q^T]^1/2, a value's through the
              output map; keys and values of equal energy
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float, Int
from ml_collections import ConfigDict

from mla import config as config_lib
from mla import files, generate
from mla import loss as loss_lib
from mla import model as model_lib
from mla.attention.grouped import key_heads
from mla.backends import Starts
from mla.checkpoint import Checkpoints, flatten, unflatten
from mla.convert.importing import draft_of
from mla.convert.sources import dumps
from mla.data import tokenizers
from mla.data.pipeline import EvalWindows, eval_windows, load_run_data
from mla.errors import UserError

METHODS = ('svd', 'whitened', 'two_sided')
CALIBRATION = 16_384  # tokens of the training text
REPORTED = 4_096  # of the validation text, in windows of at most WINDOW
WINDOW = 512
RIDGE = 1e-6  # of a covariance's mean eigenvalue, added to all of them


class Factors(NamedTuple):
  """One layer's weights as MLA has them."""

  w_q: np.ndarray
  w_dkv: np.ndarray
  w_kr: np.ndarray
  w_uk: np.ndarray
  w_uv: np.ndarray


def compress(
  workdir: Path,
  out: Path,
  *,
  latent_dim: int,
  rope_dim: int | None = None,
  method: str = 'whitened',
) -> dict[str, Any]:
  """Writes the run at `workdir`, compressed, as the new run `out`; returns compression.json there.

  rope_dim, R, divides what the model turns of a head, and is all of it if not given. The report has
  the losses, in nats a token of validation text: of the model, of it with nothing lost but by the
  rotary part, and as compressed. UserError for sizes that don't fit.
  """
  run = generate.load(workdir)
  source = run.config
  turned = source.rope_dim or source.head_dim
  rope_dim = rope_dim or turned
  full = _check(source, latent_dim, rope_dim, method)
  data = load_run_data(workdir, source)
  width = min(source.seq_len, WINDOW)
  held_out = eval_windows(data.validation, seq_len=width, max_tokens=REPORTED)
  calibration = eval_windows(data.train, seq_len=width, max_tokens=CALIBRATION).without_padding()
  observed = observe(run.model, calibration.tokens[:, :-1], calibration.starts)
  report: dict[str, Any] = {
    'source': str(workdir),
    'method': method,
    'latent_dim': latent_dim,
    'rope_dim': rope_dim,
    'loss': {'source': _loss(run.model, held_out)},
  }
  config, whole = convert(source, run.model, observed, full, rope_dim, 'svd')
  report['loss']['rotary_only'] = _loss(whole, held_out)
  config, model = convert(source, run.model, observed, latent_dim, rope_dim, method)
  report['loss']['compressed'] = _loss(model, held_out)
  with draft_of(out, 'out') as draft:
    tokenizers.save(run.tokenizer, draft)
    files.write_whole(draft / 'config.json', dumps(config_lib.to_json(config)))
    files.write_whole(draft / 'compression.json', dumps(report))
    saved = {'config': config_lib.to_json(config), 'data': data.digest, 'origin': str(workdir)}
    with Checkpoints(draft) as checkpoints:
      checkpoints.save(
        run.step,
        nnx.state(model, nnx.Param),
        None,
        {**saved, 'tokenizer': run.tokenizer.digest},
      )
  return report


def full_rank(config: ConfigDict, rope_dim: int) -> int:
  """The latent's width at which nothing is lost by the rank: all heads' keys and values, of whose
  rope_dim turning dims one head's worth stands beside the latent."""
  values = config.value_head_dim or config.head_dim
  return min(config.d_model, key_heads(config) * (config.head_dim + values) - rope_dim)


def _check(config: ConfigDict, latent_dim: int, rope_dim: int, method: str) -> int:
  """The full rank; UserError for what can't be compressed so."""
  if config.attention not in ('mha', 'gqa', 'mqa'):
    raise UserError(f'attention={config.attention}: only mha, gqa and mqa are compressed')
  if config.rope_scaling != 'none':
    raise UserError(f'rope_scaling={config.rope_scaling}: is not compressed; only none is')
  if method not in METHODS:
    raise UserError(f'--method={method}: choose one of {", ".join(METHODS)}')
  turned = config.rope_dim or config.head_dim
  if rope_dim < 2 or rope_dim % 2 or turned % rope_dim:
    raise UserError(
      f'--rope_dim={rope_dim}: must be even and divide {turned}, what the model turns of a head'
    )
  full = full_rank(config, rope_dim)
  if not 0 < latent_dim <= full:
    raise UserError(
      f'--latent_dim={latent_dim}: must be at least 1 and at most {full}, the rank of the keys and '
      'values'
    )
  return full


class Observed(NamedTuple):
  """What a model does with calibration text, by layer."""

  covariances: Float[np.ndarray, 'L D D']  # E[x x^T] of the normed inputs, uncentred
  # E[e^(-i w d)] of each head and pair of dims that turns, w its frequency, over the distances d
  # that the head attends to: the constant that is nearest to the turning.
  still: Complex[np.ndarray, 'L H half']


def observe(
  model: model_lib.Decoder,
  tokens: Int[np.ndarray, 'W T'],
  starts: Int[np.ndarray, 'W T'] | None = None,
) -> Observed:
  """Of an MHA, GQA or MQA model, over the windows."""
  turned = model.blocks.attention.rotated
  frequencies = model.blocks.attention.rotation.frequencies(turned // 2)
  before = np.tril(np.ones((tokens.shape[1],) * 2, bool))
  turns = np.exp(1j * np.outer(np.arange(tokens.shape[1]), frequencies)).astype(np.complex64)

  @jax.jit
  def collect(
    model: model_lib.Decoder, tokens: Int[Array, 'B T'], starts: Starts
  ) -> tuple[Array, Array]:
    seen = before[None, None]
    if starts is not None:
      seen &= np.arange(tokens.shape[1]) >= starts[:, None, :, None]
    positions = np.arange(tokens.shape[1])[None]
    graphdef, stacked = nnx.split(model.blocks)

    def block(x, leaves):
      layer = nnx.merge(graphdef, leaves)
      h = layer.attention_norm(x)
      x, entries = layer.parallel(x, positions, starts=starts)
      logits = layer.attention.logits(h, entries, positions).astype(jnp.float32)
      maps = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
      still = jnp.einsum('bhts,tp,sp->hp', maps, turns.conj(), turns)
      h = h.astype(jnp.float32)
      return x, (jnp.einsum('btd,bte->de', h, h), still)

    return jax.lax.scan(block, model.embed(tokens), stacked)[1]

  sums: list = [0.0, 0.0]
  for start in range(0, len(tokens), 4):
    rows = jax.tree.map(lambda array, i=start: jnp.asarray(array[i : i + 4]), (tokens, starts))
    for place, part in enumerate(collect(model, *rows)):
      sums[place] += np.asarray(part, np.complex128 if place else np.float64)
  return Observed(*(total / tokens.size for total in sums))


def convert(
  source: ConfigDict,
  model: model_lib.Decoder,
  observed: Observed,
  latent_dim: int,
  rope_dim: int,
  method: str,
) -> tuple[ConfigDict, model_lib.Decoder]:
  """The compressed model and its config."""
  config = source.copy_and_resolve_references()
  config.update(
    {
      'attention': 'mla',
      'num_kv_heads': 0,
      'latent_dim': latent_dim,
      'rope_dim': rope_dim,
      'query_latent_dim': 0,
      'latent_norm': False,
      'ffn_dim': model.blocks.ffn.w_gate.shape[-1],
      'value_head_dim': source.value_head_dim or source.head_dim,
    }
  )
  own = flatten(nnx.state(model, nnx.Param))
  layers = [
    factorise(
      **{n: np.asarray(own[f'blocks/attention/{n}/value'][i], np.float64) for n in WEIGHTS},
      covariance=covariance,
      still=still,
      turned=source.rope_dim or source.head_dim,
      latent_dim=latent_dim,
      rope_dim=rope_dim,
      method=method,
    )
    for i, (covariance, still) in enumerate(zip(*observed, strict=True))
  ]
  new = {
    f'blocks/attention/{name}/value': np.stack([getattr(layer, name) for layer in layers])
    for name in Factors._fields
  }
  graphdef, params = nnx.split(nnx.eval_shape(lambda: model_lib.make_model(config, model.vocab)))
  filled = {
    path: jnp.asarray(new[path] if path in new else own[path], jnp.float32)
    for path in flatten(params)
  }
  return config, nnx.merge(graphdef, unflatten(params, filled))


WEIGHTS = ('w_q', 'w_k', 'w_v', 'w_o')


def factorise(
  *,
  w_q: Float[np.ndarray, 'D H N'],
  w_k: Float[np.ndarray, 'D K N'],
  w_v: Float[np.ndarray, 'D K V'],
  w_o: Float[np.ndarray, 'H V D'],
  covariance: Float[np.ndarray, 'D D'],
  still: Complex[np.ndarray, 'H half'],
  turned: int,
  latent_dim: int,
  rope_dim: int,
  method: str,
) -> Factors:
  """One layer; the first `turned` dims of a head rotate, pair i being dims i and i + turned/2."""
  D, H, N = w_q.shape
  K, V = w_k.shape[1], w_v.shape[2]
  group, half = H // K, turned // 2
  z = w_k[:, :, :half] + 1j * w_k[:, :, half:turned]  # D K half
  q = w_q[:, :, :half] + 1j * w_q[:, :, half:turned]  # D H half
  # MLA's frequencies base^(-2j/R) are every (turned/R)-th of the model's.
  pairs = np.arange(0, half, turned // rope_dim)
  shared, q_rope = np.empty((D, len(pairs)), complex), np.empty((D, H, len(pairs)), complex)
  weights = _weights(q, covariance, still, K)
  rest = z.copy()
  for j, pair in enumerate(pairs):
    heads = z[:, :, pair] * weights[:, pair]
    u = np.linalg.eigh(heads.T @ covariance @ heads.conj())[1][:, -1]  # K
    shared[:, j] = heads @ u.conj()
    u = u / weights[:, pair]
    rest[:, :, pair] -= shared[:, j, None] * u
    q_rope[:, :, j] = q[:, :, pair] * np.repeat(u.conj(), group)
  # What no longer turns stands as it does on average where its query heads look; keys that hardly
  # stand at all become small, so that no rank is spent on them.
  size = np.sqrt((abs(still) ** 2).reshape(K, group, half).mean(1)) + RIDGE
  rest *= size
  q = q * still.conj() / np.repeat(size, group, axis=0)
  w_k, w_q = w_k.copy(), w_q.copy()
  w_k[:, :, :half], w_k[:, :, half:turned] = rest.real, rest.imag
  w_q[:, :, :half], w_q[:, :, half:turned] = q.real, q.imag
  down, up = _joint(w_q, w_k, w_v, w_o, covariance, latent_dim, method)
  up = up.reshape(latent_dim, K, N + V).repeat(group, axis=1)
  # Ours divides by sqrt(N + R) what was divided by sqrt(N).
  w_q = np.concatenate([w_q, q_rope.real, q_rope.imag], axis=-1) * np.sqrt((N + rope_dim) / N)
  return Factors(
    w_q, down, np.concatenate([shared.real, shared.imag], axis=-1), up[..., :N], up[..., N:]
  )


def _weights(q, covariance, still, heads: int) -> np.ndarray:
  """[K, half]: what it costs a key head's pair no longer to turn, the root of: its queries' energy
  times how much of the turning no constant has."""
  energy = np.einsum('dhp,de,ehp->hp', q.conj(), covariance, q).real
  lost = energy * np.maximum(1 - abs(still) ** 2, 0)
  weights = np.sqrt(lost.reshape(heads, -1, lost.shape[-1]).sum(1))
  most = weights.max(axis=0)
  return np.where(most > 0, np.maximum(weights, RIDGE * most), 1)


def _joint(
  w_q, keys, values, w_o, covariance, latent_dim: int, method: str
) -> tuple[np.ndarray, np.ndarray]:
  """[D,C] and [C, K (N+V)], whose product is nearest to all keys and values in method's sense."""
  D, K, N = keys.shape
  group = w_q.shape[1] // K
  both = np.concatenate([keys, values], axis=-1)  # D K N+V
  seen = np.eye(D) if method == 'svd' else _root(covariance)
  widths = N + values.shape[-1]
  lens = np.broadcast_to(np.eye(widths), (K, widths, widths)).copy()
  if method == 'two_sided':
    for g in range(K):
      mine = slice(g * group, (g + 1) * group)
      lens[g, :N, :N] = _root(np.einsum('dhn,de,ehm->nm', w_q[:, mine], covariance, w_q[:, mine]))
      lens[g, N:, N:] = _root(np.einsum('hvd,hwd->vw', w_o[mine], w_o[mine]))
    looked = np.einsum('dkn,knm->dkm', np.tensordot(seen, both, 1), lens)
    for part in (slice(None, N), slice(N, None)):
      energy = np.linalg.norm(looked[..., part])
      lens[:, part, part] /= energy or 1.0
  looked = np.einsum('dkn,knm->dkm', np.tensordot(seen, both, 1), lens).reshape(D, -1)
  basis = np.linalg.svd(looked, full_matrices=False)[2][:latent_dim]  # C, K (N+V)
  through = np.einsum('dkn,knm->dkm', both, lens).reshape(D, -1)
  back = np.einsum('ckm,kmn->ckn', basis.reshape(len(basis), K, -1), np.linalg.inv(lens))
  return through @ basis.T, back.reshape(len(basis), -1)


def _root(covariance: np.ndarray) -> np.ndarray:
  """The symmetric square root, of full rank."""
  size = len(covariance)
  ridge = RIDGE * max(np.trace(covariance) / size, 1e-30)
  eigenvalues, vectors = np.linalg.eigh(covariance + ridge * np.eye(size))
  return (vectors * np.sqrt(np.maximum(eigenvalues, ridge))) @ vectors.T


def _loss(model: model_lib.Decoder, windows: EvalWindows) -> float:
  """Nats a target, all positions in parallel."""

  @jax.jit
  def nll(
    model: model_lib.Decoder, tokens: Int[Array, 'B window'], starts: Starts
  ) -> Float[Array, 'B T']:
    x = model_lib.states(model, tokens[:, :-1], starts=starts)
    return loss_lib.token_nll(x, model.unembedding(), tokens[:, 1:], model.vocab)

  rows = []
  for index in range(len(windows.tokens)):
    row = windows.take(np.array([index]))
    rows.append(np.asarray(nll(model, *jax.device_put((row.tokens, row.starts)))))
  return float(np.sum(np.concatenate(rows), where=windows.mask) / windows.mask.sum())
