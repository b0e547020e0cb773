"""Text from a model, for people, rollouts and evaluations: requests in, samples out, many at a time.

Each row of a batch draws tokens by itself, in a loop on the devices (`inference.decode`). As rows finish, others take their
places (`inference.slots`), and nothing is compiled for that: there are few numbers of rows, few lengths of the cache, few sizes
of prompts.
"""

import contextlib
import dataclasses
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from llama2_jax.config import SEED, Config, UserError, between
from llama2_jax.inference import decode, likelihood
from llama2_jax.inference.slots import Slots, shards
from llama2_jax.mesh import decoding_mesh
from llama2_jax.model.llama import ComputeConfig, Llama
from llama2_jax.text.tokenizer import Tokenizer

REFILL = 8  # of the rows, one in so many must be done before their places are filled again
TAIL = 8  # tokens of a prompt that tell how the text goes on from it


@dataclasses.dataclass(frozen=True)
class Request(Config):
    """A prompt and how to continue it.

    Attributes:
      token_ids: Ids of the prompt, BOS included.
      max_new_tokens: Maximum number of new tokens; the model's context is a limit, too.
      num_samples: Number of independent continuations.
      temperature: Sampling temperature; 0: the best token each time.
      top_p: Samples from the most likely tokens that make up this probability (Meta's rule, recipe J).
      top_k: Samples from this many tokens at most; 0: no limit.
      seed: Random seed. A sample is a function of it, its number and the prompt, whatever runs beside it.
      stop: Strings that end a sample; the text ends before them.
      stop_token_ids: Ids that end a sample besides EOS; the text ends before them, too.
      answer: Whether the text is a turn of a dialog, without the space between prompt and text.
    """

    token_ids: Sequence[int]
    max_new_tokens: int = between(256, 1, 2**31 - 1)
    num_samples: int = between(1, 1, 100_000)
    temperature: float = between(0.6, 0, 100)
    top_p: float = between(0.9, 0, 1)
    top_k: int = between(0, 0, 2**31 - 1)
    seed: int = SEED
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    answer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.stop):
            raise UserError('stop holds an empty text: leave it out.')
        if len(self.stop_token_ids) >= decode.STOP_IDS // 2:
            raise UserError(f'stop_token_ids has {len(self.stop_token_ids)} ids: {decode.STOP_IDS // 2 - 1} are possible.')
        if not self.token_ids:
            raise UserError('The prompt is empty: begin it with BOS at least.')


