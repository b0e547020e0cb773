"""One of several processes, which comes to a barrier or a step, or does not: python hosts_program.py barrier|watch"""

import os
import sys
import time

import jax

from llama2_jax import runtime
from llama2_jax.runtime.hosts import Watch


def main():
    """Process 1 is the one that stays behind."""
    with runtime.user_errors():
        runtime.start()
        runtime.barrier('all begin')
        os.environ['LLAMA2_JAX_TIMEOUT'] = '5'  # only now, as some take long to begin
        late = jax.process_index() == 1
        if sys.argv[1] == 'barrier':
            time.sleep(120 if late else 0)
            runtime.barrier('the roof is on')
        with Watch() as watch:
            watch.at(3)
            time.sleep(0.5)
            watch.at(3 if late else 4)
            time.sleep(8)
        runtime.log('done')
        runtime.barrier('all end')


if __name__ == '__main__':
    main()
