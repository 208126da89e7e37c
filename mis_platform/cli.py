"""The `mis` command: parse, resolve, hand over. The only file that knows typer and exit codes.

Exit codes: 0 done; 2 usage or settings; 3 data invalid or missing; 4 finished with failures; 5 fingerprint mismatch;
6 storage or cluster lost; 75 preempted (SIGTERM), run me again; 130 stopped by Ctrl-C, run me again.

Everything heavy is imported inside the commands, after the settings are read: `mis --help` and a typo answer at once.
"""

import enum
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

# Before Ray is imported, which reads it: else a thread that is still at work when Ray was shut down starts another one.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

if TYPE_CHECKING:
    from mis_platform.config import Resources, Run
    from mis_platform.data.benchmarks import Dataset
    from mis_platform.storage import Storage
    from mis_platform.submission import Cluster
    from mis_platform.sweep import Sweep

HERE_ONLY = {"submit", "status", "logs", "stop", "ui", "quickstart", "show"}  # commands that no job runs
USAGE, DATA, FAILURES, MISMATCH, LOST, PREEMPTED, INTERRUPTED = 2, 3, 4, 5, 6, 75, 130


class Split(enum.StrEnum):
    """Which images of a dataset that comes in two halves."""

    train = "train"
    val = "val"


class Source(enum.StrEnum):
    """Unsupervised proposals that can be scored: what target.source allows, but for labels."""

    tree = "tree"
    tokencut = "tokencut"
    dsm = "dsm"
    freemask = "freemask"


class Commands(TyperGroup):
    """A group that says where a word belongs which is none of its commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As click's own; a word of another group ends in a usage error (exit code 2) that says where it belongs."""
        if args and args[0] not in self.commands and (place := _place_of(args[0])):
            ctx.fail(f"No such command {args[0]!r}; did you mean: {place}?")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Unsupervised interactive segmentation: photos in, a click model and its score out.",
)
data_app = typer.Typer(no_args_is_help=True, help="Datasets: what is there, and is it whole?")
app.add_typer(data_app, name="data")
run_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Experiments: every table and figure of the paper.")
app.add_typer(run_app, name="run")
cluster_app = typer.Typer(no_args_is_help=True, help="Clusters: is a file right, before money is spent?")
app.add_typer(cluster_app, name="cluster")

