"""The tables of a sweep's report, from frontier.summarise's summary."""

from collections.abc import Mapping, Sequence
from typing import Any

from mla.tables import CONTEXT, GIB, MIB, Table


def tables(summary: Mapping[str, Any]) -> list[Table]:
  """The report's tables, the frontier first; one without rows says why in its note."""
  return [
    Table(
      'The frontier',
      'On it: no arm of as few bytes has a lower loss. *yes*: better than each of them; *no*: '
      'worse than some; *uncertain*: the data cannot tell. The verdicts hold with 95 % '
      'confidence, simultaneously. The smallest arm has no rival.',
      *frontier_rows(summary),
    ),
    *([recall_table(summary)] if 'probe' in summary else []),
    _equal_bytes(summary),
    _latents(summary),
    _compute(summary),
    _training_memory(summary),
    _inference_memory(summary),
  ]


def _number(value: float | None, form: str = '.4f') -> str:
  return '-' if value is None else format(value, form)


def _interval(d: Mapping[str, Any] | None, which: str) -> str:
  """A difference with its interval `which`."""
  if d is None:
    return '-'
  if d[which] is None:
    return f'{d["mean"]:+.4f}'
  return f'{d["mean"]:+.4f} ({d[which][0]:+.4f} to {d[which][1]:+.4f})'


def finished(arm: Mapping[str, Any]) -> str:
  """How many of the seeds that judge an arm finished."""
  finished = 0 if arm['tuned_on_itself'] else arm['seeds']
  failed = len(arm['failed_seeds'])
  return f'{finished} of {finished + failed}' if failed else str(finished)


def _loss(arm: Mapping[str, Any]) -> str:
  star = '*' if arm['failed_seeds'] or arm['tuned_on_itself'] else ''
  return f'{arm["mean_loss"]:.4f}{star}'


def frontier_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  heads = [
    'arm',
    'bytes/token',
    'loss',
    '+/- (95 %, two-sided)',
    'seeds',
    'learning rate',
    'd (95 %, two-sided)',
    'd at most (95 %, one-sided, simultaneous)',
    'text +/- (95 %, two-sided)',
    'on frontier',
  ]
  rows = [
    [
      arm['arm'],
      f'{arm["kv_cache_bytes_per_token"]:,.0f}',
      _loss(arm),
      _number(arm['half_width']),
      finished(arm),
      f'{arm["learning_rate"]:g}',
      _interval(arm['difference'], 'ci95'),
      _number((arm['difference'] or {}).get('one_sided_upper_95_simultaneous'), '+.4f'),
      _number(arm['difference_windows_half_width']),
      arm['on_frontier'],
    ]
    for arm in summary['arms']
  ]
  return heads, rows


def _equal_bytes(summary: Mapping[str, Any]) -> Table:
  """Arms of the same bytes beside each other, the best first: fewer heads, or a latent?"""
  rows = []
  for size in sorted({arm['kv_cache_bytes_per_token'] for arm in summary['arms']}):
    group = [arm for arm in summary['arms'] if arm['kv_cache_bytes_per_token'] == size]
    group.sort(key=lambda arm: bool(arm['failed_seeds']))
    for arm in group if len(group) > 1 else []:
      rows.append([
        f'{size:,.0f}',
        arm['arm'],
        _loss(arm),
        _number(arm['half_width']),
        _interval(arm['difference_at_equal_bytes'], 'ci95_simultaneous'),
      ])  # fmt: skip
  pairs = summary['pairs_at_equal_bytes']
  heads = ['bytes/token', 'arm', 'loss', '+/- (95 %, two-sided)', _simultaneous('the best', pairs)]
  return Table('At equal bytes', '' if rows else 'No two arms have the same bytes.', heads, rows)


