"""The report on a run, or a tree of runs: what stands in it, where points lie, and that a browser shows it."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama2_jax.config import UserError
from llama2_jax.report import charts, markdown
from llama2_jax.report.curves import by_count, calibration, curves, plane
from llama2_jax.report.page import write_report
from llama2_jax.report.runs import answers, find_runs, sections

ROOT = Path(__file__).parents[2]
SAMPLES = """The first dialog; marked tokens are trained.

<pre>&lt;s&gt; [INST] Who? [/INST]<mark> Me &lt;/s&gt;</mark></pre>

<!-- step 10 -->
## Step 10

**Who has a pig?**

> Nobody.

<!-- step 20 -->
## Step 20

**Who has a pig?**

> Mira <script>alert(1)</script>
> has.

"""
TABLE = """<!-- step 4 -->
## Step 4

| prompt | answer | helpfulness |
|---|---|---|
| Who has a pig? | Mira &lt;b&gt; has. | 0.91 |
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


@pytest.fixture
def tree(tmp_path):
    """What a demo leaves: pretraining, fine-tuning, PPO, and a summary."""
    root = tmp_path / 'demo'
    lines = [{'step': s, 'tokens': s * 8, 'loss': 5 / s, 'learning_rate': 0.1, 'tokens_per_second': 1234.5} for s in range(1, 51)]
    lines[-1] |= {'heldout/loss': 0.25, 'heldout/toy:letters/loss': 0.5, 'seconds': 90.0}
    write(root / 'sft' / 'metrics.jsonl', '\n'.join(map(json.dumps, lines)) + '\n{"step": 5')
    write(root / 'sft' / 'samples.md', SAMPLES)
    write(root / 'sft' / 'config.json', {'init_from': 'demo/pretrain/model', 'note': '</pre><script>'})
    write(root / 'sft' / 'model' / 'config.json', {'provenance': {'stage': 'sft', 'parent': 'demo/pretrain/model', 'step': 50}})
    write(root / 'sft' / 'checkpoints' / '20' / 'metrics.jsonl', 'not ours')
    lines = [{'step': s, 'score': s / 10, 'kl': s / 2, 'policy/loss': None, 'heldout/judge': 0.5} for s in range(1, 5)]
    write(root / 'ppo' / 'metrics.jsonl', '\n'.join(map(json.dumps, lines)) + '\n')
    write(root / 'ppo' / 'samples.md', TABLE)
    versions = [
        {'version': 'base', 'helpfulness': 0.2, 'harmlessness': 0.4},
        {'version': 'SFT', 'helpfulness': 0.7, 'harmlessness': 0.6},
    ]
    write(root / 'summary.json', versions)
    write(root / 'broken.json', '{"half": ')
    return root


def test_a_tree_in_one_file(tree):
    path = write_report(str(tree))
    text = path.read_text()
    assert path == tree / 'report.html' and len(text) < 100_000
    assert not re.search(r'(?:src|href)="(?!#|data:)', text) and 'http' not in text.replace('http://www.w3.org/2000/svg', '')
    assert re.findall(r'<h2>(.*?)</h2>', text) == ['Side by side', 'demo', 'sft', 'ppo']
    for figure in (
        '<b>50</b><span>steps',
        '<b>0.1</b><span>loss',
        '<b>0.25</b><span>heldout/<wbr>loss',
        '<b>1.5 min</b>',
        '<b>1,234</b>',
    ):
        assert figure in text, figure
    for title in ('Loss', 'Learning rate', 'Tokens a second', 'Reward against KL', 'summary: helpfulness and harmlessness'):
        assert f'<figcaption>{title}</figcaption>' in text
    assert 'pretrain/model → <b>sft</b>' in text and 'jax 0.' in text
    assert '<td>Mira &lt;script&gt;alert(1)&lt;/script&gt;\nhas.</td>' in text
    assert '[/INST]<mark> Me &lt;/s&gt;</mark></pre>' in text and '&lt;/pre&gt;&lt;script&gt;' in text
    assert text.count('<script>') == 1
    write_report(str(tree / 'ppo'), str(tree / 'deep' / 'one.html'))
    assert 'Side by side' not in (tree / 'deep' / 'one.html').read_text()


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match=r'^--workdir=gs://bucket/run lies in a bucket: copy it'):
        write_report('gs://bucket/run')
    with pytest.raises(UserError, match='is no directory'):
        write_report(str(tmp_path / 'none'))
    with pytest.raises(UserError, match='There is nothing to report in'):
        write_report(str(tmp_path))
    (tmp_path / 'file').write_text('')
    write(tmp_path / 'a.json', {'x': 1})
    with pytest.raises(UserError, match=r'file/r.html cannot be written: '):
        write_report(str(tmp_path), str(tmp_path / 'file' / 'r.html'))


def test_runs_and_their_samples(tree):
    runs = find_runs(tree)
    assert [(run.name, run.stage) for run in runs] == [('', 'run'), ('sft', 'sft'), ('ppo', 'ppo')]
    assert len(runs[1].metrics) == 50 and runs[1].last('heldout/loss') == 0.25 and runs[1].last('none') is None
    assert list(runs[0].tables) == ['summary']
    parts = sections(SAMPLES)
    assert [step for step, _ in parts] == [-1, 10, 20]
    assert answers(parts[1][1]) == {'Who has a pig?': 'Nobody.'}
    assert answers(TABLE) == {'Who has a pig?': 'Mira &lt;b&gt; has.'}


