'use strict';
// Shows what contents.py made: names are only ever set as text, and no figure is computed here.
const contents = JSON.parse(document.getElementById('contents').textContent);
const find = (id) => document.getElementById(id);
const arms = new Map(contents.arms.map((arm) => [arm.arm, arm]));
const looks = {
  displaylogo: false,
  responsive: true,
  modeBarButtons: [['toImage', 'zoom2d', 'pan2d', 'zoomIn2d', 'zoomOut2d', 'autoScale2d', 'resetScale2d']],
};

function element(tag, text = '', parent = null) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// The margin: which sweet spot each one gives is told beforehand, by mla/sweep/frontier.py's rule.
function setMargin(index) {
  const spot = contents.spots[index];
  find('nats').textContent = spot.margin_text;
  find('verdict').textContent = spot.verdict;
  Plotly.restyle('frontier', { x: [spot.ring.x], y: [spot.ring.y] }, [contents.ring]);
  Plotly.relayout('frontier', { 'shapes[0].y1': spot.band });
  for (const row of document.querySelectorAll('#tables tr[data-arm]')) {
    row.classList.toggle('spot', row.dataset.arm === spot.arm);
  }
}

// One arm: its figures, the command that trains it, its curves.
function choose(name) {
  const arm = arms.get(name);
  find('arm').value = name;
  find('figures').textContent = arm.figures;
  find('command').replaceChildren();
  for (const word of arm.command) {
    element('span', word, find('command'));
    find('command').append(' '); // the one place where a line may break
  }
  find('seeds').textContent = arm.remark;
  find('curves').hidden = !arm.curves.length; // before it is drawn, or it has no width
  if (arm.curves.length) Plotly.react('curves', arm.curves, contents.curves_layout, looks);
  for (const row of document.querySelectorAll('#tables tr[data-arm]')) {
    row.classList.toggle('chosen', row.dataset.arm === name);
  }
}

function makeTable(table) {
  element('h2', table.title, find('tables'));
  if (table.note) element('p', table.note, find('tables')).className = 'note';
  if (!table.rows.length) return;
  const box = element('div', '', find('tables'));
  box.className = 'scroll';
  const made = element('table', '', box);
  const heads = element('tr', '', element('thead', '', made));
  const body = element('tbody', '', made);
  table.heads.forEach((text, column) => {
    const head = element('th', '', heads);
    head.scope = 'col';
    element('button', text, head).addEventListener('click', () => sort(heads, body, head, column));
  });
  for (const row of table.rows) {
    const line = element('tr', '', body);
    line.dataset.arm = row.arm;
    row.cells.forEach((text, column) => {
      const cell = element('td', text, line);
      cell.dataset.value = row.values[column] ?? '';
      if (typeof row.values[column] === 'string') cell.className = 'words';
    });
  }
}

// Numbers by size, words by letters, what has no value last either way.
function sort(heads, body, head, column) {
  const down = head.ariaSort === 'ascending';
  for (const other of heads.children) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const value = (row) => row.children[column].dataset.value;
  const compare = (a, b) => {
    if (a === '' || b === '') return (a === '') - (b === '');
    const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    return down ? -order : order;
  };
  body.append(...[...body.children].sort((a, b) => compare(value(a), value(b))));
}

find('about').textContent = contents.about;
find('hint').textContent = contents.hint;
if (contents.warnings.length) {
  find('warnings').firstChild.textContent = `${contents.warnings.length} to know before you believe it`;
  for (const warning of contents.warnings) element('li', warning, find('warnings').lastChild);
} else {
  find('warnings').remove();
}
contents.tables.forEach(makeTable);
for (const name of arms.keys()) element('option', name, find('arm')).value = name;
find('arm').addEventListener('change', (event) => choose(event.target.value));
Plotly.newPlot('frontier', contents.traces, contents.layout, looks);
find('frontier').on('plotly_click', (event) => {
  const name = event.points[0].customdata;
  if (name) choose(name);
});
find('margin').max = contents.spots.length - 1;
find('margin').value = contents.start;
find('margin').addEventListener('input', (event) => setMargin(Number(event.target.value)));
setMargin(contents.start);
choose(contents.chosen);
