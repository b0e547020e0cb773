"""What the paper reports (recipe H.7, I.2): in per cent, but for BOLD; in the order 7B, 13B, 34B, 70B."""

from llama2_jax.config import MODELS, ModelConfig
from llama2_jax.evals.tasks import TASKS

SIZES = ('7b', '13b', '34b', '70b')
# Table 22 and the one after it (p50): task -> solved examples -> figures.
BY_SHOTS = {
    'naturalquestions': {
        0: (16.4, 16.1, 25.1, 25.3),
        1: (22.7, 28.0, 30.0, 33.0),
        5: (25.7, 31.2, 32.8, 39.5),
        64: (29.5, 34.6, 39.9, 44.3),
    },
    'triviaqa': {
        0: (65.8, 73.1, 81.0, 82.4),
        1: (68.9, 77.2, 83.3, 85.0),
        5: (72.1, 79.6, 84.5, 87.6),
        64: (73.7, 79.4, 84.6, 87.5),
    },
    'squad': {
        0: (67.2, 72.9, 77.4, 80.7),
        1: (72.3, 72.1, 78.8, 82.6),
        4: (72.6, 70.6, 77.5, 81.9),
        5: (72.5, 71.3, 77.5, 81.9),
    },
    'quac': {0: (39.4, 42.7, 42.9, 42.4), 1: (39.7, 44.8, 44.4, 49.3)},
}
# Table 20 and those beside it (p49-51), Table 44 (p69).
BASE = {
    'mmlu': (45.3, 54.8, 62.6, 68.9),
    'mmlu/humanities': (42.9, 52.8, 59.4, 65.0),
    'mmlu/stem': (36.4, 44.1, 52.1, 58.0),
    'mmlu/social': (51.2, 62.6, 71.8, 80.3),
    'mmlu/other': (52.2, 61.1, 69.2, 74.6),
    'bbh': (32.6, 39.4, 44.1, 51.2),
    'agieval': (29.3, 39.1, 43.4, 54.2),
    'agieval/aqua-rat': (23.2, 21.7, 19.3, 23.2),
    'agieval/logiqa-en': (31.0, 38.1, 40.7, 48.8),
    'agieval/lsat-ar': (23.9, 23.0, 21.3, 25.7),
    'agieval/lsat-lr': (22.4, 41.0, 47.5, 70.2),
    'agieval/lsat-rc': (32.7, 54.6, 62.1, 76.6),
    'agieval/sat-en': (43.2, 62.1, 77.2, 86.9),
    'agieval/sat-en-without-passage': (37.4, 46.1, 49.0, 53.4),
    'agieval/sat-math': (28.2, 27.3, 32.7, 41.8),
    'gsm8k': (14.6, 28.7, 42.2, 56.8),
    'math': (2.5, 3.9, 6.24, 13.5),
    'humaneval': (12.8, 18.3, 22.6, 29.9),
    'humaneval_pass100/pass@100': (45.6, 60.2, 77.2, 89.0),
    'mbpp': (20.8, 30.6, 33.0, 45.0),
    'mbpp_pass80/pass@80': (62.8, 69.0, 76.1, 81.4),
    'naturalquestions': BY_SHOTS['naturalquestions'][5],
    'triviaqa': BY_SHOTS['triviaqa'][5],
    'squad': BY_SHOTS['squad'][0],
    'quac': BY_SHOTS['quac'][0],
    'boolq': (77.4, 81.7, 83.7, 85.0),
    'piqa': (78.8, 80.5, 81.9, 82.8),
    'siqa': (48.3, 50.3, 50.9, 50.7),
    'hellaswag': (77.2, 80.7, 83.3, 85.3),
    'winogrande': (69.2, 72.8, 76.7, 80.2),
    'arc_easy': (75.2, 77.3, 79.4, 80.2),
    'arc_challenge': (45.9, 49.4, 54.5, 57.4),
    'openbookqa': (58.6, 57.0, 58.2, 60.2),
    'commonsenseqa': (57.8, 67.3, 74.3, 78.5),
    'truthfulqa': (33.29, 41.86, 43.45, 50.18),
    'toxigen': (21.25, 26.10, 21.19, 24.60),
    # Table 3 (p8). Its Math is GSM8K alone for 7B and 13B; here is the mean that it announces.
    'group:code': (16.8, 24.5, 27.8, 37.5),
    'group:commonsense': (63.9, 66.9, 69.9, 71.9),
    'group:world': (48.9, 55.4, 58.7, 63.6),
    'group:reading': (61.3, 65.8, 68.0, 69.4),
    'group:math': (8.55, 16.3, 24.2, 35.2),
}
# Chat models: tables 14 and 45 (p31, p70). Academic sets are those of Llama 3's model card, which has no 34B.
CHAT = {
    'truthfulqa': (57.04, 62.18, 67.20, 64.14),
    'toxigen': (0.00, 0.00, 0.02, 0.01),
    'mmlu': (34.1, 47.8, None, 52.9),
    'humaneval': (7.9, 14.0, None, 25.6),
    'gsm8k': (25.7, 41.2, None, 57.5),
    'math': (3.8, 6.7, None, 11.6),
}


def size_of(config: ModelConfig) -> str | None:
    """The paper's model of this shape."""
    shape = (config.dim, config.layers)
    return next((size for size in SIZES if (MODELS[size].dim, MODELS[size].layers) == shape), None)


def reported(name: str, size: str | None, chat: bool, shots: int | None = None) -> float | None:
    """The paper's figure for a row of our table; None where it has none.

    Args:
      name: Of a task, of a group or measure of it ('mmlu/stem'), or 'group:world'.
      size: Of the model, one of SIZES; None of another.
      chat: Whether it is a chat model.
      shots: Solved examples in the prompt; None: as many as the paper's headline figure is of.
    """
    figures = (CHAT if chat else BASE).get(name)
    if shots is not None and name in BY_SHOTS and not chat:
        figures = BY_SHOTS[name].get(shots)
    elif shots is not None and shots != TASKS[name.split('/')[0]].shots:
        figures = None
    return figures[SIZES.index(size)] if figures and size else None
