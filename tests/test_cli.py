"""The command line against a real service in this process: real API, database and orchestrator, no Ray, no model."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from openai import OpenAI
from typer.testing import CliRunner

from service.cli import app, jobs
from service.jobs.rehearsal import Rehearsal
from tests.api.live import ECHO, live_service, sync_client, ticking
from tests.training.runs import BASE_KEY, make_base
from training.storage import Storage

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PATIENCE_S = 60
BASE = "babbler"
NUM_STEPS = 6  # enough for the plan of a later job to take its speed from
HEAVY = ("openai", "ray", "torch", "transformers", "rich.progress", "fastapi", "sqlalchemy")

Tunesmith = Callable[..., Result]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """base_url and admin key; an orchestrator ticks beside it and its runs are rehearsals."""
    with (
        live_service(tmp_path_factory.mktemp("home"), validate_timeout_s=240) as (platform, url, secret),
        ticking(platform, Rehearsal(platform.storage, NUM_STEPS)),
    ):
        yield url, secret


@pytest.fixture
def tunesmith(service: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tunesmith:
    """Runs one command against the service, as its administrator."""
    url, secret = service
    for name, value in (
        ("TUNESMITH_URL", url),
        ("TUNESMITH_API_KEY", secret),
        ("TUNESMITH_HOME", str(tmp_path)),
        ("COLUMNS", "80"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jobs, "VALIDATION_POLL_S", 0.02)

    def run(*arguments: str, expect: int = 0, typed: str | None = None) -> Result:
        result = CliRunner().invoke(app, arguments, input=typed)
        assert result.exit_code == expect, (result.output, result.exception)
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture(scope="module")
def base(service: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny one, added by the command line: planning wants a real model's files."""
    source = Storage(str(tmp_path_factory.mktemp("babbler")))
    make_base(source)
    url, secret = service
    result = CliRunner().invoke(app, ["base", "add", BASE, source.path(BASE_KEY), "--url", url, "--key", secret])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "is ready" in result.output
    return BASE


@pytest.fixture
def client(service: tuple[str, str]) -> Iterator[OpenAI]:
    with sync_client(*service) as made:
        yield made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A good training file."""
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(ROW) + "\n") * 12)
    return path


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = f"""
import sys
from service.cli import app
try:
    app(["--help"])
