"""HAProxy as the HTTP edge, when the setting says so: its environment, its recorded folder, and the end of orphans.

Ray Serve (2.60) starts HAProxy below its proxy actor. If the cluster dies hard, HAProxy survives on its ports and
answers 500 to everything. So its folder, which its command line names, is recorded, and an orphan of ours is ended at
the next start.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from service.settings import Settings

STOP_PATIENCE_S = 5.0


def controller_options(settings: Settings) -> dict[str, Any] | None:
    """Options of the Serve controller, whose environment HAProxy mode is read from; None without HAProxy."""
    if not settings.use_haproxy:
        return None
    # Not in the home: Serve puts a node's id into the path, and the path of a Unix socket may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="tunesmith-", dir="/tmp")
    _record(settings, folder)
    variables = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        # A reload cuts streams older than this; the default of 120 s is shorter than a long answer.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # default 30: every delete would take half a minute
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a killed HAProxy is back in 5 s instead of 25
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # our own /metrics counts requests
    }
    return {"runtime_env": {"env_vars": variables}}


def end_orphan(settings: Settings) -> None:
    """End HAProxy processes of this home that outlived their cluster; processes of others are never touched."""
    folder = _recorded_folder(settings)
    if folder is None:
        return
    for pid in _find(folder):
        _end(pid)
    shutil.rmtree(folder, ignore_errors=True)
    _state_file(settings).unlink(missing_ok=True)


def _state_file(settings: Settings) -> Path:
    return settings.home_dir / "haproxy.json"


def _record(settings: Settings, folder: str) -> None:
    fresh = _state_file(settings).with_suffix(".new")
    fresh.write_text(json.dumps({"folder": folder}))
    fresh.replace(_state_file(settings))  # whole or not at all: a torn record would hide an orphan


def _recorded_folder(settings: Settings) -> str | None:
    try:
        return str(json.loads(_state_file(settings).read_text())["folder"])
    except FileNotFoundError:  # it was never on
        return None


def _find(folder: str) -> list[int]:
    """Processes whose command line names our folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # ended meanwhile
            if b"haproxy" in command.split(b"\0", 1)[0] and f"{folder}/".encode() in command:
                found.append(int(entry.name))
    return found


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_PATIENCE_S
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended
