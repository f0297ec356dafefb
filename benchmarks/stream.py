"""Time, state and memory of one token of a stream, after a thousand to a million tokens.

    python -m benchmarks.stream --json

- seqboat: a language model with a state: 4 layers of width 128, a causal EMA (N 16) and a routed gated attention unit
  (Z 64, H 256, window 128, softmax, rotary). The router's bias gives every layer the requested rate on random tokens.
- recompute: the same model without states: every token computes the last 2,048 again, so later positions all cost the
  same.
- kv_cache_transformer: a pre-norm transformer of the same width and depth, 4 heads, feed-forward 4 x, preallocated keys
  and values. The cache is filled with random numbers instead of a prefill. It has no router, so it is measured once, at
  rate 1.
  Positions whose caches hold more than 200,000 tokens of the batch (cuda: 4,000,000) are not measured.

microseconds_per_token is the median time of one step of the whole batch divided by the batch size. seqboat takes every
requested step, the others as many as fit into 10 seconds, at least 5. The steps at a position start from its state. The
positions alternate, so that other load on the machine affects all of them. At rate 0.1 and batch 1 most steps activate
no token in most layers; the mean is the cost per token of a long stream. peak_megabytes is the peak memory of the
process after one step at the position: resident memory, on cuda allocated memory. Every model, batch and rate
(kv_cache_transformer: also position) runs in a separate process. prefill_tokens_per_second is the speed in chunks with
a state, forward_tokens_per_second that of one stateless call on the same tokens, 65,536 of the batch but at most 16,384
a row.
"""

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.products import stopwatch
from benchmarks.stream_models import (
    CONTEXT,
    DEPTH,
    VOCABULARY,
    WIDTH,
    CachedTransformer,
    Recompute,
    Step,
    Stream,
    compiled,
    language_model,
    set_rates,
)
from sma.model import LanguageModel
from sma.model_output import ModelState
from sma.pytree import map_tensors, tensors
from sma.streams import run_command

MODELS = ("seqboat", "recompute", "kv_cache_transformer")
BATCHES = (1, 16)
RATES = (0.1, 1.0)
POSITIONS = (1_000, 10_000, 100_000, 1_000_000)
# Between two positions the stream advances in small chunks of one size, which divides every position. Large chunks or
# chunks of several sizes would fragment the allocator's memory and raise the peak. Free memory is returned to the
# system after a number of chunks. The measurement of a prefill uses large chunks.
SMALL, LARGE, WARM_UP, GIVE_BACK = 4_000, 16_384, 800, 20
REACH = {"cpu": 200_000, "cuda": 4_000_000}


