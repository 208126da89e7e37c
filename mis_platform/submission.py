"""A command of this package as a job on a cluster: sent through the Ray Jobs API, followed, its exit code brought home.

Ray knows only whether a job succeeded; its `driver_exit_code` is the exit code of our own command. A job belongs to
the cluster: following it may stop and start again at any time, it goes on.
"""

import asyncio
import contextlib
import difflib
import logging
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from mis_platform import access, packing
from mis_platform.artifacts import git_commit
from mis_platform.config import fingerprint
from mis_platform.progress import duration
from mis_platform.redaction import holds_secret, scrub

for _talkative in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
    logging.getLogger(_talkative).setLevel(logging.WARNING)

HANDED_ON = ("MIS_ROOT", "MIS_DATA", "MLFLOW_TRACKING_URI")
NEVER = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "PYTHONPATH", "PATH")  # the cluster's
STOP_SECONDS = 30  # from SIGTERM to SIGKILL: time to commit a checkpoint
CONNECT_SECONDS = 10.0
FIRST_SECONDS = 15.0  # for the answer to the first question, which is a small one
ANSWER_SECONDS = 60.0  # between two bytes of later answers: to start a job, the head itself looks for up to 10
PATIENCE = 600.0  # seconds without the cluster before it counts as lost
AGENT_TRIES = 6
HEARTBEAT = 20.0  # seconds: a connection that is silently gone is noticed
WORDS, IDENTITY = "mis.words", "mis.identity"
OURS = {0, 1, 2, 3, 4, 5, 6, 75, 130}  # exit codes of our own command; 1 is a fault of ours, with a traceback
LOST, STOPPED = 6, 130
ROOTS = {"--root", "--data-root"}
PATH_OPTIONS = ROOTS | {"--model", "--out"}
# Asked on the cluster, which may have a MIS_ROOT of its own; a job's folder goes away with its node.
_NO_ROOT = "Error: no --root s3://... and no MIS_ROOT, neither here nor on the cluster"
_ROOT_GUARD = f'[ -n "$MIS_ROOT" ] || {{ echo "{_NO_ROOT}"; exit 2; }}; '
ROOTLESS = {"list", "data", "import", "cluster"}  # commands that touch no artifacts


class UnknownJob(ValueError):
    """The cluster has no job of that id."""


@dataclass(frozen=True)
class Job:
    """One job of a cluster, as people see it. start, end: seconds since 1970, None if it has not got there."""

    id: str
    state: str  # PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED
    words: str
    start: float | None
    end: float | None
    driver_exit_code: int | None
    message: str

    @property
    def is_over(self) -> bool:
        """Whether it has come to an end, good or bad."""
        return JobStatus(self.state).is_terminal()

    @property
    def exit_code(self) -> int | None:
        """Our own exit code of the command; None while it runs. 6 where the job, not the command, came to an end."""
        if not self.is_over:
            return None
        if self.state == JobStatus.STOPPED:
            return STOPPED
        if self.state == JobStatus.SUCCEEDED:
            return 0
        return self.driver_exit_code if self.driver_exit_code in OURS else LOST

    def ending(self) -> str:
        """One line on how it ended."""
        if self.state == JobStatus.STOPPED:
            return "the job was stopped"
        code = self.driver_exit_code
        if code is None:
            lines = [line.strip() for line in self.message.splitlines() if line.strip()]
            return f"the job was lost: {scrub(' '.join(lines[:3]))[:500] or 'no reason is known'}"
        if code in OURS:
            return f"exit code {code}"
        number = -code if code < 0 else code - 128
        signal = f"signal {number}" + (" (often: out of memory)" if number == 9 else "")
        return f"the command was ended by {signal}" if 0 < number < 65 else f"exit code {code}"

    def row(self, now: float) -> tuple[str, ...]:
        """id, state, exit code, start, duration, words."""
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.start)) if self.start else "-"
        took = duration(max(0.0, (self.end or now) - self.start)) if self.start else "-"
        code = "-" if self.exit_code is None else str(self.exit_code)
        return self.id, self.state.lower(), code, started, took, self.words


class _Client(JobSubmissionClient):
    """Ray's own client waits without end for a host that does not answer."""

    has_answered = False

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", (CONNECT_SECONDS, ANSWER_SECONDS if self.has_answered else FIRST_SECONDS))
        return super()._do_request(method, endpoint, **options)


