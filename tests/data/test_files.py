"""Files of rows in every format, told apart by content; a wrong name and a wrong content are named."""

import gzip
import json
import tarfile

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from llama2_jax.config import UserError
from llama2_jax.data.sources import Tally, read_documents, read_records
from llama2_jax.text.tokenizer import sentences

ROWS = [{'text': f'document {i} é', 'n': i} for i in range(3)]
LINES = '\n'.join(map(json.dumps, ROWS)).encode()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, 'zstd') as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def write_table(path, format):
    table = pa.Table.from_pylist(ROWS)
    if format == 'parquet':
        pa.parquet.write_table(table, path)
    else:
        maker = pa.ipc.new_stream if format == 'stream' else pa.ipc.new_file
        with pa.OSFile(str(path), 'wb') as file, maker(file, table.schema) as writer:
            writer.write_table(table)
    return path


def write_all(path):
    """Each format under its own name."""
    (path / 'a.jsonl').write_bytes(LINES)
    (path / 'b.json').write_text(json.dumps(ROWS, indent=1))
    (path / 'c.jsonl.gz').write_bytes(gzip.compress(LINES))
    (path / 'd.jsonl.zst').write_bytes(zstd(LINES))
    write_table(path / 'e.parquet', 'parquet')
    write_table(path / 'f.arrow', 'stream')
    write_table(path / 'g.arrow', 'file')
    (path / 'h.csv').write_text('text,n\n' + ''.join(f'"document {i} é",{i}\n' for i in range(3)))
    (path / 'i.tsv').write_text('text\tn\n' + ''.join(f'document {i} é\t{i}\n' for i in range(3)))
    (path / 'j.jsonl').write_bytes(b'\xef\xbb\xbf' + LINES)
    (path / 'README.md').write_text('not rows')
    (path / 'dataset_info.json').write_text('{}')


def test_every_format_gives_the_same_rows(tmp_path):
    write_all(tmp_path)
    found = [(record.file[-len('a.jsonl') :], record.fields) for record in read_records(f'rows:{tmp_path}')]
    assert len(found) == 30
    assert [{**fields, 'n': int(fields['n'])} for _, fields in found] == ROWS * 10
    assert list(read_documents(f'rows:{tmp_path}')) == [row['text'] for row in ROWS] * 10  # a .json array, too
    bare = tmp_path / 'blob'
    bare.write_bytes((tmp_path / 'e.parquet').read_bytes())
    assert [record.where for record in read_records(f'rows:{bare}')] == [f'{bare} row {i}' for i in range(3)]


def test_a_directory_of_hugging_face(tmp_path):
    for name in ('data-00000-of-00002.arrow', 'data-00001-of-00002.arrow'):
        write_table(tmp_path / name, 'stream')
    state = {'_data_files': [{'filename': f'data-0000{i}-of-00002.arrow'} for i in (1, 0)]}
    (tmp_path / 'state.json').write_text(json.dumps(state))
    files = [record.file for record in read_records(f'rows:{tmp_path}')]
    assert files[0].endswith('1-of-00002.arrow') and files[-1].endswith('0-of-00002.arrow') and len(files) == 6
    both = tmp_path / 'both'
    for split in ('train', 'test'):
        (both / split).mkdir(parents=True)
        write_table(both / split / 'a.parquet', 'parquet')
    with pytest.raises(UserError, match='both has the splits test, train'):
        list(read_records(f'rows:{both}'))
    assert len(list(read_records(f'rows:{both}/train'))) == 3


@pytest.mark.parametrize(
    ('name', 'write', 'looks'),
    [
        ('a.jsonl', lambda path: path.write_bytes(gzip.compress(LINES)), 'gzip'),
        ('a.jsonl', lambda path: path.write_bytes(zstd(LINES)), 'zstd'),
        ('a.jsonl', lambda path: write_table(path, 'parquet'), 'parquet'),
        ('a.csv', lambda path: write_table(path, 'stream'), 'arrow'),
        ('a.parquet', lambda path: path.write_bytes(LINES), 'JSON'),
        ('a.jsonl', lambda path: path.write_text('text,n\nx,1\n'), 'csv'),
        ('a.csv', lambda path: path.write_bytes(LINES), 'JSON'),
        ('a.jsonl.zst', lambda path: path.write_bytes(gzip.compress(LINES)), 'gzip'),
        ('a.jsonl', lambda path: path.write_bytes('{"text": "é"}'.encode('utf-16')), 'UTF-16'),
        ('a', lambda path: path.write_bytes(b'PK\x03\x04...'), 'zip'),
    ],
)
def test_a_wrong_name_is_named_with_what_the_file_looks_like(tmp_path, name, write, looks):
    write(tmp_path / name)
    with pytest.raises(UserError, match=f'/{name} .*looks like {looks}'):
        list(read_records(f'rows:{tmp_path}/{name}'))


def test_damaged_files_are_named(tmp_path):
    write_all(tmp_path)
    for name in ('c.jsonl.gz', 'd.jsonl.zst', 'e.parquet', 'f.arrow'):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
        with pytest.raises(UserError, match=f'/{name} is corrupt|/{name} is a corrupt'):
            list(read_records(f'rows:{tmp_path}/{name}'))


def test_rows_of_csv_with_another_number_of_columns(tmp_path):
    (tmp_path / 'a.csv').write_text('text,n\nx,1\ny\nz,3\n')
    with pytest.raises(UserError, match='a.csv:3 .*number of columns'):
        list(read_documents(f'rows:{tmp_path}/a.csv'))


def test_skipped_documents_are_counted_with_their_reasons(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(b'{"text": "a"}\n{"txt": "b"}\n{"text": 3}\n{"text": "c"}\n{\n')
    tally = Tally(skip=3)
    assert list(read_documents(f'rows:{tmp_path}/a.jsonl', tally)) == ['a', 'c']
    assert [error.split('a.jsonl:')[1][:1] for error in tally.bad] == ['2', '3', '5'] and str(tally) == '3 bad rows'
    with pytest.raises(UserError, match='a.jsonl:5 is not JSON'):
        list(read_documents(f'rows:{tmp_path}/a.jsonl', Tally(skip=2)))


def test_text_is_text(tmp_path):
    write_table(tmp_path / 'a.txt', 'parquet')
    with pytest.raises(UserError, match='a.txt is no text, it looks like parquet'):
        list(read_documents(f'text:{tmp_path}/a.txt'))
    (tmp_path / 'c').write_text('plain')
    with tarfile.open(tmp_path / 'b.txt', 'w') as archive:
        archive.add(tmp_path / 'c', 'c')
    with pytest.raises(UserError, match='b.txt is no text, it looks like tar'):
        list(read_documents(f'text:{tmp_path}/b.txt'))
    (tmp_path / 'd.txt').write_bytes(b'\xef\xbb\xbfone')
    assert list(read_documents(f'text:{tmp_path}/d.txt')) == ['one']


def test_blank_lines_of_windows_part_long_texts(tmp_path):
    text = ('word ' * 1000 + '\r\n\r\n') * 5 + 'line\r\n' * 10
    (tmp_path / 'a.txt').write_bytes(text.encode())
    found = list(read_documents(f'text:{tmp_path}/a.txt'))
    assert ''.join(found) == text and all(piece.endswith('\r\n\r\n') for piece in found[:-1])


@pytest.mark.parametrize('kind', ['parquet', 'csv', 'hf'])
def test_formats_are_no_kinds_of_sources(kind):
    with pytest.raises(UserError, match='write rows:a'):
        list(read_records(f'{kind}:a'))


def test_a_character_that_sentencepiece_reserves_loses_no_line():
    assert list(sentences(['one \u2585 two\nthree'])) == ['one ', ' two', 'three']


def varint(number):
    """A positive whole number as Thrift's compact protocol has it, zigzag."""
    number, out = number << 1, b''
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def test_a_parquet_page_that_claims_two_gigabytes(tmp_path):
    """The footer's sizes are those of the file; the header of its page lies."""
    path = tmp_path / 'a.parquet'
    table = pa.table({'text': ['hello world ' * 50] * 200})
    pa.parquet.write_table(table, path, compression='zstd', use_dictionary=False, write_statistics=False)
    data = bytearray(path.read_bytes())
    column = pa.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    start = end = column.data_page_offset + 3  # after the type of the page and the head of the next field
    while data[end] & 128:
        end += 1
    claimed = varint(2_000_000_000)
    data[start : end + 1] = claimed
    old, new = (varint(column.total_compressed_size + more) for more in (0, len(claimed) - (end + 1 - start)))
    footer = len(data) - 400
    data[footer:] = data[footer:].replace(old, new)
    path.write_bytes(data)
    before = pa.total_allocated_bytes()
    with pytest.raises(UserError, match=r'a\.parquet'):
        list(read_records(f'rows:{path}'))
    assert pa.total_allocated_bytes() - before < 1e7
