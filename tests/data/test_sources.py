import functools
import gzip
import json

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from llama2_jax.config import UserError
from llama2_jax.data import sources
from llama2_jax.data.sources import read_documents


def write(path, data: bytes):
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return path


def write_arrayrecord(path, records):
    writer = ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
    for record in records:
        writer.write(record)
    writer.close()
    return path


@pytest.mark.parametrize('name', ['a.txt', 'a.txt.gz'])
def test_text_is_split_at_separator_lines_and_nothing_else_is_lost(tmp_path, name):
    write(tmp_path / name, 'one\nno <|endoftext|> here\n<|endoftext|>\r\n\n<|endoftext|>\ntwo é\r\n <|endoftext|>\nend'.encode())
    expected = ['one\nno <|endoftext|> here\n', '\n', 'two é\r\n <|endoftext|>\nend']
    assert list(read_documents(f'text:{tmp_path}/*')) == expected


def test_long_text_is_cut_at_blank_line_newline_space_or_character():
    def pieces(text):
        buffer, found = bytearray(text.encode()), []
        while len(buffer) > sources.PIECE:
            end = sources._cut(buffer)
            found.append(bytes(buffer[:end]))
            del buffer[:end]
        return found

    n = sources.PIECE
    assert [len(p) for p in pieces('a' * 100 + '\n\n' + 'b' * 50 + '\n' + 'c c' * n)][:2] == [102, 51]
    assert len(pieces('a' * 100 + ' ' + 'b' * n)[0]) == 101
    assert len(pieces('é' * n)[0]) == n
    assert len(pieces('x' + 'é' * n)[0]) == n - 1  # never inside a character
    assert len(pieces('x' + '𝛼' * n)[0]) == n - 3


@pytest.mark.parametrize('filler', ['é' * 7001, 'words and words ' * 999, 'line\n' * 4001, '𝛼𝛽\n\n' * 3000, 'x'])
def test_pieces_of_a_long_document_concatenate_to_the_exact_text(tmp_path, filler):
    text = (filler * 5 + '\n<|endoftext|> not a separator\n') * 3
    write(tmp_path / 'a.txt', text.encode())
    found = list(read_documents(f'text:{tmp_path}/a.txt'))
    assert ''.join(found) == text
    assert max(len(piece.encode()) for piece in found) <= 16384


def test_json_records_from_lines_gz_and_arrayrecord(tmp_path):
    rows = [json.dumps({'text': f'document {i} é', 'id': i}).encode() for i in range(3)]
    write(tmp_path / 'a.jsonl', b'\n\n'.join(rows) + b'\n')
    write(tmp_path / 'b.jsonl.gz', b'\n'.join(rows))
    write_arrayrecord(tmp_path / 'c.arrayrecord', rows)
    texts = [f'document {i} é' for i in range(3)]
    assert list(read_documents(f'jsonl:{tmp_path}/*.jsonl*')) == texts * 2  # files in the order of their names
    assert list(read_documents(f'arrayrecord:{tmp_path}/c*')) == texts


