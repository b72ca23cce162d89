"""HAProxy as the HTTP edge, when the setting says so: its environment, its recorded process, and the end of orphans.

Ray Serve (2.60) starts HAProxy below its proxy actor. If the cluster dies hard, HAProxy survives on its ports and
answers 500 to everything, so its process id is recorded and an orphan of ours is ended at the next start.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from service.settings import Settings


def _folder(settings: Settings) -> Path:
    return settings.home_dir / "haproxy"


def controller_options(settings: Settings) -> dict[str, Any] | None:
    """Options of the Serve controller, whose environment HAProxy mode is read from; None without HAProxy."""
    if not settings.use_haproxy:
        return None
    folder = _folder(settings)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    variables = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # A reload cuts streams older than this; the default of 120 s is shorter than a long answer.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # default 30: every delete would take half a minute
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a killed HAProxy is back in 5 s instead of 25
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # its metrics port listens on all interfaces without a key
    }
    return {"runtime_env": {"env_vars": variables}}


def _pid_file(settings: Settings) -> Path:
    return settings.home_dir / "haproxy.pid"


def _find(settings: Settings) -> list[int]:
    """Processes whose command line names our configuration file."""
    wanted = str(_folder(settings) / "haproxy.cfg").encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # ended meanwhile
            if b"haproxy" in command.split(b"\0", 1)[0] and wanted in command:
                found.append(int(entry.name))
    return found


def record_pid(settings: Settings) -> None:
    """Note the running HAProxy's process ids."""
    if settings.use_haproxy:
        _pid_file(settings).write_text(" ".join(map(str, _find(settings))))


def end_orphan(settings: Settings) -> None:
    """End HAProxy processes of this home that outlived their cluster; processes of others are never touched."""
    if not _pid_file(settings).exists() and not _folder(settings).exists():
        return
    for pid in _find(settings):  # by command line, not by the recorded id alone: ids are reused after a restart
        _end(pid)
    _pid_file(settings).unlink(missing_ok=True)


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended
