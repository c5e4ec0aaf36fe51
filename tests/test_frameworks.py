"""The scripts of docs/frameworks.md, trained, killed and resumed, end where an undisturbed run ends, to the bit."""

import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from commands import ROOT, torchrun

# Each section of the page has one script: by heading.
SECTIONS = (ROOT / "docs/frameworks.md").read_text().split("\n## ")[1:]
ALL = {text.partition("\n")[0]: text.split("```python\n")[1].split("```")[0] for text in SECTIONS}
SCRIPTS = {
    "accelerate": ALL["Accelerate"],
    "trainer": ALL["transformers' Trainer"],
    "lightning": ALL["Lightning"],
}
LOOPS = {"lightning": ALL["Fabric"], "ignite": ALL["ignite"], "torch": ALL["nanoGPT's structure"]}
# Runs a script whose rank 1 is killed after so many steps, or which leaves its parameters behind.
RUN = """
import os, runpy, signal, sys, torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_, script, steps, killed_after = sys.argv
rank, count, params = int(os.environ["RANK"]), 0, []

def after_step(optimizer, *_):
    global count
    count += 1
    params[:] = [p for group in optimizer.param_groups for p in group["params"]]
    if rank == 1 and count == int(killed_after):
        os.kill(os.getpid(), signal.SIGKILL)

register_optimizer_step_post_hook(after_step)
sys.argv = [script, steps]
kept = runpy.run_path(script, run_name="__main__")  # or its process group would be garbage, see launch/agent.py
torch.save([p.detach() for p in params], f"params{rank}.pt")
"""
# A process of its own may abort on the usual way out, see docs/troubleshooting.md; a forked one ends by this anyway.
EXIT = "os._exit(0)\n"


def run(folder: Path, script: str, steps: int, killed_after: int = 0, anew: bool = False) -> CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "run.py").write_text(RUN + EXIT if anew else RUN)
    (folder / "script.py").write_text(script)
    imports = "\n".join(re.findall(r"^(?:import|from) .*", script, re.MULTILINE))
    command = ["run.py", "script.py", str(steps), str(killed_after)]
    return torchrun(2, *command, cwd=folder, anew=anew, imports=imports)


