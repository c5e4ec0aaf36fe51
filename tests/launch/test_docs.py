"""What the pages say is so: scripts run, before and after, messages are ours, and all that is public is on them."""

import ast
import importlib.util
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import ROOT, output_of

import zeroadam
import zeroadam.checkpoint

PAGES = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
}
BLOCKS = {page: re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL) for page, text in PAGES.items()}
# Whose scripts have tests of their own.
APART = {"docs/coming_from.md", "docs/frameworks.md", "docs/torch.md"}
SCRIPTS = {
    f"{page}-{number}": script
    for page, blocks in BLOCKS.items()
    if page not in APART
    for number, (kind, script) in enumerate(blocks)
    if kind == "python"
}
DIFFS = [diff for kind, diff in BLOCKS["docs/coming_from.md"] if kind == "diff"]


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_scripts_on_the_pages_run(script: str, tmp_path: Path) -> None:
    for framework in ("accelerate", "lightning"):
        if f"import {framework}" in script or f"from {framework}" in script:
            pytest.importorskip(framework)
    output_of(script, tmp_path)


@pytest.mark.parametrize("diff", DIFFS, ids=["adamw", "zero_redundancy", "fsdp2", "deepspeed"])
def test_before_and_after(diff: str, tmp_path: Path) -> None:
    """The two versions of a script print the same loss; DeepSpeed's is not run."""
    before, after = sides_of(diff)
    loss = output_of(after, tmp_path).splitlines()[-1]
    assert 0 < float(loss) < 1
    if "deepspeed" not in before:
        assert output_of(before, tmp_path).splitlines()[-1] == loss


def sides_of(diff: str) -> tuple[str, str]:
    lines = diff.splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in lines if line[:1] in f" {sign}\n") for sign in "-+")
    return before, after


def test_the_lines_of_the_readme_to_change_are_those_of_its_script() -> None:
    """The script runs above; the diff has no process group to run in."""
    [diff] = [diff for kind, diff in BLOCKS["README.md"] if kind == "diff"]
    [script] = [script for kind, script in BLOCKS["README.md"] if kind == "python"]
    after = sides_of(diff)[1]
    ast.parse(after)
    for line in after.splitlines():
        call = re.sub(r"\(.*", "(", line)
        assert call in script, line


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("compiled", ["net", "model"])
def test_torchs_own_tools(compiled: str, tmp_path: Path) -> None:
    """The trace has our phases; the average of the weights is AdamW's without torch.compile, to its rounding."""
    [script] = [script for kind, script in BLOCKS["docs/torch.md"] if kind == "python"]
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


COMMANDS = [
    line.strip() for text in PAGES.values() for line in text.splitlines() if re.match(r" {4}\S.*launch/\w+\.py", line)
]


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_of_the_pages_name_scripts_and_options_that_there_are(command: str) -> None:
    script, arguments = re.findall(r"(launch/\w+\.py)(.*)", command)[-1]
    source = (ROOT / script).read_text() + (ROOT / "launch/benchmark_launches.py").read_text()
    for option in re.findall(r"--[\w-]+", arguments):
        assert f'"{option}"' in source, (command, option)
    for name in re.findall(r'"([^"]+)"', arguments):  # of an implementation
        assert f'"{name}"' in (ROOT / "launch/implementations.py").read_text(), (command, name)


