"""The scheduler, with commands of the shell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.runner import Run, complete, flags
from tests.commands import ROOT


def run(folder: Path, *scripts: str, **options) -> Run:
    """A run whose commands are *scripts* of the shell, with the folder as $0."""
    return Run(folder, options, [["sh", "-c", script, str(folder)] for script in scripts])


def waiting_for(file: str) -> str:
    """A script that waits for *file*, but fails rather than waits for ever."""
    return f"for i in $(seq 3000); do [ -e {file} ] && break; sleep .02; done; [ -e {file} ] || exit 1"


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether the process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_commands_follow_each_other_and_a_finished_run_is_left_alone(tmp_path):
    runs = [run(tmp_path / name, "echo one; echo 1 >> $0/made", "echo two") for name in "ab"]
    complete(runs)
    complete(runs, jobs=2)
    for each in runs:
        assert (each.folder / "made").read_text() == "1\n"
        assert each.log.read_text() == "one\ntwo\n"
        assert json.loads((each.folder / "run.json").read_text()) == {"options": {}, "finished": True}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"lr": 0.2, "rhos": (1, 2)}, "lr 0.1, not 0.2"),
        ({"rhos": (1, 2)}, "lr 0.1, not None"),
        ({"lr": 0.1, "rhos": (1, 2), "seed": 3}, "seed None, not 3"),
    ],
)
def test_other_options_are_refused_before_any_run_starts(tmp_path, options, difference, finished):
    folder = tmp_path / "a"
    before = run(folder, lr=0.1, rhos=[1, 2])
    before.folder.mkdir()
    before.note(finished)
    first = run(tmp_path / "first", "true")
    with pytest.raises(SystemExit) as end:
        complete([first, run(folder, "true", **options)])
    assert end.value.code == f"'{folder}' holds a run with {difference}: move it away."
    assert not first.folder.exists()
    complete([run(folder, "true", lr=0.1, rhos=(1, 2))])


def test_a_failure_shows_the_end_of_the_log_and_stops_the_others_which_go_on_later(tmp_path, capfd):
    script = "echo $$ > $0/pid; [ -e $0/../again ] || { touch $0/../again; exec sleep 600; }"
    beside = run(tmp_path / "beside", script)
    after = run(tmp_path / "after", "true")
    script = f"[ -e $0/mended ] || {{ {waiting_for('$0/../again')}; seq 100; exit 3; }}"
    failing = run(tmp_path / "failing", script)
    with pytest.raises(SystemExit) as end:
        complete([beside, failing, after], jobs=2)
    assert end.value.code == 3
    error = capfd.readouterr().err
    assert "81\n82\n" in error and "\n100\n" in error and "80\n" not in error
    assert f"failed with status 3; its output is in '{failing.log}'." in error
    assert not is_alive(int((beside.folder / "pid").read_text()))
    assert not after.folder.exists()
    assert not beside.is_finished() and not failing.is_finished()

    (failing.folder / "mended").touch()
    complete([beside, failing, after], jobs=2)
    assert beside.is_finished() and failing.is_finished() and after.is_finished()


def test_a_command_that_a_signal_ends_fails_with_its_status_and_its_own_output(tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        complete([run(tmp_path / "a", "echo earlier", "echo now; kill -9 $$")])
    assert end.value.code == 128 + signal.SIGKILL
    error = capfd.readouterr().err
    assert "failed with status -9" in error and "now\n" in error and "earlier" not in error


def test_several_run_at_a_time_and_share_the_threads(tmp_path, monkeypatch):
    """Each waits for the other."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    runs = [
        run(tmp_path / name, f"touch $0/here; {waiting_for(f'$0/../{other}/here')}; echo $OMP_NUM_THREADS")
        for name, other in ("ab", "ba")
    ]
    complete(runs, jobs=2)
    assert [each.log.read_text() for each in runs] == ["3\n", "3\n"]


def test_one_at_a_time_where_one_is_asked_for(tmp_path):
    script = "mkdir $0/../alone && sleep .2 && rmdir $0/../alone"
    complete([run(tmp_path / name, script) for name in "abc"], jobs=1)


def test_the_watch_is_asked_about_the_runs_under_way(tmp_path):
    seen = []

    def watch(of: Run) -> tuple[float, str]:
        seen.append(of)
        (of.folder / "seen").touch()
        return 0.5, "half"

    runs = [run(tmp_path / name, waiting_for("$0/seen")) for name in "ab"]
    complete(runs, watch=watch)
    assert set(seen) == set(runs)


PROGRAM = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script
from pathlib import Path
from recipes.runner import Run, complete
complete([Run(Path(f), {}, [["sh", "-c", sys.argv[1], f]]) for f in sys.argv[2:]], jobs=2)
"""


def start(script: str, *folders: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, script, *map(str, folders)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 128 + 15), (signal.SIGHUP, 128 + 1), (signal.SIGINT, 1)]
)
def test_a_signal_stops_the_runs_and_the_processes_that_they_started(tmp_path, number, status):
    folders = [tmp_path / "a", tmp_path / "b"]
    files = [folder / "pids" for folder in folders]
    with start("sleep 600 & echo $$ $! > $0/pids; wait", *folders) as program:
        until(lambda: all(file.exists() and len(file.read_text().split()) == 2 for file in files))
        program.send_signal(number)
        assert program.wait(60) == status
        error = program.stderr.read()
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    until(lambda: not any(map(is_alive, pids)))
    assert ("Interrupted; the same command goes on" in error) == (number == signal.SIGINT)
    assert "Traceback" not in error


def test_a_second_process_waits_for_the_first_and_finds_its_run_finished(tmp_path):
    folder = tmp_path / "a"
    script = f"echo once >> $0/made; {waiting_for('$0/go')}"
    with start(script, folder) as first:
        until((folder / "made").exists)
        with start(script, folder) as second:
            assert "waiting for it" in next(line for line in second.stderr if "Another process" in line)
            assert first.poll() is None and second.poll() is None
            (folder / "go").touch()
            assert second.wait(60) == 0
        assert first.wait(60) == 0
    assert (folder / "made").read_text() == "once\n"


def test_a_command_that_outlives_its_program_keeps_the_lock(tmp_path):
    folder = tmp_path / "a"
    script = f"echo $$ >> $0/made; {waiting_for('$0/go')}"
    with start(script, folder) as first:
        until((folder / "made").exists)
        first.kill()
    with start(script, folder) as second:
        next(line for line in second.stderr if "Another process" in line)
        (folder / "go").touch()
        assert second.wait(60) == 0
    assert len((folder / "made").read_text().split()) == 2


def test_signals_mean_afterwards_what_they_meant_before(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    complete([run(tmp_path / "a", "true")])
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"^--jobs is 0, but it must be at least 1\.$"):
        complete([run(tmp_path / "a", "true")], jobs=0)
    with pytest.raises(SystemExit, match=r"^no-such-command\ncannot be started: .*No such file"):
        complete([Run(tmp_path / "a", {}, [["no-such-command"]])])
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit, match=r"file' is no folder: choose another"):
        complete([run(tmp_path / "file", "true")])
    for found in ("", "{}", '{"options": 1}'):
        (tmp_path / "a" / "run.json").write_text(found)
        with pytest.raises(SystemExit, match=r"run.json' is not of a run made here: move '.*/a' away"):
            complete([run(tmp_path / "a", "true")])


def test_options_become_flags():
    options = {"batch_size": [32, 64], "lr": 0.1, "download": True, "data": None, "cutmix": False, "seed": 0}
    assert flags(options) == ["--batch-size", "32", "64", "--lr", "0.1", "--download", "--seed", "0"]
