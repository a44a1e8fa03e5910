"""The SLURM script of docs/commands.md, run with commands that stand in for SLURM's and for Python."""

import json
import os
import pathlib
import re
import signal
import subprocess
import time

import pytest

import train

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "commands.md"
STUBS = {
    # One task per node, with its number; its status is the highest of theirs.
    "srun": """for k in 0 1; do SLURM_PROCID=$k "$@" & echo $! >> pids; done
status=0
for pid in $(cat pids); do wait $pid || status=$?; done
rm pids
exit $status""",
    "scancel": 'echo "$@" >> scancelled; kill -TERM $(cat pids)',
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$@" >> requeued; fi',
    # A worker that trains for ever, or until $FINISHES.
    "python": """run=weights/Jan0$(ls weights | wc -l)-0000_liver
printf "%s\\n" "$TF_CONFIG" > task$SLURM_PROCID.json
printf "%s\\n" "$@" > arguments$SLURM_PROCID
trap '[ $SLURM_PROCID = 1 ] || { mkdir $run; touch $run/model-7.index; }; exit 130' TERM
[ -z "$FINISHES" ] || exit $FINISHES
touch ready$SLURM_PROCID
while true; do sleep 0.02; done""",
}


@pytest.fixture
def folder(tmp_path):
    """A working folder with train.sh, weights/ and the commands in bin/."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "train.sh").write_text(script)
    (tmp_path / "weights").mkdir()
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def submit(folder, **environment):
    environment |= {"SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "liver"}
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(["bash", "train.sh"], cwd=folder, env={**os.environ, **environment})


def arguments(folder, task=0):
    """The flags that a worker got, as train.py reads them."""
    script, *flags = (folder / f"arguments{task}").read_text().splitlines()
    assert script == "train.py"
    return train.build_parser().parse_args(flags)


def stop_when_ready(folder, job):
    deadline = time.monotonic() + 20
    while len(list(folder.glob("ready?"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    status = job.wait(timeout=20)
    for ready in folder.glob("ready?"):
        ready.unlink()
    return status


def test_a_job_whose_time_is_over_queues_again_and_goes_on_with_the_newest_checkpoint(folder):
    assert stop_when_ready(folder, submit(folder)) == 0
    for k in range(2):
        config = json.loads((folder / f"task{k}.json").read_text())
        assert config["cluster"] == {"worker": ["node1:22345", "node2:22345"]}
        assert config["task"] == {"type": "worker", "index": k}
        assert arguments(folder, k).checkpoint is None
        assert arguments(folder, k).name == "liver"
        assert arguments(folder, k).gpu == "0,1,2,3"
    assert (folder / "scancelled").read_text() == "--signal=TERM 12345\n"
    assert (folder / "requeued").read_text() == "requeue 12345\n"
    os.utime(folder / "weights" / "Jan00-0000_liver" / "model-7.index", (1, 1))  # long ago, as jobs are
    assert stop_when_ready(folder, submit(folder)) == 0
    assert arguments(folder).checkpoint == "weights/Jan00-0000_liver/model-7.index"
    (folder / "weights" / "Jan02-0000_liver").mkdir()  # a run that ended before its first checkpoint
    assert submit(folder, FINISHES="0").wait(timeout=20) == 0
    assert arguments(folder).checkpoint == "weights/Jan01-0000_liver/model-7.index"
    assert arguments(folder, 1) == arguments(folder)
    assert (folder / "requeued").read_text() == 2 * "requeue 12345\n"


@pytest.mark.parametrize("status", [1, 130])
def test_a_job_that_fails_or_is_cancelled_does_not_queue_again(folder, status):
    assert submit(folder, FINISHES=str(status)).wait(timeout=20) == status
    assert not (folder / "requeued").exists()


def test_the_options_ask_for_what_the_script_needs(folder):
    options = " ".join(re.findall(r"^#SBATCH (.*)$", (folder / "train.sh").read_text(), re.MULTILINE)).split()
    assert {"--ntasks-per-node=1", "--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= {*options}
