"""Figures of preference by hand, and the two commands on a toy model."""

import json

import jax
import numpy as np
import pytest

from llama2_jax.checkpoints.directory import save_model
from llama2_jax.config import ModelConfig, UserError
from llama2_jax.data.preferences import Pair
from llama2_jax.evals.preference import Judged, calibration, figures, share, table
from llama2_jax.mesh import MeshConfig, make_mesh
from llama2_jax.model.reward import ScoreModel
from llama2_jax.stages.score import evaluate, score_file
from llama2_jax.text.tokenizer import train_tokenizer

SHAPE = ModelConfig(vocab_size=300, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=24, context=128)


def pair(lengths, rating=0, safe=(-1, -1), turns=1):
    return Pair('here', tuple(np.zeros(length, np.uint32) for length in lengths), (), rating, safe, turns)


def test_shares_have_intervals():
    assert share([]) is None
    found = share([True] * 8 + [False] * 2)
    assert (found['value'], found['count']) == (0.8, 10)
    assert found['low'] == pytest.approx(0.4902, abs=1e-4) and found['high'] == pytest.approx(0.9433, abs=1e-4)
    assert share([True] * 3)['high'] == pytest.approx(1)


def test_figures_by_hand():
    pairs = [
        pair((5, 9), 4, (1, 0)), pair((7, 4), 4, (1, 0), 2), pair((9, 3), 1, (0, 0), 5), pair((4, 4), 0, (1, 1)),
    ]  # fmt: skip
    scores = np.array([[3.0, -1.0], [0.5, 1.0], [-2.0, -3.0], [2.0, 1.0]], np.float32)
    found = figures(Judged('toy', pairs, scores))
    assert found['accuracy']['value'] == 0.75
    assert {name: (value['value'], value['count']) for name, value in found['by rating'].items()} == {
        'significantly': (0.5, 2), 'negligibly': (1.0, 1),
    }  # fmt: skip
    assert {name: value['count'] for name, value in found['by turns'].items()} == {'1': 2, '2': 1, '4+': 1}
    # Unsafe answers score -1, 1, -2 and -3; sigmoid(-1) = 0.27 and sigmoid(-2) = 0.12.
    assert (found['unsafe recall']['value'], found['unsafe precision']['value']) == (0.75, 1.0)
    assert (found['gate recall']['value'], found['gate precision']['value']) == (0.5, 1.0)
    # Safe ones score 3, 0.5, 2 and 1: a hundredth of them are below 0.515.
    assert found['recall at 1 % alarms']['value'] == 0.75
    lengths = np.array([[5, 9], [7, 4], [9, 3], [4, 4]])
    expected = np.corrcoef(scores[:, 0] - scores[:, 1], lengths[:, 0] - lengths[:, 1])[0, 1]
    assert found['length correlation']['within pairs'] == pytest.approx(expected)
    shown = table({'rm': {'toy': found}})
    assert 'rm on toy' in shown and '75.0%  30.1 to 95.4  of 4' in shown and 'turns: 4+' in shown
    bare = figures(Judged('toy', [pair((3, 3))], np.array([[1.0, 0.0]], np.float32)))
    assert 'unsafe recall' not in bare and bare['length correlation']['within pairs'] is None


def test_calibration_of_a_calibrated_model():
    """Pairs that are won as often as sigmoid of the difference says."""
    draw = np.random.default_rng(0)
    size = draw.uniform(0, 4, 20_000)
    difference = np.where(draw.random(20_000) < 1 / (1 + np.exp(-size)), size, -size)
    bins = calibration(difference)
    assert len(bins) == 10 and bins[0]['predicted'] < 0.56 and bins[-1]['predicted'] > 0.97
    assert all(abs(point['predicted'] - point['win rate']) < 0.03 for point in bins)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('judge')
    rows = [
        {'prompt': f'What is {i}?', 'chosen': f'It is {i}.', 'rejected': 'No.' + ' No.' * i, 'rating': 'better'} for i in range(9)
    ]
    (home / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    dialogs = [{'id': f'row {i}', 'prompt': row['prompt'], 'completion': row['chosen']} for i, row in enumerate(rows)]
    (home / 'dialogs.jsonl').write_text('\n'.join(map(json.dumps, dialogs)))
    tokenizer = train_tokenizer([json.dumps(row) for row in rows] * 4, home / 'tokenizer.model', SHAPE.vocab_size)
    scores = {'shift': 1.5, 'mean': -1.5, 'std': 1.0}
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        save_model(home / 'rm', ScoreModel(SHAPE, jax.random.key(0)), tokenizer, {'scores': scores})
    return home


def test_judging_from_the_command(home, tmp_path, capsys):
    source = f'jsonl:{home}/pairs.jsonl'
    results = evaluate([str(home / 'rm')], [source], str(tmp_path / 'out'), batch_size=8)
    assert json.loads((tmp_path / 'out/preferences.json').read_text()) == results
    assert results[str(home / 'rm')][source]['accuracy']['count'] == 9
    assert (tmp_path / 'out/preferences.png').stat().st_size > 10_000
    assert 'accuracy' in capsys.readouterr().out
    with pytest.raises(UserError, match='holds no comparison that fits a context of 128'):
        (tmp_path / 'long.jsonl').write_text(json.dumps({'prompt': 'x' * 300, 'chosen': 'a', 'rejected': 'b'}))
        evaluate([str(home / 'rm')], [f'jsonl:{tmp_path}/long.jsonl'], None, batch_size=8)


def test_scoring_a_file_goes_on_where_it_stopped(home, tmp_path):
    out = tmp_path / 'out.jsonl'
    score_file(str(home / 'rm'), str(home / 'dialogs.jsonl'), str(out), batch_size=8)
    whole = out.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line['id'] for line in lines] == [f'row {i}' for i in range(9)]
    assert all(line['probability'] == pytest.approx(1 / (1 + np.exp(-line['score'])), abs=1e-6) for line in lines)
    assert len({line['score'] for line in lines}) > 5
    out.write_text(whole[: whole.index('row 5') + 3])  # stopped in the middle of a line
    score_file(str(home / 'rm'), str(home / 'dialogs.jsonl'), str(out), batch_size=8)
    assert [json.loads(line)['id'] for line in out.read_text().splitlines()] == [line['id'] for line in lines]
    np.testing.assert_allclose(
        [json.loads(line)['score'] for line in out.read_text().splitlines()], [line['score'] for line in lines], atol=1e-6
    )
    (tmp_path / 'other.jsonl').write_text(json.dumps({'prompt': 'Hi', 'completion': 'Hello.'}))
    with pytest.raises(UserError, match='holds results for content of the dialogs'):
        score_file(str(home / 'rm'), str(tmp_path / 'other.jsonl'), str(out), batch_size=8)
    (tmp_path / 'long.jsonl').write_text(json.dumps({'prompt': 'x' * 300, 'completion': 'Hello.'}))
    with pytest.raises(UserError, match='long.jsonl:1: the dialog has .* tokens, beyond the context of 128'):
        score_file(str(home / 'rm'), str(tmp_path / 'long.jsonl'), str(tmp_path / 'new.jsonl'), batch_size=8)
