"""The pages of docs/ say what is so: scripts run, before and after, and messages are ours."""

import re
from pathlib import Path

import pytest
from test_launch import ROOT, output_of

DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/coming_from.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("diff", DIFFS, ids=["adamw", "zero_redundancy", "fsdp2", "deepspeed"])
def test_before_and_after(diff: str, tmp_path: Path) -> None:
    """The two versions of a script print the same loss; DeepSpeed's is not run."""
    lines = diff.splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in lines if line[:1] in f" {sign}\n") for sign in "-+")
    loss = output_of(after, tmp_path).splitlines()[-1]
    assert 0 < float(loss) < 1
    if "deepspeed" not in before:
        assert output_of(before, tmp_path).splitlines()[-1] == loss


def test_messages_are_those_of_the_code() -> None:
    source = " ".join(file.read_text() for file in (ROOT / "zeroadam").glob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    table = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    assert len(messages) > 12
    for cell in messages:
        for message in re.findall(r"`(.*?)`", cell):
            assert message.removeprefix("disagree on ") in source, message
