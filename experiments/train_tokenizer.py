"""Trains a SentencePiece tokenizer with LLaMA 2's settings; writes workdir/tokenizer.model.

python experiments/train_tokenizer.py --set 'source=text:corpus/*.txt' --workdir=tok
"""

from common import stage

from llama2_jax.stages import tokenizer
from llama2_jax.stages.tokenizer import TokenizerConfig


def tiny() -> TokenizerConfig:
    """1,024 pieces, for the tiny model; without a source, of the toy world.

    python experiments/train_tokenizer.py --workdir=tok

    A laptop, two seconds, about 2.8 bytes per token of the toy world.
    """
    return TokenizerConfig(vocab_size=1024)


def small() -> TokenizerConfig:
    """4,096 pieces, for the small model.

    python experiments/train_tokenizer.py --config=small --set 'source=text:books/*.txt.gz' --workdir=tok

    A laptop, five seconds for 20 MB of text.
    """
    return TokenizerConfig(vocab_size=4096)


def llama2() -> TokenizerConfig:
    """32,000 pieces, as in the paper (p6); give it a source of some hundred megabytes at least.

    python experiments/train_tokenizer.py --config=llama2 --set 'source=jsonl:web/*.jsonl.gz' --workdir=tok

    One machine; the sampled lines are held in memory, so lower max_sentences where the source is larger than that.
    """
    return TokenizerConfig(vocab_size=32_000, max_sentences=200_000_000)


PRESETS = {'tiny': tiny, 'small': small, 'llama2': llama2}

if __name__ == '__main__':
    stage(PRESETS, tokenizer.run)