finally:
    assert not [name for name in {HEAVY} if name in sys.modules], sorted(sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    for name in ("up", "demo", "train", "jobs", "models", "chat", "keys", "base", "alias"):
        assert f" {name} " in shown.stdout


def test_train_with_wait_follows_the_job_to_its_model(
    tunesmith: Tunesmith, client: OpenAI, data: Path, base: str
) -> None:
    shown = tunesmith(
        "train",
        str(data),
        "--base-model",
        base,
        "--suffix",
        "cli",
        "--rank",
        "4",
        "--dora",
        "--sample",
        "Who [are] you?",
        "--wait",
    ).output
    assert "12 rows" in shown
    assert f"step {NUM_STEPS} Who [are] you?\n  Answer {NUM_STEPS}\n" in shown
    assert "The job has successfully completed" in shown
    job = client.fine_tuning.jobs.list(limit=1).data[0]
    assert job.status == "succeeded"
    assert job.fine_tuned_model is not None
    assert f"tunesmith chat {job.fine_tuned_model}" in shown
    adapter = (job.model_extra or {})["adapter"]
    assert (adapter["rank"], adapter["dora"], adapter["rslora"]) == (4, True, False)
    assert job.fine_tuned_model in tunesmith("models").output  # whole, however narrow the terminal is
    assert f"{job.id}  succeeded  {base}  {job.fine_tuned_model}" in tunesmith("jobs").output
    details = tunesmith("jobs", job.id).output
    assert "succeeded" in details
    assert "New fine-tuned model created" in details


def test_train_passes_every_option_on(tunesmith: Tunesmith, client: OpenAI, data: Path, base: str) -> None:
    options = ("--epochs", "7", "--learning-rate", "0.003", "--full", "--validation-file", str(data))
    options += ("--workers", "1-2", "--batch-size", "3", "--set", "keep_checkpoints=5", "--set", "n_evals=4")
    options += ("--set", "hyperparameters.warmup_ratio=0.25", "--set", "metadata.team=red")
    tunesmith("train", str(data), "--base-model", base, *options)
    job = client.fine_tuning.jobs.list(limit=1).data[0]
    assert job.validation_file is not None
    assert job.hyperparameters is not None
    assert job.hyperparameters.n_epochs == 7
    extra = job.model_extra or {}
    assert extra["adapter"] == {"type": "none"}
    assert extra["num_workers"] == {"min": 1, "max": 2}
    hyper = job.to_dict()["method"]["supervised"]["hyperparameters"]  # type: ignore[index]
    assert {"learning_rate": 0.003, "batch_size": 3, "warmup_ratio": 0.25}.items() <= hyper.items()
    assert (extra["keep_checkpoints"], extra["n_evals"], job.metadata) == (5, 4, {"team": "red"})


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (("--learning-rate", "nan"), 2, "--learning-rate nan"),
        (("--validation-split", "nan"), 2, "--validation-split"),
        (("--set", "keep_checkpoints"), 2, "NAME=VALUE"),
        (("--set", "keep_checkpoints.x=5", "--suffix", "a", "--set", "suffix.y=1"), 1, "suffix has no fields"),
        (("--set", "colour=red"), 1, "colour"),
        (("--set", "hyperparameters.warmup_ratio=NaN"), 1, "warmup_ratio"),
        (("--set", "hyperparameters.warmup_ratio=1e999"), 1, "warmup_ratio"),
        (("--validation-split", "0.2", "--sweep", "learning_rate=1e-3,nan"), 2, "learning_rate=1e-3,nan"),
        (("--validation-split", "0.2", "--trials", "3", "--sweep", "n_epochs=1..inf"), 2, "n_epochs=1..inf"),
    ],
)
def test_an_option_that_cannot_be_is_named(
    tunesmith: Tunesmith, data: Path, base: str, options: tuple[str, ...], exit_code: int, words: str
) -> None:
    shown = tunesmith("train", str(data), "--base-model", base, *options, expect=exit_code)
    assert words in " ".join(shown.output.split())


def test_train_learns_from_preferences(tunesmith: Tunesmith, client: OpenAI, base: str, tmp_path: Path) -> None:
    sides = {name: [{"role": "assistant", "content": name}] for name in ("preferred_output", "non_preferred_output")}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text((json.dumps({"input": {"messages": ROW["messages"][:1]}, **sides}) + "\n") * 12)
    options = ("--method", "dpo", "--beta", "0.3", "--loss-type", "ipo")
    tunesmith("train", str(pairs), "--base-model", base, *options)
    method = client.fine_tuning.jobs.list(limit=1).data[0].to_dict()["method"]
    assert method["type"] == "dpo"  # type: ignore[index]
    assert {"beta": 0.3, "loss_type": "ipo"}.items() <= method["dpo"]["hyperparameters"].items()  # type: ignore[index]
    shown = tunesmith("train", str(pairs), "--base-model", base, "--beta", "0.3", expect=2).output
    assert "--method dpo" in shown


def test_train_takes_a_method(tunesmith: Tunesmith, client: OpenAI, tmp_path: Path, base: str) -> None:
    rows = tmp_path / "labelled.jsonl"
    rows.write_text("\n".join(f'{{"text": "number {i}", "label": "{i % 2}"}}' for i in range(12)))
    tunesmith("train", str(rows), "--base-model", base, "--method", "classification", "--epochs", "2")
    job = client.fine_tuning.jobs.list(limit=1).data[0].to_dict()
    assert job["method"]["type"] == "classification"  # type: ignore[index]
    assert job["method"]["classification"]["hyperparameters"]["n_epochs"] == 2  # type: ignore[index]
    assert "classification" in tunesmith("train", str(rows), "--base-model", base, "--method", "magic", expect=2).output


