"""A job on a narrow terminal, under mpirun, of which nothing is said but the folder of a run."""

import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
HANGS_S = 240
COLUMNS = 80


def lines_on_a_terminal(command, environment, cwd):
    """What was to be seen on a terminal, line by line, also for a moment."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, cwd=cwd,
        env=environment | {"TERM": "xterm"}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 1 << 16):
            written += block
    except OSError:  # all who had it open have ended
        pass
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[mhl]", "", written.decode())
    assert process.wait(HANGS_S) == 0, text
    return [line for line in re.split(r"\x1b\[2K|\x1b\[1A|[\r\n]+", text) if line.strip()]


def test_a_run_goes_on_as_it_was_with_a_bar(launcher, copy_of_first, tmp_path):
    words = ["-np", "2", sys.executable, SCRIPTS / "train.py", "--run-dir", copy_of_first, "--steps", "62"]
    command = [str(word) for word in (launcher._mpirun, *words)]
    lines = lines_on_a_terminal(command, launcher._environment, tmp_path)
    said = "\n".join(lines)

    # The options are those of the run: its width, its text, its rows of metrics.
    assert "options that are not given here are those of" in said.replace("\n", " ")
    rows = (copy_of_first / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows][-3:] == [60, 61, 62]
    assert json.loads((copy_of_first / "status.json").read_text())["state"] == "done"

    # A bar, and what else takes time; by one rank, and in lines that fit.
    bars = [line for line in lines if line[0] in "-\\|/" and " of 62 steps" in line]
    assert bars and any("loading TensorFlow" in line for line in lines)
    assert sum(line.startswith("tf_dist ") for line in lines) == 1
    sample = lines.index(next(line for line in lines if line.startswith("sample ")))
    ours = [line for line in lines[:sample] if "/" not in line.strip("/- ") or line in bars]
    assert max(map(len, ours)) < COLUMNS
