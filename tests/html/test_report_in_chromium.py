"""report.html in a real Chromium without a network: hover, legend, slider, sorting, curves.

Needs the browser and its driver (Debian: apt-get install chromium chromium-driver); without them
all of it fails, for `make test-html` is what was asked for. CHROMIUM and CHROMEDRIVER may name
them; SCREENSHOT=F.png keeps a picture.
"""

import json
import os
import shutil
import time
from pathlib import Path

import plotly.graph_objects as go
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from sweeps import made_up_sweep

from configs import base
from mla import config as config_lib
from mla.sweep import frontier, page, report, results

ARMS = ('mha', 'mqa', 'c8', 'c4', HOSTILE := '<img src=x onerror="document.title=1">')


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  found = made_up_sweep(tmp_path_factory.mktemp('sweep'), {HOSTILE: ('gqa', 24.0, 1.25)})
  for text in (found / 'results.jsonl').read_text().splitlines():
    path = found / 'trials' / json.loads(text)['trial']
    path.mkdir(parents=True)
    lines = [{'step': step, 'loss': 2 + 1 / step} for step in range(1, 400)]
    lines.append({'step': 400, 'eval_loss': 2.0})
    (path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
  report.write(found)
  told = page.write(found, config_lib.flatten(base.get_config()))
  assert told.startswith('written'), told
  return found


@pytest.fixture(scope='module')
def browser():
  options = webdriver.ChromeOptions()
  for flag in ('headless=new', 'no-sandbox', 'disable-gpu', 'window-size=1100,1600'):
    options.add_argument(f'--{flag}')
  options.binary_location = os.environ.get('CHROMIUM') or shutil.which('chromium') or ''
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
  driver = os.environ.get('CHROMEDRIVER') or shutil.which('chromedriver')
  if not options.binary_location or not driver:
    pytest.fail('no Chromium: apt-get install chromium chromium-driver, or name them')
  found = webdriver.Chrome(options, webdriver.ChromeService(driver))
  yield found
  found.quit()


@pytest.fixture
def shown(browser, folder):
  browser.get((folder / page.NAME).as_uri())
  wait(browser, 'return document.querySelectorAll("#frontier .scatterlayer .trace").length > 0')
  return browser


def wait(browser, script: str):
  """What the script returns, as soon as it is true."""
  for _ in range(100):
    found = browser.execute_script(script)
    if found:
      return found
    time.sleep(0.1)
  raise AssertionError(f'never true: {script}')


def marker(browser, arm: str):
  """Where an arm's marker is in the window: x, y."""
  return browser.execute_script(
    """
    const plot = document.getElementById('frontier');
    plot.scrollIntoView();
    const trace = plot.data.find((t) => t.error_y && t.customdata.includes(arguments[0]));
    const index = trace.customdata.indexOf(arguments[0]);
    const box = plot.getBoundingClientRect(), layout = plot._fullLayout;
    const y = layout.yaxis._offset + layout.yaxis.d2p(trace.y[index]);
    return [box.x + layout.xaxis._offset + layout.xaxis.d2p(trace.x[index]), box.y + y];
    """,
    arm,
  )


def point_at(browser, arm: str, click: bool = False) -> None:
  x, y = (round(place) for place in marker(browser, arm))
  actions = ActionChains(browser)
  actions.w3c_actions.pointer_action.move_to_location(x - 40, y - 40)
  actions.w3c_actions.pointer_action.move_to_location(x, y)
  if click:
    actions.w3c_actions.pointer_action.click()
  actions.perform()


def summary(folder: Path) -> dict:
  return json.loads((folder / 'frontier.json').read_text())


@pytest.mark.parametrize('name', ARMS)
def test_pointing_at_an_arm_tells_all_of_it(shown, folder, name):
  (arm,) = [arm for arm in summary(folder)['arms'] if arm['arm'] == name]
  point_at(shown, name)
  told = wait(shown, 'return document.querySelector("#frontier .hoverlayer")?.textContent')
  assert name in told
  assert f'{arm["mean_loss"]:.4f}' in told
  assert '{:.4f} to {:.4f}'.format(*arm['ci95']) in told
  assert f'{arm["kv_cache_bytes_per_token"]:,.0f} bytes' in told
  assert f'learning rate {arm["learning_rate"]:g}' in told
  assert ', '.join(arm['losses']) in told
  assert 'python train.py --config=' in told


def test_the_legend_hides_a_family_and_its_seeds(shown):
  seen = "return document.getElementById('frontier')._fullData.filter(t => t.legendgroup == 'mla')"
  visible = seen + '.map(t => t.visible)'
  assert shown.execute_script(visible) == [True, True]
  drawn = 'return document.querySelectorAll("#frontier .scatterlayer .point").length'
  before = shown.execute_script(drawn)
  (entry,) = [
    item
    for item in shown.find_elements(By.CSS_SELECTOR, '#frontier .legend .traces')
    if item.text == 'MLA'
  ]
  entry.find_element(By.CSS_SELECTOR, '.legendtoggle').click()
  wait(shown, visible + ".every(v => v == 'legendonly')")
  wait(shown, f'{drawn} == {before - 2 * (1 + 3)}')  # two arms of three seeds each
  entry = shown.find_elements(By.CSS_SELECTOR, '#frontier .legend .traces')
  [item for item in entry if item.text == 'MLA'][0].find_element(
    By.CSS_SELECTOR, '.legendtoggle'
  ).click()
  wait(shown, visible + '.every(v => v === true)')


def test_the_slider_moves_the_sweet_spot_by_the_rule_of_python(shown, folder):
  found = set()
  for index in range(int(shown.find_element(By.ID, 'margin').get_attribute('max')) + 1):
    shown.execute_script(
      """
      const slider = document.getElementById('margin');
      slider.value = arguments[0];
      slider.dispatchEvent(new Event('input'));
      """,
      index,
    )
    margin = float(shown.find_element(By.ID, 'nats').text)
    there = summary(folder)
    spot = frontier.sweet_spot_at(there, margin)
    told = report.verdict({**there, 'margin': margin, 'sweet_spot': spot})
    assert shown.find_element(By.ID, 'verdict').text == told
    ring = shown.execute_script("return document.getElementById('frontier').data.at(-1)")
    losses = [arm['mean_loss'] for arm in there['arms'] if arm['arm'] == spot['arm']]
    assert ring['y'] == losses
    marked = {row.get_attribute('data-arm') for row in rows(shown, '.spot')}
    assert marked == ({spot['arm']} if spot['arm'] else set())
    found.add(spot['arm'])
  assert len(found) > 2


def rows(browser, which: str = ''):
  return browser.find_elements(By.CSS_SELECTOR, f'#tables tbody tr{which}')


def test_the_arrow_keys_move_the_slider(shown):
  slider = shown.find_element(By.ID, 'margin')
  before = shown.find_element(By.ID, 'nats').text
  slider.send_keys('\ue014')  # right
  assert float(shown.find_element(By.ID, 'nats').text) > float(before)


def test_a_click_sorts_a_table_and_another_turns_it_around(shown):
  table = shown.find_element(By.CSS_SELECTOR, '#tables table')

  def column(number: int) -> list[str]:
    cells = f'tbody td:nth-child({number})'
    return [cell.text for cell in table.find_elements(By.CSS_SELECTOR, cells)]

  for number, key in ((1, str.casefold), (3, float)):
    head = table.find_element(By.CSS_SELECTOR, f'th:nth-child({number})')
    button = head.find_element(By.TAG_NAME, 'button')
    button.click()
    assert head.get_attribute('aria-sort') == 'ascending'
    assert column(number) == sorted(column(number), key=key)
    button.click()
    assert head.get_attribute('aria-sort') == 'descending'
    assert column(number) == sorted(column(number), key=key, reverse=True)
  head = table.find_element(By.CSS_SELECTOR, 'th:nth-child(7)')  # differences: the reference none
  for _ in range(2):
    head.find_element(By.TAG_NAME, 'button').click()
    assert column(7)[-1] == '-' and column(7).count('-') == 1


def test_a_click_on_an_arm_shows_its_command_and_curves(shown, folder):
  point_at(shown, 'mqa', click=True)
  wait(shown, "return document.getElementById('command').textContent.includes('attention=mqa')")
  width = "return document.querySelector('#curves .main-svg').getBoundingClientRect().width"
  assert wait(shown, width) > 700
  drawn = wait(shown, "return document.getElementById('curves').data?.map(t => t.name)")
  assert drawn == [f'seed {n}, {what}' for n in (0, 1, 2) for what in ('training', 'validation')]
  shown.execute_script('document.getElementById("arm").scrollIntoView()')
  assert shown.find_elements(By.CSS_SELECTOR, '#curves .scatterlayer .trace')


def test_plotly_knows_all_that_is_said_to_it(folder):
  """graph_objects raises for a property that does not exist, which JavaScript would pass over."""
  lines = results.read_lines(folder / 'results.jsonl')
  shown = page.contents(folder, summary(folder), lines, config_lib.flatten(base.get_config()))
  go.Figure({'data': shown['traces'], 'layout': shown['layout']})
  for arm in shown['arms']:
    go.Figure({'data': arm['curves'], 'layout': shown['curves_layout']})


def test_names_stay_text(shown):
  assert shown.title == 'Sweep report'
  assert HOSTILE in shown.find_element(By.ID, 'tables').text
  assert not shown.find_elements(By.TAG_NAME, 'img')


def test_nothing_is_asked_of_a_network_and_nothing_complains(browser, folder):
  for kind in ('browser', 'performance'):
    browser.get_log(kind)  # of before
  browser.get((folder / page.NAME).as_uri())
  wait(browser, 'return document.querySelectorAll("#frontier .scatterlayer .trace").length > 0')
  point_at(browser, 'mqa', click=True)
  events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
  asked = [
    event['params']['request']['url']
    for event in events
    if event['method'] == 'Network.requestWillBeSent'
  ]
  assert [url for url in asked if not url.startswith(('file:', 'data:', 'blob:'))] == []
  assert any(url.startswith('file:') for url in asked)  # the page itself: the log works
  assert browser.get_log('browser') == []
  picture = os.environ.get('SCREENSHOT')
  if picture:
    browser.execute_script('window.scrollTo(0, 0)')
    browser.save_screenshot(picture)
