"""Byte-level causal language modelling with SeqBoat.

python recipes/seqboat_lm.py --preset tiny
python recipes/seqboat_lm.py --evaluate RUN
python recipes/seqboat_lm.py generate --run RUN --prompt "The class" --tokens 2000
"""

if __name__ == "__main__":  # this Python may lack the package or its extra
    __import__("sma.recipes.environment" if __package__ else "environment")

import codecs
import sys
from typing import Literal

import torch
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.checkpoint import load
from sma.errors import CheckpointError, InputError
from sma.generation import generate
from sma.model import LanguageModel
from sma.recipes.io.command import CommandOptions, exit_code, parse
from sma.recipes.io.option_parser import Folder
from sma.recipes.training.options import OneRunOptions
from sma.recipes.training.single_run import train_or_evaluate


class Options(OneRunOptions):
    """Train a byte-level language model and evaluate it in bits per character. `seqboat_lm generate` generates text."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.seqboat_lm")

    preset: Literal["tiny", "paper"] = Field(
        default="tiny", description="tiny: minutes on two cores; paper: enwik8 in the paper's setting"
    )

    @property
    def name(self) -> str:
        return f"language_{self.preset}"


class GenerateOptions(CommandOptions):
    """Continue a prompt with a trained model, byte by byte."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.seqboat_lm generate")

    run: Folder = Field(description="the folder of a run, or of a model saved by sma.save")
    prompt: str = Field(default="\n", description="the start of the text")
    tokens: int = Field(default=500, ge=0, description="number of bytes to generate")
    temperature: float = Field(
        default=0.8, ge=0.0, description="temperature of the distribution; 0 takes the most probable byte"
    )
    top_k: int | None = Field(default=None, ge=1, description="sample from the k most probable bytes only")
    top_p: float | None = Field(
        default=None, gt=0.0, le=1.0, description="sample from the most probable bytes with a total probability of p"
    )
    seed: int = Field(default=0, description="seed of the samples")
    samples: int = Field(
        default=1, ge=1, description="number of texts; several are generated in parallel and printed at the end"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["generate"]:
        return exit_code(lambda: write(parse(GenerateOptions, given[1:])))
    return exit_code(lambda: train_or_evaluate(parse(Options, given)))


def write(options: GenerateOptions) -> None:
    """Print the continuations; a single one is printed while it is generated.

    Raises:
        SmaError: the command fails; the message is for the user.
    """
    if options.temperature == 0:
        options.refuse(["top_k", "top_p", "seed"], "--temperature 0 takes the most probable byte without sampling")
    folder = options.run / "model" if (options.run / "model").is_dir() else options.run
    model = load(folder)
    if not isinstance(model, LanguageModel):
        raise CheckpointError(
            f"the model in {str(folder)!r} is of kind {model.spec.kind!r}; only a 'language_model' can generate text"
        )
    # The original bytes of a prompt that is not UTF-8.
    prompt = options.prompt.encode(errors="surrogateescape")
    if not prompt:
        raise InputError("--prompt is empty; give at least one character")
    ids = torch.tensor([list(prompt)])
    stream = generate(
        model,
        ids,
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        samples=options.samples,
    )
    if options.samples > 1:
        rows = torch.stack(list(stream), 1).tolist() if options.tokens else [[]] * options.samples
        for number, row in enumerate(rows):
            print(f"--- {number + 1} of {options.samples}\n{options.prompt}{bytes(row).decode(errors='replace')}")
        return
    # A character of several bytes is printed after its last byte.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(options.prompt, end="", flush=True)
    for token in stream:
        print(decoder.decode(bytes(token.tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    sys.exit(main())
