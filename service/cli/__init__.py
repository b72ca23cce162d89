"""`tunesmith`: the command line, thin over the HTTP API. Every command is an ordinary client's work.

This file owns the list of commands and their options; what they do lies beside it. It imports neither openai nor rich
nor Ray, which would make `--help` slow: each command imports what it needs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from service.settings import Settings

app = typer.Typer(
    help="Fine-tune open language models and serve them, on your own Ray cluster, through the OpenAI API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
base_app = typer.Typer(help="Base models that jobs may start from.", no_args_is_help=True)
alias_app = typer.Typer(help="Names that move from model to model.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(base_app, name="base")
app.add_typer(alias_app, name="alias")

DEFAULT_URL = "http://127.0.0.1:8000/v1"
Url = Annotated[str, typer.Option(envvar="TUNESMITH_URL", help="The service, up to and including /v1.")]
Key = Annotated[
    str, typer.Option(envvar="TUNESMITH_API_KEY", show_default="the admin key in the home", help="API key.")
]
Home = Annotated[Path | None, typer.Option(help="Folder of the service's state.", show_default="~/.tunesmith")]


def settings_with(**changes: object) -> Settings:
    """The settings of the environment, with the options that were given in their place."""
    return Settings().model_copy(update={name: value for name, value in changes.items() if value is not None})


@app.command()
def up(
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; starts one when left out.")] = None,
    home: Home = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port.", show_default="8000")] = None,
) -> None:
    """Run the service until Ctrl-C."""
    from service import up as service_up

    try:
        service_up.main(settings_with(ray_address=address, home=home, host=host, port=port))
    except service_up.UpError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def demo(
    home: Annotated[Path | None, typer.Option(help="Keep everything here; otherwise a temporary folder.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port.", show_default="a free one")] = None,
) -> None:
    """The whole story in a few minutes: build a base, fine-tune it, and compare the answers."""
    from service.demo import run_demo

    raise typer.Exit(run_demo(home, port))


@app.command()
def train(
    data: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="Training file (JSONL).")],
    base_model: Annotated[str, typer.Option(help="Base, or earlier fine-tune, to start from.")],
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's id.")] = None,
    method: Annotated[
        Literal["supervised", "dpo", "classification", "embedding"],
        typer.Option(help="How the model learns from the rows."),
    ] = "supervised",
    validation_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="Rows that are only measured.")
    ] = None,
    validation_split: Annotated[
        float | None, typer.Option(min=0, max=0.5, help="Share of the rows to measure on.", show_default="none")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many evaluations without a lower validation loss.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="How far dpo may lead away.", show_default="auto")] = None,
    loss_type: Annotated[
        Literal["sigmoid", "ipo", "simpo", "orpo"] | None, typer.Option(help="Loss of dpo.", show_default="sigmoid")
    ] = None,
    sample: Annotated[
        list[str] | None, typer.Option(help="A prompt to answer at each evaluation; may be repeated.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=50, show_default="auto")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=256, show_default="auto")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Absolute.", show_default="auto")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other field of the request, such as keep_checkpoints=5, adapter.dropout=0.1 or "
            "hyperparameters.warmup_ratio=0.1; may be repeated.",
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of a LoRA adapter.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, max=512, help="LoRA rank.", show_default="auto")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale LoRA by the root of its rank.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="LoRA with a trained length for each row of weights.")] = False,
    workers: Annotated[
        str, typer.Option(metavar="N|MIN-MAX", help="Train workers; of a range as many as the cluster has room for.")
    ] = "1",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=V,V|NAME=MIN..MAX", help="Try values of learning_rate, batch_size, n_epochs or lora_rank."
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="So many random combinations of --sweep.", show_default="all")
    ] = None,
    asha: Annotated[bool, typer.Option("--asha", help="Stop weak trials of a sweep early.")] = False,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials of a sweep at a time.", show_default="2")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch the job until it is over.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and create nothing.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Upload a data set and create a fine-tuning job."""
    from service.cli import dry_run as dry_running
    from service.cli import jobs, sweeps
    from service.cli.client import connected

    _check_finite(learning_rate=learning_rate, beta=beta)
    chosen = {"rank": rank, "rslora": rslora or None, "dora": dora or None}
    adapter = {name: value for name, value in chosen.items() if value is not None}
    if full and adapter:
        raise typer.BadParameter(f"--{next(iter(adapter))} belongs to LoRA and cannot go with --full.")
    if method != "dpo" and (beta is not None or loss_type is not None):
        raise typer.BadParameter("--beta and --loss-type need --method dpo.")
    if patience is not None and validation_file is None and not validation_split:
        raise typer.BadParameter("--patience needs --validation-split or --validation-file.")
    if sweep and validation_file is None and not validation_split:
        raise typer.BadParameter("--sweep needs --validation-split or --validation-file.")
    if not sweep and (trials is not None or asha or max_concurrent is not None):
        raise typer.BadParameter("--trials, --asha and --max-concurrent belong to --sweep.")
    try:
        searched = sweeps.sweep_field(sweep, trials, asha, max_concurrent) if sweep else None
    except sweeps.SweepOptionError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        num_workers = jobs.parse_workers(workers)
    except ValueError:
        raise typer.BadParameter(f"--workers {workers}: give a number such as 2, or a range such as 1-4.") from None
    try:
        fields = jobs.parse_fields(set_ or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    hyperparameters = {
        "n_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "beta": beta,
        "loss_type": loss_type,
    }
    wishes = jobs.TrainWishes(
        base_model,
        method,
        hyperparameters,
        suffix=suffix,
        full=full,
        adapter=adapter,
        workers=num_workers,
        validation_split=validation_split,
        patience=patience,
        sample_prompts=sample,
        sweep=searched,
        fields=fields,
    )
    with connected(url, key) as client:
        if dry_run:
            dry_running.show_plan(client, data, validation_file, wishes)
            return
        raise typer.Exit(jobs.train(client, data, validation_file, wishes, wait=wait))


@app.command(name="jobs")
def show_jobs(
    job_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Show one job with its last events.")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel the job.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Pause the job after a checkpoint.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Let a paused job go on.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Watch the job until it is over.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """List jobs, or look at one and steer it."""
    from service.cli import jobs
    from service.cli.client import connected

    verbs = [name for name, wanted in (("cancel", cancel), ("pause", pause), ("resume", resume)) if wanted]
    if len(verbs) > 1 or ((verbs or wait) and job_id is None):
        raise typer.BadParameter("Give an ID, and one of --cancel, --pause and --resume at most.")
    with connected(url, key) as client:
        if job_id is None:
            jobs.show_all(client)
            return
        if verbs:
            jobs.steer(client, job_id, verbs[0])
        raise typer.Exit(jobs.watch(client, job_id) if wait else jobs.show_one(client, job_id))


@app.command()
def models(url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Everything that can be called."""
    from service.cli import registry
    from service.cli.client import connected

    with connected(url, key) as client:
        registry.show_models(client)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A model, checkpoint, base or alias.")],
    prompt: Annotated[str | None, typer.Argument(help="Ask once; without it you get a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 always takes the likeliest.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Talk to a model; answers are streamed."""
    from service.cli import talk
    from service.cli.client import connected

    with connected(url, key) as client:
        talk.chat(client, model, prompt, system=system, temperature=temperature, max_tokens=max_tokens)


@keys_app.command("create")
def create_key(
    name: str,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="files, jobs, models, inference or admin; may be repeated.", show_default="all but admin"),
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Make a key; it is shown once."""
    from service.cli import registry
    from service.cli.client import connected

    with connected(url, key) as client:
        registry.create_key(client, name, scope or [])


@keys_app.command("list")
def list_keys(url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Keys without their secrets."""
    from service.cli import registry
    from service.cli.client import connected

    with connected(url, key) as client:
        registry.list_keys(client)


@keys_app.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(metavar="ID")], url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Make a key invalid at once."""
    from service.cli import registry
    from service.cli.client import connected

    with connected(url, key) as client:
        registry.revoke_key(client, key_id)


@base_app.command("add")
def add_base(
    name: str,
    source: Annotated[str, typer.Argument(help="A folder on the service's machine, a Hub id, or `starter`.")],
    revision: Annotated[str | None, typer.Option(help="Commit of the Hub id.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Register a base model and wait until it is ready."""
    from service.cli import registry
    from service.cli.client import connected

    with connected(url, key) as client:
        raise typer.Exit(registry.add_base(client, name, source, revision))


@base_app.command("list")
def list_bases(url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Registered bases, also those in preparation."""
    from service.cli import registry
    from service.cli.client import connected

    with connected(url, key) as client:
        registry.list_bases(client)


@alias_app.command("set")
def set_alias(name: str, model: str, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Point a name to a model; requests that come later see the new one."""
    from service.cli import registry
    from service.cli.client import connected

    with connected(url, key) as client:
        registry.set_alias(client, name, model)


@alias_app.command("list")
def list_aliases(url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Aliases and what they point to."""
    from service.cli import registry
    from service.cli.client import connected

    with connected(url, key) as client:
        registry.list_aliases(client)


@alias_app.command("delete")
def delete_alias(name: str, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """End an alias; the model stays."""
    from service.cli import registry
    from service.cli.client import connected

    with connected(url, key) as client:
        registry.delete_alias(client, name)


def _check_finite(**options: float | None) -> None:
    """Typer takes "nan" and "inf" for numbers where there is no bound."""
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            raise typer.BadParameter(f"--{name.replace('_', '-')} {value}: give a finite number.")


def main() -> None:
    """The console script."""
    app()