@dataclasses.dataclass(frozen=True)
class Sample:
    """One continuation.

    Attributes:
      text: Text after the prompt, without the stop.
      token_ids: New tokens, up to the one that ends the sample.
      logprobs: Log-probability of each token at the request's temperature (1 if that is 0), before top-p and top-k; float32.
      stop_reason: 'eos'; 'stop' for a stop string or id; 'length' for max_new_tokens or the end of the context.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    stop_reason: Literal['eos', 'stop', 'length']


@dataclasses.dataclass
class _Row:
    """A sample that is being drawn."""

    index: int  # of the request
    request: Request
    number: int  # of the sample
    limit: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sample: Sample | None = None  # once it has ended


class Engine:
    """A model laid out for decoding, and its cache. One generation runs at a time.

    Args:
      model: parameters, on any mesh or on the host, which are copied; or weights that are laid out on `mesh` already.
      tokenizer: the model's.
      mesh: for decoding (`mesh.decoding_mesh`); by default of all devices.
      batch_size: sequences at a time, at most.
      dtype: the compute dtype; by default the platform's.
      int8: weights in eight bits, which a little of the quality pays for.
    """

    def __init__(
        self,
        model: Llama | decode.Weights,
        tokenizer: Tokenizer,
        *,
        mesh: Mesh | None = None,
        batch_size: int = 32,
        dtype: str | None = None,
        int8: bool = False,
    ):
        self.config, self.tokenizer = model.config, tokenizer
        self._mesh, self._int8 = mesh or decoding_mesh(model.config), int8
        self._dtype = dtype or ComputeConfig().on(self._mesh.devices.flat[0].platform).dtype
        self._batch_size = max(batch_size, shards(self._mesh))
        self._busy = False
        self.load(model)

    def load(self, model: Llama | decode.Weights) -> None:
        """Takes the parameters of another model of the same shape: those of the latest policy, say."""
        laid_out = isinstance(model, decode.Weights)
        self._weights = model if laid_out else decode.shard_for_decoding(model, self._mesh, self._dtype, self._int8)
        self._slots: Slots | None = None

    def generate(self, requests: Iterable[Request]) -> Iterator[list[Sample]]:
        """The samples of each request, in order.

        Raises:
          UserError: a prompt that the model cannot continue; the request's number is named.
        """
        ended: dict[int, list[Sample | None]] = {}
        following = 0
        for row in self._run(requests, decode.CHUNK):
            if row.sample:
                ended.setdefault(row.index, [None] * row.request.num_samples)[row.number] = row.sample
            while following in ended and all(ended[following]):
                yield ended.pop(following)
                following += 1

    def stream(self, request: Request) -> Generator[str, None, Sample]:
        """The text of one sample, piece by piece as it comes; the generator returns the sample.

        Raises:
          UserError: the model cannot continue the prompt.
        """
        shown = 0
        for row in self._run([dataclasses.replace(request, num_samples=1)], 1):
            text = row.sample.text if row.sample else self._text(request, row.token_ids)
            # What may yet become another character or the beginning of a stop is not shown.
            end = len(text) if row.sample else len(text.rstrip('\N{REPLACEMENT CHARACTER}')) - _begun(text, request.stop)
            if end > shown:
                yield text[shown:end]
                shown = end
        return row.sample

    def log_likelihoods(self, questions: Sequence[Sequence[likelihood.Choice]]) -> Iterator[tuple[int, list[float]]]:
        """For each question, how likely each of its choices is: the sum of the log-probabilities of its tokens, float32.

        Args:
          questions: lists of choices, (ids of a context, ids of its continuation); choices may share their contexts or not.

        Yields:
          A question's number and the sums of its choices, in whatever order is quick.

        Raises:
          UserError: a choice that the model cannot read; the question's number is named.
        """
        for index, choices in enumerate(questions):
            for context, ids in choices:
                if not context or not ids:
                    raise UserError(f'Question {index}: a choice needs a context, BOS at least, and a continuation.')
                self.check(Request([*context, *ids[:-1]]), f'Question {index}')
        with self._exclusive():
            self._open(min(self._batch_size, likelihood.ROWS * shards(self._mesh)))
            yield from likelihood.log_likelihoods(self._slots, self._mesh.devices.flat[0], questions)

    def check(self, request: Request, name: str) -> None:
        """Raises a UserError, with the name of the request, where the model cannot continue its prompt."""
        length, context = len(request.token_ids), self.config.context
        if length >= context:
            raise UserError(f'{name}: the prompt has {length} tokens, and a context of {context} leaves no room to continue it.')
        if bad := [token for token in request.token_ids if not 0 <= token < self.config.vocab_size]:
            raise UserError(f'{name}: token id {bad[0]} is outside the vocabulary of {self.config.vocab_size}.')

    def _run(self, requests: Iterable[Request], steps: int) -> Iterator[_Row]:
        """Every row after each call that went on with it, by up to `steps` tokens, whether it has ended or not."""
        with self._exclusive():
            queue = self._rows(requests)
            waiting = deque(islice(queue, self._batch_size))
            live: list[_Row | None] = [None] * self._open(len(waiting))
            while waiting or any(live):
                free = [slot for slot, row in enumerate(live) if row is None]
                rows = [waiting.popleft() for _ in free if waiting]
                prompts = [np.asarray(row.request.token_ids[:-1], np.int32) for row in rows]
                for slot, row in zip(self._slots.place(prompts, free), rows, strict=True):
                    live[slot] = row
                waiting.extend(islice(queue, len(live) - len(waiting)))
                # While others wait, the call ends when there is something to gain from filling places again.
                quota = max(len(live) // REFILL, 1) if waiting else sum(row is not None for row in live)
                drawn = self._slots.advance(self._describe(live), steps, quota)
                for slot, row in enumerate(live):
                    if row is not None:
                        self._extend(row, *(x[slot] for x in drawn))
                        live[slot] = None if row.sample else row
                        yield row

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One user of the cache at a time."""
        if self._busy:
            raise RuntimeError('the engine is generating already')
        self._busy = True
        try:
            yield
        except BaseException:  # an interrupted call may have used the cache up
            self._slots = None
            raise
        finally:
            self._busy = False

    def _rows(self, requests: Iterable[Request]) -> Iterator[_Row]:
        for index, request in enumerate(requests):
            self.check(request, f'Request {index}')
            limit = min(request.max_new_tokens, self.config.context - len(request.token_ids))
            for number in range(request.num_samples):
                yield _Row(index, request, number, limit)

    def _open(self, rows: int) -> int:
        """Makes sure of a cache for so many rows, or a few more: a power of two in each shard. Returns how many it has."""
        parts = shards(self._mesh)
        a_shard = 1 << (-(-rows // parts) - 1).bit_length() if rows > parts else 1
        rows = min(a_shard, self._batch_size // parts) * parts
        if self._slots is None or len(self._slots.held) != rows:
            self._slots = None  # the old one goes before the new one comes
            self._slots = Slots(self._weights, self._mesh, rows)
        return rows

    def _describe(self, live: list[_Row | None]) -> decode.Rows:
        """The rows for the devices."""

        def array(dtype, value, default=0):
            return np.array([default if row is None else value(row) for row in live], dtype)

        stops = np.full((len(live), decode.STOP_IDS), -1, np.int32)
        for stop, row in zip(stops, live, strict=True):
            if row is not None:
                ids = (self.tokenizer.eos_id, *self.tokenizer.stop_ids, *row.request.stop_token_ids)
                stop[: len(ids)] = ids
        return decode.Rows(
            token_B=array(np.int32, lambda row: (row.token_ids or row.request.token_ids)[-1]),
            length_B=array(np.int32, lambda row: len(row.request.token_ids) + len(row.token_ids) - 1),
            live_B=array(bool, lambda row: True, default=False),
            drawn_B=array(np.int32, lambda row: len(row.token_ids)),
            limit_B=array(np.int32, lambda row: row.limit),
            seed_B=array(np.uint32, lambda row: row.request.seed),
            sample_B=array(np.uint32, lambda row: row.number),
            temperature_B=array(np.float32, lambda row: row.request.temperature),
            top_p_B=array(np.float32, lambda row: row.request.top_p),
            top_k_B=array(np.int32, lambda row: row.request.top_k),
            stop_BL=stops,
        )

    def _extend(self, row: _Row, tokens: np.ndarray, logprobs: np.ndarray, count: int) -> None:
        """Adds what was drawn, and sees whether the sample has ended."""
        before, request = len(row.token_ids), row.request
        row.token_ids += tokens[:count].tolist()
        row.logprobs += logprobs[:count].tolist()
        if request.stop and (cut := self._find_stop(request, row.token_ids, before)):
            length, text = cut
            row.sample = Sample(text, row.token_ids[:length], row.logprobs[:length], 'stop')
        elif row.token_ids[-1] in (*(ends := (self.tokenizer.eos_id, *self.tokenizer.stop_ids)), *request.stop_token_ids):
            reason = 'eos' if row.token_ids[-1] in ends else 'stop'
            row.sample = Sample(self._text(request, row.token_ids[:-1]), row.token_ids, row.logprobs, reason)
        elif len(row.token_ids) == row.limit:
            row.sample = Sample(self._text(request, row.token_ids), row.token_ids, row.logprobs, 'length')

    def _find_stop(self, request: Request, token_ids: list[int], before: int) -> tuple[int, str] | None:
        """With how many tokens a stop string is complete, and the text up to it; None while there is none."""
        if not any(stop in self._text(request, token_ids) for stop in request.stop):
            return None
        for length in range(before + 1, len(token_ids) + 1):
            text = self._text(request, token_ids[:length])
            if found := [place for stop in request.stop if (place := text.find(stop)) >= 0]:
                return length, text[: min(found)]
        return None

    def _text(self, request: Request, token_ids: Sequence[int]) -> str:
        """What new tokens add to the text of the prompt."""
        end = list(request.token_ids[-TAIL:])
        # A prompt may end, and be completed, in the middle of a character.
        text = self.tokenizer.decode([*end, *token_ids])
        text = text[len(os.path.commonprefix([text, self.tokenizer.decode(end)])) :]
        return text.removeprefix(' ') if request.answer else text


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
