"""Pictures: no text on another, none cut off, every arm to be seen; and what they claim is so."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.markers import CARETDOWN, CARETUP
from pictures import covered, faults, texts

from configs import mha_small
from configs.sweeps import frontier as sweep
from mla import cost, plots
from mla.errors import UserError
from mla.plots import labels, panels, styles
from mla.plots.costs import PUBLISHED

ROOT = Path(__file__).parent.parent
SWEEP = json.loads((ROOT / 'results' / 'frontier' / 'frontier.json').read_text())
RUNS = json.loads((ROOT / 'results' / 'small.json').read_text())['runs']


def drawn(draw, *args, size=(8, 5.2)) -> Figure:
  figure = Figure(figsize=size, layout='constrained')
  draw(figure, *args)
  return figure


def told(figure: Figure) -> str:
  return '\n'.join(text for text, _ in texts(figure))


def arm(name: str, attention: str, size: float, loss: float, half: float | None = 0.01, **fields):
  seeds = {} if half is None else {str(seed): loss + half * (seed - 1) for seed in range(3)}
  return {
    **{'arm': name, 'attention': attention, 'latent_dim': fields.get('latent_dim')},
    **{'kv_cache_bytes_per_token': float(size), 'seeds': max(len(seeds), 1), 'mean_loss': loss},
    **{'half_width': half, 'on_frontier': fields.get('on_frontier', 'uncertain'), 'losses': seeds},
  }


def summary(arms: list[dict], spot: str | None = None, undecided=()) -> dict:
  arms = sorted(arms, key=lambda arm: (arm['kv_cache_bytes_per_token'], arm['mean_loss']))
  return {
    'reference': arms[-1]['arm'], 'margin': 0.02, 'arms': arms,
    'sweet_spot': {'arm': spot, 'undecided': list(undecided), 'seeds_in_all': {}},
  }  # fmt: skip


def many(count: int, size=lambda i: 256 * 2 ** (i / 8), name=lambda i, kind: f'{kind}-{i}'):
  rng = np.random.default_rng(0)
  kinds = ['mha', 'gqa', 'mqa', 'mla']
  return [
    arm(
      name(i, kinds[i % 4]), kinds[i % 4], size(i), 1.2 + 0.01 * rng.random(), 0.005,
      latent_dim=2 ** (2 + i % 7) if i % 4 == 3 else None,
      on_frontier=('yes', 'no', 'uncertain')[i % 3],
    )
    for i in range(count)
  ]  # fmt: skip


LONG = 'mqa-with-a-name-nobody-would-give-it-and-more-of-it'
HARD = {
  'the committed sweep': SWEEP,
  'thirty arms': summary(many(30), 'gqa-1'),
  'all of equal bytes': summary(many(12, size=lambda i: 512)),
  'thirty of equal bytes': summary(many(30, size=lambda i: 512)),
  'sizes close to each other': summary(many(16, size=lambda i: 512 + 4 * i), 'mha-0'),
  'no power of two among them': summary(many(8, size=lambda i: 320 + 18 * i), 'mha-0'),
  'large caches': summary(many(12, size=lambda i: 163840 * (1 + i)), None, ['mha-0', 'gqa-1']),
  'long names': summary(
    many(10, name=lambda i, kind: f'{LONG}-{i}'), f'{LONG}-0', [f'{LONG}-{i}' for i in range(4)]
  ),
  'names a sweep makes': summary(
    many(9, name=lambda i, kind: f'attention={kind},num_kv_heads={i},rope_dim=32,head_dim={i}')
  ),
  'one outlier': summary([*many(8), arm('far', 'mla', 300, 3.4, 0.3, latent_dim=2)], 'mha-0'),
  'one outlier below': summary([*many(8), arm('far', 'mla', 300, 0.4, latent_dim=2)], 'far'),
  'one interval without end': summary([*many(8), arm('wide', 'mqa', 700, 1.205, 4.0)]),
  'one arm': summary([arm('mha', 'mha', 2048, 1.2)], 'mha'),
  'no intervals': summary([arm(f'mla-c{c}', 'mla', 8 * c, 1 + 1 / c, None) for c in (4, 8, 16)]),
  'two at one point': summary([*many(4), *(arm(f'gqa-{x}', 'gqa', 512, 1.2) for x in 'ab')]),
  'seeds that failed': summary(
    [{**found, 'failed_seeds': [i] if i % 2 else []} for i, found in enumerate(many(8))], 'mha-0'
  ),
  'variants added since': summary([arm(f'n{i}-a', f'n{i}', 99 * i, 1 + i) for i in range(1, 6)]),
}  # fmt: skip


@pytest.mark.parametrize('draw', [plots.frontier, plots.latent_knob, plots.equal_bytes])
@pytest.mark.parametrize('case', HARD)
def test_no_text_of_a_sweeps_picture_overlaps_or_is_cut_off(draw, case):
  figure = drawn(draw, HARD[case])
  assert faults(figure) == []
  assert covered(figure) == []


def run(attention: str, size: float, perplexity: float, half: float | None = 0.01, **fields):
  return {
    **{'workdir': f'runs/{attention}', 'attention': attention, 'latent_dim': None},
    **{'cache_dtype': 'bfloat16', 'kv_cache_bytes_per_token': size, 'perplexity': perplexity},
    'perplexity_ci95': half and [perplexity - half, perplexity + half],
    **fields,
  }


DTYPES = [
  run
  for name in ('small_float32', 'small', 'small_int8')
  for run in json.loads((ROOT / 'results' / f'{name}.json').read_text())['runs']
]


def insides():
  """What notebooks/inside_a_latent draws, of a model with more layers and heads than ours."""
  rng = np.random.default_rng(0)
  spectra = np.sort(rng.random((8, 64)))[:, ::-1] ** 3
  maps = np.tril(rng.random((6, 8, 40, 40)))
  groups = [{'from': 2**k, 'to': 2 ** (k + 1) - 1, 'loss': 2 + 0.5**k} for k in range(14)]
  costs = {'latent': (1e-4, 2e-5), 'k_rope': (-1e-5, 2e-5), 'latent and k_rope': (9e-5, 3e-5)}
  large = mha_small.get_config()
  large.update({'num_heads': 128, 'head_dim': 128, 'latent_dim': 512, 'rope_dim': 64})
  return {
    'spectra': (plots.spectra, spectra / spectra.sum(1, keepdims=True), list(range(20, 28))),
    'maps': (plots.attention_maps, maps / maps.sum(-1, keepdims=True)),
    'positions': (plots.by_position, groups),
    'one position': (plots.by_position, groups[:2]),
    'int8': (plots.int8_parts, costs),
    'dtypes': (plots.dtypes, DTYPES),
    'one run in two dtypes': (plots.dtypes, [run for run in DTYPES if run['attention'] == 'mla']),
    'absorption': (plots.absorption, large),
  }


@pytest.mark.parametrize('name', insides())
def test_no_text_of_what_looks_inside_overlaps_or_is_cut_off(name):
  draw, *args = insides()[name]
  assert faults(drawn(draw, *args)) == []


def test_a_dtypes_title_is_what_the_results_say():
  title = told(drawn(plots.dtypes, DTYPES))
  worst = max(
    100 * (run['perplexity'] / whole['perplexity'] - 1)
    for run in DTYPES[8:]
    for whole in DTYPES[:4]
    if run['workdir'] == whole['workdir']
  )
  assert f'costs {worst:.3f} % of perplexity at most' in ' '.join(title.split())


RUN_SETS = {
  'the committed runs': RUNS,
  'one run': RUNS[:1],
  'too few windows': [run('mha', 64.0, 3.0, None), run('mqa', 16.0, 3.1, None)],
  'all windows alike': [
    run('mha', 64.0, 3.0, perplexity_ci95=[3.0 - 1e-15, 3.0 - 1e-15]),
    run('mqa', 16.0, 3.0, perplexity_ci95=[3.0 + 1e-15, 3.0 + 1e-15]),
  ],
  'one run given twice': [RUNS[0], RUNS[0]],
  'one run in three dtypes': [
    run('mla', size, 3 + 1e-4 * size, cache_dtype=dtype, latent_dim=32, workdir='runs/' + 'x' * 60)
    for dtype, size in (('float32', 1024.0), ('bfloat16', 512.0), ('int8', 288.0))
  ],
  'twelve of equal bytes': [
    run('mla', 512.0, 3 + 1e-3 * i, latent_dim=32, workdir=f'runs/a_long_name_of_a_run_{i}')
    for i in range(12)
  ],
  'one without measure': [run('mqa', 256.0, 90.0), *RUNS],
  'a probe': [
    run(name, size, 3.0, accuracy=share, accuracy_ci95=[share - 0.01, min(1, share + 0.01)])
    for name, size, share in (('mha', 64.0, 1.0), ('mqa', 16.0, 0.53), ('gqa', 32.0, 0.98))
  ],
}


@pytest.mark.parametrize('case', RUN_SETS)
def test_no_text_of_evals_picture_overlaps_or_is_cut_off(case):
  figure = drawn(plots.perplexity, RUN_SETS[case])
  assert faults(figure) == []
  assert covered(figure) == []


LABELS = {
  'the committed sweep': {arm['arm']: arm['kv_cache_bytes_per_token'] for arm in SWEEP['arms']},
  'thirty arms': {f'mla-c{i}': 1e6 * i for i in range(1, 31)},
  'long names': {f'{LONG}-{i}': 0.1 * i for i in range(1, 9)},
  'one': {'mha': 3.0},
}


@pytest.mark.parametrize('case', LABELS)
@pytest.mark.parametrize('series', [1, 3])
def test_no_text_of_bars_overlaps_or_is_cut_off(case, series):
  values = {f'remat={i}': LABELS[case] for i in range(series)}
  assert faults(drawn(plots.bars, values, 'MiB a batch')) == []


@pytest.mark.parametrize('case', LABELS)
def test_no_text_of_stacks_overlaps_or_is_cut_off(case):
  values = {
    name: {'k': value / 3, 'latent': value / 3, 'elsewhere': value / 3}
    for name, value in LABELS[case].items()
  }
  figure = drawn(plots.stacks, values, 'bytes per token')
  assert faults(figure) == []
  assert {'keys', 'latent', 'elsewhere'} <= set(told(figure).splitlines())


MEMORY = {
  'two coincide': {'mha': 2048, 'gqa': 1024, 'mqa': 512, 'mla': 512},
  'all coincide': dict.fromkeys(('mha', 'gqa', 'mqa', 'mla'), 512),
  'one': {'mla': 512},
  'twelve': {f'mla-c{i}': 8 * (32 + i) for i in range(12)},
}


def memory(size: dict[str, int]) -> Figure:
  sizes = {name: {t: t * size[name] for t in (512, 2048, 8192, 32768)} for name in size}
  return drawn(plots.cache_memory, sizes, size=(8, 7))


@pytest.mark.parametrize('case', MEMORY)
def test_no_text_of_the_memory_overlaps_or_is_cut_off(case):
  figure = memory(MEMORY[case])
  assert faults(figure) == []
  words = told(figure)
  assert all(
    styles.one_line(name) in styles.one_line(words) for name in styles.names(MEMORY[case]).values()
  )


def test_no_line_hides_another():
  """Where MQA and MLA keep the same bytes, pixels of both colours and both markers are seen."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  figure = memory(MEMORY['two coincide'])
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  pixels = np.asarray(canvas.buffer_rgba())
  height = figure.axes[0].bbox.y0
  above = pixels[: int(pixels.shape[0] - height), : int(figure.axes[0].bbox.x1), :3].astype(int)
  for variant in ('mqa', 'mla'):
    colour = [int(styles.STYLES[variant].colour[i : i + 2], 16) for i in (1, 3, 5)]
    seen = (abs(above - colour).max(-1) < 30).sum()
    assert seen > 300, variant


