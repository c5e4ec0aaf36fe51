"""launch/slurm.sbatch on a real cluster: slurmctld and a slurmd on one host, a second slurmd on another."""

import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import ROOT, SMALL, environment, newest_step, on_one_host, until
from hosts import Hosts, can_make_hosts
from patience import at_most

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "nsenter", "unshare")
pytestmark = pytest.mark.skipif(
    not can_make_hosts() or not all(map(shutil.which, PROGRAMS)), reason="needs root, ip and tc, Slurm and munge"
)
CONFIGURATION = """
ClusterName=zeroadam
SlurmctldHost={names[0]}({addresses[0]})
SlurmUser=root
AuthInfo=socket={folder}/munge,cred_expire=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
PropagateResourceLimits=NONE
SlurmdTimeout=10
KillWait=5
NodeName={names[0]} NodeAddr={addresses[0]} CPUs=1
NodeName={names[1]} NodeAddr={addresses[1]} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Cluster:
    """Two hosts; each program sees the name of its host and finds the others by theirs."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        names = [f"{address} {name}\n" for address, name in zip(hosts.addresses, hosts.names, strict=True)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**vars(hosts), folder=folder))
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o600)
        self.daemons: list[subprocess.Popen[str]] = []

    def start_all(self) -> None:
        options = [f"--{what}-file={self.folder}/{what}" for what in ("key", "log", "pid", "seed")]
        # --force: a folder that only root may enter is fine, as only root does.
        munged = ["munged", "-F", "--force", f"--socket={self.folder}/munge", *options]
        self.daemons.append(subprocess.Popen(munged, stderr=subprocess.DEVNULL, text=True))
        until((self.folder / "munge").exists, 20)
        self.daemons.append(self.start(0, "slurmctld", "-D"))
        for index in range(2):
            self.start_node(index)

    def start_node(self, index: int) -> None:
        self.daemons.append(self.start(index, "slurmd", "-D", "-N", self.hosts.names[index]))

    def start(self, index: int, *command: str) -> subprocess.Popen[str]:
        name = self.hosts.names[index]
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        # ip netns exec would hide the cgroups that slurmd looks for.
        enter = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "sh", "-c", script]
        variables = {"SLURM_CONF": f"{self.folder}/slurm.conf", "PYTHON": sys.executable, "ZEROADAM_SHARED_MEMORY": "0"}
        return subprocess.Popen(
            [*enter, name, f"{self.folder}/hosts", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a daemon's log
            text=True,
            cwd=ROOT,
            env={**environment(self.folder), **variables},
        )

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints, on the first host."""
        return self.start(0, *command).communicate(timeout=at_most(30))[0]

    def remove(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        if (log := self.folder / "slurmctld.log").exists():
            print(log.read_text())  # shown if the test fails


@pytest.fixture
def cluster(make_hosts: Callable[[int], Hosts]) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="zas") as folder:  # short, as munge's socket is there
        made = Cluster(make_hosts(2), Path(folder))
        try:
            made.start_all()
            yield made
        finally:
            made.remove()


def test_a_job_loses_a_node_and_goes_on_from_the_newest_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm puts it in the queue again; it ends with the losses of a run in which nothing happened, to the bit."""
    arguments = [*SMALL, "--hook", "reduce_scatter", "--checkpoint-every", "10"]
    arguments += ["--steps", "150", "--eval-every", "150"]
    checkpoints, log = tmp_path / "checkpoints", tmp_path / "log"
    own = ["--checkpoint-dir", str(checkpoints), "--json", f"{tmp_path}/slurm.json"]
    until(lambda: cluster.ask("scontrol", "show", "node").count("State=IDLE ") == 2, 60)
    answer = cluster.ask("sbatch", f"--output={log}", "launch/slurm.sbatch", *arguments, *own)
    job = re.fullmatch(r"Submitted batch job (\d+)\n", answer)
    assert job, answer

    def state() -> str:
        return cluster.ask("scontrol", "show", "job", job[1])

    until(lambda: newest_step(checkpoints) >= 10, 60)
    cluster.hosts.kill(1)
    until(lambda: "Restarts=1" in state(), 120)
    cluster.start_node(1)
    # Slurm holds it until the credentials of its first run have expired. Started before, it may lose its node to
    # what is still on the way to end that run.
    until(lambda: "JobState=COMPLETED" in state(), 200)
    assert "resumed after step" in log.read_text()
    found = json.loads((tmp_path / "slurm.json").read_text())
    assert found["losses"] == on_one_host(2, tmp_path, *arguments)["losses"]
