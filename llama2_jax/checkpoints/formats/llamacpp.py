"""GGUF, the one-file format of llama.cpp, through its `gguf` library: weights, shape, tokenizer and chat template."""

import dataclasses
import io
import itertools
import math
from functools import partial
from typing import Any

import numpy as np
from etils.epath import Path
from sentencepiece import sentencepiece_model_pb2

from llama2_jax.checkpoints.formats.gguf_header import Tensor, read_header
from llama2_jax.checkpoints.formats.pieces import NORMAL, Piece, kind_of, make_model
from llama2_jax.checkpoints.names import as_bytes, from_theirs, their_names, their_shape, to_theirs
from llama2_jax.checkpoints.source import DTYPES, Source, Stored, Stream, check_stop_ids, check_tensors, matrix_dtype
from llama2_jax.config import ModelConfig, UserError, check_field, from_dict, shown
from llama2_jax.files import create, read_bytes, size_of
from llama2_jax.text.template import LLAMA2_TEMPLATE, PromptFormat, foreign_format
from llama2_jax.text.tokenizer import Tokenizer

PLAIN = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}  # GGUF's name -> ours
QUANTISED = 'q8_0'  # 32 numbers of 8 bits share a scale
MAX_PARTS = 1000
# Fields of a file, and ours.
SHAPE = {
    'llama.embedding_length': 'dim',
    'llama.block_count': 'layers',
    'llama.attention.head_count': 'heads',
    'llama.attention.head_count_kv': 'kv_heads',
    'llama.attention.key_length': 'head_dim',
    'llama.feed_forward_length': 'hidden',
    'llama.context_length': 'context',
    'llama.attention.layer_norm_rms_epsilon': 'norm_eps',
    'llama.rope.freq_base': 'rope_theta',
}
OPTIONAL = ('llama.attention.head_count_kv', 'llama.attention.key_length', 'llama.rope.freq_base')


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
    fields, tensors = _read_parts(path)
    found, kinds = {}, {}
    for name, tensor in tensors.items():
        if tensor.kind not in gguf.GGML_QUANT_SIZES:
            raise UserError(f'{tensor.path}: tensor {shown(name)} is of the unknown type {tensor.kind}.')
        kinds[name] = gguf.GGMLQuantizationType(tensor.kind)
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        if tensor.shape[-1] % block or tensor.offset + math.prod(tensor.shape) // block * size > size_of(tensor.path):
            raise UserError(f'{tensor.path} is cut short: tensor {shown(name)} is missing or incomplete.')
        found[name] = Stored(tensor.path, tensor.offset, tensor.shape, DTYPES[PLAIN.get(kinds[name].name, 'float32')])
    if 'token_embd.weight' not in found:
        raise UserError(f"{path}: tensor 'token_embd.weight' is missing.")
    config = _read_fields(path, fields, found['token_embd.weight'].shape[0])
    found.setdefault('output.weight', found['token_embd.weight'])  # tied
    kinds.setdefault('output.weight', kinds['token_embd.weight'])
    wanted = their_names(config, 'head_DV', 'gguf')
    check_tensors(found, wanted, config, 1, path)
    names = {key: name for name, key in wanted.items()}

    def read(name: str, layer: int | None) -> np.ndarray:
        theirs = names[name, layer]
        matrix = _dequantised(found[theirs], kinds[theirs], gguf)
        return from_theirs(name, matrix, config, 'gguf')

    # llama.cpp wants the norms' scales in float32, whatever the matrices are.
    matrices = {DTYPES[PLAIN.get(kinds[name].name, 'float32')] for name, stored in found.items() if len(stored.shape) > 1}
    vectors = [_dequantised(stored, kinds[name], gguf) for name, stored in found.items() if len(stored.shape) == 1]
    provenance = {'stage': 'convert', 'parent': str(path), 'step': None}
    tokenizer, stop_ids = partial(_tokenizer_model, path, fields), _stop_ids(path, fields, config.vocab_size)
    prompts, dtype = foreign_format(fields.get('tokenizer.chat_template'), path.stem, str(path)), matrix_dtype(matrices, vectors)
    return Source(path, 'gguf', config, dtype, 'head_DV', read, tokenizer, provenance, stop_ids, prompts=prompts)