def test_the_check_finds_what_it_looks_for():
  """Overlapping ticks, a title too long, a name on a marker: what the pictures once had."""
  figure = Figure(figsize=(4, 3))
  axes = figure.subplots()
  axes.set_xticks([1, 1.001], ['256', '272'])
  axes.plot([1.0], [1.0], 'o')
  axes.text(1, 1, 'a name', ha='center', va='center')
  axes.set_title('a title that nobody would call short, and that no canvas of four inches holds')
  assert any('256' in fault and '272' in fault for fault in faults(figure))
  assert any('leaves' in fault for fault in faults(figure))
  assert len(covered(figure)) == 1


def test_every_name_finds_a_place_in_the_committed_sweep():
  words = styles.one_line(told(drawn(plots.frontier, SWEEP)))
  for name in styles.names(arm['arm'] for arm in SWEEP['arms']).values():
    assert styles.one_line(name) in words
  assert 'for want of room' not in words


def test_names_left_out_are_counted():
  case = summary(many(40))
  figure = drawn(plots.frontier, case, size=(2.5, 1.5))
  shown = [text for text, _ in texts(figure)]
  names = styles.names(arm['arm'] for arm in case['arms']).values()
  missing = sum(name not in shown for name in names)
  assert missing
  assert f'{missing} names left out' in told(figure)


