"""Which hosts a job can be started on again, with an agent of our own instead of ssh."""

import os
import socket

import pytest

from tf_dist.errors import LaunchError
from tf_dist.ops.hostfile import (
    Host,
    Launch,
    agent_of,
    named_in,
    ranks_of_a_model,
    ranks_on,
    those_that_answer,
)


@pytest.fixture
def agent(tmp_path):
    """Reaches a and b; c refuses, d never answers."""
    path = tmp_path / "agent"
    path.write_text('#!/bin/sh\ncase $1 in d) sleep 60;; c) exit 255;; esac\nshift\nexec "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_lists_and_files_of_hosts(tmp_path):
    path = tmp_path / "hosts"
    path.write_text(
        "# ours\na slots=2\n\nb:3   # MPICH's\nc max_slots=4 slots=1\nd\ne slots=2 max-slots=8\nf count=3\n"
    )
    assert named_in(["--hostfile", str(path), "--map-by", "core"]) == (
        [Host("a", 2), Host("b", 3), Host("c", 1), Host("d", 0), Host("e", 2), Host("f", 3)],
        ["--map-by", "core"],
    )
    assert named_in(["-x", "A=b", "--host=a:2,b"]) == ([Host("a", 2), Host("b", 0)], ["-x", "A=b"])
    assert named_in(["--oversubscribe"]) == ([], ["--oversubscribe"])


def test_a_file_that_is_not_there():
    with pytest.raises(LaunchError, match="cannot read the hosts in nowhere"):
        named_in(["--hostfile", "nowhere"])


def test_who_answers(agent):
    wanted = [Host(name, 2) for name in "abcd"] + [Host(socket.gethostname(), 1)]
    assert those_that_answer(wanted, [agent], limit_s=3.0) == [wanted[0], wanted[1], wanted[4]]


def test_where_nobody_can_ask_all_are_there():
    assert those_that_answer([Host("a", 2)], ["no-such-program"]) == [Host("a", 2)]


def test_mpirun_says_how_hosts_are_reached():
    assert agent_of(["--prtemca", "plm_ssh_agent", "sh .agent"]) == ["sh", ".agent"]
    assert agent_of([])[0] == "ssh"


@pytest.mark.parametrize(
    ("slots", "together", "ranks"), [((2, 2), 1, 4), ((2,), 1, 2), ((3,), 2, 2), ((0,), 1, 4), ((8,), 1, 8)]
)
def test_ranks_that_are_left(slots, together, ranks):
    hosts = [Host("x", 2)] * 2
    assert ranks_on([Host("x", n) for n in slots], hosts, 8, together) == ranks


def test_ranks_that_share_a_model():
    words = ["train.py", "--tensor-parallel", "2", "--pipeline-parallel=3", "--steps", "7"]
    assert ranks_of_a_model(words) == 6 and ranks_of_a_model(["train.py"]) == 1


@pytest.mark.parametrize(
    ("text", "flags", "ranks"),
    [
        ("tensor_parallel: 2\npipeline_parallel: 2\n", [], 4),
        ("tensor_parallel: 2\n", ["--tensor-parallel=4"], 4),
        ("- tensor_parallel", [], 1),
        ("tensor_parallel: [", [], 1),
        (None, ["--tensor-parallel", "2"], 2),
        ("pipeline-parallel: 2\n", [], 2),
        ("pipeline-parallel: 2\nsteps: 9\nno_such_key: 1\n", ["--sequence-parallel=2", "--help"], 4),
        ("tensor-parallel: '2'\n", [], 1),
    ],
)
def test_ranks_that_share_a_model_by_a_file(tmp_path, text, flags, ranks):
    """What is wrong in the file is said by the job."""
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    assert ranks_of_a_model(["train.py", "--config", str(path), *flags]) == ranks


def test_the_next_start_is_without_those_who_are_gone(agent, told):
    flags = ["--host", "a:2,c:2", "--prtemca", "plm_ssh_agent", agent]
    launch = Launch(["job.py"], 4, 1, "mpirun", flags)
    assert launch.command(again=False)[:5] == ["mpirun", "-np", "4", "--host", "a:2,c:2"]
    assert launch.command(again=True)[:5] == ["mpirun", "-np", "2", "--host", "a:2"]
    assert launch.command(again=True)[5:8] == flags[2:]
    assert told.messages[0] == "no answer from c: starting 2 ranks"
    with pytest.raises(LaunchError, match="no answer from c: 2 ranks could be started, 3 are wanted"):
        launch._replace(least=3).command(again=True)


@pytest.mark.parametrize(
    "name",
    [
        "-oProxyCommand=touch${IFS}x",
        "-l",
        "--help",
        "a;b",
        "a$(b)",
        "a`b`",
        "a|b",
        "a'b",
        "a\x1b[2J",
        "hôst",
        "u@-x",
    ],
)
def test_a_name_that_is_more_than_a_name(tmp_path, name):
    """ssh takes what begins with a dash for an option, some of which run commands."""
    (tmp_path / "hosts").write_text(f"localhost slots=1\n{name} slots=1\n")
    for flags in (["--hostfile", str(tmp_path / "hosts")], ["--host", f"localhost,{name}:2"], [f"-H={name}"]):
        with pytest.raises(LaunchError, match=r"is no name of a host|is no host") as caught:
            named_in(flags)
        assert caught.value.exit_code == 78 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["node-01", "node_1.cluster.org", "10.0.0.7", "user@node", "+n1", "7"])
def test_names_of_hosts(name):
    assert named_in(["--host", f"{name}:2"])[0] == [Host(name, 2)]


def test_a_file_of_hosts_that_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LaunchError, match="it is a named pipe"):
        named_in(["--hostfile", str(tmp_path / "pipe")])
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfa slots=99999999999999999999999\r\n")
    assert named_in(["--hostfile", str(tmp_path / "hosts")])[0] == [Host("a", 1_000_000)]


def test_options_of_a_file_count_as_flags_do(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("pipeline-parallel: 2\ntensor_parallel: 3\n")
    assert ranks_of_a_model(["train.py", "--config", str(path)]) == 6
