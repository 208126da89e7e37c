"""Shell commands of cluster files: how they start Ray, with which variables, and which images they name.

Read, never run. What is quoted for another shell (`bash -c "..."`, `eval`, `ssh`) is read like the rest.
"""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise

# Flags of `ray start` in Ray 2.60; reading them from Ray itself takes seconds, so a test compares.
START_FLAGS = set(
    shlex.split(
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

SHELLS = {"sh", "ash", "bash", "dash", "ksh", "zsh", "su", "runuser"}  # each runs the words behind its -c
JOINED = {"eval", "ssh"}  # each runs all the words behind it
ENGINES = {"ctr", "docker", "nerdctl", "podman"}
MAX_DEPTH = 8  # shells in shells; nobody means well with more
_OPENING, _CLOSING = "({$`", ")}`"  # of a subshell, which stick to its first and last words
_RUNS_NEXT = re.compile(r"-[A-Za-z]*c|--command")
_IMAGE = re.compile(r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@sha256:\w+)?")


def start_flags(command: str) -> Iterator[tuple[str, str]]:
    """Flags of every `ray start` in a shell command with their values: `--num-cpus=0` is ("num-cpus", "0")."""
    for words in _statements(command):
        flags = words[_ray_start(words) :]
        for position, word in enumerate(flags):
            if word.startswith("--"):
                name, mark, value = word[2:].partition("=")
                following = flags[position + 1] if position + 1 < len(flags) else ""
                yield name, value if mark or following.startswith("-") else following


def variables(command: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """What a shell command exports, sets, or gives to `ray start` alone; empty for what it unsets.

    depth: shells around it. What one of them is told counts where it starts Ray, and nowhere else.
    """
    for words in _simple(command):
        inner = [script for script in _scripts(words) if depth < MAX_DEPTH and _starts_ray(script)]
        if "unset" in words:
            yield from ((name, "") for name in words[words.index("unset") + 1 :])
        elif inner or "export" in words or _ray_start(words) < len(words) or all("=" in word for word in words):
            given = (word.lstrip("({").partition("=") for word in words[: _ray_start(words)])
            yield from ((name, value) for name, mark, value in given if mark and name.isidentifier())
        for script in inner:
            yield from variables(script, depth + 1)


def scripts(command: str, depth: int = 0) -> Iterator[str]:
    """A shell command, and what is quoted in it for other shells, as they would read it."""
    yield command
    if depth < MAX_DEPTH:
        for words in _simple(command):
            for script in _scripts(words):
                yield from scripts(script, depth + 1)


def images(command: str) -> Iterator[str]:
    """What may be an image, of the words that docker and its like are given to run, make or pull."""
    for words in _statements(command):
        at = next((at for at, word in enumerate(words) if _program(word) in ENGINES), len(words))
        if {"run", "create", "pull"} & set(words[at:]):
            yield from (word for word in words[at + 1 :] if ":" in word and _IMAGE.fullmatch(word))


def _starts_ray(command: str) -> bool:
    return any(_ray_start(words) < len(words) for words in _statements(command))


def _ray_start(words: list[str]) -> int:
    """Where the flags of `ray start` begin; behind the last word when it is not started."""
    for at, (program, what) in enumerate(pairwise(words)):
        if what.rstrip(_CLOSING) == "start" and _program(program) in {"ray", "ray.scripts.scripts"}:
            return at + 2
    return len(words)


def _program(word: str) -> str:
    return word.lstrip(_OPENING).rpartition("/")[2]


def _scripts(words: list[str]) -> Iterator[str]:
    """What a simple command hands to another shell."""
    for at, word in enumerate(words):
        program, rest = _program(word), words[at + 1 :]
        if program in JOINED:
            yield " ".join(rest)
        elif program in SHELLS:
            flag = next((k for k, each in enumerate(rest) if _RUNS_NEXT.fullmatch(each)), len(rest))
            yield from rest[flag + 1 : flag + 2]
            yield from (each.partition("=")[2] for each in rest if each.startswith("--command="))


def _statements(command: str) -> Iterator[list[str]]:
    """Words of each simple command, of other shells' too."""
    for script in scripts(command):
        yield from _simple(script)


def _simple(command: str) -> Iterator[list[str]]:
    """Words of each simple command of this shell; nothing of a command whose quotes do not close."""
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
