"""The command line: `moescale train`, `doctor`, `config`, `data`, `generate`, `evaluate`, `verify` and others."""

from __future__ import annotations

import faulthandler
import io
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from moescale import __version__
from moescale.cluster.launch import is_one_of_many, read_launch
from moescale.config import (
    Config,
    ConfigError,
    Silenced,
    Stopped,
    TrainingError,
    check_local,
    describe,
    load_config,
    memory_asked,
    parse_config,
    read_overrides,
)

TAKES_OVERRIDES = {"ignore_unknown_options": True}  # `--optim.lr=1` comes in, and is told how it is written
EDITS = ("--upcycle", "--granularity", "--top-k", "--experts", "--noise", "--drop-experts", "--merge-experts",
         "--place-experts", "--load")  # of moescale edit, which earlier versions took at moescale convert
BROKEN_PIPE_STATUS = 141  # as of a command whose reader is gone: 128 + SIGPIPE

app = typer.Typer(
    help="Train mixtures of experts, from one laptop process to a torchrun cluster.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,  # else [a, b] is taken for a style, and not shown
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moescale {__version__}, torch {version('torch')}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the versions of moescale, torch and Python."
    )] = False,
    local_rank: Annotated[int | None, typer.Option(
        "--local_rank", hidden=True, help="What DeepSpeed's launcher adds; LOCAL_RANK says the same.")] = None,
) -> None:
    pass


@app.command(no_args_is_help=True, context_settings=TAKES_OVERRIDES)
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, e.g. configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, e.g. parallel.ep=2 run.steps=100.")
    ] = None,
    warm: Annotated[bool, typer.Option(
        "--warm", help="Keep a spare process a rank that has imported everything, for when torchrun restarts it.")
    ] = False,
) -> None:
    """Train a model, going on from the last checkpoint in run.dir if there is one.

    On one process:   moescale train configs/quickstart.yaml

    On many:          torchrun --nproc-per-node 2 -m moescale train configs/quickstart.yaml parallel.ep=2

    The run directory then holds config.yaml (every key, with its value), metrics.jsonl (a line a logging step) and
    checkpoints/. Every key of the YAML can be changed on the command line as group.key=value, with null, true and
    [a, b] as there; the last of two counts. moescale config shows all of them.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is said in one line
    with _one_line_errors(config):
        if warm:
            _leave_spare()
        overrides = overrides or []
        if read_launch().size == 1:
            settled = load_config(config, overrides)  # before torch comes in, which takes seconds

            def read() -> Config:
                return locate(settled, config, overrides)
        else:
            def read() -> Config:
                return locate(load_config(config, overrides), config, overrides)

        from moescale.resume import locate
        from moescale.trainer import train as run

        run(read)


def _leave_spare() -> None:
    if not read_launch().elastic or sys.platform != "linux":
        raise ConfigError("--warm is for ranks that torchrun starts again, on Linux: leave it out, or start with "
                          "torchrun --max-restarts 3 -m moescale train, or launch/torchrun.sh")
    from moescale.warm import leave_spare

    leave_spare(main)


@app.command(no_args_is_help=True, context_settings=TAKES_OVERRIDES)
def doctor(
    config: Annotated[Path, typer.Argument(help="A YAML file, e.g. configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, as they will be given to train.")
    ] = None,
) -> None:
    """Check all that a run needs before its first step, and measure network and disk, without training.

    On one process:   moescale doctor configs/quickstart.yaml

    On many:          torchrun --nproc-per-node 2 -m moescale doctor configs/quickstart.yaml parallel.ep=2

    A line for each check begins with ok, warn or fail; the exit status is 2 if one failed.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with _one_line_errors(config, stopped="stopped"):
        from moescale.doctor import examine
        from moescale.resume import locate

        words = overrides or []
        if not examine(lambda: locate(load_config(config, words), config, words), typer.echo):
            raise typer.Exit(2)


@app.command(context_settings=TAKES_OVERRIDES)
def config(
    words: Annotated[list[str] | None, typer.Argument(
        metavar="[FILE] [KEY=VALUE]...", help="A YAML file, and changes; the defaults, if not given.")] = None,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print all keys as YAML, from which one can train.")] = False,
) -> None:
    """Show every key of a configuration: its value, what it may be, its default and what it is for.

    moescale config

    moescale config configs/quickstart.yaml optim.lr=0.001

    A star marks what differs from the default.
    """
    with _one_line_errors(stopped="stopped"):
        file, *overrides = words if words and "=" not in words[0] and words[0][:1] != "-" else [None, *(words or ())]
        if file is None:
            settled = parse_config(read_overrides(overrides), "defaults")
        else:
            _refuse_url(Path(file))
            settled = load_config(file, overrides)
        typer.echo(settled.to_yaml() if yaml else
                   "\n".join(describe(settled, shutil.get_terminal_size((100, 24)).columns)), nl=False)


