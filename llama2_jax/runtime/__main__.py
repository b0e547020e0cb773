"""Preflight, to be run on every host of a pod before a long run, or on a laptop.

python -m llama2_jax.runtime check [DIRECTORY …]

A directory, which may be a gs:// address, is one that every host must be able to write to. On several hosts
LLAMA2_JAX_COORDINATOR is set as for training; LLAMA2_JAX_TIMEOUT=60 waits a minute for hosts instead of ten.
"""

import sys

from llama2_jax.config import UserError
from llama2_jax.runtime import user_errors
from llama2_jax.runtime.check import check

if __name__ == '__main__':
    with user_errors():
        if sys.argv[1:2] != ['check']:
            raise UserError('Usage: python -m llama2_jax.runtime check [DIRECTORY …]')
        check(sys.argv[2:])