RootOption = Annotated[
    str, typer.Option("--root", envvar="MIS_ROOT", help="Where artifacts go: a folder, or s3://bucket/prefix.")
]
DataRootOption = Annotated[
    Path | None, typer.Option("--data-root", envvar="MIS_DATA", help="Folder that holds the datasets by name.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting, e.g. sampling.alpha=0.8 (all: `mis show`)."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what is done and what is missing; run nothing.")]
ProfileOption = Annotated[str, typer.Option("--profile", help="Size of the experiment: paper, small or smoke.")]
OnlyOption = Annotated[list[str] | None, typer.Option("--only", metavar="ROW", help="Only this row; repeat for more.")]
SeedsOption = Annotated[int, typer.Option("--seeds", min=1, max=100, help="Trainings of each row, with other seeds.")]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Exit with 5 if other code has made or begun what would be used.")
]
DASHBOARD = "http://127.0.0.1:8265"
AddressOption = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="The dashboard of the cluster's head.")
]
UntrustedOption = Annotated[
    bool, typer.Option("--untrusted", help="Decode files in a child process with limits (resources.untrusted=true).")
]
DatasetOption = Annotated[
    str | None, typer.Option("--dataset", help="NAME under --data-root, or NAME:PATH, e.g. folder:photos.")
]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from mis_platform import __version__

        typer.echo(f"mis {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What belongs to no command."""


@app.command()
def quickstart(
    root: Annotated[str, typer.Option("--root", help="Folder for everything this makes.")] = "quickstart",
    assignments: SetOption = None,
) -> None:
    """The whole method in minutes on a laptop: photos, trees, a small training, its score, pictures, MLflow."""
    from mis_platform import quickstart as story

    run, resources = story.settings(assignments or [])
    story.tell(_root(root), run, resources)


@app.command()
def precompute(
    dataset: DatasetOption = None,
    root: RootOption = "artifacts",
    data_root: DataRootOption = None,
    assignments: SetOption = None,
    dry_run: DryRunOption = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 if any photo was refused.")] = False,
    untrusted: UntrustedOption = False,
) -> None:
    """Turn photos into merge trees: features, then Ward merging, one row an image."""
    run, resources = _settings(assignments, untrusted, dataset=dataset)
    from mis_platform import pipeline

    photos = pipeline.training_photos(run, data_root, resources.untrusted)
    stage = pipeline.trees_stage(photos, run, resources)
    if dry_run:
        return _print_plan([stage], root)
    trees, summary = _ensure(stage, _writable(root))
    typer.echo(_counts("trees", summary))
    typer.echo(f"trees: {trees}")
    if strict and summary.get("quarantined"):
        raise typer.Exit(FAILURES)


@app.command()
def train(
    dataset: DatasetOption = None,
    root: RootOption = "artifacts",
    data_root: DataRootOption = None,
    assignments: SetOption = None,
    dry_run: DryRunOption = False,
    strict: StrictOption = False,
    untrusted: UntrustedOption = False,
) -> None:
    """Train a click model on simulated interactions; makes the trees first if they are missing."""
    run, resources = _settings(assignments, untrusted, dataset=dataset)
    from mis_platform import jobs, pipeline
    from mis_platform.artifacts import check_code

    photos = pipeline.training_photos(run, data_root, resources.untrusted)
    stage = pipeline.checkpoint_stage(photos, run, resources, lambda step, metrics: None)
    if strict:
        check_code([stage], _root(root))
    if dry_run:
        return _print_plan([stage], root)
    checkpoint = jobs.train(photos, run, resources, _writable(root))
    typer.echo(f"model: {checkpoint}")
    typer.echo(f"next: mis eval --dataset grabcut --model {checkpoint}")


@app.command(name="eval")
def evaluate(
    dataset: Annotated[list[str] | None, typer.Option("--dataset", help="A benchmark; repeat for several.")] = None,
    model: Annotated[str, typer.Option("--model", help="Directory, fingerprint, MLflow run, or latest.")] = "latest",
    method: Annotated[
        str | None,
        typer.Option("--method", help="No model: graphcut, random_walk, geodesic, gsc, esc, or module:class."),
    ] = None,
    proposals: Annotated[bool, typer.Option("--proposals", help="Score proposals instead of a model.")] = False,
    source: Annotated[
        list[Source] | None, typer.Option("--source", help="With --proposals: which ones; repeat to compare.")
    ] = None,
    root: RootOption = "artifacts",
    data_root: DataRootOption = None,
    assignments: SetOption = None,
    dry_run: DryRunOption = False,
    untrusted: UntrustedOption = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out images whose files are missing, instead of exit code 3.")
    ] = False,
) -> None:
    """Clicks needed on a benchmark (NoC@85, NoC@90), or, with --proposals, how well proposals fit the objects."""
    from mis_platform.config import CLASSICAL_READS, TRAINED, override

    if source and not proposals:
        raise ValueError("--source says which proposals to score; it needs --proposals")
    run, resources = _settings(assignments, untrusted, method=method)
    from mis_platform import jobs, pipeline

    specs, asking = dataset or run.eval_datasets, ("eval", "eval_datasets", "method")
    benchmarks = [pipeline.benchmark(spec, data_root, resources.untrusted) for spec in specs]
    if allow_missing:
        benchmarks = [_without_missing(benchmark) for benchmark in benchmarks]
    if proposals:
        reads = ("data", "eval_datasets", "features", "sources", "target")
        _note_without_effect(run, assignments, reads, "proposals need no training")
        runs = [override(run, [f"target.source={each}"]) for each in source or ()] or [run]
        if dry_run:
            return _print_plan([pipeline.overlap_stage(b, each, resources) for b in benchmarks for each in runs], root)
        typer.echo(jobs.score_proposals(benchmarks, runs, resources, _writable(root)))
        return None
    from mis_platform import report, saved_models

    if run.method != TRAINED:
        settings = [f"classical.{name}" for name in CLASSICAL_READS.get(run.method, ())]
        _note_without_effect(run, assignments, (*settings, *asking), f"{run.method} needs no training")
        if dry_run:
            return _print_plan([pipeline.method_clicks_stage(each, run, resources) for each in benchmarks], root)
        scores = jobs.evaluate_method(benchmarks, run, resources, _writable(root))
    else:
        directory = saved_models.find_model(_root(root), model)
        typer.echo(f"model: {directory}", err=True)
        run = _as_imported(run, directory, assignments)
        known = jobs.settings_of(directory, run)
        _note_without_effect(run, assignments, asking, "the model is trained already", known)
        if dry_run:
            return _print_plan([pipeline.clicks_stage(b, run, resources, directory) for b in benchmarks], root)
        scores = jobs.evaluate(benchmarks, directory, run, resources, _writable(root))
    typer.echo(report.published_table(scores))
    typer.echo(f"\n{report.summary_table(scores)}")
    return None


