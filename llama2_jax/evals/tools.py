"""What grading may need besides an answer: a place to run programs, and classifiers of texts; each is there if asked for."""

import dataclasses
from collections.abc import Callable, Sequence

Classifier = Callable[[Sequence[tuple[str, str]]], list[float]]  # (prompt, answer) pairs -> a probability each


@dataclasses.dataclass(frozen=True)
class Tools:
    """What grading may use.

    Attributes:
      run_program: runs a Python program in the sandbox; its outcome ('passed', or what went wrong).
      refuses: the probability that an answer declines.
      toxic, true, informative: probabilities, where a classifier was given.
    """

    run_program: Callable[[str], str] | None = None
    refuses: Classifier | None = None
    toxic: Classifier | None = None
    true: Classifier | None = None
    informative: Classifier | None = None
