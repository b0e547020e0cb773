"""Rows and files of rows that are damaged or made to do harm; most were found by benchmarks/fuzz/readers.py."""

import gzip
import json
import struct

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from test_formats import turns

from llama2_jax.config import UserError, listed, reason
from llama2_jax.data.comparisons import read_comparisons
from llama2_jax.data.schemas import read_dialogs
from llama2_jax.data.sources import read_records

HUGE = 10**400


@pytest.fixture
def source(tmp_path):
    def source(*rows):
        (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        return f'rows:{tmp_path}/a.jsonl'

    return source


def refuse(read, source, named):
    """Its one sentence is short, and can be shown."""
    with pytest.raises(UserError, match=named) as caught:
        list(read(source))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


def message(i, parent, role='prompter'):
    return {'message_id': i, 'parent_id': parent, 'message_tree_id': 't', 'text': 'x', 'role': role, 'rank': None}


@pytest.mark.parametrize(
    'rows',
    [
        [{'messages': [{'role': ['user'], 'content': 'q'}]}],
        [{'messages': {'role': ['user', 'assistant'], 'content': ['q']}}],
        [{'messages': [{'role': 'x' * 100_000, 'content': 'q'}]}],
        [{'messages': turns('q', 'a'), 'system': [0] * 10_000}],
        [{'a' * 5000 + '\x1b': 1} | {f'f{i}': 1 for i in range(1000)}],
        [{'messages': [turns('q')[0], {'role': 'assistant', 'content': 'a', 'weight': 'w' * 5000}]}],
        [message(1, 2), message(2, 1)],
        [message([1], None), message(2, [1])],
    ],
)
def test_dialogs_of_the_wrong_types_are_refused_with_their_row(source, rows):
    refuse(read_dialogs, source(*rows), r'a\.jsonl:1')


@pytest.mark.parametrize(
    'rows',
    [
        [{'prompt': 'q', 'answers': [{'answer': 'a', 'rank': HUGE}, {'answer': 'b', 'rank': 1}]}],
        [{'prompt': 'q', 'answers': [{'answer': 'a', 'rank': 'inf'}, {'answer': 'b', 'rank': 1}]}],
        [{'prompt': 'q', 'response': 'a', 'helpfulness': float('nan')}, {'prompt': 'q', 'response': 'b', 'helpfulness': 1}],
        [{'prompt': 'q', 'response': 'a', 'is_safe': [0] * 10_000}],
        [{'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'rating': ['x' * 10_000]}],
        [{'message_tree_id': 't', 'prompt': 'no object'}],
        [{'prompt': 'q', 'responses': ['a', 'b'], 'safe': [True]}],
    ],
)
def test_comparisons_of_the_wrong_types_are_refused_with_their_row(source, rows):
    refuse(read_comparisons, source(*rows), r'a\.jsonl:1')


@pytest.mark.parametrize('kind', ['file', 'stream'])
@pytest.mark.parametrize('codec', ['zstd', 'lz4'])
@pytest.mark.parametrize('dictionary', [False, True])
def test_arrow_buffers_that_grow_without_measure_are_refused(tmp_path, kind, codec, dictionary):
    def write(name, text):
        column = pa.array([text])
        table = pa.table({'text': column.dictionary_encode() if dictionary else column})
        make = pa.ipc.new_file if kind == 'file' else pa.ipc.new_stream
        with make(str(tmp_path / name), table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            writer.write_table(table)

    write('a.arrow', 'x' * 2**17)
    [record] = read_records(f'rows:{tmp_path}/a.arrow')
    assert record.fields == {'text': 'x' * 2**17}
    write('b.arrow', ' ' * 10**8)
    refuse(read_records, f'rows:{tmp_path}/b.arrow', r'b\.arrow holds 1000000\d\d bytes')


def test_arrow_offsets_outside_of_their_buffer_are_refused(tmp_path):
    table = pa.table({'text': ['hello', 'world']})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    good = sink.getvalue().to_pybytes()
    offsets = struct.pack('<3i', 0, 5, 10)
    assert good.count(offsets) == 1
    (tmp_path / 'a.arrow').write_bytes(good.replace(offsets, struct.pack('<3i', 0, 2**30, 10)))
    refuse(read_records, f'rows:{tmp_path}/a.arrow', r'a\.arrow is corrupt')


@pytest.mark.parametrize('start', [b'{"text": "', b'[', b'text,b\n"'], ids=['a line', 'an array', 'csv'])
def test_a_packed_file_that_grows_without_measure_is_refused(tmp_path, start):
    (tmp_path / 'rows.gz').write_bytes(gzip.compress(start + b' ' * 2**27, 1))
    refuse(read_records, f'rows:{tmp_path}/rows.gz', r'rows\.gz holds')


def test_a_parquet_page_that_grows_without_measure_is_refused(tmp_path):
    table = pa.table({'text': ['a' * 2**27]})
    pa.parquet.write_table(table, tmp_path / 'a.parquet', compression='zstd', use_dictionary=False)
    refuse(read_records, f'rows:{tmp_path}/a.parquet', r'a\.parquet holds')


def test_one_long_text_in_many_rows_of_a_table_is_read(tmp_path):
    pa.parquet.write_table(pa.table({'text': ['a' * 2**20] * 200}), tmp_path / 'a.parquet')
    assert [len(record.fields['text']) for record in read_records(f'rows:{tmp_path}/a.parquet')] == [2**20] * 200


@pytest.mark.parametrize('files', [3, [3], [{'filename': 3}], [{'filename': '../out.arrow'}], [{'filename': '/etc/passwd'}]])
def test_a_list_of_files_names_files_beside_it_only(tmp_path, files):
    (tmp_path / 'state.json').write_text(json.dumps({'_data_files': files}))
    refuse(read_records, f'rows:{tmp_path}', r'state\.json is damaged')


def test_words_of_other_libraries_are_shown_on_one_line():
    assert reason(ValueError('no\n such  type.')) == 'no such type'
    assert reason(ValueError('type \x0f')) == r"'type \x0f'"
    assert reason(MemoryError()) == 'MemoryError'
    assert len(reason(ValueError('x' * 10_000))) < 210
    assert listed(map(str, range(30)), 3) == '0, 1, 2, 27 more'