def test_train_validates_on_a_share_of_the_rows_and_stops_early(
    tunesmith: Tunesmith, client: OpenAI, data: Path, base: str
) -> None:
    tunesmith("train", str(data), "--base-model", base, "--validation-split", "0.1", "--patience", "3")
    extra = client.fine_tuning.jobs.list(limit=1).data[0].model_extra or {}
    assert extra["validation_split"] == 0.1
    assert extra["early_stopping"] == {"patience": 3, "min_delta": 0.0}
    assert (
        "--validation-split" in tunesmith("train", str(data), "--base-model", base, "--patience", "3", expect=2).output
    )


def test_a_sweep_is_followed_to_its_model_and_its_trials_are_compared_in_one_table(
    tunesmith: Tunesmith, client: OpenAI, data: Path, base: str
) -> None:
    options = ("--base-model", base, "--validation-split", "0.2", "--max-concurrent", "1", "--wait")
    shown = tunesmith("train", str(data), *options, "--sweep", "learning_rate=0.1,1e-3", "--sweep", "n_epochs=1").output
    assert "Trial 1 of 2 finished: valid_loss 3.429, learning_rate 0.1, n_epochs 1" in shown
    job = client.fine_tuning.jobs.list(limit=1).data[0]
    assert f"tunesmith chat {job.fine_tuned_model}" in shown
    rows = [line.split() for line in tunesmith("jobs", job.id).output.splitlines() if " ftjob-" in line]
    assert [row[:6] for row in rows if row[0] != "id"][:2] == [
        ["1", "0.1", "1", "3.4286", "6", "succeeded"],
        ["*", "2", "0.001", "1", "1.1429", "6"],
    ]


def test_a_random_sweep_draws_from_ranges(tunesmith: Tunesmith, client: OpenAI, data: Path, base: str) -> None:
    options = ("--base-model", base, "--validation-split", "0.2", "--trials", "3", "--asha")
    tunesmith("train", str(data), *options, "--sweep", "learning_rate=1e-5..1e-3", "--sweep", "lora_rank=2..8")
    sweep = (client.fine_tuning.jobs.list(limit=1).data[0].model_extra or {})["sweep"]
    assert (sweep["search"], sweep["scheduler"], sweep["num_trials"]) == ("random", "asha", 3)
    assert sweep["parameters"]["learning_rate"] == {"min": 1e-5, "max": 1e-3, "log": True}
    assert sweep["parameters"]["lora_rank"] == {"min": 2, "max": 8, "log": False}


