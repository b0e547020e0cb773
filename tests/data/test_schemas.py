"""Dialogs in the formats in which they are published."""

import csv
import functools
import gzip
import io
import json

import pytest

from llama2_jax.config import UserError
from llama2_jax.data.schemas import read_dialogs


@pytest.fixture
def read(tmp_path):
    def read(*rows, name='a.jsonl'):
        (tmp_path / name).write_text('\n'.join(json.dumps(row) for row in rows))
        return list(read_dialogs(f'jsonl:{tmp_path}/{name}'))

    return read


def turns(*contents):
    return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(contents)]


def dialogs(found):
    return [dialog for _, dialog in found]


def test_messages(read, tmp_path):
    system = {'role': 'system', 'content': 'Be brief.'}
    none = {'role': 'system', 'content': ''}
    rows = [{'messages': m, 'id': 1} for m in (turns('a', 'b'), [system, *turns('a', 'b', 'c', 'd')], [none, *turns('a', 'b')])]
    assert read(*rows) == [
        (f'{tmp_path}/a.jsonl:1', turns('a', 'b')),
        (f'{tmp_path}/a.jsonl:2', [system, *turns('a', 'b', 'c', 'd')]),
        (f'{tmp_path}/a.jsonl:3', turns('a', 'b')),
    ]


@pytest.mark.parametrize('answer', ['completion', 'response', 'output'])
def test_prompt_and_answer(read, answer):
    assert dialogs(read({'prompt': 'a', answer: 'b', 'meta': 3})) == [turns('a', 'b')]


def test_instructions(read):
    rows = [{'instruction': 'Add.', 'input': ' 1 2\n', 'output': '3'}, {'instruction': 'Hi', 'input': '', 'output': 'x'}]
    assert dialogs(read(*rows)) == [turns('Add.\n\n1 2', '3'), turns('Hi', 'x')]
    assert dialogs(read({'instruction': 'Who?', 'context': 'Me.', 'response': 'You.', 'category': 'qa'})) == [
        turns('Who?\n\nMe.', 'You.')
    ]


def test_sharegpt(read):
    def row(*turns):
        return {'id': 'x', 'conversations': [{'from': who, 'value': text} for who, text in turns]}

    assert dialogs(
        read(
            row(('human', 'a'), ('gpt', 'b'), ('human', 'c')),
            row(('system', 's'), ('gpt', 'x'), ('user', 'a'), ('bing', 'b')),
            row(('gpt', 'a')),
            row(),
        )
    ) == [turns('a', 'b'), [{'role': 'system', 'content': 's'}, *turns('a', 'b')], None, None]
    with pytest.raises(UserError, match=r"a\.jsonl:1: conversations\[0\] is from 'tool'; known: system, human, user, "):
        read(row(('tool', 'a')))


def test_oasst_takes_the_best_ranked_answers(read):
    def node(text, *replies, rank=None, deleted=False):
        return {'message_id': text, 'text': text, 'rank': rank, 'deleted': deleted, 'replies': list(replies)}

    tree = node(
        'q',
        node('worst', node('no', node('never'))),
        node('second', rank=1),
        node('gone', rank=-1, deleted=True),
        node('best', node('silence'), node('q2', node('unranked'), node('a2', rank=5)), node('q3', node('a3')), rank=0),
    )
    assert dialogs(read({'message_tree_id': 'q', 'tree_state': 'x', 'prompt': tree})) == [turns('q', 'best', 'q2', 'a2')]
    assert dialogs(read(tree, node('nobody'))) == [turns('q', 'best', 'q2', 'a2'), None]


def test_the_format_is_each_files_own(read, tmp_path):
    read({'prompt': 'a', 'response': 'b'}, name='a.jsonl')
    (tmp_path / 'b.json').write_text(
        json.dumps([{'instruction': 'c', 'output': 'd'}, {'instruction': 'e', 'output': 'f'}], indent=1)
    )
    assert list(read_dialogs(f'jsonl:{tmp_path}/*')) == [
        (f'{tmp_path}/a.jsonl:1', turns('a', 'b')),
        (f'{tmp_path}/b.json element 0', turns('c', 'd')),
        (f'{tmp_path}/b.json element 1', turns('e', 'f')),
    ]


