"""Shell commands of cluster files: how they start Ray, and with which variables. Read, never run."""

import shlex
from collections.abc import Iterator
from itertools import pairwise

from mis_platform.cluster_files.rules import names

# Flags of `ray start` in Ray 2.60; reading them from Ray itself takes seconds, so a test compares.
START_FLAGS = set(
    names(
        "address autoscaling-config block cgroup-path dashboard-agent-grpc-port dashboard-agent-listen-port "
        "dashboard-host dashboard-port disable-usage-stats enable-object-reconstruction "
        "enable-resource-isolation head include-dashboard include-log-monitor labels labels-file log-color "
        "log-style max-worker-port memory metrics-export-port min-worker-port no-monitor no-redirect-output "
        "node-ip-address node-manager-port node-name num-cpus num-gpus object-manager-port "
        "object-spilling-directory object-store-memory plasma-directory port proxy-server-url "
        "ray-client-server-port ray-debugger-external redis-password redis-shard-ports redis-username "
        "resources runtime-env-agent-port system-config system-reserved-cpu system-reserved-memory temp-dir "
        "tracing-startup-hook verbose worker-port-list"
    )
)


def start_flags(command: str) -> Iterator[tuple[str, str]]:
    """Flags of every `ray start` in a shell command with their values: `--num-cpus=0` is ("num-cpus", "0")."""
    for words in _statements(command):
        flags = words[_ray_start(words) :]
        for position, word in enumerate(flags):
            if word.startswith("--"):
                name, mark, value = word[2:].partition("=")
                following = flags[position + 1] if position + 1 < len(flags) else ""
                yield name, value if mark or following.startswith("-") else following


def variables(command: str) -> Iterator[tuple[str, str]]:
    """What a shell command exports, sets, or gives to `ray start` alone; empty for what it unsets."""
    for words in _statements(command):
        if "unset" in words:
            yield from ((name, "") for name in words[words.index("unset") + 1 :])
        elif "export" in words or _ray_start(words) < len(words) or all("=" in word for word in words):
            given = (word.lstrip("({").partition("=") for word in words[: _ray_start(words)])
            yield from ((name, value) for name, mark, value in given if mark and not name.startswith("-"))


def _ray_start(words: list[str]) -> int:
    """Where the flags of `ray start` begin; behind the last word when it is not started."""
    return next((at + 2 for at, pair in enumerate(pairwise(words)) if pair == ("ray", "start")), len(words))


def _statements(command: str) -> Iterator[list[str]]:
    """Words of each simple command; nothing of a command whose quotes do not close."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    try:
        words = list(lexer)
    except ValueError:
        return
    statement: list[str] = []
    for word in [*words, ";"]:
        if word and not word.strip(";&|\n"):
            if statement:
                yield statement
            statement = []
        else:
            statement.append(word)
