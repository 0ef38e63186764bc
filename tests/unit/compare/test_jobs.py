"""The runs of a study side by side: slots, failures, and the end of a process however it comes."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from heterodox.app.folder import RunFolder
from heterodox.core.errors import CheckpointError
from heterodox.study.jobs import Job, run_jobs
from tests.tiny import tiny_recipe


class Process:
    """Stands for a running child."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


@dataclass
class FakeJob(Job):
    """Runs for some rounds without any process."""

    rounds: int = 1
    devices: list = field(default_factory=list)
    told: list = field(default_factory=list)

    def start(self, device):
        if self.rounds < 0:
            raise CheckpointError("cannot write here")
        self.devices.append(device)
        self.process, self.status = Process(), "running"

    def poll(self):
        self.rounds -= 1
        if self.rounds == 0 or self.process.signals:
            self.told += self.process.signals
            self.status = "interrupted" if self.process.signals else "finished"
            self.process = None


def fakes(tmp_path, *rounds: int) -> list[FakeJob]:
    return [FakeJob(tiny_recipe(), RunFolder(tmp_path / str(i)), rounds=n) for i, n in enumerate(rounds)]


def run(jobs, slots, watch=lambda: None, interrupted=lambda: False) -> None:
    run_jobs(jobs, slots=slots, watch=watch, interrupted=interrupted, interval=0.0)


def test_no_more_run_at_once_than_there_are_slots(tmp_path):
    jobs, most = fakes(tmp_path, 3, 1, 2, 1), []
    run(jobs, ["0", "1"], watch=lambda: most.append(sum(job.status == "running" for job in jobs)))
    assert [job.status for job in jobs] == ["finished"] * 4
    assert max(most) <= 2
    assert [job.devices for job in jobs] == [["0"], ["1"], ["1"], ["0"]]


def test_a_run_that_cannot_start_fails_alone(tmp_path):
    jobs = fakes(tmp_path, -1, 2, -1)
    run(jobs, [None])
    assert [job.status for job in jobs] == ["failed", "finished", "failed"]
    assert (jobs[0].message, jobs[0].share) == ("cannot write here", 1.0)


def test_after_an_interrupt_the_running_are_asked_once_and_no_other_starts(tmp_path):
    jobs, rounds = fakes(tmp_path, 99, 99, 1), []
    run(jobs, [None, None], watch=lambda: rounds.append(1), interrupted=lambda: len(rounds) >= 2)
    assert [job.status for job in jobs] == ["interrupted", "interrupted", "waiting"]
    assert jobs[0].told == jobs[1].told == [signal.SIGTERM]


def test_whatever_breaks_the_study_stops_its_children(tmp_path):
    jobs = fakes(tmp_path, 99, 99)

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(jobs, [None, None], watch=broken)
    assert [job.process.signals for job in jobs] == [[signal.SIGTERM]] * 2


def child_of(job: Job, code: str) -> None:
    """Let the job have this Python code for its run."""
    job.folder.create()
    with job.log.open("wb") as log:
        job.process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
    job.status = "running"


def ended(job: Job) -> Job:
    job.process.wait(timeout=30)
    job.poll()
    assert job.process is None
    return job


SLEEP = "import time; time.sleep(30)"


def test_how_a_process_ends_is_told(tmp_path):
    killed, stopped, broken, quiet = (Job(tiny_recipe(), RunFolder(tmp_path / str(i))) for i in range(4))
    child_of(killed, SLEEP)
    child_of(stopped, SLEEP)
    child_of(broken, "import sys; print('first', file=sys.stderr); sys.exit('heterodox: the last word')")
    child_of(quiet, "raise SystemExit(3)")
    killed.process.kill()
    stopped.process.terminate()
    assert (ended(killed).status, killed.message) == (
        "failed",
        f"it said nothing (killed by SIGKILL; see {killed.log})",
    )
    assert (ended(stopped).status, stopped.message) == ("interrupted", None)
    assert ended(broken).message == f"heterodox: the last word (exit code 1; see {broken.log})"
    assert ended(quiet).message == f"it said nothing (exit code 3; see {quiet.log})"


def test_a_damaged_summary_is_named(tmp_path):
    job = Job(tiny_recipe(), RunFolder(tmp_path))
    (tmp_path / "recipe.yaml").write_text(tiny_recipe().to_yaml())
    for text in ("", "{", "[1]"):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"summary\.json: .*; remove the file to go on without it"):
            job.find("abc")
    summary = {"status": "finished", "message": None, "val_loss": 1.5, "corpus_sha256": "abc"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    job.find("abc")
    assert (job.status, job.share, job.val_loss) == ("finished", 1.0, 1.5)


def test_a_run_on_another_text_is_not_kept(tmp_path):
    (tmp_path / "recipe.yaml").write_text(tiny_recipe().to_yaml())
    (tmp_path / "summary.json").write_text('{"status": "finished", "corpus_sha256": "abc"}')
    with pytest.raises(CheckpointError, match="holds a run on another text"):
        Job(tiny_recipe(), RunFolder(tmp_path)).find("def")


def test_the_share_of_a_run_follows_its_metrics(tmp_path):
    job = Job(tiny_recipe(run={"budget": {"tokens": 1000}}), RunFolder(tmp_path))
    child_of(job, SLEEP)
    row = '{"kind": "train", "step": 5, "tokens": 300, "meta_tokens": 200, "flops": 1, "seconds": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(row + '{"kind": "probe", "step": 5, "alignment": {}}\n{"kind": "tra')
    job.poll()
    assert (job.share, job.share_at_start, job.status) == (0.5, 0.5, "running")
    job.process.kill()
    assert ended(job).share == 1.0
