"""A fork of the server is what a new interpreter would be, and nothing is left of it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minicpmv_finetune.fork_server import ForkServer
from tests.test_process_tree import wait_until_gone

SECONDS = 30
IMPORTS = """
import sys, numpy
imported = True
"""
WAIT = "open('pid', 'w').write(str(os.getpid())); time.sleep(60)"

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "imports_of_a_test.py").write_text(IMPORTS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[ForkServer]:
    with ForkServer(["imports_of_a_test"]) as server:
        yield server


def write(folder: Path, code: str, name: str = "program") -> str:
    (folder / f"{name}.py").write_text(f"import os, signal, sys, time\n{code}\n")
    return name


@pytest.fixture
def run(server: ForkServer, folder: Path) -> Run:
    """Runs a program in a fork; returns its exit code and what it prints."""

    def run(code: str, *arguments: str, **variables: str) -> tuple[int, str]:
        with server.start(write(folder, code), arguments, {**os.environ, **variables}, leads_tree=True) as process:
            assert process.stdout
            return process.wait(), process.stdout.read()

    return run


def read_pid(file: Path) -> int:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if file.exists() and file.read_text():
            return int(file.read_text())
        time.sleep(0.02)
    raise TimeoutError


def test_a_program_has_its_arguments_environment_folder_and_output(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    code, printed = run(
        "print(__name__, sys.argv, os.environ.get('GIVEN'), os.environ.get('HOME'), os.getcwd());"
        "print('imports_of_a_test' in sys.modules, os.getpid() == os.getpgrp(), sys.stdout.encoding);"
        "os.system('echo from a shell'); print('→ last', file=sys.stderr)",
        "one",
        "two",
        GIVEN="yes",
    )
    assert code == 0
    assert printed.splitlines() == [
        f"__main__ ['{folder}/program.py', 'one', 'two'] yes {os.environ.get('HOME')} {folder / 'below'}",
        "True False utf-8",
        "from a shell",
        "→ last",
    ]


@pytest.mark.parametrize(
    ("code", "expected", "printed"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('sentence')", 1, "sentence"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL, ""),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", 128 + signal.SIGTERM, ""),
        ("import atexit; atexit.register(print, 'at exit')", 0, "at exit"),
    ],
)
def test_a_program_ends_as_an_interpreter_ends(code: str, expected: int, printed: str, run: Run) -> None:
    ended, output = run(code)
    assert ended == expected
    assert output.splitlines()[-1:] == ([printed] if printed else [])


def test_programs_do_not_share_what_one_of_them_changes(run: Run) -> None:
    code = "import imports_of_a_test as it, numpy; print(it.imported, numpy.random.rand()); it.imported = False"
    first, second = run(code)[1].split(), run(code)[1].split()
    assert first[0] == second[0] == "True"
    assert first[1] != second[1]


def test_the_number_of_threads_is_that_of_the_programs_environment(folder: Path) -> None:
    (folder / "imports_of_a_test.py").write_text("import torch")
    program = write(folder, "import torch; print(torch.get_num_threads())")
    with ForkServer(["imports_of_a_test"]) as server:
        for threads in ("1", "3", "0"):
            with server.start(program, [], {**os.environ, "OMP_NUM_THREADS": threads}, leads_tree=True) as process:
                assert process.stdout
                # OpenMP itself ignores the last one.
                assert process.stdout.read().split() == [threads] or threads == "0"
                assert process.wait() == 0


def test_a_program_starts_others_that_are_forks_of_the_server_too(run: Run, folder: Path) -> None:
    other = write(
        folder,
        "print('imports_of_a_test' in sys.modules, sys.argv[1:], 'started_by' in globals(), end=' ');"
        "print(os.getpid() == os.getpgrp(), open('/proc/self/cmdline').read().split('\\0')[1:3]);"
        "os.kill(os.getpid(), int(sys.argv[1]))",
        "other",
    )
    code, printed = run(
        "from minicpmv_finetune.fork_server import fork_client, run_program\n"
        "started_by = os.getpid()\n"
        f"print(run_program('{other}', ['9']))\n"
        f"process = fork_client().start('{other}', ['15'], os.environ, own_session=True)\n"
        "print(process.wait(), process.poll(), process.returncode)"
    )
    assert (code, printed.splitlines()) == (
        0,
        ["True ['9'] False False ['-m', 'other']", "-9", "True ['15'] False True ['-m', 'other']", "-15 -15 -15"],
    )


def test_a_signal_reaches_the_program_and_its_processes_end(server: ForkServer, folder: Path) -> None:
    child = "subprocess.Popen(['setsid', sys.executable, '-c', 'import os, time; ' + wait], cwd='child')"
    (folder / "child").mkdir()
    code = f"import subprocess; wait = {WAIT!r}; {child}; exec(wait)"
    with server.start(write(folder, code), [], os.environ, leads_tree=True) as process:
        started = [read_pid(folder / "pid"), read_pid(folder / "child" / "pid")]
        process.send_signal(signal.SIGTERM)
        assert not wait_until_gone(started[:1])  # the tree has handled the signal
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 128 + signal.SIGTERM
    assert not wait_until_gone(started)


@pytest.mark.parametrize("victim", ["owner", "server", "tree", "program"])
def test_nothing_is_left_when_a_process_is_killed(victim: str, folder: Path) -> None:
    program = write(folder, WAIT)
    owner_code = (
        "import os; from minicpmv_finetune.fork_server import ForkServer\n"
        "with ForkServer(['imports_of_a_test']) as server:\n"
        f"    with server.start('{program}', [], os.environ, leads_tree=True) as process:\n"
        "        print(server._process.pid, process.pid, flush=True)\n"
        "        print(process.wait(), flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", owner_code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        server, tree = map(int, owner.stdout.readline().split())
        pids = {"owner": owner.pid, "server": server, "tree": tree, "program": read_pid(folder / "pid")}
        os.kill(pids[victim], signal.SIGKILL)
        if victim != "owner":
            assert int(owner.stdout.readline()) != 0
            assert owner.wait(SECONDS) == 0
    # The kernel kills no program whose tree is killed; who does that has to kill the program too.
    os.kill(pids["program"], signal.SIGKILL) if victim == "tree" else None
    assert not wait_until_gone(list(pids.values()))


def test_the_server_survives_who_ended_while_it_asked(server: ForkServer, folder: Path) -> None:
    mine, its = socket.socketpair()
    with mine, its, (folder / "out").open("w") as out:
        socket.send_fds(server._control, [b"f"], [its.fileno(), out.fileno(), out.fileno()])
        mine.sendall(b'{"module": "pro')
    with server.start(write(folder, "sys.exit(4)"), [], os.environ, leads_tree=True) as process:
        assert process.wait(SECONDS) == 4


def test_a_program_may_start_before_the_last_import_or_wait_for_it(folder: Path) -> None:
    program = write(folder, "print('late' in sys.modules)")
    write(folder, f"while not os.path.exists('{folder}/go'): time.sleep(0.02)", "late")
    write(folder, "import select; select.select([int(sys.argv[1])], [], [])", "first")  # until a program is asked for
    with ForkServer(["first", "late"]) as server:
        with server.start(program, [], os.environ, leads_tree=True) as process:
            assert process.stdout
            assert process.stdout.read() == "False\n"
            (folder / "go").touch()
        server.wait_for_imports()
        with server.start(program, [], os.environ, leads_tree=True) as process:
            assert process.stdout
            assert process.stdout.read() == "True\n"


def test_a_server_that_is_a_fork_imports_beside_the_other_one(folder: Path) -> None:
    program = write(folder, "print([name in sys.modules for name in ('imports_of_a_test', 'late')])")
    write(folder, f"while not os.path.exists('{folder}/go'): time.sleep(0.02)", "late")
    with ForkServer(["imports_of_a_test"]) as base, ForkServer(["late"], base) as server:
        assert not server.wait_for_imports(0)
        with base.start(program, [], os.environ, leads_tree=True) as process:
            assert process.stdout
            assert process.stdout.read() == "[True, False]\n"
            assert process.wait(SECONDS) == 0
        (folder / "go").touch()
        assert server.wait_for_imports()
        with server.start(program, [], os.environ, leads_tree=True) as process:
            assert process.stdout
            assert process.stdout.read() == "[True, True]\n"
            process.send_signal(signal.SIGTERM)
        pids = [base._process.pid, server._process.pid]
    assert not wait_until_gone(pids)


def test_a_server_that_is_a_fork_ends_when_the_other_one_is_killed(folder: Path) -> None:
    with ForkServer(["imports_of_a_test"]) as base, ForkServer([], base) as server:
        os.kill(base._process.pid, signal.SIGKILL)
        assert not wait_until_gone([server._process.pid])
        with pytest.raises(ConnectionError):
            server.start(write(folder, "pass"), [], os.environ, leads_tree=True)


def test_a_program_whose_library_the_server_cannot_import_shows_why_itself(folder: Path) -> None:
    (folder / "imports_of_a_test.py").write_text("import no_such_library")
    with ForkServer(["imports_of_a_test"]) as server:
        server.wait_for_imports()
        with server.start(write(folder, "import imports_of_a_test"), [], os.environ, leads_tree=True) as process:
            assert process.stdout
            assert process.stdout.read().splitlines()[-1] == "ModuleNotFoundError: No module named 'no_such_library'"
            assert process.wait() == 1


def test_a_server_that_has_ended_says_so_to_who_asks(server: ForkServer, folder: Path) -> None:
    server._process.send_signal(signal.SIGKILL)
    server._process.wait()
    with pytest.raises(ConnectionError):
        server.start(write(folder, "pass"), [], os.environ, leads_tree=True)


def test_no_signal_is_lost_while_a_fork_starts(server: ForkServer, folder: Path) -> None:
    program = write(folder, "time.sleep(60)")
    for number in range(20):
        with server.start(program, [], os.environ, leads_tree=True) as process:
            threading.Event().wait(number / 2000)  # so that it meets each part of the start
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 128 + signal.SIGTERM


def test_a_started_fork_leads_its_group(run: Run, folder: Path) -> None:
    other = write(folder, "time.sleep(60)", "other")
    code, printed = run(
        "from minicpmv_finetune.fork_server import fork_client\n"
        "for _ in range(20):\n"
        f"    process = fork_client().start('{other}', [], os.environ, own_session=True)\n"
        "    os.killpg(process.pid, signal.SIGTERM)\n"
        "    print(process.wait(), end=' ')"
    )
    assert (code, printed.split()) == (0, ["-15"] * 20)


def test_a_program_runs_another_without_the_server_if_it_cannot_fork(run: Run, folder: Path) -> None:
    other = write(folder, "print('imports_of_a_test' in sys.modules, flush=True); sys.exit(7)", "other")
    code, printed = run(
        "from minicpmv_finetune.fork_server import fork_client, run_program\n"
        "fork_client()._control.shutdown(2)\n"
        f"print(run_program('{other}', []))"
    )
    assert (code, printed.split()) == (0, ["False", "7"])