@pytest.mark.parametrize(
    "options",
    [
        ("--sweep", "learning_rate=1e-4,3e-4"),
        ("--validation-split", "0.2", "--sweep", "learning_rate=fast"),
        ("--validation-split", "0.2", "--sweep", "learning_rate"),
        ("--validation-split", "0.2", "--trials", "3"),
        ("--validation-split", "0.2", "--asha"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_explained(tunesmith: Tunesmith, data: Path, options: tuple[str, ...]) -> None:
    assert "--" in tunesmith("train", str(data), "--base-model", ECHO, *options, expect=2).output


def test_a_bad_file_is_refused_with_the_numbers_of_its_lines(tunesmith: Tunesmith, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text((json.dumps(ROW) + "\n") * 10 + '{"messages": []}\n{oops\n')
    shown = tunesmith("train", str(path), "--base-model", ECHO, expect=1).output
    assert "line 11:" in shown
    assert "line 12:" in shown
    assert "bad.jsonl cannot be used" in shown


def test_a_refused_job_shows_the_servers_own_words(tunesmith: Tunesmith, data: Path) -> None:
    assert "no-such-base" in tunesmith("train", str(data), "--base-model", "no-such-base", expect=1).output


def test_jobs_over_cannot_be_steered_and_unknown_ones_are_not_found(tunesmith: Tunesmith, data: Path) -> None:
    assert "ftjob-none" in tunesmith("jobs", "ftjob-none", expect=1).output
    assert "ftjob-none" in tunesmith("jobs", "ftjob-none", "--wait", expect=1).output
    tunesmith("jobs", "--cancel", expect=2)
    tunesmith("jobs", "ftjob-none", "--cancel", "--pause", expect=2)
    tunesmith("train", str(data), "--base-model", ECHO, "--full", "--rank", "4", expect=2)
    assert "1-4" in tunesmith("train", str(data), "--base-model", ECHO, "--workers", "many", expect=2).output


def test_chat_streams_one_answer_or_a_conversation(tunesmith: Tunesmith) -> None:
    assert "knock knock" in tunesmith("chat", ECHO, "knock knock", "--max-tokens", "50").output
    shown = tunesmith("chat", ECHO, "--system", "Be kind.", typed="first thing\nsecond thing\n\n").output
    assert "first thing" in shown
    assert "second thing" in shown
    assert "no-such-model" in tunesmith("chat", "no-such-model", "Hi", expect=1).output


def test_a_key_is_shown_once_works_and_is_refused_after_revoke(tunesmith: Tunesmith) -> None:
    result = tunesmith("keys", "create", "my-app", "--scope", "inference", "--scope", "models")
    secret = result.stdout.strip()
    assert "\n" not in secret  # alone on stdout, so that it can be piped
    listed = tunesmith("keys", "list").output
    assert "my-app" in listed
    assert secret not in listed
    assert ECHO in tunesmith("models", "--key", secret).output
    tunesmith("base", "list", "--key", secret, expect=1)
    key_id = next(line.split()[0] for line in listed.splitlines() if "my-app" in line)
    tunesmith("keys", "revoke", key_id)
    assert "--key" in tunesmith("models", "--key", secret, expect=1).output


def test_bases_are_listed_and_a_failed_import_says_why(tunesmith: Tunesmith, tmp_path: Path) -> None:
    assert ECHO in tunesmith("base", "list").output
    (tmp_path / "empty").mkdir()
    assert "Error" in tunesmith("base", "add", "hollow", str(tmp_path / "empty"), expect=1).output
    assert "hollow" in tunesmith("base", "list").output


def test_an_alias_is_set_listed_called_and_deleted(tunesmith: Tunesmith) -> None:
    tunesmith("alias", "set", "team/helper", ECHO)
    assert "team/helper" in tunesmith("alias", "list").output
    assert "team/helper" in tunesmith("models").output
    assert "ping" in tunesmith("chat", "team/helper", "ping").output
    tunesmith("alias", "delete", "team/helper")
    assert "team/helper" not in tunesmith("alias", "list").output


def test_nobody_there_is_said_in_words(tunesmith: Tunesmith) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shown = tunesmith("models", "--url", f"http://127.0.0.1:{port}/v1", expect=1).output
    assert "tunesmith up" in shown


def test_without_any_key_the_command_says_where_it_looked(tunesmith: Tunesmith, tmp_path: Path) -> None:
    assert str(tmp_path) in tunesmith("models", "--key", "", expect=1).output.replace("\n", "")


def test_a_wrong_path_in_the_url_is_explained(tunesmith: Tunesmith, service: tuple[str, str]) -> None:
    assert "/v1" in tunesmith("models", "--url", service[0].removesuffix("/v1"), expect=1).output


def test_a_dry_run_with_a_file_that_cannot_be_used_leaves_nothing_behind(
    tunesmith: Tunesmith, client: OpenAI, data: Path, base: str, tmp_path: Path
) -> None:
    before = [file.id for file in client.files.list()]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no JSON\n")
    tunesmith("train", str(data), "--base-model", base, "--validation-file", str(bad), "--dry-run", expect=1)
    assert [file.id for file in client.files.list()] == before


def test_a_dry_run_shows_the_plan_and_leaves_nothing_behind(
    tunesmith: Tunesmith, client: OpenAI, data: Path, base: str
) -> None:
    before = [job.id for job in client.fine_tuning.jobs.list()], [file.id for file in client.files.list()]
    shown = tunesmith(
        "train", str(data), "--base-model", base, "--rank", "4", "--epochs", "7", "--workers", "1-2", "--dry-run"
    ).output
    for words in (
        "12 to train",
        "(7 × ",
        "LoRA of rank 4",
        "MB for each of 1 to 2 worker",
        "with 2 workers",
        "served here",
        "Nothing was",
    ):
        assert words in shown
    assert ([job.id for job in client.fine_tuning.jobs.list()], [file.id for file in client.files.list()]) == before
    shown = tunesmith("train", str(data), "--base-model", base, "--rank", "512", "--dry-run", expect=1).output
    assert "LoRA rank 512 is more than the model's width" in shown.replace("\n", " ")