@app.command(name="import")
def import_model(
    file: Annotated[Path, typer.Argument(help="An official .pth file of SimpleClick, MIS or RITM.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for the model.")],
    refine: Annotated[
        str | None, typer.Option("--refine", help="fbrs: refine the answer at every click (RITM only).")
    ] = None,
) -> None:
    """Turn an official checkpoint into a model for `mis eval`; nothing in the file is run."""
    if "://" in str(out) or str(out).startswith("s3:"):
        raise ValueError(f"--out {out}: a model is imported into a local folder; copy it where it is needed")
    from mis_platform.model.checkpoints import import_checkpoint

    config = import_checkpoint(file, out, refine)
    settings = ", ".join(f"{name}={_spell(value)}" for name, value in config["eval"].items())
    typer.echo(f"model: {out} ({config['family']} {config['variant']}; {settings})")
    typer.echo(f"next: mis eval --dataset grabcut --model {out}")


@app.command(name="list")
def list_experiments() -> None:
    """The experiments and their questions."""
    from mis_platform import experiment

    files = experiment.list_experiments()
    if not files:
        raise ValueError(f"there are no experiments in {experiment.experiments_folder()}; set MIS_EXPERIMENTS")
    width = max(map(len, files))
    for name, file in files.items():
        typer.echo(f"{name:<{width}}  {experiment.question_of(file)}")


@run_app.command(name="sweep")
def run_sweep(
    name: Annotated[str, typer.Argument(help="An experiment, see `mis list`.")],
    profile: ProfileOption = "paper",
    only: OnlyOption = None,
    seeds: SeedsOption = 1,
    root: RootOption = "artifacts",
    data_root: DataRootOption = None,
    assignments: SetOption = None,
    dry_run: DryRunOption = False,
    strict: StrictOption = False,
) -> None:
    """Train and score every row of an experiment; run it again to go on after any stop. Exit code 4: a row failed or
    was refused, because its data or weights are not there."""
    prepared = _sweep(name, profile, only, seeds, root, data_root, assignments, writes=not dry_run)
    from mis_platform import sweep
    from mis_platform.comparison import STOPPED, render

    if strict:
        sweep.check_same_code(prepared)
    if dry_run:
        return _print_sweep(prepared)

    comparison = sweep.run_sweep(prepared)
    typer.echo(render(comparison, "text"))
    typer.echo(f"\nreport and figures: {prepared.directory}", err=True)
    found = sweep.outcomes(prepared)
    for state in STOPPED:
        names = dict.fromkeys(outcome.row.name for outcome in found if outcome.state == state)
        if names:
            about = f"{state}, for the reasons above: {', '.join(names)}; the same command tries them again"
            typer.echo(about, err=True)
    if any(outcome.state in STOPPED for outcome in found):
        raise typer.Exit(FAILURES)
    return None


@app.command(name="report")
def report_experiment(
    name: Annotated[str, typer.Argument(help="An experiment, see `mis list`.")],
    profile: ProfileOption = "paper",
    only: OnlyOption = None,
    seeds: SeedsOption = 1,
    form: Annotated[str, typer.Option("--format", help="text, markdown, html or json.")] = "text",
    root: RootOption = "artifacts",
    data_root: DataRootOption = None,
    assignments: SetOption = None,
) -> None:
    """The table of an experiment beside the paper's, from what is done so far; runs nothing."""
    prepared = _sweep(name, profile, only, seeds, root, data_root, assignments, writes=False, reads=True)
    from mis_platform import sweep
    from mis_platform.comparison import render

    typer.echo(render(sweep.compare_rows(prepared)[0], form))


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="An experiment; without one, all settings.")] = None,
    dataset: DatasetOption = None,
    profile: ProfileOption = "paper",
    seeds: SeedsOption = 1,
    root: RootOption = "artifacts",
    data_root: DataRootOption = None,
    assignments: SetOption = None,
) -> None:
    """Every setting with its value, or an experiment: its question, settings, rows, what is done and what is missing.

    Nothing is written below the root.
    """
    if name is not None:
        return _print_sweep(_sweep(name, profile, None, seeds, root, data_root, assignments, writes=False))
    return _print_settings(dataset, root, data_root, assignments)


