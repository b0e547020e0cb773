"""A tokenizer for models with random weights: ids 3, 4, 5 … are the letters a, b, c …, and BOS and EOS are nothing."""


class Letters:
    unk_id, bos_id, eos_id, stop_ids = 0, 1, 2, ()

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text, bos, eos):
        return [1] * bos + [ord(letter) - 94 for letter in text] + [2] * eos

    def decode(self, ids):
        return ''.join(chr(94 + token) for token in ids if token > 2)