def test_tfds_without_tensorflow(tmp_path, monkeypatch):
    import sys

    import tensorflow_datasets as tfds

    class MiniText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({self.field: tfds.features.Text()}))

        def _split_generators(self, manager):
            return {'train': self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, {self.field: f'document {i} é'}

        field = 'text'

    class MiniTitles(MiniText):
        field = 'title'

    for builder in (MiniText, MiniTitles):
        builder(data_dir=tmp_path, file_format='array_record').download_and_prepare()
    monkeypatch.setattr(tfds, 'data_source', functools.partial(tfds.data_source, data_dir=tmp_path))
    monkeypatch.setattr(sources, 'EXAMPLES', 2)
    texts = {f'document {i} é' for i in range(5)}
    assert [(part.start, part.stop) for part in sources.split('tfds:mini_text')] == [(0, 2), (2, 4), (4, 5)]
    assert set(read_documents('tfds:mini_text:1.0.0')) == texts
    assert len(list(read_documents('tfds:mini_text#train[:40%]'))) == 2
    assert 'tensorflow' not in sys.modules
    with pytest.raises(UserError, match=r"^Source tfds:mini_titles example 0 has no field 'text' .*\(it has: title\)\.$"):
        list(read_documents('tfds:mini_titles'))
    with pytest.raises(UserError, match="^Source tfds:mini_text#nope cannot be opened: .*Unknown split 'nope'"):
        list(read_documents('tfds:mini_text#nope'))
    with pytest.raises(UserError, match='^Source tfds:mini_tex cannot be opened: .*Dataset mini_tex not found'):
        list(read_documents('tfds:mini_tex'))


def test_toy_documents_are_all_genres():
    from llama2_jax import toy

    assert [part.names for part in sources.split('toy:documents')] == [(genre,) for genre in toy.GENRES]
    assert next(iter(read_documents(f'toy:{toy.GENRES[1]}'))) == next(iter(toy.documents(toy.GENRES[1])))
    with pytest.raises(UserError, match='^Source toy:documentz: did you mean'):
        sources.split('toy:documentz')


def test_small_files_are_read_together_and_the_stamp_follows_the_content(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'PART', 10)
    monkeypatch.setattr(sources, 'FILES', 1)
    for i, size in enumerate([4, 4, 4, 20, 1]):
        write(tmp_path / f'{i}.txt', b'x' * size)
    parts = sources.split(f'text:{tmp_path}/*')
    assert [tuple(name[-5:] for name in part.names) for part in parts] == [('0.txt', '1.txt', '2.txt'), ('3.txt',), ('4.txt',)]
    assert [part.bytes for part in parts] == [12, 20, 1]
    write(tmp_path / '3.txt', b'x' * 21)
    changed = sources.split(f'text:{tmp_path}/*')
    assert [a == b for a, b in zip(parts, changed, strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    ('name', 'data', 'kind', 'sentence'),
    [
        ('a.txt', b'good\n' * 4000 + b'bad \xff', 'text', r'/a\.txt is not valid UTF-8 at byte 20004\.$'),
        ('a.txt', 'é'.encode() * 20000 + b'\xc3', 'text', r'/a\.txt is not valid UTF-8 at byte 40000\.$'),
        (
            'a.jsonl',
            b'{"text": "a"}\n{"text": "b"\n',
            'jsonl',
            r'/a\.jsonl:2 is not JSON: Expecting',
        ),
        ('a.jsonl', b'{"text": "a"}\n\n{"txt": "b"}\n', 'jsonl', r"/a\.jsonl:3 has no field 'text' .*\(it has: txt\)"),
        ('a.jsonl', b'{"text": null}', 'jsonl', r"/a\.jsonl:1 has no field 'text'"),
        ('a.jsonl', b'["text"]', 'jsonl', r'/a\.jsonl element 0 is not an object'),
        ('a.jsonl', b'{"text": "\xff"}', 'jsonl', r"/a\.jsonl:1 is not JSON: 'utf-8' codec can't decode byte 0xff"),
        ('a.jsonl', b'{"text": "\\ud800"}', 'jsonl', r'/a\.jsonl:1 holds a lone surrogate'),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, data, kind, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        list(read_documents(f'{kind}:{tmp_path}/{name}'))


@pytest.mark.parametrize(
    'damage', [lambda data: data[: len(data) // 2], lambda data: b'no gzip', lambda data: data[:50] + data[:200]]
)
def test_a_damaged_gzip_is_named(tmp_path, damage):
    data = gzip.compress(json.dumps({'text': ' '.join(map(str, range(20000)))}).encode())
    (tmp_path / 'a.jsonl.gz').write_bytes(damage(data))
    with pytest.raises(UserError, match=r'/a\.jsonl\.gz is a corrupt or half-written gzip file: '):
        list(read_documents(f'jsonl:{tmp_path}/*.gz'))


def test_a_damaged_arrayrecord_is_named_with_the_record(tmp_path):
    rows = [json.dumps({'text': ' '.join(str(hash((i, j))) for j in range(2000))}).encode() for i in range(20)]
    path = write_arrayrecord(tmp_path / 'a.arrayrecord', rows)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match=r'/a\.arrayrecord record 0 cannot be read, the file is corrupt or half-written'):
        list(read_documents(f'arrayrecord:{path}'))
    flipped = bytearray(good)
    flipped[good.index(rows[12][:1000]) + 500] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(UserError, match=r'/a\.arrayrecord record 12 cannot be read, the file is corrupt'):
        list(read_documents(f'arrayrecord:{path}'))
    write_arrayrecord(path, [b'{"text": "a"}', b'{}'])
    with pytest.raises(UserError, match=r"/a\.arrayrecord record 1 has no field 'text'"):
        list(read_documents(f'arrayrecord:{path}'))


@pytest.mark.parametrize(
    ('source', 'sentence'),
    [
        ('txt:a', r"Source 'txt:a' is of an unknown kind 'txt'; did you mean 'text'\?"),
        ('corpus.txt', r"Source 'corpus.txt' is of an unknown kind 'corpus.txt'; "),
        ('text', r"Source 'text' names nothing after 'text'; write text:PATH\."),
        ('jsonl:/nowhere/*.jsonl', r'Source jsonl:/nowhere/\*\.jsonl matches no file\.'),
    ],
)
def test_bad_source_strings(source, sentence):
    with pytest.raises(UserError, match=f'^{sentence}'):
        sources.split(source)


def test_a_bucket_without_its_library_is_one_sentence(monkeypatch):
    from etils import epath

    def glob(self, pattern):
        assert (str(self), pattern) == ('gs://bucket/books', '2*/*.txt')
        raise ImportError('Please install gcsfs to access Google Storage')

    monkeypatch.setattr(epath.gpath._GPath, 'glob', glob)
    with pytest.raises(UserError, match=r'^Source text:gs://bucket/books/2\*/\*\.txt cannot be read: Please install gcsfs'):
        sources.split('text:gs://bucket/books/2*/*.txt')


def test_a_bucket_is_read_like_a_disk(tmp_path, monkeypatch):
    from etils import epath

    for name in ('a.txt', 'b.txt.gz'):
        write(tmp_path / name, name.encode())
    monkeypatch.setattr(epath, 'Path', lambda path: epath.gpath.PosixGPath(str(path).replace('gs://bucket', str(tmp_path))))
    local = f'{tmp_path}/'
    parts = sources.split('text:gs://bucket/*')
    assert [name.replace(local, '') for part in parts for name in part.names] == ['a.txt', 'b.txt.gz']
    monkeypatch.setattr(sources, '_glob', lambda pattern: [('gs://bucket/a.txt', 5, 0), ('gs://bucket/b.txt.gz', 5, 0)])
    assert list(read_documents('text:gs://bucket/*')) == ['a.txt', 'b.txt.gz']