def _read_parts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields and tensors of a file, or of the parts that llama-gguf-split made of one, of which `path` is the first."""
    fields, tensors = read_header(path)
    count, number = fields.get('split.count', 0), fields.get('split.no', 0)
    if not isinstance(count, int) or not isinstance(number, int) or not 0 <= count <= MAX_PARTS:
        raise UserError(f'{path}: split.no={shown(number)} of split.count={shown(count)} is not a part of a model.')
    if count <= 1:
        return fields, tensors
    end = f'-00001-of-{count:05d}.gguf'
    if number or not path.name.endswith(end):
        raise UserError(f'{path} is part {number + 1} of {count}: give the first part, whose name ends in {end}.')
    for index in range(2, count + 1):
        part = path.with_name(f'{path.name.removesuffix(end)}-{index:05d}-of-{count:05d}.gguf')
        if not part.exists():
            raise UserError(f'{part} is missing: {path.name} is the first of {count} parts, which must lie beside each other.')
        for name, tensor in read_header(part)[1].items():
            if name in tensors:
                raise UserError(f'{part}: tensor {shown(name)} is also in {tensors[name].path.name}.')
            tensors[name] = tensor
    return fields, tensors


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
        raise UserError(f'{path}: general.architecture={shown(architecture)} is not handled, only llama is.')
    of = {field.name: field for field in dataclasses.fields(ModelConfig)}
    values: dict[str, Any] = {'vocab_size': vocab_size}
    for theirs, ours in SHAPE.items():
        if theirs in fields:
            check_field(f'{path}: {theirs}', fields[theirs], of[ours])
            # Numbers are stored as float32: 1e-5 comes back as 9.999999747378752e-06.
            values[ours] = float(f'{fields[theirs]:.6g}') if of[ours].type is float else fields[theirs]
        elif theirs not in OPTIONAL:
            raise UserError(f'{path}: field {theirs!r} is missing.')
    values = {'kv_heads': values['heads'], 'head_dim': values['dim'] // values['heads']} | values
    config = from_dict(ModelConfig, values, str(path))
    allowed = {'rope.dimension_count': config.head_dim, 'attention.value_length': config.head_dim, 'rope.scaling.type': 'none'}
    allowed |= {'expert_count': 0, 'rope.scaling.factor': 1.0, 'rope.scale_linear': 1.0, 'vocab_size': vocab_size}
    for name, only in allowed.items():
        if (value := fields.get(f'llama.{name}', only)) != only:
            raise UserError(f'{path}: llama.{name}={shown(value)} is not handled; LLaMA 2 has {only!r}.')
    return config


def _stop_ids(path: Path, fields: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """EOS and the end of a turn, where the file names one."""
    ids = [fields.get(f'tokenizer.ggml.{name}_token_id') for name in ('eos', 'eot')]
    return check_stop_ids(f'{path}: tokenizer.ggml.eos_token_id or eot_token_id', [i for i in ids if i is not None], vocab_size)


def _tokenizer_model(path: Path, fields: dict[str, Any]) -> bytes:
    """A SentencePiece model of the pieces in the file, with LLaMA 2's settings (recipe B); the original is not in it.

    Raises:
      UserError: the tokenizer is of another kind or damaged.
    """

    def field(name: str, default: Any = None) -> Any:
        return fields.get(f'tokenizer.ggml.{name}', default)

    if field('model') != 'llama':
        raise UserError(f'{path}: its tokenizer is of the kind {shown(field("model"))}, not SentencePiece as of LLaMA 2 (llama).')
    pieces = field('tokens', [])
    ids = {name: field(f'{name}_token_id', default) for name, default in (('unknown', 0), ('bos', 1), ('eos', 2))}
    for name, number in ids.items():
        if not isinstance(number, int) or not 0 <= number < len(pieces):
            raise UserError(f'{path}: tokenizer.ggml.{name}_token_id={shown(number)} is none of its {len(pieces)} pieces.')
    kinds, scores = field('token_type', [kind_of(str(piece)) for piece in pieces]), field('scores', [0.0] * len(pieces))
    try:
        listed = [Piece(*piece) for piece in zip(pieces, scores, [kind or NORMAL for kind in kinds], strict=True)]
        return make_model(listed, *ids.values(), add_space=bool(field('add_space_prefix', True)))
    except (TypeError, ValueError):
        raise UserError(f'{path}: its pieces, their scores and their types do not belong together.') from None


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
    _add_tokenizer(writer, model.tokenizer(), model.stop_ids, model.prompts)
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


def _add_tokenizer(writer: Any, content: bytes, stop_ids: tuple[int, ...], prompts: PromptFormat) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    tokenizer = Tokenizer.from_bytes(content)
    writer.add_tokenizer_model('llama')
    writer.add_tokenizer_pre('default')
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([piece.type for piece in model.pieces])
    writer.add_bos_token_id(tokenizer.bos_id)
    eos, *others = stop_ids or (tokenizer.eos_id,)
    writer.add_eos_token_id(eos)
    if others:  # llama.cpp has two names for what ends a text, and no list
        writer.add_eot_token_id(others[0])
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    if prompts.chat:
        writer.add_chat_template(prompts.template or LLAMA2_TEMPLATE)