class Cluster:
    """The Jobs API at one address. Raises ValueError for an unsafe address, or a token that is wrong or missing, and
    ConnectionError when nobody answers."""

    def __init__(self, address: str) -> None:
        self.address = access.check_dashboard(address)
        token = access.find_token() if os.environ.get("RAY_AUTH_MODE", "").lower() != "disabled" else None
        self._headers = {"Authorization": f"Bearer {token.value}"} if token else {}
        self._place = token.place if token else None
        with self._explained(), _only_address(self.address):
            self._client = _Client(self.address, headers=dict(self._headers))
            self.ray_version = str(self._client._do_request("GET", "/api/version").json()["ray_version"])
            self._client.has_answered = True

    def jobs(self) -> list[Job]:
        """The jobs that this package sent, oldest first."""
        with self._explained():
            found = [each for each in self._client.list_jobs() if each.type == JobType.SUBMISSION]
        ours = [_job(each) for each in found if WORDS in (each.metadata or {})]
        return sorted(ours, key=lambda job: job.start or 0.0)

    def job(self, name: str) -> Job:
        """Raises UnknownJob, which names the nearest id, when there is no such job."""
        if re.fullmatch(r"[\w.-]+", name):
            with self._explained():
                try:
                    return _job(self._client.get_job_info(name))
                except RuntimeError as error:
                    if "status code 404" not in str(error):
                        raise
        known = [job.id for job in self.jobs()]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known[-5:]) or 'none'}"
        raise UnknownJob(f"no job is called {name!r}{hint}")

    def logs(self, name: str) -> str:
        """All that the job has said so far."""
        self.job(name)
        with self._explained():
            return str(self._client.get_job_logs(name))

    def stop(self, name: str) -> Job:
        """Ask the job to end, and wait until it has: at most its time to commit a checkpoint, and a little more."""
        job, waits_until = self.job(name), time.monotonic() + STOP_SECONDS + 30
        if not job.is_over:
            with self._explained():
                self._client.stop_job(name)
        while not job.is_over and time.monotonic() < waits_until:
            time.sleep(0.5)
            job = self.job(name)
        return job

    def submit(
        self,
        words: Sequence[str],
        names: Sequence[str] = (),
        again: bool = False,
        experiments: Path | None = None,
        package: Path | None = None,
    ) -> str:
        """Send `mis WORDS` as a job; its id. names: environment variables that go with it.

        experiments, package: the folders that travel, see `packing.collect`. Raises ValueError for what must not or
        cannot travel, before anything is sent, and when the same words are running already, unless `again`.
        """
        environment = variables(names, self.address)
        check_words(words)
        files = packing.collect(experiments, package)
        if self.ray_version.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise ValueError(f"the cluster runs Ray {self.ray_version}, this package needs {ray.__version__} there")
        identity = fingerprint([list(words), *(environment.get(name, "") for name in HANDED_ON)])
        if not again:
            self._refuse_twin(identity)
        name = new_id(words)
        with tempfile.TemporaryDirectory(prefix="mis-submit-") as folder, self._explained():
            packing.pack(files, Path(folder))
            self._send(
                entrypoint=entrypoint(words),
                submission_id=name,
                runtime_env={"working_dir": folder, "env_vars": environment},
                metadata={WORDS: shlex.join(words), IDENTITY: identity},
            )
        return name

    def _send(self, **job: Any) -> None:
        """Submit; a head that has only just started is given a minute to take jobs (it looks for 10 s at each try)."""
        for tries_left in reversed(range(AGENT_TRIES)):
            try:
                self._client.submit_job(**job)
                return
            except RuntimeError as error:
                if "No available agent" not in str(error):
                    raise
                if not tries_left:
                    raise RuntimeError(
                        "its head takes no jobs, because the agent there does not serve. Where another Ray runs on the "
                        "same machine, a head needs ports of its own: ray start --dashboard-agent-listen-port PORT"
                    ) from None

    def follow(
        self,
        name: str,
        say: Callable[[str], None] = print,
        note: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ) -> Job:
        """Say every line of the job's log, each once, until the job is over.

        The connection may break: the log is read again from where it was. Raises ConnectionError when the cluster is
        away for longer than PATIENCE seconds, or has come back without the job.
        """
        self.job(name)
        return asyncio.run(_Follower(self, name, say, note).run())

    def _refuse_twin(self, identity: str) -> None:
        with self._explained():
            for each in self._client.list_jobs():
                if (each.metadata or {}).get(IDENTITY) == identity and not each.status.is_terminal():
                    raise ValueError(
                        f"the same command is running already, as {each.submission_id}: follow it with "
                        f"`mis logs {each.submission_id} --follow`, stop it with `mis stop {each.submission_id}`, or "
                        "send it once more with --again"
                    )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the client as ours, in one line, without a token."""
        try:
            yield
        except AuthenticationError:
            what = f"the token of {self._place} is not the cluster's" if self._place else "the cluster wants a token"
            raise ValueError(f"{self.address} refuses: {what}; the token is looked for in {access.PLACES}") from None
        except (requests.exceptions.RequestException, ConnectionError) as error:
            raise ConnectionError(
                f"no Ray cluster answers at {self.address} ({_cause(error)}); is it running, does a tunnel lead there?"
            ) from None
        except (RuntimeError, KeyError, TypeError) as error:  # the last two: another program's JSON
            reason = " ".join(scrub(str(error)).split())[:500]
            raise ConnectionError(f"the cluster at {self.address} answers with an error: {reason}") from None

    @contextlib.asynccontextmanager
    async def _tail(self, name: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        # Ray's own tail_job_logs has no heartbeat: a connection that a router forgot would be waited on for ever.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        place = f"{self.address}/api/jobs/{name}/logs/tail"
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:
            # Nor is one that is accepted and never answered an end of the wait.
            opening = session.ws_connect(place, heartbeat=HEARTBEAT, max_msg_size=0)
            async with await asyncio.wait_for(opening, ANSWER_SECONDS) as socket:
                yield socket


class _Follower:
    """Reads a log that is only ever appended to; a new connection starts at its beginning and skips what was said."""

    def __init__(self, cluster: Cluster, name: str, say: Callable[[str], None], note: Callable[[str], None]) -> None:
        self._cluster, self._name, self._say, self._note = cluster, name, say, note
        self._said = 0  # characters of the log that were taken
        self._line = ""  # the beginning of a line whose end has not come
        self._away_since: float | None = None

    async def run(self) -> Job:
        pause = 0.2
        while True:
            before = self._said
            with contextlib.suppress(aiohttp.ClientError, OSError):
                await self._read()
            job = await self._state()
            if job is not None and job.is_over:
                if self._line:
                    self._say(self._line)
                return job
            pause = 0.2 if self._said > before else min(5.0, 2 * pause)
            await asyncio.sleep(pause)

    async def _read(self) -> None:
        skip = self._said
        async with self._cluster._tail(self._name) as socket:
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    self._take(message.data[skip:])
                    skip = max(0, skip - len(message.data))

    def _take(self, text: str) -> None:
        self._said += len(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._say(line)

    async def _state(self) -> Job | None:
        """The job, or None while the cluster is away."""
        try:
            job = await asyncio.to_thread(self._cluster.job, self._name)
            if job.is_over:  # the connection may have broken just before the end
                self._take((await asyncio.to_thread(self._cluster.logs, self._name))[self._said :])
        except ConnectionError as error:
            now = time.monotonic()
            if self._away_since is None:
                self._away_since = now
                self._note(f"the connection is lost, the job may go on; trying for {duration(PATIENCE)}: {error}")
            if now - self._away_since > PATIENCE:
                raise ConnectionError(f"{error} Gave up following {self._name}") from None
            return None
        except UnknownJob:
            raise ConnectionError(f"the cluster no longer knows the job {self._name}: it was started anew") from None
        if self._away_since is not None:
            self._note("connected again")
            self._away_since = None
        return job


# -- what is sent ----------------------------------------------------------------------------------------------------


def entrypoint(words: Sequence[str]) -> str:
    """The shell command of a job: our source in the working directory before any that the cluster has installed."""
    options = {word.partition("=")[0] for word in words}
    needs_root = words[0] not in ROOTLESS and not options & {"--root", "--help"}
    guard = _ROOT_GUARD if needs_root else ""
    return f'{guard}MIS_EXPERIMENTS="$PWD/experiments" exec python -m mis_platform.cli {shlex.join(words)}'


def new_id(words: Sequence[str]) -> str:
    """Readable and unique: mis-run-sweep-ablation_alpha-20261126-0431-3f9a1c."""
    named = [re.sub(r"[^A-Za-z0-9_]+", "_", word) for word in words[:3] if not word.startswith("-")]
    stamp = time.strftime("%Y%m%d-%H%M", time.gmtime())
    return "-".join(["mis", *named, stamp, secrets.token_hex(3)])[-100:]


def variables(names: Sequence[str], address: str) -> dict[str, str]:
    """Environment of the job: MIS_ROOT, MIS_DATA and MLFLOW_TRACKING_URI of this shell, and `names`.

    Raises ValueError for a name that is not set or is the cluster's own, for a password in an address, and for a path
    or a server that only this machine knows.
    """
    chosen = {name: os.environ[name] for name in HANDED_ON if os.environ.get(name)}
    for name, value in chosen.items():
        if holds_secret(value):
            raise ValueError(
                f"{name} holds a password or key, which the cluster would keep readable; give it to the cluster itself "
                "(its environment or instance role), or as a variable of its own with --env NAME"
            )
        _check_place(name, value, address)
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"--env {name.partition('=')[0]}: give the name alone; its value is taken from this shell")
        if name in NEVER:
            raise ValueError(f"--env {name}: that is the cluster's own")
        if name not in os.environ:
            raise ValueError(f"--env {name}: there is no such variable here")
        chosen[name] = os.environ[name]
    commit = git_commit()
    return {
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
        **({"MIS_GIT_COMMIT": commit} if commit else {}),  # the sources arrive without their history
        **chosen,
    }


def check_words(words: Sequence[str]) -> list[str]:
    """Notes on absolute paths, which every node must see. Raises ValueError for a password or a path of this folder."""
    notes = []
    for before, word in zip(["", *words], words):
        if holds_secret(word):
            raise ValueError(f"{scrub(word)} holds a password or key: the cluster keeps a job's words readable")
        for path in _paths(before, word):
            here = Path(path).expanduser()
            if here.is_absolute() and _exists(here):
                notes.append(f"{path} does not travel: every node of the cluster must see it under that path")
            elif not here.is_absolute() and (_exists(here) or ROOTS & {before, word.partition("=")[0]}):
                raise ValueError(
                    f"{path} is a path of this folder, and files do not travel with a job: give an absolute path that "
                    "every node of the cluster sees, or s3://..."
                )
    return sorted(set(notes))


def _paths(before: str, word: str) -> list[str]:
    """What in `word` is meant as a path of this machine; a name such as grabcut is none, folder or not. before: the
    word in front of it."""
    option, _, value = word.partition("=")
    if "://" in word or (word.startswith("-") and not value):
        return []
    text = value if word.startswith("--") else word
    if before in PATH_OPTIONS or option in PATH_OPTIONS:
        return [text]
    name, _, given = text.partition("=") if "=" in text else ("", "", text)
    _, colon, path = given.partition(":")
    candidate = path if colon else given
    is_path = colon or name.endswith("weights") or "/" in candidate or ("." in candidate and _exists(Path(candidate)))
    return [candidate] if candidate and is_path and not candidate.startswith("-") else []


def _check_place(name: str, value: str, address: str) -> None:
    """Refuse what the cluster cannot reach: a relative path, or a server on this machine's loopback address."""
    url = urlsplit(value)
    if url.scheme in {"http", "https"}:
        if access.is_loopback(url.hostname or "") and not access.is_loopback(urlsplit(address).hostname or ""):
            raise ValueError(f"{name}={value} is this machine alone; the cluster needs an address that it can reach")
        return
    path = value.removeprefix("sqlite:///") if value.startswith("sqlite:///") else value
    if "://" not in path and not Path(path).expanduser().is_absolute():
        raise ValueError(f"{name}={value} is a path of this folder; give one that every node of the cluster sees")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a word longer than a file name may be
        return False


