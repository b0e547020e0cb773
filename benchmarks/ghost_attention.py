"""What Ghost Attention changes: recall of instructions by turn, before, with the same tuning without it, and with it.

python experiments/ghost_attention.py --workdir=gatt
python benchmarks/ghost_attention.py --ghost=gatt --workdir=gatt-control        # prints a table; recall.png beside it

The control is fine-tuned as the toy preset is, on the same dialogs of the same lengths, but plainly answered: it learns long
contexts, and nothing of instructions in them.
"""

import dataclasses
import json
import random
import sys
from pathlib import Path

from absl import app, flags
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1] / 'experiments'))

import ghost_attention  # noqa: E402 (its folder is no package)

from llama2_jax import runtime  # noqa: E402
from llama2_jax.data.constraints import read_constraints  # noqa: E402
from llama2_jax.stages import ghost, sft  # noqa: E402
from llama2_jax.toy.oracle import Oracle  # noqa: E402

_GHOST = flags.DEFINE_string(
    'ghost', None, 'Working directory of experiments/ghost_attention.py with its toy preset.', required=True
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Working directory of the control.', required=True)


def _plain(messages: list[dict], oracle: Oracle, rng: random.Random) -> list[dict]:
    """The dialog without its instructions, perfectly answered; what is trained stays."""
    plain: list[dict] = []
    for question, answer in zip(messages[1::2], messages[2::2], strict=True):
        plain.append(question)
        plain.append({**answer, 'content': oracle.perfect(oracle.understand(plain), rng)})
    return plain


def _control(config: ghost.GhostConfig, path: Path) -> None:
    """Fine-tunes the control in `path`."""
    oracle, rng = Oracle(), random.Random(0)
    path.mkdir(parents=True, exist_ok=True)
    with (Path(_GHOST.value) / 'dialogs.jsonl').open() as rows, (path / 'dialogs.jsonl').open('w') as file:
        for row in rows:
            file.write(json.dumps({'messages': _plain(json.loads(row)['messages'], oracle, rng)}) + '\n')
    sft.run_within(dataclasses.replace(config.sft, init_from=config.model), path, path / 'dialogs.jsonl')


def _draw(figures: dict[str, dict[int, float]], path: Path) -> None:
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel='turn', ylabel='dialogs that obey', ylim=(-0.03, 1.03))
    for name, by_turn in figures.items():
        axes.plot([int(turn) for turn in by_turn], list(by_turn.values()), label=name, marker='o', markersize=3)
    axes.set_xticks([1, *ghost.TURNS])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(_) -> None:
    """Prints the table of the paper's turns and draws all of them."""
    runtime.start()
    home, path = Path(_GHOST.value), Path(_WORKDIR.value)
    model = json.loads((home / 'config.json').read_text())['model']
    config = dataclasses.replace(ghost_attention.tiny(), model=model)
    before, after = (
        {int(turn): share for turn, share in by_turn.items()}
        for by_turn in json.loads((home / 'recall.json').read_text()).values()
    )
    _control(config, path)
    _, judged = ghost.read_questions(config)
    control = ghost.measure(config, path / 'model', read_constraints(config.constraints), judged)
    figures = {'before': before, 'the same tuning without it': control, 'Ghost Attention': after}
    ghost.print_recall(figures)
    _draw(figures, path / 'recall.png')


if __name__ == '__main__':
    app.run(main)
