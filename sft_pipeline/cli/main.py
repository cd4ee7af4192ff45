"""The `sft` command."""

import json
import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer
from rich.console import Console

from sft_pipeline.cli.console import Terminal
from sft_pipeline.errors import Interrupted, SftError
from sft_pipeline.secret_text import redacted

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Supervised fine-tuning, from raw rows to a traceable model.",
)
INTERRUPTED_BY_KEYBOARD = 130  # what the command-line library makes of a KeyboardInterrupt
PIPE_WIDTH = 200  # columns where nobody's terminal says how many there are
err = Terminal(stderr=True, highlight=False, soft_wrap=True)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="name of a recipe, or path of its file")]
Snapshot = Annotated[str | None, typer.Option(help="snapshot of the dataset; the newest by default")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
MODEL_HELP = "an export's folder, a recipe (its current model), recipe@snapshot, or a fingerprint"
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="override a key of the recipe; may be repeated"),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("sft_pipeline"))
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options before a command."""


@app.command()
def run(
    recipe: Recipe,
    snapshot: Snapshot = None,
    until: Annotated[
        str | None, typer.Option(metavar="ASSET", help="stop after this asset, for example packed_shards")
    ] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Materialize the branch of a recipe, reusing everything that is up to date."""
    from sft_pipeline.cli.run import run_recipe

    result = run_recipe(recipe, snapshot=snapshot, until=until, overrides=overrides or [], console=err)
    if as_json:
        if result.error:
            err.print(f"sft: {result.error}")
        print_json(result.to_json())
    else:
        result.show(_out())
    raise typer.Exit(result.exit_code)


@app.command()
def check(recipe: Recipe, snapshot: Snapshot = None, overrides: Set = None, as_json: Json = False) -> None:
    """Validate config and data, and say what a training would cost, without training."""
    from sft_pipeline.cli.check import check_recipe, show_check

    result = check_recipe(recipe, snapshot=snapshot, overrides=overrides or [], console=err)
    if as_json:
        print_json(result)
    else:
        show_check(result, _out())
    raise typer.Exit(0 if result["valid"] else 2)


