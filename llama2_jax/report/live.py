"""The curves of a run under a notebook's cell, while it trains."""

import html
import threading
from pathlib import Path

from llama2_jax.report.curves import curves
from llama2_jax.report.page import document
from llama2_jax.train.metrics import read_metrics

ROW = 300  # pixels of a row of three charts


class Live:
    """`with Live('run'): stage.run(config, 'run')` shows what `run/metrics.jsonl` holds, every few seconds and at the end."""

    def __init__(self, workdir: str, every: float = 3.0):
        self._path, self._every = Path(workdir) / 'metrics.jsonl', every
        self._over = threading.Event()

    def __enter__(self) -> 'Live':
        from IPython.display import HTML, display

        self._html, self._handle = HTML, display(HTML(''), display_id=True)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self._show()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            self._show()

    def _show(self) -> None:
        charts = curves(read_metrics(self._path)) if self._path.exists() else []
        if charts:
            page = html.escape(document(self._path.parent.name, [f'<div class="charts">{"".join(charts)}</div>']))
            height = -(-len(charts) // 3) * ROW
            frame = f'<iframe srcdoc="{page}" style="width: 100%; height: {height}px; border: 0"></iframe>'
            self._handle.update(self._html(f'<div>{frame}</div>'))