def recall_table(summary: Mapping[str, Any]) -> Table:
  """A probe's accuracy: of each arm, and against the best of as many bytes."""
  probe = summary['probe']
  values = f'{probe["attributes"]} value{"s"[: probe["attributes"] - 1]}'
  note = (
    f'{probe["task"]}: {probe["records"]} records of {values} of {probe["alphabet"]}, '
    f'{probe["bits_held"]:,.0f} bits a window; guessing is right with {probe["guessing"]:.4f}. '
    '*bits* are those of a window that come back (mla/probes.py).'
  )
  rows = []
  for arm in summary['arms']:
    found = arm['recall']
    d, half = found['difference_at_equal_bytes'], found['half_width_at_equal_bytes']
    against = (
      '-' if d is None else f'{d:+.4f} +/- {_number(half)} to {found["best_of_equal_bytes"]}'
    )
    rows.append([
      arm['arm'],
      f'{arm["kv_cache_bytes_per_token"]:,.0f}',
      f'{found["mean_accuracy"]:.4f}',
      _number(found['half_width']),
      f'{found["bits_recalled"]:,.1f}',
      against,
    ])  # fmt: skip
  pairs = summary['arms'][0]['recall']['pairs_at_equal_bytes']
  to = _simultaneous('the best of as many bytes', pairs)
  heads = ['arm', 'bytes/token', 'accuracy', '+/- (95 %, two-sided)', 'bits', to]
  return Table('Recall', note, heads, rows)


def caches_table(probe: str, rows: Sequence[Mapping[str, Any]]) -> Table:
  """What recall.through tells of a sweep's trials through two caches."""
  usual, cache = rows[0]['bytes']
  told = [
    [
      row['arm'],
      str(row['trials']),
      *(f'{row["bytes"][name]:,.0f}' for name in (usual, cache)),
      *(f'{row["accuracy"][name]:.4f}' for name in (usual, cache)),
      f'{row["difference"]:+.4f}',
      _number(row['half_width']),
    ]
    for row in rows
  ]
  heads = ['arm', 'trials', f'{usual}, bytes', f'{cache}, bytes', usual, cache, 'difference', '+/-']
  note = f'{probe}: accuracy through {usual} and {cache}, of the same weights.'
  return Table('Two caches', note, heads, told)


def _latents(summary: Mapping[str, Any]) -> Table:
  arms = [arm for arm in summary['arms'] if arm['latent_dim']]
  if len(arms) < 2:
    return Table('latent_dim as the knob', 'Fewer than two latents in this sweep.', [], [])
  nested = {arm['prefix_of'] for arm in arms if 'prefix_of' in arm}

  def place(arm: Mapping[str, Any]) -> tuple:
    # Those that failed last: no difference is taken to them. Each nested run's widths together.
    run = arm.get('prefix_of', arm['arm'] if arm['arm'] in nested else '')
    return bool(arm['failed_seeds']), run, arm['latent_dim'], arm['kv_cache_bytes_per_token']

  arms = sorted(arms, key=place)
  rows = [
    [
      str(arm['latent_dim']),
      arm['arm'],
      f'{arm["kv_cache_bytes_per_token"]:,.0f}',
      _loss(arm),
      _number(arm['half_width']),
      _interval(arm['difference_to_smaller_latent'], 'ci95_simultaneous'),
    ]
    for arm in arms
  ]
  to = _simultaneous('the row above', summary['latent_steps'])
  heads = ['latent_dim', 'arm', 'bytes/token', 'loss', '+/- (95 %, two-sided)', to]
  return Table('latent_dim as the knob', narrowest(summary), heads, rows)


def narrowest(summary: Mapping[str, Any]) -> str:
  """How small the latent may be, by the bounds against the reference and the steps between them."""
  arms = sorted(
    (arm for arm in summary['arms'] if arm['latent_dim'] and not arm['failed_seeds']),
    key=lambda arm: (arm['latent_dim'], arm['kv_cache_bytes_per_token']),
  )
  sides: dict[str, list[str]] = {'within': [], 'beyond': [], 'undecided': []}
  for arm in arms:
    d = arm['difference'] or {}
    low, high = (d.get(f'one_sided_{end}_95_simultaneous') for end in ('lower', 'upper'))
    if low is not None and high is not None:  # it saves something, and seeds say how sure we are
      within, beyond = high <= summary['margin'], low > summary['margin']
      side = 'within' if within else 'beyond' if beyond else 'undecided'
      sides[side].append(_latent_name(arm, arms))
  if not any(sides.values()):
    return 'How small the latent may be cannot be told from these results.'
  where = f'{summary["margin"]} nats of {summary["reference"]}'
  text = (
    f'Shown to be within {where}: {_listed(sides["within"]) or "no latent"}; shown not to be: '
    f'{_listed(sides["beyond"]) or "none"}; undecided: {_listed(sides["undecided"]) or "none"} '
    '(one-sided 95 %, simultaneous).'
  )
  of_name = {arm['arm']: arm for arm in arms}
  gains, losses = [], []
  for arm in arms:
    bounds = (arm['difference_to_smaller_latent'] or {}).get('ci95_simultaneous')
    if bounds:
      smaller = of_name[arm['smaller_latent']]
      step = f'{_latent_name(smaller, arms)} to {_latent_name(arm, arms)}'
      gains += [step] if bounds[1] < 0 else []
      losses += [step] if bounds[0] > 0 else []
  shown = [
    f'a {what} is shown from {_listed(steps)}'
    for what, steps in (('gain', gains), ('loss', losses))
    if steps
  ]
  return (
    f'{text} Of the steps to the next wider latent, '
    f'{", and ".join(shown) or "none is shown to matter"} '
    '(two-sided 95 %, simultaneous).'
  )


