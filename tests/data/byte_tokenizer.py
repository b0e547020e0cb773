"""A tokenizer whose ids say what they are: 0 <unk>, 1 BOS, 2 EOS, 3 + byte."""

import os
import time

from llama2_jax.text.template import PromptFormat


class ByteTokenizer:
    """The part of `text.tokenizer.Tokenizer` that `data` uses."""

    bos_id, eos_id, prompts = 1, 2, PromptFormat()

    def __init__(self, vocab_size=259):
        self.vocab_size = vocab_size
        self.fingerprint = f'bytes-{vocab_size}'

    def encode_batch(self, texts, bos, eos):
        assert bos
        assert eos
        return [[1, *(byte + 3 for byte in text.encode()), 2] for text in texts]


class DyingTokenizer(ByteTokenizer):
    """Its worker process is killed, as when memory runs out."""

    def encode_batch(self, texts, bos, eos):
        os._exit(9)


class SleepingTokenizer(ByteTokenizer):
    """Its worker processes leave their ids in $PIDS and never finish."""

    def encode_batch(self, texts, bos, eos):
        with open(os.environ['PIDS'], 'a') as file:
            file.write(f'{os.getpid()}\n')
        time.sleep(1000)


def documents(ids):
    """The texts of a stream of documents."""
    assert ids[0] == 1
    assert ids[-1] == 2
    body = [bytes(i - 3 for i in part[:-1]) for part in split_at_bos(ids)]
    return [text.decode() for text in body]


def split_at_bos(ids):
    parts = []
    for i in ids:
        if i == 1:
            parts.append([])
        else:
            parts[-1].append(int(i))
    return parts