def params(folder: Path) -> list[torch.Tensor]:
    both = [torch.load(folder / f"params{rank}.pt") for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    return both[0]


@pytest.mark.parametrize("framework", SCRIPTS)
def test_killed_and_resumed_it_ends_where_it_should(framework: str, tmp_path: Path) -> None:
    """Killed after 7 of 8 steps. Lightning goes on with other data then, so AdamW goes through the same there."""
    pytest.importorskip({"trainer": "transformers"}.get(framework, framework))
    script, plain = SCRIPTS[framework], SCRIPTS[framework]
    kills: dict[str, list[int]] = {"killed": [7, 5], "undisturbed": [0]}  # when resumed, 5 steps are not reached
    if framework == "lightning":
        plain = script.replace("ZeroAdamW(self", "torch.optim.AdamW(fused=True, params=self")
        plain = plain.replace("optimizer.clip_grad_norm_(", "torch.nn.utils.clip_grad_norm_(self.parameters(), ")
        plain = plain.replace(".register_comm_hook(None, reduce_scatter_hook)", "")
        kills["undisturbed"] = kills["killed"]
    for name, steps in kills.items():
        for killed_after in steps:
            anew = (name, killed_after) == ("killed", 7)  # as a user starts it
            done = run(tmp_path / name, script if name == "killed" else plain, 8, killed_after, anew)
            assert (done.returncode != 0) is (killed_after == 7), done.stderr
            assert (tmp_path / name / "params0.pt").exists() is (killed_after != 7)
    expected, found = params(tmp_path / "undisturbed"), params(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


MISTAKES = {
    "accelerate": ("accelerator.register_save_state_pre_hook(", "(lambda _: None)(", "register_save_state_pre_hook"),
    "trainer": ("ZeroTrainer(", "__import__('transformers').Trainer(", "zeroadam.huggingface.ConsolidateOnSave"),
    "lightning": ("configure_gradient_clipping", "unused", r"optimizer\.clip_grad_norm_"),
}


@pytest.mark.parametrize("framework", MISTAKES)
def test_what_has_been_forgotten_is_named(framework: str, tmp_path: Path) -> None:
    pytest.importorskip({"trainer": "transformers"}.get(framework, framework))
    line, other, cure = MISTAKES[framework]
    script = SCRIPTS[framework].replace("logger=False", "gradient_clip_val=0.1, logger=False")
    assert line in script
    done = run(tmp_path, script.replace(line, other), 4)
    assert done.returncode != 0
    assert re.search(cure, done.stderr), done.stderr


@pytest.mark.parametrize("clip", [False, True])
def test_the_trainer_with_the_hook_has_the_numbers_of_adamw(tmp_path: Path, clip: bool) -> None:
    """To the bit where it does not clip: the norms are sums in another order."""
    pytest.importorskip("transformers")
    script = SCRIPTS["trainer"].replace('{"lr": 1e-3}', '{"lr": 1e-3, "fused": False}')
    script = script.replace("save_steps=2", f"save_steps=2,\n    max_grad_norm={0.1 if clip else 0.0}")
    plain = script.replace("ZeroTrainer(", "__import__('transformers').Trainer(").replace(
        "ZeroAdamW", "torch.optim.AdamW"
    )
    plain = plain.replace("from zeroadam import torch.optim.AdamW\n", "")
    script += """
assert trainer.accelerator.ddp_handler.gradient_as_bucket_view
assert trainer.model_wrapped is trainer._hooked
"""
    for name, text in (("ours", script), ("plain", plain)):
        done = run(tmp_path / name, text, 6)
        assert done.returncode == 0, done.stderr
    ours, expected = params(tmp_path / "ours"), params(tmp_path / "plain")
    if clip:
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    else:
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_an_optimizer_built_too_early_is_told_when_to_build_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    script = SCRIPTS["trainer"].replace("arguments = ", "ZeroAdamW(torch.nn.Linear(2, 2).parameters())\narguments = ")
    done = run(tmp_path, script, 2)
    assert done.returncode != 0
    assert "transformers' TrainingArguments() do so: build it after them" in done.stderr


@pytest.mark.parametrize("package", LOOPS)
def test_loops_of_other_frameworks_have_the_numbers_of_adamw(package: str, tmp_path: Path) -> None:
    """To the bit without clipping; and what they save is AdamW's to load."""
    pytest.importorskip(package)
    script = LOOPS[package].replace("lr=1e-3", "lr=1e-3, fused=False")
    script, clips = re.subn(r".*\.clip_grad_norm_\(.*\n", "", script)
    plain = script.replace("ZeroAdamW(", "torch.optim.AdamW(")
    plain, hooks = re.subn(r".*register_comm_hook.*\n|^ *save\(.*\n", "", plain, flags=re.MULTILINE)
    assert (clips, hooks) == (1, 2)
    for name, text in (("ours", script), ("plain", plain)):
        done = run(tmp_path / name, text, 6)
        assert done.returncode == 0, done.stderr
    ours, expected = params(tmp_path / "ours"), params(tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    (file,) = [file for file in (tmp_path / "ours").glob("*.pt") if not file.name.startswith("params")]
    saved = torch.load(file)
    fresh = [torch.nn.Parameter(torch.zeros_like(value)) for value in expected]
    sizes = [len(group["params"]) for group in saved["optimizer"]["param_groups"]]
    groups = [{"params": [fresh.pop(0) for _ in range(size)]} for size in sizes]
    torch.optim.AdamW(groups).load_state_dict(saved["optimizer"])
    assert {float(entry["step"]) for entry in saved["optimizer"]["state"].values()} == {6.0}