def _latent_name(arm: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> str:
  """'C = 16', where there is one arm of that width."""
  alone = sum(other['latent_dim'] == arm['latent_dim'] for other in arms) == 1
  return f'C = {arm["latent_dim"]}' if alone else arm['arm']


def _listed(texts: Sequence[str]) -> str:
  return ' and '.join([', '.join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _simultaneous(other: str, pairs: int) -> str:
  return f'difference to {other} (95 %, two-sided, simultaneous over {pairs} pairs)'


def _trained(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """The arms that were trained: not the prefixes of a nested latent, which is one run."""
  return [arm for arm in summary['arms'] if 'prefix_of' not in arm]


def _compute(summary: Mapping[str, Any]) -> Table:
  reference = next(arm for arm in summary['arms'] if arm['arm'] == summary['reference'])
  base = reference['flops_per_token']
  rows = []
  for arm in _trained(summary):
    flops = arm['flops_per_token']
    rows.append([
      arm['arm'],
      f'{arm["params_non_embedding"]:,}',
      _number(flops and flops / 1e6, '.2f'),
      _number(flops / base if flops and base else None, '.3f'),
      _number(arm['tokens_per_second'], ',.0f'),
    ])  # fmt: skip
  heads = [
    'arm',
    'non-embedding parameters',
    'MFLOPs/token',
    f'of {summary["reference"]}',
    'tokens/s',
  ]
  return Table(
    'Training compute',
    "FLOPs a token: XLA's count of the compiled training step (mla/cost.py), attention as a whole "
    'square. Tokens a second: median of the log lines, on whatever machine the sweep ran, beside '
    'whatever else it ran; for a speed ratio measured side by side see bench/.',
    heads,
    rows,
  )


def _training_memory(summary: Mapping[str, Any]) -> Table:
  rows = []
  for arm in _trained(summary):
    memory = arm['training_memory']
    rows.append([
      arm['arm'],
      *(
        _number(memory and memory[remat][what] / MIB, '.1f')
        for what in ('activation_bytes', 'peak_bytes')
        for remat in ('none', 'latents')
      ),
    ])  # fmt: skip
  heads = [
    'arm',
    'activations, MiB',
    'with remat=latents',
    'peak, MiB',
    'with remat=latents',
  ]
  return Table(
    'Training memory',
    'Peak: arguments (weights, optimiser, batch) and working memory of the compiled step. '
    'Activations: what the forward pass keeps for the backward pass, as JAX writes the program '
    'down. The compiler then keeps less of it: what two operations need is kept once, what is '
    'cheap is computed again where it is needed, and what has been used makes room. So the '
    'activations may be more than the peak, which holds what is left of them and the rest. With '
    '`remat=latents` only what the cache would keep is kept.',
    heads,
    rows,
  )


def _inference_memory(summary: Mapping[str, Any]) -> Table:
  rows = []
  for arm in summary['arms']:
    size = arm['kv_cache_bytes_per_token']
    rows.append([
      arm['arm'],
      f'{size:,.0f}',
      *(
        f'{batch * context * size / MIB:,.1f}'
        for batch, context in ((1, 1024), (1, CONTEXT), (32, CONTEXT))
      ),
      f'{GIB / (size * CONTEXT):,.0f}',
    ])  # fmt: skip
  heads = 'arm, bytes/token, MiB at 1 x 1k, at 1 x 8k, at 32 x 8k, users/GiB'.split(', ')
  return Table(
    'Inference memory',
    f'Bytes of a {summary["cache_dtype"]} cache; users are conversations of {CONTEXT:,} tokens.',
    heads,
    rows,
  )
