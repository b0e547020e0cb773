"""GGUF, the one-file format of llama.cpp, through its `gguf` library: weights, shape, tokenizer and chat template."""

import contextlib
import io
import itertools
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from etils.epath import Path
from sentencepiece import sentencepiece_model_pb2

from llama2_jax.config import ModelConfig, UserError
from llama2_jax.convert.huggingface import CHAT_TEMPLATE
from llama2_jax.convert.names import as_bytes, from_theirs, their_names, their_shape, to_theirs
from llama2_jax.convert.source import DTYPES, Source, Stored, Stream, check_tensors
from llama2_jax.files import create, is_remote, read_bytes, size_of
from llama2_jax.text.tokenizer import Tokenizer

PLAIN = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}  # GGUF's name -> ours
HEADER_BYTES = 2**25  # shape, tokenizer and the list of tensors take no more
QUANTISED = 'q8_0'  # 32 numbers of 8 bits share a scale


def import_gguf() -> Any:
    """The module.

    Raises:
      UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError('The gguf library is needed for .gguf files: pip install gguf.') from None
    return gguf


def open_gguf(path: Path) -> Source:
    """Opens a .gguf file; quantised tensors are read as float32.

    Raises:
      UserError: the file is damaged, of another architecture, or a tensor is missing, unknown or of another shape or kind.
    """
    gguf = import_gguf()
    try:
        with _mappable(path) as file:
            reader = gguf.GGUFReader(file)
    except (ValueError, OSError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise UserError(f'{path} is damaged, or not a GGUF file ({str(error)[:120]}).') from None
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith('tokenizer.')}
    if fields.get('split.count', 1) > 1:
        raise UserError(f'{path} is one of {fields["split.count"]} parts: join them first (llama-gguf-split --merge).')
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    found, size = {}, size_of(path)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        dtype = DTYPES[PLAIN.get(tensor.tensor_type.name, 'float32')]
        found[tensor.name] = Stored(path, int(tensor.data_offset), shape, dtype)
        if int(tensor.data_offset + tensor.n_bytes) > size:
            raise UserError(f'{path} is cut short: tensor {tensor.name!r} is missing or incomplete.')
    if 'token_embd.weight' not in found:
        raise UserError(f"{path}: tensor 'token_embd.weight' is missing.")
    config = _read_fields(path, fields, found['token_embd.weight'].shape[0])
    found.setdefault('output.weight', found['token_embd.weight'])  # tied
    types.setdefault('output.weight', types['token_embd.weight'])
    wanted = their_names(config, 'head_DV', 'gguf')
    check_tensors(found, wanted, config, 1, path)
    names = {key: name for name, key in wanted.items()}
    kinds = {name: gguf.GGMLQuantizationType[kind] for name, kind in types.items()}

    def read(name: str, layer: int | None) -> np.ndarray:
        theirs = names[name, layer]
        matrix = _dequantised(found[theirs], kinds[theirs], gguf)
        return from_theirs(name, matrix, config, 'gguf')

    # llama.cpp wants the norms' scales in float32, whatever the matrices are: where nothing is lost, theirs is the dtype.
    matrices = {types[name] for name, (ours, _) in wanted.items() if len(their_shape(ours, config)) > 1}
    dtype = DTYPES[PLAIN.get(matrices.pop(), 'float32')] if len(matrices) == 1 else DTYPES['float32']
    vectors = [stored.read() for stored in found.values() if len(stored.shape) == 1]
    if any(not np.array_equal(vector.astype(dtype).astype(vector.dtype), vector) for vector in vectors):
        dtype = DTYPES['float32']
    provenance = {'stage': 'convert', 'parent': str(path), 'step': None}
    return Source(path, 'gguf', config, dtype, 'head_DV', read, partial(_tokenizer_model, path, reader), provenance)


@contextlib.contextmanager
def _mappable(path: Path) -> Iterator[str]:
    """A file that the library can map: of one in a bucket its beginning, with a hole where the numbers are."""
    if not is_remote(path):
        yield str(path)
        return
    with tempfile.NamedTemporaryFile() as file:
        size = size_of(path)
        file.write(read_bytes(path, 0, min(size, HEADER_BYTES)))
        file.truncate(size)
        file.flush()
        yield file.name


def _dequantised(stored: Stored, kind: Any, gguf: Any) -> np.ndarray:
    if kind.name in PLAIN:
        return stored.read()
    if len(stored.shape) == 1:
        raise UserError(f'{stored.path} holds a vector of type {kind.name}, which is not handled.')
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = stored.shape
    raw = read_bytes(stored.path, stored.offset, rows * columns // block * size)
    try:
        return gguf.quants.dequantize(raw.reshape(rows, -1), kind).astype(np.float32, copy=False)
    except NotImplementedError:
        raise UserError(f'{stored.path} holds tensors of type {kind.name}, which the gguf library cannot dequantise.') from None


def _read_fields(path: Path, fields: dict[str, Any], vocab_size: int) -> ModelConfig:
    architecture = fields.get('general.architecture')
    if architecture != 'llama':
        raise UserError(f'{path}: general.architecture={architecture!r} is not handled, only llama is.')
    try:
        heads, dim = int(fields['llama.attention.head_count']), int(fields['llama.embedding_length'])
        config = ModelConfig(
            vocab_size=vocab_size,
            dim=dim,
            layers=int(fields['llama.block_count']),
            heads=heads,
            kv_heads=int(fields.get('llama.attention.head_count_kv', heads)),
            head_dim=int(fields.get('llama.attention.key_length', dim // heads)),
            hidden=int(fields['llama.feed_forward_length']),
            context=int(fields['llama.context_length']),
            # Stored as float32: 1e-5 comes back as 9.999999747378752e-06.
            norm_eps=float(f'{fields["llama.attention.layer_norm_rms_epsilon"]:.6g}'),
            rope_theta=float(f'{fields.get("llama.rope.freq_base", 10_000.0):.6g}'),
        )
    except KeyError as error:
        raise UserError(f'{path}: field {error.args[0]!r} is missing.') from None
    except (TypeError, ValueError):
        raise UserError(f'{path}: the fields of its shape are not plain numbers.') from None
    allowed = {'rope.dimension_count': config.head_dim, 'attention.value_length': config.head_dim, 'rope.scaling.type': 'none'}
    allowed |= {'expert_count': 0, 'rope.scaling.factor': 1.0, 'rope.scale_linear': 1.0, 'vocab_size': vocab_size}
    for name, only in allowed.items():
        if (value := fields.get(f'llama.{name}', only)) != only:
            raise UserError(f'{path}: llama.{name}={value!r} is not handled; LLaMA 2 has {only!r}.')
    return config


def _tokenizer_model(path: Path, reader: Any) -> bytes:
    """A SentencePiece model of the pieces in the file, with LLaMA 2's settings (recipe B); the original is not in it.

    Raises:
      UserError: the tokenizer is of another kind.
    """

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(f'tokenizer.ggml.{name}')
        return default if found is None else found.contents()

    if field('model') != 'llama':
        raise UserError(f'{path}: its tokenizer is of the kind {field("model")!r}, not SentencePiece as of LLaMA 2 (llama).')
    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in zip(field('tokens'), field('scores'), field('token_type'), strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)  # GGUF numbers the types as SentencePiece does
    spec = model.trainer_spec
    spec.model_type = spec.BPE
    spec.vocab_size, spec.byte_fallback = len(model.pieces), True
    spec.unk_id, spec.bos_id = field('unknown_token_id', 0), field('bos_token_id', 1)
    spec.eos_id, spec.pad_id = field('eos_token_id', 2), -1
    spec.unk_piece, spec.bos_piece, spec.eos_piece = (model.pieces[i].piece for i in (spec.unk_id, spec.bos_id, spec.eos_id))
    spec.split_digits = spec.allow_whitespace_only_pieces = True
    model.normalizer_spec.name = 'identity'
    model.normalizer_spec.add_dummy_prefix = bool(field('add_space_prefix', True))
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString(deterministic=True)


def write_gguf(path: Path, model: Source, dtype: np.dtype | str, stream: Stream) -> None:
    """Writes a .gguf file.

    Args:
      path: of the file.
      model: for all but the tensors.
      dtype: of the matrices; QUANTISED quantises them. The norms' scales are float32, as llama.cpp wants them.
      stream: the tensors.

    Raises:
      UserError: rows do not divide into the blocks of a quantised type.
    """
    gguf = import_gguf()
    config = model.config
    wanted = their_names(config, model.head, 'gguf')
    name = QUANTISED.upper() if dtype == QUANTISED else next(kind for kind, ours in PLAIN.items() if ours == dtype.name)
    kind = gguf.GGMLQuantizationType[name]
    writer = gguf.GGUFWriter(None, 'llama')
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if name == 'F32' else gguf.LlamaFileType[f'MOSTLY_{name}'])
    _add_shape(writer, config)
    _add_tokenizer(writer, model.tokenizer(), gguf)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for theirs, (ours, _) in wanted.items():
        shape = their_shape(ours, config)
        if len(shape) == 1:
            writer.add_tensor_info(theirs, shape, np.dtype(np.float32), 4 * shape[0], gguf.GGMLQuantizationType.F32)
            continue
        if shape[-1] % block:
            raise UserError(f'{theirs!r} has rows of {shape[-1]}, and {QUANTISED} takes blocks of {block}: use another --dtype.')
        writer.add_tensor_info(theirs, shape, np.dtype(np.float16), int(np.prod(shape)) // block * size, kind)

    def content(name: str, array: np.ndarray) -> np.ndarray:
        matrix = to_theirs(name, array, config, 'gguf')
        if matrix.ndim == 1:
            matrix = matrix.astype(np.float32, copy=False)
        elif dtype == QUANTISED:
            matrix = gguf.quants.quantize(matrix.astype(np.float32, copy=False), kind)
        return as_bytes(matrix)

    header = io.BytesIO()
    writer.fout, writer.state = [header], gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with create(path) as file:
        matrices = (matrix for _, [matrix] in stream(lambda *parameter: [partial(content, *parameter)]))
        for stored in itertools.chain([header.getbuffer()], matrices):
            file.write(stored)
            file.write(bytes(-len(stored) % gguf.GGUF_DEFAULT_ALIGNMENT))


def _add_shape(writer: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _add_tokenizer(writer: Any, content: bytes, gguf: Any) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    tokenizer = Tokenizer.from_bytes(content)
    writer.add_tokenizer_model('llama')
    writer.add_tokenizer_pre('default')
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([piece.type for piece in model.pieces])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    writer.add_chat_template(CHAT_TEMPLATE)