class Marks:
    """Makes the steps at every position, and takes one of them to measure the peak memory."""

    def __init__(self, options: argparse.Namespace, batch: int, rate: float) -> None:
        self.device, self.batch, self.positions, self.steps = (
            options.device,
            batch,
            sorted(options.position),
            options.steps,
        )
        self.compiled, self.rate = options.compile, rate
        self.active = [0.0] * DEPTH
        self.seen = 0

    @cached_property
    def model(self) -> LanguageModel:
        """The model of seqboat and recompute."""
        model = language_model().to(self.device)
        set_rates(model, self.rate)
        return model

    def ids(self, length: int) -> Tensor:
        """Random tokens."""
        return torch.randint(VOCABULARY, (self.batch, length), device=self.device)

    def seqboat(self) -> Iterator[tuple[Step, int]]:
        """Advance in chunks. The steps continue from a copy of the state, in memory that is allocated first."""
        chunk = max(1, min(1000, SMALL // self.batch, *self.positions))
        state = self.model.init_state(self.batch)
        kept = [map_tensors(torch.clone, state) for _ in self.positions]
        # Warm up the allocator, so that no position is the first to need its memory.
        for number in range(min(WARM_UP, self.positions[-1])):
            state = self._advance(chunk, state)
            if number % GIVE_BACK == 0:
                give_back_memory()
            self.model(self.ids(1), state=kept[0])
        state = state.reset(torch.ones(self.batch, dtype=torch.bool, device=self.device))
        self.seen, self.active = 0, [0.0] * DEPTH
        step_model = compiled(self.model) if self.compiled else self.model
        for position, copy in zip(self.positions, kept, strict=True):
            while self.seen < position:
                state = self._advance(min(chunk, position - self.seen), state)
                if self.seen // chunk % GIVE_BACK == 0:
                    give_back_memory()
            for mine, now in zip(tensors(copy), tensors(state), strict=True):
                mine.copy_(now)
            step_model(self.ids(1), state=copy)
            yield Stream(step_model, copy), state.num_bytes

    def _advance(self, length: int, state: ModelState | None) -> Any:
        output = self.model(self.ids(length), state=state)
        self.seen += length
        for index, decision in enumerate(output.decisions):
            self.active[index] += float(decision.rate()[0]) * length
        return output.state

    def recompute(self) -> Iterator[tuple[Step, int]]:
        """The state is the last tokens before the position."""
        self._advance(CONTEXT, None)
        for position in self.positions:
            ids = self.ids(min(position, CONTEXT))
            step = Recompute(self.model, ids)
            step(self.ids(1))
            yield step, ids.numel() * ids.element_size()

    def kv_cache_transformer(self) -> Iterator[tuple[Step, int]]:
        """One cache at a time, with room for the steps."""
        for position in self.positions:
            model = CachedTransformer(self.batch, position, self.steps + 64, self.device)
            model(self.ids(1))
            yield model, DEPTH * 2 * self.batch * position * WIDTH * 4

    @property
    def real_rate(self) -> float | None:
        """Measured activation rate, mean over the layers."""
        return round(statistics.mean(self.active) / self.seen, 4) if self.seen else None

    def speeds(self) -> tuple[float, float]:
        """Tokens per second of a prefill in chunks, and of one stateless call: medians of turns."""
        ids = self.ids(min(16_384, 65_536 // self.batch))

        def prefill() -> None:
            state: Any = self.model.init_state(self.batch)
            for part in ids.split(max(1, min(4096, LARGE // self.batch)), 1):
                state = self.model(part, state=state).state

        times = take_turns([prefill, lambda: self.model(ids)], self.device, rounds=4)
        prefilled, forwarded = (round(ids.numel() / statistics.median(part[1:])) for part in times)
        return prefilled, forwarded


def take_turns(
    calls: Sequence[Callable[[], object]], device: str, rounds: int, seconds: float | None = None
) -> list[list[float]]:
    """Seconds of each call, round after round; each round begins with another call. At least 5 rounds, then until the
    time is up.
    """
    times: list[list[float]] = [[] for _ in calls]
    until = None if seconds is None else time.perf_counter() + seconds
    for turn in range(rounds):
        if until is not None and turn >= 5 and time.perf_counter() > until:
            break
        for call in range(len(calls)):
            chosen = (turn + call) % len(calls)
            with stopwatch(device) as elapsed:
                calls[chosen]()
            times[chosen].append(elapsed[0])
    return times


def give_back_memory() -> None:
    """Return the free memory of the C library's allocator to the system, where supported.

    The peak memory is then the memory that the stream needs at once.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def peak_megabytes(device: str) -> float:
    """Peak memory of the process so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@torch.inference_mode()
def measure(model: str, batch: int, rate: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one model at all positions in this process."""
    torch.manual_seed(0)
    marks = Marks(options, batch, rate)
    steps: list[Step] = []
    points: list[dict[str, Any]] = []
    for position, (step, state_bytes) in zip(marks.positions, getattr(marks, model)(), strict=True):
        steps.append(step)
        points.append(
            {
                "position": position,
                "state_bytes": state_bytes,
                "peak_megabytes": round(peak_megabytes(options.device), 1),
            }
        )
    ids = marks.ids(options.steps + 20).split(1, 1)
    queues = [iter(ids) for _ in steps]
    calls = [lambda step=step, queue=queue: step(next(queue)) for step, queue in zip(steps, queues, strict=True)]
    take_turns(calls, options.device, rounds=20 if model == "seqboat" else 1)
    times = take_turns(calls, options.device, options.steps, None if model == "seqboat" else 10.0)
    prefill, forward = marks.speeds() if model == "seqboat" else (None, None)
    return [
        {
            "model": model,
            "batch": batch,
            "rate": rate,
            "position": point["position"],
            "microseconds_per_token": round(1e6 * statistics.median(found) / batch, 2),
            "mean_microseconds_per_token": round(1e6 * statistics.mean(found) / batch, 2),
            "state_bytes": point["state_bytes"],
            "peak_megabytes": point["peak_megabytes"],
            "steps": len(found),
            "real_rate": marks.real_rate,
            "prefill_tokens_per_second": prefill,
            "forward_tokens_per_second": forward,
        }
        for point, found in zip(points, times, strict=True)
    ]


def processes(options: argparse.Namespace) -> Iterator[list[str]]:
    """Arguments of every process."""
    for model in options.model:
        for batch in options.batch:
            if model == "kv_cache_transformer":
                reached = [[position] for position in options.position if batch * position <= REACH[options.device]]
            else:
                reached = [options.position]
            for rate in (1.0,) if model == "kv_cache_transformer" else options.rate:
                for positions in reached:
                    yield [
                        "--point",
                        model,
                        str(batch),
                        str(rate),
                        *(word for position in positions for word in ("--position", str(position))),
                    ]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--model", action="append", choices=MODELS, help="only this model; may be repeated, like the next three options"
    )
    parser.add_argument("--batch", action="append", type=int, help=f"only this batch size; default {BATCHES}")
    parser.add_argument("--rate", action="append", type=float, help=f"only this activation rate; default {RATES}")
    parser.add_argument("--position", action="append", type=int, help=f"only this position; default {POSITIONS}")
    parser.add_argument("--steps", type=int, default=2000, help="single steps per position; default 2000")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the single step of seqboat; the peak memory is then that of the compiler",
    )
    parser.add_argument(
        "--point", nargs=3, metavar=("MODEL", "BATCH", "RATE"), help="measure one model in this process"
    )
    options = parser.parse_args()
    for name, default in (("model", MODELS), ("batch", BATCHES), ("rate", RATES), ("position", POSITIONS)):
        setattr(options, name, getattr(options, name) or list(default))
    return options


def main() -> None:
    """Measure every point and print them."""
    options = parse()
    if options.point:
        model, batch, rate = options.point
        print(json.dumps(measure(model, int(batch), float(rate), options)))
        return
    command = [sys.executable, "-m", "benchmarks.stream", "--device", options.device, "--steps", str(options.steps)]
    points = []
    for words in processes(options):
        done = subprocess.run(
            [*command, *words, *["--compile"] * options.compile], capture_output=True, encoding="utf-8", check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
        points.extend(json.loads(done.stdout))
        print(" ".join(words[1:4]), "done", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(points, indent=1))
        return
    print(
        f"{'model':20} {'batch':>5} {'rate':>6} {'position':>9} {'us/token':>10} {'mean':>10} {'state bytes':>12} "
        f"{'peak MB':>8}"
    )
    for point in points:
        speed = f"{point['microseconds_per_token']:10.1f} {point['mean_microseconds_per_token']:10.1f}"
        size = f"{point['batch']:5} {point['rate']:6.2f} {point['position']:9}"
        print(f"{point['model']:20} {size} {speed} {point['state_bytes']:12} {point['peak_megabytes']:8.1f}")
    for point in points:
        if point["forward_tokens_per_second"] and point["position"] == max(options.position):
            share = point["prefill_tokens_per_second"] / point["forward_tokens_per_second"]
            what = f"batch {point['batch']}, rate {point['rate']} (really {point['real_rate']})"
            print(
                f"prefill at {what}: {point['prefill_tokens_per_second']} tokens/s, "
                f"{100 * share:.0f} % of the stateless forward"
            )


if __name__ == "__main__":
    sys.exit(run_command(main))