@app.command()
def sweep(
    recipe: Recipe,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=V1,V2,...",
            help="values to try of a key of the recipe; several of these make a grid, "
            "a single value holds for all trials",
        ),
    ] = None,
    snapshot: Snapshot = None,
    updates: Annotated[
        int | None,
        typer.Option(
            min=1, help="budget: the supervised tokens of so many updates of the recipe; a tenth by default"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Try values on short trainings with equal supervised-token budgets, ranked by the recipe's own rule."""
    from sft_pipeline.cli.sweep import show_sweep, sweep_recipe

    result = sweep_recipe(recipe, options=overrides or [], snapshot=snapshot, updates=updates, console=err)
    if as_json:
        if result.error:
            err.print(f"sft: {result.error}")
        print_json(result.to_json())
    else:
        show_sweep(result, _out())
    raise typer.Exit(result.exit_code)


@app.command()
def init(
    data: Annotated[str, typer.Argument(metavar="FILE_OR_FOLDER", help="the data, also hf://dataset@COMMIT")],
    name: Annotated[str | None, typer.Option(help="of the dataset; by default that of the file")] = None,
    base: Annotated[str, typer.Option(help="folder or hub id of the model to train")] = "data/base_model",
    into: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="with datasets/ and recipes/; the last one that is searched by default"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at data, guess how it reads, and write its dataset and recipe files."""
    from sft_pipeline.cli.init import init as init_files
    from sft_pipeline.cli.init import show_init

    result = init_files(data, name=name, base=base, into=into)
    if as_json:
        print_json(result)
    else:
        show_init(result, _out())


@app.command(name="import")
def import_(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="axolotl or LLaMA-Factory YAML, TRL script, or command line")
    ],
    name: Annotated[str | None, typer.Option(help="of the recipe; by default that of the file")] = None,
    dataset: Annotated[str | None, typer.Option(help="name of the dataset that it trains on")] = None,
    into: Annotated[str | None, typer.Option(metavar="FOLDER", help="with recipes/")] = None,
    as_json: Json = False,
) -> None:
    """Write a recipe from the settings of another trainer: what maps, what does not, and why."""
    from sft_pipeline.cli.import_recipe import import_recipe, show_import

    result = import_recipe(file, name=name, dataset=dataset, into=into)
    if as_json:
        print_json(result)
    else:
        show_import(result, _out())


@app.command()
def preview(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="name of a dataset, or path of its file")],
    number: Annotated[int, typer.Option("-n", min=0, help="how many rows are shown")] = 3,
    snapshot: Snapshot = None,
    as_json: Json = False,
) -> None:
    """Show the first rows as messages, and those that would be rejected, without building anything."""
    from sft_pipeline.cli.preview import preview_dataset, show_preview

    result = preview_dataset(dataset, snapshot=snapshot, number=number)
    if as_json:
        print_json(result)
    else:
        show_preview(result, _out())


@app.command()
def inspect(
    recipe: Recipe,
    row: Annotated[str | None, typer.Option(metavar="ID", help="one row, by row id")] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="how many rows")] = 3,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="write a self-contained page instead")
    ] = None,
    snapshot: Snapshot = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Show rows token by token as the model will see them, and the blocks they are packed in."""
    from sft_pipeline.cli.inspect import inspect_recipe

    result = inspect_recipe(
        recipe,
        row=row,
        n=number,
        html=html,
        snapshot=snapshot,
        overrides=overrides or [],
        console=err,
        out=None if as_json else _out(),
    )
    if as_json:
        print_json(result)


@app.command()
def lineage(
    model_dir: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="an exported model")],
    verify: Annotated[
        bool, typer.Option("--verify", help="hash again everything that can be reached")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the chain from an exported model back to its source files."""
    from sft_pipeline.cli.lineage import show_lineage

    result = show_lineage(model_dir, verify=verify, console=err, out=None if as_json else _out())
    if as_json:
        print_json(result)
    raise typer.Exit(1 if verify and not result["verified"] else 0)


@app.command()
def replay(
    training: Annotated[
        str,
        typer.Argument(metavar="TRAINING", help="folder of a training, or the beginning of its fingerprint"),
    ],
    update: Annotated[int, typer.Option(min=1, help="which update, counted from 1")],
    as_json: Json = False,
) -> None:
    """Make one update of a training again, and show the loss of each of its rows, the worst first."""
    from sft_pipeline.cli.replay import replay_update, show_replay

    result = replay_update(training, update=update, console=err)
    if as_json:
        print_json(result)
    else:
        show_replay(result, _out())


@app.command()
def trace(
    group_or_row_id: Annotated[str, typer.Argument(metavar="GROUP_OR_ROW_ID")], as_json: Json = False
) -> None:
    """Find the artifacts, updates and exported models that contain a row or a group."""
    from sft_pipeline.cli.lineage import show_trace

    result = show_trace(group_or_row_id, console=err, out=None if as_json else _out())
    if as_json:
        print_json(result)


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(metavar="[models|runs|artifacts]")] = "models", as_json: Json = False
) -> None:
    """List exported models, Dagster runs, or everything in the store."""
    from sft_pipeline.cli.list import list_items

    result = list_items(what, console=err, out=None if as_json else _out())
    if as_json:
        print_json(result)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be removed")] = False,
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", min=0, help="keep what is younger, whatever needs it")
    ] = 0.0,
    keep_last: Annotated[
        int, typer.Option(metavar="N", min=0, help="keep the newest N exported models of each recipe")
    ] = 0,
    pins: Annotated[
        list[str] | None,
        typer.Option(
            "--pin", metavar="MODEL", help="keep it from now on (also a fingerprint); removes nothing"
        ),
    ] = None,
    unpins: Annotated[
        list[str] | None, typer.Option("--unpin", metavar="FINGERPRINT", help="keep it no longer than needed")
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove what no ref, alias, pin, running process or lineage needs; say first what and how much."""
    from sft_pipeline.cli.gc import change_pins, collect_garbage

    out = None if as_json else _out()
    if pins or unpins:
        result = change_pins(pins or [], unpins or [], dry_run=dry_run, out=out)
    else:
        result = collect_garbage(
            dry_run=dry_run, older_than=older_than, keep_last=keep_last, console=err, out=out
        )
    if as_json:
        print_json(result)


@app.command()
def fsck(as_json: Json = False) -> None:
    """Hash everything in the store again; name what is damaged, and what to do about it."""
    from sft_pipeline.cli.fsck import check_store

    result = check_store(console=err, out=None if as_json else _out())
    if as_json:
        print_json(result)
    raise typer.Exit(1 if result["damaged"] else 0)


@app.command()
def diff(
    model_a: Annotated[str, typer.Argument(metavar="MODEL_A", help=MODEL_HELP)],
    model_b: Annotated[str, typer.Argument(metavar="MODEL_B")],
    as_json: Json = False,
) -> None:
    """Compare two models: rows they were trained on, template, recipe keys, packages, scores."""
    from sft_pipeline.cli.diff import diff_models

    result = diff_models(model_a, model_b, console=err, out=None if as_json else _out())
    if as_json:
        print_json(result)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="of the Dagster UI")] = 3000,
    mlflow_port: Annotated[int, typer.Option(help="of the MLflow UI")] = 5000,
) -> None:
    """Serve the Dagster and MLflow UIs on loopback until interrupted."""
    from sft_pipeline.cli.ui import serve

    serve(port, mlflow_port, err)


def _out() -> Console:
    return Terminal(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_json(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    # A name of a file that is not UTF-8 is text that cannot be written as it is.
    sys.stdout.write(text.encode(errors="backslashreplace").decode() + "\n")


def main() -> None:
    """Runs the command; expected errors become one message and their exit code."""
    from sft_pipeline.project import set_environment
    from sft_pipeline.store.files import as_disk_error

    signal.signal(signal.SIGTERM, _interrupt)
    wants_json = "--json" in sys.argv[1:]
    try:
        set_environment()
        code = app(standalone_mode=False)  # a raised Exit comes back as its code
        if code == INTERRUPTED_BY_KEYBOARD:
            raise KeyboardInterrupt
        _leave(code if isinstance(code, int) else 0)
    except SftError as error:
        _fail(str(error), error.exit_code, wants_json)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on", Interrupted.exit_code, wants_json)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line itself
            _fail(error.format_message() or "name a command; see the list above", 2, wants_json)
        if os.environ.get("SFT_DEBUG"):
            err.print(redacted(traceback.format_exc()))
        if clear := as_disk_error(error, "running"):
            _fail(str(clear), clear.exit_code, wants_json)
        _fail(f"unexpected {type(error).__name__}: {error} (SFT_DEBUG=1 shows the traceback)", 1, wants_json)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int, wants_json: bool) -> None:
    message = redacted(message)
    err.print("sft:", style="bold red", end=" ")
    err.print(message)
    if wants_json:
        status = {3: "blocked", 4: "interrupted"}.get(code, "failed")
        print_json({"status": status, "error": message, "valid": False})
    _leave(code)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
