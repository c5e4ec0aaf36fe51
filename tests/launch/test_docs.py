"""The pages of docs/ say what is so: scripts run, before and after, and messages are ours."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import ROOT, output_of

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
    source = " ".join(file.read_text() for file in (ROOT / "zeroadam").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    table = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    assert len(messages) > 12
    for cell in messages:
        for message in re.findall(r"`(.*?)`", cell):
            assert message.removeprefix("disagree on ") in source, message


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("compiled", ["net", "model"])
def test_torchs_own_tools(compiled: str, tmp_path: Path) -> None:
    """The trace has our phases; the average of the weights is AdamW's without torch.compile, to its rounding."""
    script = re.findall(r"```python\n(.*?)```", (ROOT / "docs/torch.md").read_text(), re.DOTALL)[0]
    if compiled == "model":
        script = script.replace("torch.compile(net)", "net").replace("    model(", "    torch.compile(model)(")
    script = script.replace("dist.destroy_process_group()", "torch.save(average.state_dict(), 'average.pt')")
    assert "zeroadam.update" in output_of(script, tmp_path)
    found = torch.load(tmp_path / "average.pt")
    for rank in range(2):
        trace = (tmp_path / f"trace{rank}.json").read_text()
        assert all(f'"zeroadam.{phase}"' in trace for phase in ("reduce_scatter", "update", "all_gather"))
    plain = script.replace("ZeroAdamW(", "torch.optim.AdamW(").replace("model.register_comm_hook", "# ")
    plain = plain.replace("torch.compile(", "(")
    output_of(plain, tmp_path)
    expected = torch.load(tmp_path / "average.pt")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_tests_that_the_readme_names_are_there() -> None:
    """`tests/file.py::name`, or `::name` in the file that was named last."""
    readme, file = (ROOT / "README.md").read_text(), ""
    named = re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", readme)
    assert sum(bool(test) for _, test in named) > 5
    for path, test in named:
        file = path or file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), (file, test)