def test_the_line_goes_through_the_markers():
  """Also where arms of equal bytes stand side by side."""
  figure = drawn(plots.frontier, SWEEP)
  lines = [line for axes in figure.axes for line in axes.get_lines()]
  spots = {tuple(line.get_xydata()[0]) for line in lines if line.get_marker() in [*'s^vo']}
  (line,) = {
    tuple(map(tuple, line.get_xydata())) for line in lines if line.get_drawstyle() == 'steps-post'
  }
  assert len(line) > 3
  assert set(line[:-1]) <= spots  # the last is the end of the axis
  assert [y for _, y in line] == sorted((y for _, y in line), reverse=True)


def test_the_sweep_titles_claim_what_the_sweet_spot_says():
  def title(**changes) -> str:
    figure = drawn(plots.frontier, {**SWEEP, **changes})
    return styles.one_line(figure.get_suptitle())

  spot = {'arm': 'mqa-8-heads-of-16', 'undecided': [], 'seeds_in_all': {}}
  assert title(sweet_spot=spot) == (
    "MQA with 8 heads of 16 keeps 1/8 of MHA's cache, its loss within 0.02 nats"
  )
  assert title(sweet_spot={**spot, 'arm': 'mla-c64'}).startswith('MLA with C=64 keeps 38 %')
  undecided = {**spot, 'arm': None, 'undecided': ['mqa']}
  assert title(sweet_spot=undecided).startswith('Undecided: these seeds cannot tell')
  none = title(sweet_spot={**spot, 'arm': 'mha'})
  assert none == 'No smaller cache is within 0.02 nats of MHA'
  failed = [{**arm, 'failed_seeds': [3]} if arm['arm'] == 'mha' else arm for arm in SWEEP['arms']]
  assert title(sweet_spot=undecided, arms=failed).startswith('Seeds of MHA failed')


def test_the_knobs_title_is_the_last_step_shown_to_gain():
  def title(*highs: float | None) -> str:
    arms = [arm(f'mla-c{2**i}', 'mla', 2**i, 2 - 0.1 * i, latent_dim=2**i) for i in range(4)]
    for narrow, wide, high in zip(arms, arms[1:], highs, strict=False):
      interval = None if high is None else [-1, high]
      step = {'mean': -0.1, 'ci95_simultaneous': interval}
      wide |= {'smaller_latent': narrow['arm'], 'difference_to_smaller_latent': step}
    return drawn(plots.latent_knob, summary(arms)).get_suptitle().replace('\n', ' ')

  assert title(-0.01, -0.01, -0.01) == 'C = 8 lies 0.100 nats below C = 4'
  assert title(-0.01, -0.01, 0.2) == (
    'C = 4 lies 0.100 nats below C = 2; no wider latent is shown to gain more'
  )
  assert title(0.1, 0.2, 0.1).startswith('No wider latent is shown to lose less')
  assert title(None, None, None) == title() == 'Of the latents, C = 8 has the lowest mean loss'


def test_an_arm_without_a_fair_mean_is_starred_and_the_line_passes_it_by():
  arms = [arm(f'mqa-{i}', 'mqa', 64 * 2**i, 1.3 - 0.01 * i) for i in range(4)]
  arms[1] |= {'mean_loss': 1.0, 'failed_seeds': [5]}
  figure = drawn(plots.frontier, summary(arms))
  assert 'MQA 1*' in told(figure).splitlines()
  assert 'no fair mean' in told(figure)
  lines = [line for axes in figure.axes for line in axes.get_lines()]
  heights = {y for line in lines if line.get_drawstyle() == 'steps-post' for y in line.get_ydata()}
  assert heights == {1.3, 1.28, 1.27}


@pytest.mark.parametrize(
  'values, title',
  [
    ({'mha': 8, 'mqa': 1}, 'MQA has the least: 1/8 of MHA'),
    ({'mha': 8, 'mqa': 2, 'mla-c8': 2}, 'MQA and MLA C=8 have the least: 1/4 of MHA'),
    ({'mha': 8, 'gqa': 8}, 'All have the same'),
    ({'mha': 8}, 'MHA: nothing to compare yet'),
  ],
)
def test_the_title_of_bars_is_their_arithmetic(values, title):
  assert drawn(plots.bars, {'cache': values}, 'MiB').get_suptitle() == title
  parts = {name: {'k': value / 2, 'v': value / 2} for name, value in values.items()}
  assert drawn(plots.stacks, parts, 'MiB').get_suptitle() == title