@app.command(no_args_is_help=True, context_settings=TAKES_OVERRIDES)
def data(
    config: Annotated[Path, typer.Argument(help="A YAML file, e.g. configs/quickstart.yaml.")],
    destination: Annotated[Path, typer.Argument(help="What the names of the files begin with, e.g. tokens/mine.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, e.g. data.files=[texts/*.md].")
    ] = None,
) -> None:
    """Write the tokens of a run's text as Megatron's indexed datasets.

    moescale data configs/quickstart.yaml tokens/mine 'data.files=[texts/**/*.md]'

    DESTINATION_train.bin and DESTINATION_held_out.bin hold the tokens of the documents that the run would train on and
    hold out, each with an .idx beside it; with data.weights, DESTINATION_train_0.bin and others hold those of each
    entry of data.files. MoEScale reads such files in data.files, and Megatron in its data paths.
    """
    with _one_line_errors(config, destination, stopped="stopped"):
        settled = load_config(config, overrides or [])
        from moescale.data.export import export

        for line in export(settled.data, destination):
            typer.echo(line)


@app.command(no_args_is_help=True)
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory for its last one.")],
    prompt: Annotated[list[str] | None, typer.Option(
        help="Text to go on from, several times for several; without one a new document starts.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many texts to write from each prompt.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write, at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="Below 1: safer; 0: always the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the likeliest K tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(
        help="Draw among the likeliest tokens that together have this probability, e.g. 0.9.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63, help="The same seed writes the same text.")] = 0,
    context: Annotated[int | None, typer.Option(
        min=1, help="How many tokens it looks back on, at most; data.seq_len, without a bound for ALiBi or a window.")
    ] = None,
    special: Annotated[bool, typer.Option(
        "--special", help="Names of special tokens in the prompt, e.g. of a chat template, are those tokens.")] = False,
) -> None:
    """Let a trained model go on from a text, on one process, whatever layout it was trained in.

    It writes up to the end of the document, or as many tokens as --tokens says.

    moescale generate runs/quickstart --prompt "def main(" --tokens 200 --temperature 0.8

    moescale generate runs/quickstart --prompt "def " --prompt "class " --samples 3 --top-p 0.9
    """
    with _one_line_errors(checkpoint):
        from moescale.generate import generate_text
        from moescale.model.generation import Sampling

        sampling = Sampling(temperature, top_k, top_p, seed)
        for piece in generate_text(checkpoint, prompt or [""], tokens, samples=samples, sampling=sampling,
                                   special=special, context=context):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


@app.command(no_args_is_help=True, context_settings=TAKES_OVERRIDES)
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory for its last one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Other text, e.g. data.files=[texts/*.md].")
    ] = None,
    whole: Annotated[bool, typer.Option("--all", help="Take all that was held out, not a sample as training.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Measure how well a trained model predicts text, on one process: loss, perplexity, bits a byte.

    The text is what training evaluates on, of the documents that the run held
    out, so that the figures are the same; or all of the files that are named.

    moescale evaluate runs/quickstart --all

    moescale evaluate runs/quickstart 'data.files=[texts/**/*.md]' --json
    """
    with _one_line_errors(checkpoint):
        from moescale.scoring import evaluate_checkpoint

        found, notes = evaluate_checkpoint(checkpoint, overrides or [], whole=whole)
        for note in notes:
            typer.echo(f"moescale: {note}", err=True)
        typer.echo(found.as_json() if json else found.as_text())


@app.command(no_args_is_help=True, context_settings=TAKES_OVERRIDES)
def verify(
    config: Annotated[Path, typer.Argument(help="A YAML file, e.g. configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, e.g. moe.router=gshard moe.top_k=2.")
    ] = None,
    layouts: Annotated[
        str | None, typer.Option(help='Which to try, with commas between, e.g. "tp2 ep4, pp2 dp2 ep2".')
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Try every layout of so many ranks.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the data and the sample; the date, if not given.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all that was measured to this file.")] = None,
) -> None:
    """Prove on this machine that a run trains the same in every layout.

    No cluster and no GPU: ranks are local processes. The run is shrunk to
    a few layers and small widths, and keeps its structure: pattern, router,
    capacity, window, key heads, tied embeddings, recompute. One process takes
    a training step, then each layout takes it, with 1 and with 3 micro-batches,
    in float32 and in float64. All must agree: the features between sublayers,
    each token's experts, what is dropped, the losses, every parameter's
    gradient, and its value after the step.

    A layout is a few words: dp2 (parallel.dp_shard), rep2 (dp_replicate), tp2,
    pp2, cp2, ep2, etp2, with any number. Ranks are dp * rep * tp * pp * cp;
    without dp there are as many as ep and etp need: "tp2 ep4" is four ranks.
    Pipelines take turns with their schedules. Without --layouts and --ranks
    a sample of 2 and 4 ranks is drawn anew each day.

    moescale verify configs/quickstart.yaml --layouts "tp2, pp2 ep2, cp2 ep4"

    moescale verify configs/quickstart.yaml moe.router=gshard --ranks 4

    In the table: the largest relative error in float32 and in float64, and of
    what; the scale of the gradient that is furthest off, 2.000 being twice too
    large; whether assignments, loads and drops are equal. Below it, what falls
    short first in each layout that fails; the exit status is then 1.
    """
    with _one_line_errors(config, json, stopped="stopped"):
        settled = load_config(config, overrides or [])
        from moescale.verify.main import verify as run

        if not run(settled, layouts=layouts, ranks=ranks, seed=seed, json=json):
            raise typer.Exit(1)


@app.command(no_args_is_help=True)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, as in run.dir.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the page; RUN/report.html, if not given.")
    ] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw in characters here, and write no page.")] = False,
) -> None:
    """Show how a run went and where its tokens went, on one page that needs no network.

    moescale report runs/quickstart

    moescale report runs/a runs/b -o both.html    # laid over each other, with a table of the keys that differ

    moescale report runs/quickstart --terminal
    """
    with _one_line_errors(*runs, output, stopped="stopped"):
        from moescale.report.side_by_side import compare, read_histories

        histories, problems = read_histories(runs)
        for problem in problems:
            typer.echo(f"moescale: left out: {problem}", err=True)
        if terminal:
            from moescale.report.characters import draw, draw_table

            for history in histories:
                typer.echo(draw(history, shutil.get_terminal_size().columns) + "\n")
            if len(histories) > 1:
                typer.echo(draw_table(compare(histories)))
            return
        from moescale.report.page import write_report

        path = output or histories[0].directory / "report.html"
        write_report(histories, path)
        typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


@app.command(no_args_is_help=True)
def dashboard(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as in run.dir, of a run with wandb.")],
    entity: Annotated[str, typer.Option(help="The user or team in wandb to which the project belongs.")],
) -> None:
    """Save a view of the run's project in Weights & Biases, with panels for loss, load, heat maps and router.

    It needs the key that `wandb login` keeps.

    moescale dashboard runs/quickstart --entity my-team
    """
    with _one_line_errors(run, stopped="stopped"):
        from moescale.monitor.wandb_workspaces import save_workspace

        typer.echo(save_workspace(entity, load_config(run / "config.yaml", whole=True).monitor.wandb_project))


@app.command(no_args_is_help=True)
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint of any known format, or a run directory.")],
    destination: Annotated[Path | None, typer.Argument(help="A folder that does not exist yet.")] = None,
    to: Annotated[str | None, typer.Option(help="moescale, hf, megatron or deepspeed.")] = None,
    ep: Annotated[int, typer.Option(min=1, help="Ranks that share the experts, in the files.")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="Ranks that share each matrix.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Ranks in a row, each with some of the layers.")] = 1,
    etp: Annotated[int, typer.Option(min=1, help="Ranks that share each expert.")] = 1,
    style: Annotated[str | None, typer.Option(
        help="hf: published, fused; megatron: torch_dist, sequential, grouped, te_grouped.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; the source's, if not given.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Run both models on the same tokens first.")] = False,
    inspect: Annotated[bool, typer.Option("--inspect", help="Print what SOURCE holds, and write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --inspect: as JSON.")] = False,
    moved: Annotated[list[str] | None, typer.Option(*EDITS, hidden=True)] = None,
) -> None:
    """Write a checkpoint in another format, whole or not at all.

    moescale convert mistralai/Mixtral-8x7B runs/mixtral --to moescale --verify

    moescale convert runs/quickstart exported --to hf

    moescale convert --inspect exported

    The source's format is found out. Tensors go across one by one, so that
    memory stays small; the same command goes on where it was cut off. Nothing
    appears at DESTINATION unless every tensor was used and written once. At
    the end stands a fingerprint of each layer and expert: two checkpoints are
    the same model if theirs are equal, in whatever format.
    """
    with _one_line_errors(source, destination, stopped="stopped; the same command goes on from here"):
        from moescale.convert import command
        from moescale.convert.mapping.mapped import FileLayout

        if moved:
            raise ConfigError("moescale edit SOURCE DESTINATION changes the experts: write the option there")
        if inspect:
            command.inspect(source, json)
            return
        if destination is None or to is None:
            raise ConfigError("write moescale convert SOURCE DESTINATION --to FORMAT, or --inspect SOURCE")
        layout = FileLayout(ep, tp, pp, etp, style)
        command.run(source, destination, to, layout, dtype, _comparison(verify))


@app.command(no_args_is_help=True)
def edit(
    source: Annotated[Path, typer.Argument(help="A checkpoint of any known format, or a run directory.")],
    destination: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    upcycle: Annotated[int | None, typer.Option(min=1, help="Make a dense model one of so many experts.")] = None,
    granularity: Annotated[int, typer.Option(min=1, help="With --upcycle: parts that a copy is cut into.")] = 1,
    top_k: Annotated[int | None, typer.Option(min=1, help="With --upcycle; 2 copies if not given.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Copy experts up to so many; logits stay.")] = None,
    noise: Annotated[float, typer.Option(min=0, help="Added to copies, over each matrix's deviation.")] = 0.0,
    drop_experts: Annotated[int | None, typer.Option(min=1, help="Leave out so many of the idlest.")] = None,
    merge_experts: Annotated[int | None, typer.Option(min=1, help="Merge so many of the idlest into others.")] = None,
    place_experts: Annotated[int | None, typer.Option(
        min=1, metavar="EP", help="Renumber experts so that EP ranks have equal loads.")] = None,
    load: Annotated[Path | None, typer.Option(help="The run that measured the loads; SOURCE, if not given.")] = None,
    to: Annotated[str | None, typer.Option(help="moescale, hf, megatron or deepspeed; SOURCE's, if not given.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Run both models on the same tokens first.")] = False,
) -> None:
    """Write a checkpoint with other experts: more of them, fewer, or in another order.

    moescale edit dense mixture --upcycle 8 --verify

    moescale edit runs/quickstart runs/smaller --drop-experts 2

    moescale edit runs/quickstart runs/placed --place-experts 4

    One change at a time, written whole or not at all. The run's
    metrics.jsonl says which experts are idle and which are busy. The files
    are for one rank: moescale convert cuts them for more.
    """
    with _one_line_errors(source, destination, load, stopped="stopped; the same command goes on from here"):
        from moescale.convert import edit_command

        options = edit_command.Options(upcycle, granularity, top_k, experts, noise, drop_experts, merge_experts,
                                       place_experts, load)
        edit_command.run(source, destination, to, options, _comparison(verify))


def _comparison(wanted: bool) -> Callable[..., str] | None:
    """Find what runs both models of a conversion, if it is wanted."""
    if not wanted:
        return None
    from moescale.verify.conversion import compare_models

    return compare_models


@contextmanager
def _one_line_errors(
    *paths: Path | None, stopped: str = "stopped; the same command goes on from the last checkpoint"
) -> Iterator[None]:
    """End on the user's mistakes with one line and exit status 2. paths: that the command was given."""
    try:
        for path in paths:
            _refuse_url(path)
        yield
    except ConfigError as error:
        message, status = str(error), 2
    except TrainingError as error:
        message, status = str(error), 1
    except Stopped as error:
        message, status = str(error), error.status
    except KeyboardInterrupt:
        message, status = stopped, 130
    except Silenced as error:
        raise typer.Exit(error.status) from None
    except (MemoryError, RuntimeError, OSError) as error:
        asked = memory_asked(error)
        if asked is None:
            raise
        message, status = f"out of memory: {asked} could not be had; a machine with more, or less to do, is needed", 1
    else:
        return
    with suppress(OSError, ValueError):  # a terminal that is gone
        print(f"moescale: {message}", file=sys.stderr, flush=True)
    raise typer.Exit(status)


def _refuse_url(path: Path | None) -> None:
    """Refuse a URL, of which a command would make a local folder."""
    try:
        check_local(str(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def main() -> None:
    """Run the command that the arguments name.

    One of many ranks then leaves at once: the interpreter, while it is taken down, aborts on a thread of gloo that is
    yet to let go of a collective's tensors, one run in ten on a busy machine.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - one that was closed, for as long as this runs
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    with suppress(OSError, ValueError, AttributeError):  # a standard error that is closed
        faulthandler.enable(all_threads=False)  # where native code crashes, says where Python stood
    status: str | int | None
    try:
        app()
        status = 0
    except SystemExit as end:
        status = end.code
    except BrokenPipeError:
        status = BROKEN_PIPE_STATUS
    except Exception:  # a fault of ours or of a library
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if is_one_of_many():
        os._exit(status if isinstance(status, int) else int(status is not None))
    _close_what_cannot_be_written()
    sys.exit(status)


def _close_what_cannot_be_written() -> None:
    """Lead a standard output that is closed or full into nothing, or the interpreter would fail on it at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
