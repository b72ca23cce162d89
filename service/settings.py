"""Every setting, declared once with default, unit and reason. The environment is read here and nowhere else.

Settings are frozen and passed down; actors receive them by value, so a process never looks at its own environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Variables are the field names in capitals behind TUNESMITH_, for example TUNESMITH_PORT=9000."""

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_", frozen=True, extra="forbid", populate_by_name=True)

    home: Path = Field(Path("~/.tunesmith"), description="Folder of the admin key, the lock, and the defaults below")
    host: str = Field("127.0.0.1", description="Address to listen on; loopback unless you say otherwise")
    port: int = Field(8000, ge=1, le=65535, description="HTTP port")
    database_url: str = Field("", description="SQLAlchemy URL; empty means SQLite in home; PostgreSQL for a cluster")
    storage_url: str = Field("", description="Folder or fsspec URL for files, checkpoints, models; empty means in home")
    organization: str = Field("local", pattern=r"^[a-z0-9-]{1,32}$", description="The org part of model ids")
    bases: str = Field(
        "", description="Bases to register at start: name=folder or name=hub-id@revision, comma-separated"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged")

    ray_address: str = Field(
        "",
        validation_alias=AliasChoices("ray_address", "TUNESMITH_RAY_ADDRESS", "RAY_ADDRESS"),
        description="Cluster to join; empty starts one on this machine",
    )
    route_prefix: str = Field(
        "/", pattern=r"^/", description="Where the gateway is mounted on the cluster's HTTP server"
    )
    use_haproxy: bool = Field(False, description="HAProxy instead of Serve's own proxy in front of the gateways")
    num_gateways: int = Field(1, ge=1, description="Gateway replicas")
    gateway_num_cpus: float = Field(0.1, ge=0, description="CPUs that each gateway reserves")
    max_body_bytes: int = Field(8 << 20, ge=1024, description="Largest JSON body, in bytes")
    max_file_bytes: int = Field(512 << 20, ge=1024, description="Largest uploaded file, in bytes; OpenAI's limit")
    drain_s: float = Field(30.0, ge=0, description="Seconds that open streams get to finish at shutdown")

    engine: Literal["native", "echo"] = Field("native", description="Inference engine; echo answers without a model")
    vllm_bases: str = Field("", description="Ids of bases, separated by commas, that vLLM serves instead")
    echo_token_interval_ms: float = Field(0.0, ge=0, description="Pause of the echo engine per token, for load tests")
    engine_num_cpus: float = Field(0.5, ge=0, description="CPUs that each engine replica reserves")
    engine_num_gpus: float = Field(0.0, ge=0, description="GPUs that each engine replica reserves")
    engine_num_threads: int = Field(
        0, ge=0, description="Threads of an engine replica; 0 means half of the machine's cores"
    )
    engine_min_replicas: int = Field(1, ge=0, description="Replicas kept for a base without traffic; 0 scales to zero")
    engine_max_replicas: int = Field(1, ge=1, description="Most replicas per deployment")
    engine_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Weights in memory; auto is the base's own"
    )
    max_batch_size: int = Field(32, ge=1, description="Sequences that one replica decodes at a time")
    max_waiting: int = Field(256, ge=1, description="Requests that wait per replica before new ones get 429")
    max_resident_adapters: int = Field(32, ge=1, description="Adapters kept in memory per replica")
    coalesce_ms: float = Field(
        30.0, ge=0, le=50, description="Shortest time between two messages of a stream; with many streams it is longer"
    )

    train_num_cpus: float = Field(1.0, gt=0, description="CPUs that each train worker reserves")
    train_num_gpus: float = Field(0.0, ge=0, description="GPUs that each train worker reserves")
    train_num_threads: int = Field(0, ge=0, description="Threads of a train worker; 0 shares the machine's cores")
    max_train_workers: int = Field(8, ge=1, description="Most workers that a job may ask for")
    max_attempts: int = Field(3, ge=1, description="Runs that a job gets before a crash makes it fail")
    heartbeat_timeout_s: float = Field(20.0, gt=0, description="Silence after which a run counts as dead")
    stop_grace_s: float = Field(60.0, gt=0, description="Seconds a run gets to checkpoint and stop before it is killed")
    validate_timeout_s: float = Field(50.0, gt=0, description="Seconds a request waits for the plan of a job")
    tick_s: float = Field(0.25, gt=0, description="Pause between two rounds of the orchestrator")
    retry_window_s: float = Field(3600.0, gt=0, description="How long a retried create finds the first one's job")

    wandb_api_key: SecretStr | None = Field(None, description="Key for jobs that ask for Weights & Biases")
    wandb_base_url: str = Field("https://api.wandb.ai", pattern=r"^https?://", description="A W&B server of your own")
    wandb_offline: bool = Field(False, description="Keep W&B runs below home/wandb, for `wandb sync`")
    mlflow_tracking_uri: str = Field("", description="MLflow server or database that gets the curves of all jobs")
    tensorboard_dir: str = Field("", description="Folder that gets TensorBoard event files of all jobs")

    @property
    def home_dir(self) -> Path:
        """The home as an absolute path."""
        return self.home.expanduser().resolve()

    @property
    def resolved_database_url(self) -> str:
        """The database URL with the default filled in."""
        return self.database_url or f"sqlite:///{self.home_dir / 'tunesmith.db'}"

    @property
    def resolved_engine_num_threads(self) -> int:
        """Threads of an engine replica with the default filled in."""
        return self.engine_num_threads or max(1, (os.cpu_count() or 1) // 2)

    @property
    def resolved_storage_url(self) -> str:
        """The storage URL with the default filled in."""
        return self.storage_url or str(self.home_dir / "storage")

    @property
    def admin_key_file(self) -> Path:
        """Where the admin key lies, readable by its owner only."""
        return self.home_dir / "admin.key"

    @property
    def is_single_node(self) -> bool:
        """Whether state lies on this machine's disk, so that every process must run here."""
        return self.resolved_database_url.startswith("sqlite") or "://" not in self.resolved_storage_url

    @property
    def pin_resources(self) -> dict[str, float]:
        """Ray resources that keep a process beside its state: on the head node while that lies on a local disk."""
        return {"node:__internal_head__": 0.001} if self.is_single_node else {}

    def parsed_bases(self) -> list[tuple[str, str, str | None]]:
        """`bases` as (id, source, revision); ValueError names the entry that is not of the form."""
        found = []
        for entry in filter(None, (part.strip() for part in self.bases.split(","))):
            name, equals, source = entry.partition("=")
            if not (name and equals and source):
                raise ValueError(f"TUNESMITH_BASES: {entry!r} is not name=folder or name=hub-id@revision")
            source, _, revision = source.partition("@")
            found.append((name, source, revision or None))
        return found


def tune_serve() -> None:
    """Set Ray Serve up for streams beside engines that want all cores: a request on its way takes a fifth less of a
    core, and Serve itself, which by default takes 3 % of one without any request, a third of that. The processes of a
    Ray started after this inherit it; what the environment says already stays."""
    for name, value in {
        "CONTROL_LOOP_INTERVAL_S": "0.4",  # default 0.1
        "METRICS_EXPORT_INTERVAL_MS": "5000",  # default 100
        "USE_GRPC_BY_DEFAULT": "1",  # from process to process, instead of Ray's streams of objects
        "RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # our handlers never block the loop, which Serve then need not share
        "RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    }.items():
        os.environ.setdefault(f"RAY_SERVE_{name}", value)
