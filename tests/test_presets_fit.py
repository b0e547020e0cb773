"""The slice that each preset of a real size names was compiled for, by both libtpus, and the program fits its chips."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from llama2_jax.runtime import CHIPS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'experiments'))
RESULTS = json.loads((ROOT / 'benchmarks' / 'tpu_programs.json').read_text())
COMPILERS = {'libtpu 0.0.42.1', 'libtpu 0.0.50.1'}  # of the two lines of versions
MEMORY = {chip.name: chip.memory for chip in CHIPS.values()}


def presets():
    for stage in ('pretrain', 'sft', 'reward_model', 'dpo', 'ppo'):
        for name, preset in importlib.import_module(stage).PRESETS.items():
            if re.search(r'_\d+b', name):
                yield stage, name, preset


@pytest.mark.parametrize(('stage', 'name', 'preset'), list(presets()), ids=lambda value: value if isinstance(value, str) else '')
def test_it_fits_the_slice_that_its_docstring_names(stage, name, preset):
    topology = re.search(r'v\d\w+:[\dx]+', preset.__doc__)[0]
    cell = f'{stage} {name.replace("_safety", "_helpfulness")} {topology}'  # the same program with another term in the loss
    assert RESULTS[cell].keys() >= COMPILERS
    for compiler in COMPILERS:
        assert RESULTS[cell][compiler]['memory'] < MEMORY[topology.partition(':')[0]]


def test_no_compiled_cell_was_refused():
    assert not [cell for cell, compilers in RESULTS.items() for figures in compilers.values() if 'refused' in figures]
