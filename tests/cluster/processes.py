"""Find and kill the processes of the local cluster, by id."""

from __future__ import annotations

import os
import signal

import psutil


def cluster_pids(title: str, root: int | None = None) -> list[int]:
    """Descendants of the process that started Ray whose title begins so, e.g. "ray::RunDriver"."""
    found = []
    for process in psutil.Process(root or os.getpid()).children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue  # ended meanwhile
        if command and command[0].startswith(title):
            found.append(process.pid)
    return found


def kill(title: str, root: int | None = None) -> int:
    """`kill -9` all processes with the title; returns how many."""
    pids = cluster_pids(title, root)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return len(pids)
