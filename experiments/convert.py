"""Converts a model between formats, or compares two models: a model directory, Hugging Face's, Meta's, or a .gguf file.

python experiments/convert.py --input=Llama-2-7b-hf --output=llama2-7b
python experiments/convert.py --input=run/model --output=out-hf --to=hf --dtype=bfloat16
python experiments/convert.py --input=run/model --output=out-hf --to=hf --verify
python experiments/convert.py --input=run/model --output=out-pth --to=meta --shards=8
python experiments/convert.py --input=run/model --output=model.gguf --to=gguf --dtype=q8_0
python experiments/convert.py --input=Llama-2-7b-hf --adapter=run/adapter --output=merged
python experiments/convert.py --input=run/model --against=out-hf
"""

import sys

from absl import flags
from common import tool
from tqdm import tqdm

from llama2_jax.checkpoints.convert import FORMS, bytes_of, compare, convert
from llama2_jax.checkpoints.formats.llamacpp import QUANTISED
from llama2_jax.checkpoints.formats.peft import with_adapter
from llama2_jax.checkpoints.load import open_model
from llama2_jax.checkpoints.source import DTYPES
from llama2_jax.checkpoints.verify import against_transformers
from llama2_jax.config import UserError
from llama2_jax.files import check_writable
from llama2_jax.text.printable import printable

INPUT = flags.DEFINE_string('input', None, 'Model to read; its format is recognised.', required=True)
OUTPUT = flags.DEFINE_string('output', None, 'Directory to write, or file for gguf; must not exist.')
TO = flags.DEFINE_enum('to', 'orbax', FORMS, 'Format to write; orbax is the model directory of this package.')
DTYPE = flags.DEFINE_enum(
    'dtype', None, [*DTYPES, QUANTISED], "Dtype of the parameters; the input's by default. q8_0: gguf only."
)
ADAPTER = flags.DEFINE_string('adapter', None, 'Directory of a LoRA adapter (peft or our own) to merge into the input.')
KEEP_PADDING = flags.DEFINE_bool(
    'keep_padding', False, 'Keep the rows of the vocabulary that the tokenizer has no piece for; by default they are cut.'
)
SHARDS = flags.DEFINE_enum('shards', '1', ['1', '2', '4', '8'], 'Model-parallel shards, for meta.')
AGAINST = flags.DEFINE_string('against', None, 'Compare the input with this model: weights, and logits where memory allows.')
VERIFY = flags.DEFINE_bool('verify', False, 'With --to=hf: load the result with transformers, and compare what it computes.')

TOLERANCE = 1e-3  # of logits in float32


def run() -> None:
    """Converts or compares; exit code 1 where two models differ."""
    if bool(OUTPUT.value) == bool(AGAINST.value):
        raise UserError('Give either --output (to convert) or --against (to compare).')
    if OUTPUT.value:
        check_writable('--output', OUTPUT.value, directory=TO.value != 'gguf')
    if VERIFY.value and (not OUTPUT.value or TO.value != 'hf'):
        raise UserError('--verify belongs to --output=DIR --to=hf.')
    if ADAPTER.value and (VERIFY.value or AGAINST.value):
        raise UserError('--adapter belongs to --output=…; compare what was written then.')
    source = open_model(INPUT.value, KEEP_PADDING.value)
    if ADAPTER.value:
        source = with_adapter(source, ADAPTER.value)
    for note in source.notes:
        print(printable(note))
    with tqdm(total=bytes_of(source), unit='B', unit_scale=True, disable=None) as bar:
        if OUTPUT.value:
            convert(source, OUTPUT.value, TO.value, DTYPE.value, int(SHARDS.value), bar.update)
        else:
            result = compare(source, open_model(AGAINST.value), bar.update)
    if OUTPUT.value:
        print(printable(f'{INPUT.value} ({source.form}) is written to {OUTPUT.value} ({TO.value}).'))
        if VERIFY.value:
            difference = against_transformers(source, OUTPUT.value)
            print(f'transformers loads it, and what it computes differs by up to {difference:.3g}.')
            if not DTYPE.value and difference > TOLERANCE:
                sys.exit(f'That is more than {TOLERANCE}, which rounding does not explain.')
        return
    for (name, layer), difference in result.differences.items():
        print(f'{name}{"" if layer is None else f" of layer {layer}"}: differs by up to {difference:.3g}')
    compared = f'differ by up to {result.logits:.3g}' if result.logits is not None else f'not compared, {result.reason}'
    print(printable(f'Logits: {compared}.'))
    if result.differences:
        sys.exit(f'{len(result.differences)} tensors differ.')
    print('All weights are equal.')


if __name__ == '__main__':
    tool(run)
