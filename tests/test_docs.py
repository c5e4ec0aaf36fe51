"""The pages of docs/ say what is so: scripts run, before and after, and messages are ours."""

import re
from pathlib import Path

import pytest
from test_launch import ROOT, torchrun

DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/coming_from.md").read_text(), re.DOTALL)


def loss_of(script: str, folder: Path) -> str:
    (folder / "script.py").write_text(script)
    done = torchrun(2, "script.py", cwd=folder)
    if "terminate called without an active exception" in done.stderr:  # pytorch#56297, at exit: see launch/train.py
        done = torchrun(2, "script.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("diff", DIFFS, ids=["adamw", "zero_redundancy", "fsdp2", "deepspeed"])
def test_before_and_after(diff: str, tmp_path: Path) -> None:
    """The two versions of a script print the same loss; DeepSpeed's is not run."""
    lines = diff.splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in lines if line[:1] in f" {sign}\n") for sign in "-+")
    loss = loss_of(after, tmp_path)
    assert 0 < float(loss) < 1
    if "deepspeed" not in before:
        assert loss_of(before, tmp_path) == loss


def test_messages_are_those_of_the_code() -> None:
    source = " ".join(file.read_text() for file in (ROOT / "zeroadam").glob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    table = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    assert len(messages) > 12
    for cell in messages:
        for message in re.findall(r"`(.*?)`", cell):
            assert message.removeprefix("disagree on ") in source, message