def table(jobs: Sequence[Job]) -> str:
    """The jobs, one a line, under a heading."""
    if not jobs:
        return "no jobs"
    rows = [("job", "state", "exit", "started", "took", "command"), *(job.row(time.time()) for job in jobs)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


# -- small helpers ---------------------------------------------------------------------------------------------------


def _job(details: JobDetails) -> Job:
    metadata: Mapping[str, str] = details.metadata or {}
    return Job(
        id=details.submission_id or details.job_id or "",
        state=details.status.value,
        words=scrub(metadata.get(WORDS) or details.entrypoint),
        start=details.start_time / 1000 if details.start_time else None,
        end=details.end_time / 1000 if details.end_time else None,
        driver_exit_code=details.driver_exit_code,
        message=details.message or "",
    )


@contextlib.contextmanager
def _only_address(address: str) -> Iterator[None]:
    """Ray's client prefers these variables to the address that it is given."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _cause(error: BaseException) -> str:
    """The innermost reason of a failed request, in few words: requests repeats itself at length."""
    if isinstance(error, requests.exceptions.Timeout):
        return "it does not answer in time"
    words = re.findall(
        r"\[Errno -?\d+\] ([^'\")\]]+)", f"{error.__context__} {error}"
    )  # Ray's client hides it in its own
    return words[-1].strip().lower() if words else type(error).__name__