@pytest.mark.parametrize(
    ('rows', 'sentence'),
    [
        ([{'turns': [], 'id': 1}], r':1 has the fields turns, id, which are no known format of dialogs; '),
        ([{'prompt': 'a', 'chosen': 'b'}], r':1 has the fields prompt, chosen, which are no known format'),
        ([{}], r':1 has the fields \(none\), which'),
        ([['a']], r' element 0 is not an object with named fields\.'),
        (['a'], r':1 is not an object with named fields\.'),
        (
            [{'prompt': 'a', 'output': 'b'}] * 2 + [{'prompt': 'a', 'x': 1}],
            r':3 has the fields prompt, x, which are',
        ),
        ([{'prompt': 'a', 'output': ''}], r':1: messages\[1\] \(assistant\) has empty content\.'),
        ([{'prompt': 'a', 'output': 7}], r':1: messages\[1\] \(assistant\) has no text content\.'),
        ([{'messages': turns('a', 'b', '[INST]', 'd')}], r':1: a message holds a tag of the chat format \(\[INST\], '),
        ([{'messages': turns('a', '\ud800')}], r':1.* holds a lone surrogate'),
        (
            [{'messages': turns('a', 'b') * 2 + turns('c', 'd')[1:]}],
            r":1: messages\[4\] has the role 'assistant' where 'user' is",
        ),
        ([{'messages': 'a'}], r":1: 'messages' is not a list of objects\."),
        ([{'conversations': ['a']}], r":1: 'conversations' is not a list of objects\."),
    ],
)
def test_mistakes_name_file_and_row(read, tmp_path, rows, sentence):
    with pytest.raises(UserError, match=f'^{tmp_path}/a.jsonl{sentence}'):
        read(*rows)


def test_other_sources(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('text')
    with pytest.raises(UserError, match=r'^Source text:.*a\.txt is plain text; records are read from rows:'):
        list(read_dialogs(f'text:{tmp_path}/a.txt'))
    with pytest.raises(UserError, match=r'^Source toy:guides holds documents, not records; '):
        list(read_dialogs('toy:guides'))
    (tmp_path / 'a.jsonl').write_text('{"messages": [}')
    with pytest.raises(UserError, match=r'a\.jsonl:1 is not JSON: Expecting'):
        list(read_dialogs(f'jsonl:{tmp_path}/a.jsonl'))


def test_tfds(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class MiniChat(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            message = {'role': tfds.features.Text(), 'content': tfds.features.Text()}
            features = tfds.features.FeaturesDict({'messages': tfds.features.Sequence(message)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {'train': self._generate_examples()}

        def _generate_examples(self):
            yield 0, {'messages': turns('hé', 'ho', 'a', 'b')}

    MiniChat(data_dir=tmp_path, file_format='array_record').download_and_prepare()
    monkeypatch.setattr(tfds, 'data_source', functools.partial(tfds.data_source, data_dir=tmp_path))
    assert list(read_dialogs('tfds:mini_chat')) == [('Source tfds:mini_chat example 0', turns('hé', 'ho', 'a', 'b'))]


def test_published_oasst(fixtures):
    trees = dialogs(read_dialogs(f'jsonl:{fixtures}/oasst/en_100_tree.jsonl.gz'))
    rows = gzip.decompress((fixtures / 'oasst/en_100_tree.jsonl.gz').read_bytes()).decode().splitlines()
    for dialog, row in zip(trees, rows, strict=True):
        messages = [json.loads(row)['prompt']]
        for message in dialog:  # down the tree
            (found,) = [reply for reply in messages if reply['text'] == message['content']][:1]
            assert {'prompter': 'user', 'assistant': 'assistant'}[found['role']] == message['role']
            ranks = [reply['rank'] for reply in messages if reply.get('rank') is not None]
            assert found.get('rank') == (min(ranks) if ranks else None)
            messages = found['replies']
        assert not any(reply['replies'] for reply in messages)  # nothing was left unasked
    assert sum(len(dialog) for dialog in trees) == 290
    assert trees == dialogs(read_dialogs(f'jsonl:{fixtures}/oasst/en_100_message.jsonl.gz'))
    with pytest.raises(UserError, match=r'en_100_text\.jsonl\.gz:1 is not an object'):
        list(read_dialogs(f'jsonl:{fixtures}/oasst/en_100_text.jsonl.gz'))


def test_published_sharegpt_and_questions(fixtures):
    found = dialogs(read_dialogs(f'jsonl:{fixtures}/mt-bench/dummy_conversation.json'))
    assert found[0][:2] == turns('Who are you?', 'I am Vicuna, a language model trained by researchers from Large Model Systems '
                                 'Organization (LMSYS).')  # fmt: skip
    assert None not in found
    with pytest.raises(UserError, match=r'question\.jsonl:1 has the fields question_id, category, turns, which are no known'):
        list(read_dialogs(f'jsonl:{fixtures}/mt-bench/mt_bench/question.jsonl'))


def test_published_dolly(fixtures, tmp_path):
    """Its own fields; the sample lies there as a table."""
    table = gzip.decompress((fixtures / 'dolly-sample/databricks_dolly_15k.csv.gz').read_bytes()).decode()
    rows = list(csv.DictReader(io.StringIO(table)))
    (tmp_path / 'dolly.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    found = dialogs(read_dialogs(f'jsonl:{tmp_path}/dolly.jsonl'))
    assert len(found) == len(rows) > 100
    for dialog, row in zip(found, rows, strict=True):
        assert dialog[0]['content'].startswith(row['instruction'].strip())
        assert row['context'].strip() in dialog[0]['content']
        assert dialog[1]['content'] == row['response']