QUOTED = [
    message
    for line in re.findall(r"^> (`.*`)$", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    for message in re.findall(r"`([^`]+)`(?:, |$)", line)
]
SOURCES = {file: file.read_text() for file in sorted((ROOT / "zeroadam").rglob("*.py"))}


def test_messages_are_those_of_the_code() -> None:
    source = re.sub(r'"\s*\n\s*f?"', "", " ".join(SOURCES.values()))  # strings that go on in the next line
    assert len(QUOTED) > 100
    for message in QUOTED:
        assert message.removeprefix("disagree on ") in source, message


def messages_of(tree: ast.AST) -> Iterator[str]:
    """What is raised and warned of, with fields as {}; not what was put together elsewhere."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
        if not isinstance(call, ast.Call) or not call.args:
            continue
        if name.endswith("warn") or (isinstance(node, ast.Raise) and name not in ("AttributeError", "UnsafeError")):
            message = call.args[0]
            if isinstance(message, ast.Constant) and isinstance(message.value, str):
                yield message.value
            elif isinstance(message, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in message.values)


# Raised where a file of a checkpoint, or the memory of another process, is not what it should be: the message that a
# user gets has this as its reason. The command line says itself what it takes.
REASONS = ("untrusted.py", "hosts.py", "metadata.py", "state_dict.py")


@pytest.mark.parametrize(
    "file", [file for file in SOURCES if "cli" not in file.parts], ids=lambda file: str(file.relative_to(ROOT))
)
def test_every_error_has_an_entry_under_troubleshooting(file: Path) -> None:
    """So that what is not there can be looked up; a new message is quoted under the heading whose cure it has."""
    for message in messages_of(ast.parse(SOURCES[file])):
        python = message.endswith("has no attribute {}")  # Python's own words
        if message.count("{}") * 2 > len(message.split()) or file.name in REASONS or python:
            continue
        assert any(quoted in message for quoted in QUOTED), message


def test_tests_that_the_pages_name_are_there() -> None:
    """`tests/file.py::name`, or `::name` in the file that was named last."""
    count = 0
    for text in PAGES.values():
        file = ""
        for path, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", text):
            if path or test:
                count += 1
                file = path or file
                assert not test or re.search(rf"def {test}\w*\(", (ROOT / file).read_text()), (file, test)
                assert (ROOT / file).exists()
    assert count > 15


def test_all_that_is_public_is_in_the_readme_and_in_the_reference() -> None:
    readme, reference = PAGES["README.md"], PAGES["docs/reference.md"]
    for name in zeroadam.__all__:
        assert re.search(rf"\b{name}\b", readme), name
        assert re.search(rf"^::: zeroadam\.{name}$", reference, re.MULTILINE) or name.startswith("__"), name
    own = inspect.signature(zeroadam.ZeroAdamW).parameters.keys() - inspect.signature(torch.optim.AdamW).parameters
    for argument in own:
        assert f"| `{argument}=" in readme, argument
    methods = {name for name in vars(zeroadam.ZeroAdam) if not name.startswith(("_", "join_"))}
    for method in methods:
        assert re.search(rf"`{method}\b", readme), method
    for name in vars(zeroadam.checkpoint):
        if inspect.isfunction(getattr(zeroadam.checkpoint, name)) or name == "Manager":
            assert f"`checkpoint.{name}`" in readme, name
            assert f"::: zeroadam.checkpoint.{name}\n" in reference, name
    for variable in {*re.findall(r"ZEROADAM_\w+", " ".join(SOURCES.values()))}:
        assert variable in readme, variable
        assert f"| `{variable}` |" in reference, variable


def test_the_readme_is_short_and_its_versions_are_those_of_the_package() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 215
    project = (ROOT / "pyproject.toml").read_text()
    [lowest] = re.findall(r'"torch>=([\d.]+)', project)
    [python] = re.findall(r'^requires-python = ">=([\d.]+)"$', project, re.MULTILINE)
    version = zeroadam.__version__
    assert f"torch {lowest} " in PAGES["README.md"]
    assert f"Python {python} " in PAGES["README.md"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in PAGES["CHANGELOG.md"]


def pages_module() -> ModuleType:
    specification = importlib.util.spec_from_file_location("pages", ROOT / ".ci/pages.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_links_of_the_readme_work_on_pypi() -> None:
    """Each of them, pictures too, is an address of a file of the release, and that file is there."""
    module, base = pages_module(), "https://example.org/zeroadam"
    made = module.for_pypi(PAGES["README.md"], f"{base}/", "v1")
    links = module.LINK.findall(made)
    assert len(links) == len(module.LINK.findall(PAGES["README.md"])) > 20
    for mark, _, link in links:
        if not link.startswith("#"):
            kind = "raw" if mark else "blob"
            assert link.startswith(f"{base}/{kind}/v1/"), link
            assert (ROOT / link.removeprefix(f"{base}/{kind}/v1/").partition("#")[0]).is_file(), link


def test_links_between_the_pages_lead_to_files() -> None:
    """mkdocs looks at those of the site; this is for who reads them in the repository."""
    for page, text in PAGES.items():
        for _, _, link in pages_module().LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            if not re.match("[a-z]+:|#", link):
                assert (ROOT / page).parent.joinpath(link.partition("#")[0]).is_file(), (page, link)