def test_points_lie_where_they_should():
    drawn = charts.chart('Loss', [charts.Series('loss', [(0, 2.0), (10, 4.0)])])
    # y runs from 1.9 to 4.1 over the 194 units between 206 and 12, x from 0 to 10 over 356 from 52 on.
    assert 'd="M52.0,197.2 L408.0,20.8"' in drawn
    assert re.findall(r'text-anchor="end">(.*?)<', drawn) == ['2', '2.5', '3', '3.5', '4']
    assert 'class="keys"' not in drawn and charts.chart('Empty', [charts.Series('a', [])]) == ''
    data = json.loads(html.unescape(re.search(r'data-chart="(.*?)"', drawn)[1]))
    assert data == {'x': 'step', 'from': 0, 'to': 10, 'series': [{'name': 'loss', 'points': [[0, 2], [10, 4]]}]}


def test_small_parts():
    assert charts.ticks(0.03, 0.92) == [0.2, 0.4, 0.6, 0.8] and charts.ticks(3, 3.1) == [3, 3.025, 3.05, 3.075, 3.1]
    assert [charts.short(value) for value in (0, 12_000, 2_500_000, 0.35, 0.00004)] == ['0', '12k', '2.5M', '0.35', '4e-05']
    assert charts.downsample([(i, i) for i in range(1000)], 3) == [(0, 0), (500, 500), (999, 999)]
    assert charts.smooth([(0, 1.0), (1, 1.0)]) == [(0, 1.0), (1, 1.0)]
    assert markdown.render('# A\n\n- **b** `c`\n\n> d\n> <e>') == (
        '<h4>A</h4><ul><li><strong>b</strong> <code>c</code></li></ul><blockquote>d<br>&lt;e&gt;</blockquote>'
    )
    results = {'accuracy': 0.5, 'mmlu': {'n': 3, 'score': 0.1}, 'arc': {'n': 4, 'score': 0.2}, 'bins': [{'a': {'b': 1}}]}
    assert list(markdown.tables_of('e', results)) == [
        ('e', [{'': 'mmlu', 'n': 3, 'score': 0.1}, {'': 'arc', 'n': 4, 'score': 0.2}]),
        ('e · bins', [{'a/b': 1}]),
        ('e', [{'': 'accuracy', 'value': 0.5}]),
    ]


def test_charts_of_figures_and_tables():
    drawn = curves([{'step': 1, 'heldout/accuracy/better': 1.0, 'odd': 2}])
    assert [re.search('<figcaption>(.*?)<', each)[1] for each in drawn] == ['Accuracy', 'odd']
    rows = [{'predicted': 0.9, 'observed': 0.8}, {'predicted': 0.1, 'observed': 0.2}]
    assert 'd="M87.6,167.2 L372.4,50.8"' in calibration('RM', rows) and 'diagonal' in calibration('RM', rows)
    assert calibration('RM', rows[:1]) == '' and plane('x', rows) == '' and by_count('x', rows) == ''
    assert by_count('x', [{'n': 1, 'max': 2.0}, {'n': 2, 'max': 4.0}]).count('d="M52.0,197.2 L408.0,20.8"') == 1


def browse(page, *flags, width=1200):
    """The document as a browser leaves it after its scripts."""
    program = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not program:
        pytest.skip('no chromium here')
    command = [program, '--headless', '--no-sandbox', '--disable-gpu', f'--window-size={width},900', '--virtual-time-budget=3000']
    result = subprocess.run([*command, *flags, '--dump-dom', page.as_uri()], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(html.unescape(re.search('<title>(.*?)</title>', result.stdout)[1]))


def test_in_a_browser(tree):
    """No error, nothing wider than a phone, other colours in the dark, and the figures under the pointer."""
    path = write_report(str(tree))
    probe = """<script>
    const errors = [];
    window.onerror = message => errors.push(message);
    window.onload = () => {
      const svg = document.querySelector('#run-sft svg'), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * 407 / 420, clientY: box.top + 50}));
      const colour = getComputedStyle(document.body).backgroundColor;
      document.title = JSON.stringify({errors, colour, wide: document.documentElement.scrollWidth, inner: innerWidth,
        tip: document.querySelector('.tip').innerText,
        charts: [...document.querySelectorAll('svg')].every(s => s.clientHeight > 100)});
    };
    </script></head>"""
    path.write_text(path.read_text().replace('</head>', probe))
    light, dark = browse(path), browse(path, '--blink-settings=preferredColorScheme=0', width=500)
    for seen in (light, dark):
        assert seen['errors'] == [] and seen['charts'] and seen['wide'] <= seen['inner']
        assert re.fullmatch(r'step 50\nloss: 0\.\d+\nheldout/loss: 0.25\n?', seen['tip']), seen
    assert (light['colour'], dark['colour']) == ('rgb(246, 247, 249)', 'rgb(15, 19, 25)')


def test_command_line(tree):
    command = [sys.executable, ROOT / 'experiments' / 'report.py', '--workdir']
    result = subprocess.run([*command, tree], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, f'The report is in {tree}/report.html.\n')
    result = subprocess.run([*command, tree / 'none'], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (1, f'Error: --workdir={tree}/none is no directory.\n')


def test_odd_files_of_a_run_are_no_obstacle(tmp_path):
    """A diverged loss is a gap, text is no figure, and pipes, dangling links and lists in place of objects are passed over."""
    lines = [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': math.nan}, {'step': 3, 'loss': 'x'}, {'step': 4, 'loss': 1.0}]
    write(tmp_path / 'metrics.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
    write(tmp_path / 'config.json', '[1]')
    write(tmp_path / 'model' / 'config.json', {'provenance': []})
    os.mkfifo(tmp_path / 'samples.md')
    (tmp_path / 'table.json').symlink_to('nothing')
    [run] = find_runs(tmp_path)
    assert [line.get('loss') for line in run.metrics] == [2.0, None, None, 1.0]
    assert (run.config, run.provenance, run.samples, run.tables) == ({}, {}, '', {})
    assert 'data-chart' in write_report(tmp_path).read_text()
