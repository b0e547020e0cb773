"""Trains a tokenizer on documents: workdir/tokenizer.model, with LLaMA 2's SentencePiece settings."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

from etils.epath import Path

from llama2_jax import runtime
from llama2_jax.checkpoints.directory import check_vocabulary
from llama2_jax.config import Config, Names, UserError, between
from llama2_jax.data import sources
from llama2_jax.data.mixing import Component, parse_mixture
from llama2_jax.runtime import hosts
from llama2_jax.runtime.workdir import open_run, record_inputs
from llama2_jax.text.tokenizer import FILE_NAME, NoText, Tokenizer, train_tokenizer

SAMPLE_BYTES = 2_000_000  # of each source, to measure compression


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Config):
    """What to train on and how many pieces to learn; everything else is as in LLaMA 2's own model (recipe B)."""

    source: Annotated[str, Names('mixture', 'documents')] = 'toy:documents'  # one source, or several by commas; each is read once
    vocab_size: int = between(1024, 260, 2**20)  # the 259 of <unk>, <s>, </s> and the bytes included
    max_sentences: int = between(1_000_000, 101, 2**31 - 1)  # of more lines than this a random sample is used


def run(config: TokenizerConfig, workdir: str) -> Tokenizer:
    """Trains, or finds what the same command trained before, and prints pieces and compression.

    Raises:
      UserError: a source that cannot be read or has a weight, a vocabulary too large for the text, another config's workdir.
    """
    names = source_names(config)
    home, trained = open_run(workdir, config, (FILE_NAME,))
    path = home / FILE_NAME
    record_inputs(home, {f'source={name}': sources.fingerprint(name) for name in names}, trained)
    if trained:
        runtime.log(f'{path} is already trained; for a new one use another --workdir.')
    elif runtime.is_main_process():
        _train(names, path, config.vocab_size, config.max_sentences)
    runtime.barrier('tokenizer', hosts.DAY)  # it may take hours
    tokenizer = Tokenizer(path)
    runtime.log(f'{path}: {tokenizer.vocab_size} pieces, fingerprint {tokenizer.fingerprint}')
    for name in names:
        runtime.log(f'{name}: {bytes_per_token(tokenizer, name):.2f} bytes per token')
    return tokenizer


def _train(names: list[str], path: Path, *settings: int) -> None:
    """Trains on all documents of the sources; an error names them."""
    try:
        train_tokenizer(documents(names), path, *settings)
    except NoText:
        raise UserError(f'{", ".join(names)}: there is no text to train a tokenizer on.') from None


def source_names(config: TokenizerConfig) -> list[str]:
    """The sources of a config, all found to exist.

    Raises:
      UserError: an unknown source, one without files, or one with a weight or epochs, which mean nothing here.
    """
    names = []
    for component in parse_mixture(config.source):
        if component != Component(component.source):
            raise UserError(f'The tokenizer reads every source once: leave weight and epochs away from {component.source!r}.')
        sources.split(component.source)
        names.append(component.source)
    return names


def documents(names: list[str]) -> Iterator[str]:
    """The documents of all sources, one source after the other."""
    for name in names:
        yield from sources.read_documents(name)


def bytes_per_token(tokenizer: Tokenizer, source: str) -> float:
    """UTF-8 bytes per token (BOS and EOS not counted) over the first `SAMPLE_BYTES` of a source.

    Raises:
      UserError: if there is no text in it.
    """
    size = tokens = 0
    for text in sources.read_documents(source):
        size += len(text.encode())
        tokens += len(tokenizer.encode(text, bos=False, eos=False))
        if size >= SAMPLE_BYTES:
            break
    if not tokens:
        raise UserError(f'Source {source} has no text.')
    return size / tokens


def open_tokenizer(path: str, mixture: str, vocab_size: int, own: Path, keep: bool) -> Tokenizer:
    """The tokenizer of a training run; every process calls it.

    Args:
      path: a `tokenizer.model` or a directory that holds one; '' for one of the run's own.
      mixture: what the run's own is trained on.
      vocab_size: the model's.
      own: the file of the run's own.
      keep: there are checkpoints, so that file is used; else it is trained.

    Raises:
      UserError: there are checkpoints and no such file, the vocabulary is not the model's, or nothing can be trained on.
    """
    if not path and keep and not own.exists():
        raise UserError(
            f'{own} is missing, and the checkpoints beside it were trained with it: restore it, or use another --workdir.'
        )
    if not path and not keep and runtime.is_main_process():
        runtime.log(f'Training a tokenizer of {vocab_size:,} pieces on {mixture} …')
        _train([component.source for component in parse_mixture(mixture)], own, vocab_size)
    runtime.barrier('tokenizer', hosts.DAY)  # it may take hours
    tokenizer = Tokenizer(path or own)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer
