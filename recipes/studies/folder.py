"""The folder of a study: `experiment.yaml`, and `study.json` with its settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sma.errors import CheckpointError, SpecError, did_you_mean, parsing, quote
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.run_folder import EXPERIMENT, difference, read_json, refuse_another, write_text
from sma.recipes.studies.contract import Asked, Begun, Chosen, Options, Study
from sma.recipes.training.start import folder_of
from sma.spec import dump_yaml

STUDY = "study.json"
NEW = "start a new study"


@contextmanager
def begin(study: Study[Options, Asked], options: Options) -> Iterator[Begun[Asked]]:
    """Start a study or resume the one in the folder, which is locked inside the block.

    Raises:
        SmaError: the study cannot start; the message is for the user.
    """
    asked = asked_study(study, options) if options.resume is None else None
    folder = options.resume if options.resume is not None else options.out
    # The folder of an earlier version is resumed unchanged.
    older = folder is not None and not (folder / STUDY).is_file() and (folder / study.older).is_file()
    with folder_of(options, study.older if older else STUDY, "study") as (out, began):
        if asked is not None and not (began and (out / EXPERIMENT).exists()):
            write_down(out, *asked)
        spec, chosen = read_study(study, out)
        now = chosen
        if asked is not None:
            refuse_another(spec, asked[0], out / EXPERIMENT)
            _refuse_other_settings(study, chosen, asked[1], out)
        if given := _selected(study, spec, options):
            now = chosen.model_copy(update=given)
            every = {field: list(dict.fromkeys([*getattr(chosen, field), *names])) for field, names in given.items()}
            if (extended := chosen.model_copy(update=every)) != chosen:
                study.check(spec, extended)
                write_text(out / STUDY, extended.model_dump_json())
                chosen = extended
        yield Begun(spec, chosen, now, out)


def asked_study(study: Study[Options, Asked], options: Options) -> tuple[ExperimentSpec, Asked]:
    """Return the experiment and the settings of the options.

    Raises:
        SpecError: an option is not valid, or the runs cannot be derived from the experiment.
    """
    spec = study.experiment(options)
    spec.task.check_trainable()
    every = {field: list(known) for field, known in study.names(spec).items()}
    fields: dict[str, Any] = {**study.settings(options), **every, **_selected(study, spec, options)}
    chosen = study.chosen(study=study.name, **fields)
    study.check(spec, chosen)
    return spec, chosen


def refuse_changes(study: Study[Options, Asked], options: Options) -> None:
    """Refuse options that would change a resumed study; options that select runs are allowed.

    Raises:
        SpecError: there are such options; the message lists them.
    """
    options.refuse_all_but(["resume", "auto_resume", *study.selections], "--resume continues the study as it was", NEW)


def write_down(out: Path, spec: ExperimentSpec, chosen: Chosen) -> None:
    """Write the settings of a study into its folder."""
    # In this order: the first file marks the folder of a study. If the start is killed in between, --auto-resume writes
    # the second one.
    write_text(out / STUDY, chosen.model_dump_json())
    write_text(out / EXPERIMENT, dump_yaml(spec))


def read_study(study: Study[Any, Asked], out: Path) -> tuple[ExperimentSpec, Asked]:
    """Read the settings that `write_down` or an earlier version wrote.

    Raises:
        CheckpointError: the file is damaged or belongs to another study.
    """
    path = out / STUDY if (out / STUDY).is_file() else out / study.older
    found = read_json(path, NEW)
    with parsing(repr(str(path)), CheckpointError, NEW):
        if path.name == STUDY:
            if found["study"] != study.name:
                raise CheckpointError(
                    f"{str(path)!r} belongs to the study {quote(found['study'])}, not to {study.name!r}; "
                    "resume it with the command that began it"
                )
            chosen = study.chosen.model_validate(found)
        else:
            chosen = study.chosen.model_validate({"study": study.name, **study.upgrade(found)})
    spec = load_experiment(out / EXPERIMENT)
    for field, known in study.names(spec).items():
        if unknown := [name for name in getattr(chosen, field) if name not in known]:
            word = study.selections[field]
            raise CheckpointError(f"{str(path)!r} names an unknown {word}, {quote(unknown[0])}; {NEW}")
    return spec, chosen


def _refuse_other_settings(study: Study[Any, Asked], chosen: Asked, asked: Asked, out: Path) -> None:
    there, here = (one.model_dump(exclude=set(study.selections)) for one in (chosen, asked))
    if there != here:
        raise CheckpointError(f"{str(out)!r} holds another study: {difference(there, here)}; give another --out")


def _selected(study: Study[Options, Asked], spec: ExperimentSpec, options: Options) -> dict[str, list[str]]:
    """The values of the given options that select runs."""
    selected = {}
    for field, known in study.names(spec).items():
        word = study.selections[field]
        given: str | None = getattr(options, field)
        if given is None:
            continue
        selected[field] = names = list(dict.fromkeys(name.strip() for name in given.split(",")))
        for name in names:
            if name not in known:
                raise SpecError(f"unknown {word} {name!r}{did_you_mean(name, known, f'{word}s')}")
    return selected