def test_the_title_of_several_series_compares_the_last_with_the_first():
  series = {'none': {'mha': 100, 'mqa': 90}, 'latents': {'mha': 20, 'mqa': 9}}
  assert drawn(plots.bars, series, 'MiB').get_suptitle() == 'latents: 1/10 to 1/5 of none'


def test_an_interval_that_is_cut_off_ends_in_arrows():
  figure = drawn(plots.frontier, HARD['one interval without end'])
  caps = [line.get_marker() for line in figure.axes[0].get_lines()]
  assert caps.count(CARETDOWN) == caps.count(CARETUP) == 1
  low, high = figure.axes[0].get_ylim()
  assert high - low < 0.1


def test_evals_title_is_the_arithmetic_of_its_runs():
  title = drawn(plots.perplexity, [run('mha', 64.0, 3.0), run('mqa', 16.0, 3.06)]).get_suptitle()
  assert title == "MQA keeps 1/4 of MHA's cache at +2.0 % perplexity"


def test_of_probes_evals_picture_shows_accuracy():
  figure = drawn(plots.perplexity, RUN_SETS['a probe'])
  assert figure.get_suptitle() == 'Accuracy through bfloat16 cache'
  low, high = figure.axes[0].get_ylim()
  assert low < 0.53 and 1.0 < high < 1.2
  mixed = [*RUN_SETS['a probe'], run('mla', 8.0, 3.1)]  # of text
  assert 'Accuracy' not in drawn(plots.perplexity, mixed).get_suptitle()


def test_an_outlier_does_not_squash_the_crowd():
  """The crowd has more than half of the height that it has without the outlier."""

  def height(case: list[dict]) -> float:
    figure = drawn(plots.frontier, summary(case))
    axes = panels.panel_of(figure.axes, 1.205)
    ends = axes.transData.transform([(1000, 1.2), (1000, 1.21)])[:, 1]
    return float(ends[1] - ends[0]) / figure.bbox.height

  crowd = many(8)
  for loss in (3.4, 0.4):
    assert height([*crowd, arm('far', 'mla', 300, loss)]) > 0.5 * height(crowd)
  assert len(drawn(plots.frontier, summary(crowd)).axes) == 1


def test_arms_of_equal_bytes_stand_apart_but_never_past_a_neighbour():
  sizes = [256.0, 256.0, 272.0, 272.0, 272.0, 2048.0]
  places = panels.side_by_side(sizes, panels.log_limits(sizes))
  assert len(set(places)) == len(places)
  assert places == sorted(places)


def test_ticks_stand_at_the_sizes():
  figure = drawn(plots.frontier, SWEEP)
  sizes = {arm['kv_cache_bytes_per_token'] for arm in SWEEP['arms']}
  assert set(figure.axes[-1].get_xticks()) == sizes


def test_each_variant_has_a_look_of_its_own():
  looks = styles.styles(['gla', 'mla', 'xyz', 'mha', 'abc'])
  assert list(looks) == ['mha', 'mla', 'abc', 'gla', 'xyz']
  assert len({(look.colour, look.marker) for look in looks.values()}) == 5
  assert looks['gla'].label == 'GLA'
  assert looks['mla'] == plots.style('mla')


def test_names_are_short_and_distinct():
  assert styles.short('mqa-8-heads-of-16') == 'MQA 8 heads of 16'
  assert styles.one_line(styles.short('attention=gqa,num_kv_heads=2')) == 'GQA K=2'
  assert styles.short('latent_dim=16') == 'C=16'
  alike = [f'{LONG}-{i}-{"z" * 40}' for i in range(3)]
  assert len(set(styles.names(alike).values())) == 3
  for name in styles.names([LONG, *(arm['arm'] for arm in SWEEP['arms'])]).values():
    assert all(len(line) <= 20 for line in name.splitlines())


@pytest.mark.parametrize('ratio, words', [(8, '1/8'), (1, '100 %'), (1.9, '53 %'), (2.667, '37 %')])
def test_shares_in_words(ratio, words):
  assert styles.share(1, ratio) == words


