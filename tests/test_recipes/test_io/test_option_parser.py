"""Commands whose options are the fields of a class: parsed values, errors and help."""

from typing import Literal

import pytest
from pydantic import AliasChoices, Field
from pydantic_settings import SettingsConfigDict

import sma.recipes.compare
import sma.recipes.recall
import sma.recipes.routed_mlp
import sma.recipes.router_table
import sma.recipes.seqboat_lm
import sma.recipes.seqboat_lra
import sma.recipes.seqboat_speech
import sma.recipes.tasks.pathfinder.sheet
import sma.tune.__main__
import sma.tune.train
from sma.errors import SpecError
from sma.recipes.io.command import CommandOptions, parse
from sma.recipes.io.option_parser import File, Folder, Names, Setting, option_parser


class Options(CommandOptions):
    """Paint a wall, 100 % of it."""

    model_config = SettingsConfigDict(cli_prog_name="paint")

    wall: str = Field(description="which wall")
    colour: Literal["red", "blue"] = Field(default="red", description="of the paint")
    coats: int = Field(default=2, ge=1, description="layers of paint")
    thickness: float | None = Field(default=None, description="of a layer in mm, 100 % of them")
    plan: File | None = Field(default=None, description="a plan")
    out: Folder | None = Field(default=None, description="where pictures go")
    set: list[Setting] = Field(default=[], description="change the plan; may be repeated")
    end: str = Field(default="\n", description="the last word")
    tools: Names | None = Field(
        default=None, validation_alias=AliasChoices("tools", "brushes"), description="what to paint with"
    )
    wet: bool = Field(default=False, description="paint on wet walls")
    dry: bool = Field(default=True, description="wait until a layer is dry")


def test_help_describes_values_as_files_and_numbers():
    shown = option_parser(Options, "paint", "wall").format_help()
    assert [" ".join(part.split()) for part in shown.split("\n\n")] == [
        "usage: paint WALL [options]",
        "Paint a wall, 100 % of it.",
        "positional arguments: WALL which wall",
        "options: -h, --help show this help message and exit --colour {red,blue} of the paint (default: red) "
        "--coats NUMBER layers of paint (default: 2) --thickness NUMBER of a layer in mm, 100 % of them "
        "--plan FILE a plan --out FOLDER where pictures go --set PATH=VALUE change the plan; may be repeated "
        "--end TEXT the last word (default: '\\n') --tools NAME,NAME what to paint with --wet paint on wet walls "
        "--dry, --no-dry wait until a layer is dry (default: yes)",
    ]


def test_values_are_parsed_by_their_types():
    words = ["north", "--coats=3", "--set", "a={x: 1, y: 2}", "--set=b=3", "--no-dry", "--wet", "--brushes", "a,b"]
    read = parse(Options, words, positional="wall")
    assert (read.wall, read.coats, read.set) == ("north", 3, ["a={x: 1, y: 2}", "b=3"])
    assert (read.dry, read.wet, read.tools) == (False, True, "a,b")
    assert read.model_fields_set == {"wall", "coats", "set", "dry", "wet", "tools"}
    assert (read.program, parse(Options, ["--wall=n"], program="sma paint").program) == ("paint", "sma paint")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["n", "--colour", "rod"],
            r"^--colour: unknown choice 'rod'; did you mean 'red'\? choices: red, blue$",
            id="choice",
        ),
        pytest.param(["n", "--coats", "x"], "^--coats='x': input should be a valid integer", id="number"),
        pytest.param(["n", "--coats=0"], "^--coats='0': input should be greater than or equal to 1; see ", id="range"),
        pytest.param(["n", "--colour", "x", "--coats", "x"], "^--colour: unknown .*\n--coats='x': ", id="two"),
        pytest.param(["n", "--tool", "x"], r"^--tool: unknown option; did you mean --tools\?", id="option"),
        pytest.param(["n", "--brushe", "x"], "^--brushe: unknown option; (?!did you mean --brushes)", id="hidden"),
        pytest.param([], "^the following arguments are required: WALL; see paint --help$", id="missing"),
    ],
)
def test_wrong_argument_gives_one_message(words, message):
    with pytest.raises(SpecError, match=message):
        parse(Options, words, positional="wall")


def test_prefixed_environment_variables_are_read(monkeypatch):
    monkeypatch.setenv("SMA_COATS", "7")
    monkeypatch.setenv("COATS", "8")
    assert parse(Options, ["--wall=n"]).coats == 7
    assert parse(Options, ["--wall=n", "--coats=1"]).coats == 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=f"{options.__module__.removeprefix('sma.')}.{options.__name__}")
        for options in (
            sma.recipes.compare.Options,
            sma.recipes.recall.Options,
            sma.recipes.routed_mlp.Options,
            sma.recipes.router_table.Options,
            sma.recipes.seqboat_lm.GenerateOptions,
            sma.recipes.seqboat_lm.Options,
            sma.recipes.seqboat_lra.Options,
            sma.recipes.seqboat_speech.Options,
            sma.recipes.tasks.pathfinder.sheet.SheetOptions,
            sma.tune.__main__.Options,
            sma.tune.__main__.ReportOptions,
            sma.tune.train.ParallelOptions,
        )
    ],
)
def test_help_contains_no_python_types(options):
    parser = option_parser(options, "command")
    shown = parser.format_help()
    for word in ("None", "null", "Path ", "Path,", "list[", "factory", "str}", "int}", "bool"):
        assert word not in shown
    assert len(parser.options()) == len(set(parser.options()))
    assert all(action.help for action in parser._actions)
