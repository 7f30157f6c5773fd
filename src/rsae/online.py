"""Activations without a store: the host runs while an SAE is trained, and nothing is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsae.artefacts import Progress, config_hash
from rsae.harvest import EXCLUSION_RULE, Batch, SinkRule, drop_sinks, run_batch, share_of, text_batches
from rsae.hosts import Host
from rsae.text import PACKING_RULE, Context, Split, text_fingerprint, too_short


class OnlineActivations:
    """What a training loop reads of an ActivationStore, from a host that runs meanwhile.

    Tokens are packed and left out as in a store, and the sink rule is that of a store of the same text. Batches come from a
    buffer: it is filled with the activations of the next contexts (the loop waits), drawn from in random order, and filled
    again; at its end the text starts anew. Who begins where the last one stopped (a loop that has looked at a sample, then trains)
    finds the buffer full. Memory is 2 buffer_tokens d_in bytes.

    Attributes: d_in, hook, sink_rule, mean (its mean: float32 (d_in,)), fingerprint (names the host and what is read).
    """

    def __init__(
        self,
        host: Host,
        hook: str,
        text: str,
        *,
        split: Split = "train",
        context_length: int = 256,
        batch_size: int = 16,
        buffer_tokens: int = 2**18,
        rule_tokens: int = 65536,
        sink_ratio: float = 3.0,
        progress: Progress | None = None,
    ) -> None:
        """Run the host over the first contexts, for the sink rule.

        Args:
            text, split: what `rsae.text.documents` reads.
            batch_size: contexts a forward pass.
            buffer_tokens: about how many tokens are shuffled together (whole batches of contexts).
            rule_tokens: about how many tokens the sink rule is fitted on: the shard_tokens of the store that it is to equal.
            progress: told of the forward passes that a loop waits for.

        Raises:
            ValueError: unknown hook or text; text shorter than one context; nan or inf in the activations.
        """
        self.host, self.hook, self.text = host, host.hook_point(hook).name, text
        self.split: Split = split
        self.context_length, self.batch_size = context_length, batch_size
        pass_tokens = batch_size * context_length
        self._passes = max(1, round(buffer_tokens / pass_tokens))
        self._buffer_tokens = self._passes * pass_tokens
        self._buffer: _Buffer | None = None
        self._progress = progress
        of_rule = max(1, round(rule_tokens / pass_tokens))
        first = [
            run_batch(host, [self.hook], contexts, number)[0].rows["activations"]
            for number, contexts in self._shown("look for sinks", islice(self._once(), of_rule), of_rule)
        ]
        if not first:
            raise ValueError(too_short(text, split, context_length))
        self.sink_rule = SinkRule.fit(torch.cat(first), sink_ratio)
        self.mean = self.sink_rule.mean
        self.d_in = len(self.mean)
        self.fingerprint = config_hash(
            {
                "host": host.fingerprint,
                "dtype": str(host.dtype),
                "hook": self.hook,
                "text": [text, text_fingerprint(text), split],
                "contexts": [context_length, batch_size],
                "buffer_tokens": self._buffer_tokens,
                "sinks": [rule_tokens, sink_ratio],
                "rules": [PACKING_RULE, EXCLUSION_RULE],
            }
        )

    def batches(
        self, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Float[Tensor, "batch_size/world d_in"]]:
        """Endless shuffled float32 batches, fixed by (seed, world): a run that other ranks continue goes on with other rows.

        A buffer is drawn from for as many batches as it would hold with nothing left out, so that where batch k comes from is
        known without running what came before: the few rows that are missing are drawn a second time. `start=k` reads and
        tokenises the text up to there, and runs the host for one buffer. Rank r of `world` runs every world-th batch of contexts,
        fills a buffer of its own, and draws its part of each batch from it.

        Raises:
            ValueError: `world` does not divide `batch_size`; a batch is larger than the buffer; a buffer of nothing but tokens
                that are left out.
        """
        share = share_of(batch_size, rank, world)
        if not 1 <= share <= self._buffer_tokens:
            raise ValueError(
                f"a rank's part of a batch is {share} tokens: expected 1 to {self._buffer_tokens}, what the buffer holds"
            )
        draws = self._buffer_tokens // share
        first, skip = divmod(start, draws)
        stream = islice(self._endless(), rank + world * self._passes * first, None, world)
        buffer, self._buffer = self._buffer, None  # an iterator beside this one makes its own
        buffer = buffer or _Buffer(torch.empty(self._buffer_tokens, self.d_in, dtype=torch.bfloat16))
        try:
            for filling in count(first):
                contexts = islice(stream, self._passes)
                if buffer.of == (rank, world, filling):
                    deque(contexts, maxlen=0)  # read, so that the stream is where it would be
                else:
                    self._fill(buffer, contexts)
                    buffer.of = (rank, world, filling)
                rng = np.random.default_rng([seed, filling])
                order = np.concatenate([rng.permutation(buffer.held) for _ in range(-(-draws * share // buffer.held))])
                for chosen in torch.from_numpy(order[: draws * share]).split(share)[skip:]:
                    yield buffer.rows[chosen].float()
                skip = 0
        finally:
            self._buffer = buffer

    def release(self) -> None:
        """Give the memory of the buffer back; batches that are asked for again fill a new one."""
        self._buffer = None

    def _fill(self, buffer: _Buffer, contexts: Iterable[tuple[int, list[Context]]]) -> None:
        """Run the host over these contexts."""
        buffer.of, buffer.held = None, 0
        for number, some in self._shown("fill the buffer", contexts, self._passes):
            x = self._run(number, some).rows["activations"]
            buffer.rows[buffer.held : buffer.held + len(x)] = x
            buffer.held += len(x)
        if buffer.held == 0:
            raise ValueError(f"no token of {self.text!r} is kept: every one is special or a sink")

    def iterate(self, batch_size: int) -> Iterator[tuple[Float[Tensor, "n d_in"], Int[Tensor, " n"]]]:
        """Once through the text in its order, at most `batch_size` rows at a time: (activations float32, document numbers)."""
        for number, contexts in self._once():
            rows = self._run(number, contexts).rows
            for x, owners in zip(
                rows["activations"].split(batch_size), rows["documents"].split(batch_size), strict=True
            ):
                yield x.float(), owners.long()

    def _shown(
        self, stage: str, passes: Iterable[tuple[int, list[Context]]], n_passes: int
    ) -> Iterator[tuple[int, list[Context]]]:
        """These, told to whoever waits for them."""
        for done, each in enumerate(passes, 1):
            yield each
            if self._progress is not None:
                self._progress(stage, done, n_passes)

    def _run(self, number: int, contexts: list[Context]) -> Batch:
        """A batch of contexts without BOS, special tokens and sinks."""
        [batch] = run_batch(self.host, [self.hook], contexts, number)
        return drop_sinks(batch, self.sink_rule)

    def _once(self) -> Iterator[tuple[int, list[Context]]]:
        """Numbered batches of contexts to the text's end."""
        found = text_batches(self.text, self.split, self.host.tokenizer, self.context_length, self.batch_size)
        for number, contexts, _ in found:
            if contexts:
                yield number, contexts

    def _endless(self) -> Iterator[tuple[int, list[Context]]]:
        while True:
            yield from self._once()


@dataclass
class _Buffer:
    """Rows that batches are drawn from, so many of them, and what they are: (rank, world, number of the filling)."""

    rows: Float[Tensor, "n d_in"]
    held: int = 0
    of: tuple[int, int, int] | None = None