def test_published_caches_with_their_sources():
  """DeepSeek-V2's table 1 counts elements: 2 n_g d_h l and (d_c + d_R) l."""
  size = {model.name: model.bytes_per_token for model in PUBLISHED}
  assert size['Llama-3.1-8B'] == 2 * 8 * 128 * 32 * 2 == 128 * 1024
  assert size['Llama-3.1-70B'] == 2.5 * size['Llama-3.1-8B']
  assert size['DeepSeek-V3'] == 576 * 61 * 2 == 70_272
  assert size['DeepSeek-V2'] * 61 == size['DeepSeek-V3'] * 60
  words = styles.one_line(told(memory(MEMORY['one'])))
  for model in PUBLISHED:
    assert model.name in words
    assert 'arXiv' in model.source and model.source in words


def test_labels_at_an_edge_keep_their_order_and_do_not_touch():
  figure = Figure(figsize=(6, 3))
  axes = figure.subplots()
  heights = [0.5, 0.51, 0.49, 0.5, 0.9]
  labels.beside(axes, heights, [f'label {i}' for i in range(5)], ['black'] * 5)
  boxes = {text: box for text, box in texts(figure) if 'label' in text}
  middle = [(boxes[f'label {i}'].y0 + boxes[f'label {i}'].y1) / 2 for i in range(5)]
  assert middle[2] < middle[0] < middle[1] < middle[4]
  assert faults(figure) == []


def test_parts_of_a_cache_are_those_of_its_arrays_and_add_up():
  for arm in SWEEP['arms']:
    config = mha_small.get_config()
    config.update(sweep.get_arms()[arm['arm']])
    parts = cost.cache_parts(config, 257, dtype='bfloat16')
    assert sum(parts.values()) == arm['kv_cache_bytes_per_token']
    if arm['latent_dim']:
      assert parts == {'latent': 8 * arm['latent_dim'], 'k_rope': 8 * 32}


def test_what_mla_costs_more_are_the_scores_over_its_rotary_dims():
  """At equal size the weights of MHA and MLA cost the same; 6 T H R L is the rest."""
  parts = {}
  for name in ('mha', 'mla-c32'):
    (arm,) = (arm for arm in SWEEP['arms'] if arm['arm'] == name)
    config = mha_small.get_config()
    config.update(sweep.get_arms()[name])
    parts[name] = cost.flops_parts(config, 257, arm['flops_per_token'])
    assert sum(parts[name].values()) == pytest.approx(arm['flops_per_token'])
  rest = {name: part.pop('scores and the rest') for name, part in parts.items()}
  assert sum(parts['mla-c32'].values()) == pytest.approx(sum(parts['mha'].values()), rel=1e-2)
  assert rest['mla-c32'] - rest['mha'] == pytest.approx(6 * 256 * 4 * 32 * 4, rel=0.03)


def test_a_picture_is_written_whole_and_follows_no_link(tmp_path):
  path, other = tmp_path / 'a.png', tmp_path / 'mine'
  other.write_text('mine')
  path.symlink_to(other)
  plots.save(plots.frontier, path, SWEEP)
  assert other.read_text() == 'mine'
  assert path.read_bytes().startswith(b'\x89PNG')
  with pytest.raises(UserError, match='cannot be written'):
    plots.save(plots.frontier, tmp_path / 'nowhere' / 'a.png', SWEEP)
  plots.save(plots.bars, tmp_path / 'b.SVG', {'x': {'mha': 1.0}}, 'MiB')
  assert b'<svg' in (tmp_path / 'b.SVG').read_bytes()


def test_a_summary_without_seeds_draws_the_same_arms():
  older = copy.deepcopy(SWEEP)
  for arm in older['arms']:
    arm.pop('losses', None)
  assert 'one seed' not in told(drawn(plots.frontier, older))
  newer = copy.deepcopy(older)
  for arm in newer['arms']:
    arm['losses'] = {'0': arm['mean_loss'] + 0.01, '1': arm['mean_loss'] - 0.01}
  assert 'one seed' in told(drawn(plots.frontier, newer))


def test_cuts_claim_what_each_method_loses():
  rows = [
    {'trial': trial, 'method': method, 'bytes_per_token': size, 'loss': 1.2 + more * (lost + noise)}
    for trial, noise in (('a', 0.01), ('b', -0.01))
    for method, lost in (('turned', 0.5), ('uniform', 0.02), ('by layer', 0.1))
    for size, more in ((768, 0), (320, 1))
  ]
  figure = drawn(plots.cuts, rows, ['turned', 'uniform'])
  assert not faults(figure)
  assert 'axes and cut: +0.500; nested, one width: +0.020' in told(figure).replace('\n', ' ')
  assert 'a width a layer' not in told(figure)