@app.command()
def ui(
    root: RootOption = "artifacts",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow UI on the runs of this root (loopback only)."""
    from mis_platform import tracking

    command, environment = tracking.ui_command(_root(root), port)
    typer.echo(f"MLflow UI: http://127.0.0.1:{port} (Ctrl-C stops it)", err=True)
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


@app.command(context_settings={"allow_interspersed_args": False})  # options behind COMMAND are COMMAND's
def submit(
    words: Annotated[list[str], typer.Argument(metavar="COMMAND", help="e.g. run sweep ablation_alpha")],
    address: AddressOption = DASHBOARD,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log and return its exit code.")] = True,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME", help="Hand this variable on, e.g. HF_TOKEN; the cluster keeps it."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Even if the same command is running already.")] = False,
) -> None:
    """Run a command on a cluster through the Ray Jobs API, and return its exit code. Ctrl-C detaches; the job goes on.

    What travels is this package, the experiments, MIS_ROOT, MIS_DATA and MLFLOW_TRACKING_URI. Photos, weights and
    artifacts are read where the cluster sees them.
    """
    _check_command(words)
    from mis_platform import packing

    packing.collect()  # what must not travel is told before Ray is imported and anybody is asked
    from mis_platform import submission

    places = [os.environ[name] for name in submission.HANDED_ON if os.environ.get(name)]
    for note in submission.check_words([*words, *places]):
        typer.echo(f"note: {note}", err=True)
    cluster = submission.Cluster(address)
    name = cluster.submit(words, env or [], again)
    typer.echo(f"job {name}", err=True)
    if not wait:
        typer.echo(name)
        return
    _follow(cluster, name)


@app.command()
def status(
    job: Annotated[str | None, typer.Argument(help="One job; without it, all of them.")] = None,
    address: AddressOption = DASHBOARD,
) -> None:
    """The jobs of a cluster that `mis submit` sent: state, exit code, start, duration, command."""
    from mis_platform import submission

    cluster = submission.Cluster(address)
    jobs = cluster.jobs() if job is None else [cluster.job(job)]
    typer.echo(submission.table(jobs))
    if job is not None and jobs[0].is_over:
        typer.echo(jobs[0].ending())


@app.command()
def logs(
    job: Annotated[str, typer.Argument(help="A job, see `mis status`.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it is over; return its exit code.")] = False,
    address: AddressOption = DASHBOARD,
) -> None:
    """What a job has said."""
    from mis_platform import submission

    cluster = submission.Cluster(address)
    if follow:
        _follow(cluster, job)
    else:
        typer.echo(cluster.logs(job), nl=False)


@app.command()
def stop(
    job: Annotated[str, typer.Argument(help="A job, see `mis status`.")], address: AddressOption = DASHBOARD
) -> None:
    """Stop a job: it has half a minute to commit a checkpoint, and the same command goes on from there."""
    from mis_platform import submission

    stopped = submission.Cluster(address).stop(job)
    if not stopped.is_over:
        raise ConnectionError(f"{job} was asked to stop and has not; see `mis status {job}`")
    typer.echo(stopped.ending())


@app.command()
def doctor(
    name: Annotated[str | None, typer.Argument(help="An experiment that is to run, see `mis list`.")] = None,
    profile: ProfileOption = "paper",
    root: RootOption = "artifacts",
    data_root: DataRootOption = None,
    assignments: SetOption = None,
) -> None:
    """Is everything here that a run needs? Each line says what was looked at, and how to mend what is wrong."""
    from mis_platform.config import Resources, override, split_resources
    from mis_platform.experiment import load_experiment

    deciding, wide = split_resources(assignments or [])
    resources = override(Resources(), wide)
    if name is not None:
        load_experiment(name).with_profile(profile).with_settings(deciding)
    from mis_platform import doctor

    worst = 0
    for finding in doctor.examine(_root(root), data_root, resources, name, profile, deciding):
        typer.echo(str(finding))
        worst = max(worst, finding.exit_code)
    if worst:
        raise typer.Exit(worst)


@app.command()
def verify(
    artifacts: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE/FINGERPRINT]...", help="Only these; default all.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make damaged trees and proposals again; needs their photos.")
    ] = False,
    dataset: DatasetOption = None,
    root: RootOption = "artifacts",
    data_root: DataRootOption = None,
    assignments: SetOption = None,
) -> None:
    """Read everything in the root and report what is missing or damaged (exit code 3 if anything is)."""
    run, resources = _settings(assignments, dataset=dataset)
    from mis_platform import verification

    storage = _writable(root) if repair else _root(root)
    verdict = verification.verify(storage, artifacts or [])
    typer.echo(str(verdict))
    damaged = dict.fromkeys(problem.artifact for problem in verdict.problems)
    for artifact in damaged if repair else ():
        manifest = verification.repair(storage, artifact, verdict.damaged(artifact), run, resources, data_root)
        typer.echo(f"repaired: {artifact}, digest {manifest['digest'][:16]} as before")
    if damaged and not repair:
        for artifact in damaged:
            typer.echo(verification.how_to_make(storage.child(*artifact.split("/")), artifact), err=True)
        raise typer.Exit(DATA)


@data_app.command(name="list")
def data_list(data_root: DataRootOption = None) -> None:
    """Which datasets are known, and which are under --data-root."""
    from mis_platform.data import benchmarks

    for line in benchmarks.list_datasets(data_root):
        typer.echo(line)


@data_app.command(name="verify")
def data_verify(
    dataset: Annotated[str, typer.Option("--dataset", help="NAME or NAME:PATH.")],
    data_root: DataRootOption = None,
    split: Annotated[Split, typer.Option("--split", help="For datasets that have both.")] = Split.val,
    untrusted: UntrustedOption = False,
) -> None:
    """Read every photo and mask of a dataset and report what is missing or broken (exit code 3 if anything is)."""
    from mis_platform.data import benchmarks
    from mis_platform.progress import Progress

    half: Literal["train", "val"] = "train" if split is Split.train else "val"
    opened = benchmarks.open_dataset(dataset, data_root, half, untrusted)
    report = benchmarks.verify(opened, on_image=Progress("verify", len(opened), "images").update)
    typer.echo(str(report))
    if report.problems:
        raise typer.Exit(DATA)


@cluster_app.command(name="validate")
def cluster_validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files that are used together, or folders.")],
    cpu_only: Annotated[bool, typer.Option("--cpu-only", help="A cluster without GPUs is what is wanted.")] = False,
) -> None:
    """Check Ray cluster YAMLs, Kubernetes manifests and Compose files offline (exit code 2 if anything is wrong)."""
    from mis_platform import cluster_files

    findings = cluster_files.check_files(files, cpu_only)
    for finding in findings:
        typer.echo(str(finding))
    errors = sum(finding.severity == cluster_files.ERROR for finding in findings)
    typer.echo(f"{errors} errors, {len(findings) - errors} warnings", err=True)
    if errors:
        raise typer.Exit(USAGE)


@data_app.command(name="unpack")
def data_unpack(
    file: Annotated[Path, typer.Argument(help="A zip, tar, tar.gz or tar.bz2 archive.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    sha256: Annotated[str | None, typer.Option("--sha256", help="What the archive's SHA-256 must be.")] = None,
    max_gib: Annotated[int, typer.Option("--max-gib", min=1, help="Refuse more than this.")] = 1024,
) -> None:
    """Unpack a downloaded dataset: nothing leaves the folder, no links, no bombs, whole or not at all."""
    from mis_platform.data import archives

    unpacked = archives.unpack(file, out, sha256=sha256, max_bytes=max_gib * 2**30)
    typer.echo(f"{unpacked.files} files, {unpacked.bytes / 2**20:.1f} MiB in {unpacked.folder}")
    typer.echo(f"next: mis data verify --untrusted --dataset NAME:{unpacked.folder}")


# -- shared ----------------------------------------------------------------------------------------------------------


class Detached(SystemExit):
    """Ctrl-C while following a job: there is nothing to run again, the job goes on."""


def _follow(cluster: "Cluster", name: str) -> None:
    """Print the job's log until it is over, and exit with its exit code."""
    try:
        job = cluster.follow(name)
    except KeyboardInterrupt:
        typer.echo(
            f"\ndetached; the job goes on. Follow it: mis logs {name} --follow   Stop it: mis stop {name}", err=True
        )
        raise Detached(INTERRUPTED) from None
    if job.exit_code:
        typer.echo(f"{name}: {job.ending()}", err=True)
    raise typer.Exit(job.exit_code or 0)


def _check_command(words: list[str]) -> None:
    """Read `words` as a command line of ours, to tell a typing error here and not minutes later on the cluster."""
    from mis_platform.config import nearest

    if words[0] in HERE_ONLY:
        raise ValueError(f"mis {words[0]} is for this machine; there is nothing to submit")
    command, rest = typer.main.get_command(app), list(words)
    while isinstance(command, TyperGroup):
        if not rest or rest[0] not in command.commands:
            place = _place_of(rest[0]) if rest else ""
            hint = f"; did you mean: {place}?" if place else nearest(rest[0] if rest else "", command.commands)
            raise ValueError(f"no command `mis {' '.join(words)}`{hint}")
        command = command.commands[rest.pop(0)]
    context = command.make_context(f"mis {' '.join(words[: len(words) - len(rest)])}", rest)
    if (name := context.params.get("name")) is not None:
        from mis_platform.experiment import load_experiment

        load_experiment(name)


def _place_of(word: str) -> str:
    """The command line on which a command of another group, or an experiment, can be asked for; "" for other words."""
    from mis_platform.experiment import list_experiments

    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    if word in root.commands:
        return f"mis {word}"
    for name, group in root.commands.items():
        if isinstance(group, TyperGroup) and word in group.commands:
            return f"mis {name} {word}"
    return f"mis run sweep {word}" if word in list_experiments() else ""


def _print_settings(
    dataset: str | None, root: str, data_root: Path | None, assignments: list[str] | None
) -> None:  # fmt: skip
    from mis_platform.config import Resources, Run, fingerprint, flatten

    run, resources = _settings(assignments, dataset=dataset)
    width = max(map(len, flatten(run)))
    for settings, default, prefix in ((run, Run(), ""), (resources, Resources(), "resources.")):
        for name, value in flatten(settings, prefix).items():
            changed = (
                ""
                if flatten(default, prefix)[name] == value
                else f"   (default {_spell(flatten(default, prefix)[name])})"
            )
            typer.echo(f"{name:<{width}}  {_spell(value)}{changed}")
    typer.echo(f"\nfingerprint {fingerprint(run)}")
    from mis_platform import pipeline

    try:
        photos = pipeline.training_photos(run, data_root)
        stage = pipeline.checkpoint_stage(photos, run, resources, lambda step, metrics: None)
    except ValueError as error:
        typer.echo(f"stages: {error}")
    else:
        _print_plan([stage], root)


def _sweep(
    name: str,
    profile: str,
    only: list[str] | None,
    seeds: int,
    root: str,
    data_root: Path | None,
    assignments: list[str] | None,
    writes: bool,
    reads: bool = False,
) -> "Sweep":
    """What the words of a command line mean; typing errors are told before anything heavy is imported.

    reads: that nothing was ever run in the root is an error.
    """
    from mis_platform.config import Resources, override, split_resources
    from mis_platform.experiment import load_experiment

    deciding, wide = split_resources(assignments or [])
    resources = override(Resources(), wide)
    load_experiment(name).with_profile(profile).with_settings(deciding).select(only or [])
    storage = _writable(root) if writes else _root(root)
    if reads:
        _check_runs(storage)
    from mis_platform import sweep

    return sweep.prepare(
        name,
        profile=profile,
        root=storage,
        data_root=data_root,
        resources=resources,
        assignments=deciding,
        only=only or [],
        seeds=seeds,
        writes=writes,
    )


def _check_runs(root: "Storage") -> None:
    from mis_platform.errors import DataError
    from mis_platform.verification import has_artifacts

    if not has_artifacts(root) and not root.child("sweeps").names():
        raise DataError(f"nothing has been run in {root} yet; is it the right --root?")


def _print_sweep(prepared: "Sweep") -> None:
    """The question, the settings of all rows, the rows with those that tell them apart and what is done, the work left.

    A row's fingerprint is that of its MLflow run, the tag `mis.fingerprint`: its model and how that is scored.
    """
    from mis_platform.config import ROBOT_SETTINGS, TRAINED, flatten

    untrained = {"method", *(f"eval.{name}" for name in ROBOT_SETTINGS)}  # what decides the answers of other methods
    experiment, varied = prepared.experiment, prepared.experiment.varied()
    typer.echo(f"{prepared.name} ({experiment.source}, profile {prepared.profile}): {experiment.question}")
    if experiment.note:
        typer.echo(experiment.note)
    running = [row for row in experiment.rows if not row.quoted]
    if running:
        typer.echo(f"\nall rows, at profile {prepared.profile}:")
        _print_shared(running[0].run, varied)
    typer.echo("")
    width = max(len(row.name) for row in experiment.rows) + len(" seed 00")
    tasks = {(task.row.name, task.seed): task for task in prepared.tasks}
    for row in experiment.rows:
        if row.quoted:
            typer.echo(f"{'quoted':<8}  {row.name:<{width}}  {row.quoted}")
        for seed in range(row.seeds(prepared.seeds, prepared.experiment.measure)):
            relevant = varied if row.run.method == TRAINED else [name for name in varied if name in untrained]
            settings = ", ".join(f"{name}={_spell(flatten(row.run)[name])}" for name in relevant)
            task, why = tasks.get((row.name, seed)), prepared.refused.get((row.name, seed))
            state = "refused" if task is None else _state(task, prepared)
            about = why if task is None else f"{task.fingerprint(prepared.resources)}  {settings}".rstrip()
            typer.echo(f"{state:<8}  {row.name + (f' seed {seed}' if seed else ''):<{width}}  {about}")
    typer.echo(f"\n{prepared.work()}")


def _print_shared(run: "Run", varied: list[str]) -> None:
    """The settings that rows do not differ in, a paragraph for each group; beside those that are no default, that."""
    import textwrap

    from mis_platform.config import Run, flatten

    usual = flatten(Run())
    groups: dict[str, list[str]] = {}
    for name, value in flatten(run).items():
        group, _, leaf = name.rpartition(".")
        default = "" if value == usual[name] else f" (default {_spell(usual[name])})"
        if name not in varied:
            groups.setdefault(group, []).append(f"{leaf}={_spell(value)}{default}")
    for group, texts in groups.items():
        text = f"{group}: {', '.join(texts)}" if group else ", ".join(texts)
        typer.echo(textwrap.fill(text, 120, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False))


def _state(task: Any, prepared: "Sweep") -> str:
    return "done" if task.is_done(prepared.root, prepared.resources) else "missing"


def _settings(assignments: list[str] | None, untrusted: bool = False, **named: Any) -> "tuple[Run, Resources]":
    """Run and Resources with the command line's changes; `resources.*` names go to the latter."""
    from mis_platform.config import Resources, Run, override, split_resources

    deciding, wide = split_resources(assignments or [])
    wide += ["resources.untrusted=true"] if untrusted else []
    deciding += [f"{name}={value}" for name, value in named.items() if value is not None]
    return override(Run(), deciding), override(Resources(), wide)


def _as_imported(run: "Run", directory: "Storage", assignments: list[str] | None) -> "Run":
    """For a model that was imported: under the click protocol of its family, where --set says nothing else."""
    from mis_platform.model.weights import eval_config
    from mis_platform.saved_models import describe

    names = [text.partition("=")[0].strip() for text in assignments or []]
    given = [name.removeprefix("eval.") for name in names if name.startswith("eval.")]
    return run.model_copy(update={"eval": eval_config(describe(directory), run.eval, given)})


def _note_without_effect(
    run: "Run", assignments: list[str] | None, used: tuple[str, ...], why: str, known: dict[str, Any] | None = None
) -> None:
    """Name the settings on the command line that this evaluation does not look at, but for what is so anyway.

    used: groups and names that it does look at; known: what decided the model, by dotted name.
    """
    from mis_platform.config import flatten, split_resources

    asked, deciding = flatten(run), split_resources(assignments or [])[0]
    names = dict.fromkeys(text.partition("=")[0].strip() for text in deciding)
    others = [name for name in names if name not in used and name.partition(".")[0] not in used]
    if idle := [name for name in others if name not in (known or {}) or asked[name] != (known or {})[name]]:
        typer.echo(f"note: no effect here, for {why}: {', '.join(idle)}", err=True)


def _without_missing(benchmark: "Dataset") -> "Dataset":
    whole, missing = benchmark.without_missing()
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        about = f"{benchmark.name}: {len(missing)} of {len(benchmark)} images are left out, files are missing"
        typer.echo(f"{about} ({names}); the score is not comparable", err=True)
    return whole


def _root(root: str) -> "Storage":
    from mis_platform.storage import Storage

    storage = Storage(root)
    if storage.local is not None and os.path.isfile(storage.local):
        raise ValueError(f"{storage} is a file, not a folder; choose another --root")
    return storage


def _writable(root: str) -> "Storage":
    storage = _root(root)
    storage.check_writable()
    return storage


def _ensure(stage: Any, root: "Storage") -> "tuple[Storage, dict[str, Any]]":
    from mis_platform.artifacts import check_missing, ensure, read_manifest
    from mis_platform.stages.cluster import cluster

    if stage.is_done(root):
        directory = ensure(stage, root)
        typer.echo(f"{stage.name}: already done", err=True)
    else:
        check_missing(stage, root)
        with cluster(root):
            directory = ensure(stage, root)
    return directory, read_manifest(directory)["summary"]


def _print_plan(stages: list[Any], root: str) -> None:
    from mis_platform.artifacts import check_missing, walk

    storage = _root(root)
    for stage in stages:
        for needed in walk(stage):
            state = "done   " if needed.is_done(storage) else "missing"
            typer.echo(f"{state}  {needed.directory(storage)}")
    for stage in stages:
        check_missing(stage, storage)


def _counts(label: str, summary: dict[str, Any]) -> str:
    return f"{label}: " + ", ".join(f"{name} {_spell(value)}" for name, value in summary.items())


def _spell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return json.dumps(value, separators=(",", ":"))  # as --set takes it
    return "none" if value is None else str(value)


def main() -> None:
    """Run the command line; the one place where signals and errors become exit codes."""
    from mis_platform.stopping import Signals

    def lost(message: str) -> int:
        print(file=sys.stderr)  # behind the progress, which may stand in the middle of a line
        _tell(message)
        return PREEMPTED if signals.is_preempted else LOST

    with Signals(INTERRUPTED, lost) as signals:
        try:
            _main()
        except BaseException as error:
            stop = error.code if isinstance(error, SystemExit) else None
            # While Ray starts, the handler of SIGTERM is its own and exits with the signal's number. When a whole group
            # of processes is told to end, Ray may be gone before we are: then an error is only what follows from that.
            if signals.is_preempted or stop == signal.SIGTERM:
                print("\npreempted; run the same command again to go on from here", file=sys.stderr)
                sys.exit(PREEMPTED)
            if isinstance(error, Detached):
                raise
            if stop == INTERRUPTED or isinstance(error, KeyboardInterrupt):
                print("\nstopped; run the same command again to go on from here", file=sys.stderr)
                sys.exit(INTERRUPTED)
            if isinstance(error, SystemExit):
                raise
            from mis_platform.redaction import scrub

            print(scrub(traceback.format_exc()), file=sys.stderr)  # our fault: show everything but secrets
            sys.exit(1)


def _main() -> None:
    try:
        app()
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        _tell(str(error))
        sys.exit(code)


def _tell(message: str) -> None:
    """What went wrong, as one line without secrets."""
    from mis_platform.redaction import scrub

    print(f"Error: {scrub(' '.join(message.split()))}", file=sys.stderr)


def _exit_code(error: Exception) -> int | None:
    from mis_platform.errors import DataError, FingerprintMismatch, TrainingDiverged

    codes = {
        FingerprintMismatch: MISMATCH,
        DataError: DATA,
        TrainingDiverged: FAILURES,
        ValueError: USAGE,
        OSError: LOST,
    }
    for kind, code in codes.items():
        if isinstance(error, kind):
            return code
    return LOST if type(error).__module__.startswith("ray.") else None


if __name__ == "__main__":
    main()
