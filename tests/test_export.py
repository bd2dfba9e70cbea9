"""Exports: each is a runnable thing, means what was trained, and says what its target cannot express."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, adapter_losses
from omegaconf import OmegaConf
from trained_run import train_run

from lora_search.cli import main
from lora_search.export import FORMATS, LAYOUTS, describe
from lora_search.results import run_rows
from lora_search.rundir import RunDirectory
from lora_search.spec import load_spec, parse_spec

STEPS, STOPPED = 24, 8

SWEEP = f"""
name: short
base: {{model: "builtin:demo", compute_dtype: float32}}
data: {{path: "builtin:demo", limit: 300, validation: 0.1, test: 0.1}}
search:
  space:
    rank: {{choice: [8, 16]}}
    alpha_ratio: {{choice: [1, 2, 2.5]}}
    dropout: {{uniform: [0.0, 0.1]}}
    target_modules: {{choice: [attention-qv, all-linear, [q_proj, o_proj]]}}
    learning_rate: {{log_uniform: [1.0e-4, 1.0e-2]}}
  trials: 3
  scheduler: {{first_rung: {STOPPED}}}
training: {{steps: {STEPS}, eval_every: {STOPPED}, warmup_ratio: 0.1, seed: 5}}
tracking: {{wandb: {{mode: disabled}}}}
"""

TRIALS: list[tuple[dict[str, Any], int]] = [
    ({"rank": 8, "alpha_ratio": 2, "dropout": 0.05, "target_modules": "all-linear", "learning_rate": 5e-3}, STEPS),
    ({"rank": 16, "alpha_ratio": 1, "dropout": 0.02, "target_modules": "attention-qv", "learning_rate": 3e-3}, STOPPED),
    (
        {"rank": 8, "alpha_ratio": 2, "dropout": 0.0, "target_modules": ["q_proj", "o_proj"], "learning_rate": 1e-3},
        STEPS,
    ),
]
"""Parameters, and the steps trained: the second is stopped at the first rung, a third of its schedule's way."""

BEST, PRUNED = 0, 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run directory of the demo: a real engine, record, study and checkpoints; only Ray is left out."""
    import torch
    from optuna.trial import TrialState

    from lora_search.search.study import create_study, distributions, encode

    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("export")
    spec = parse_spec(SWEEP, source="short.yaml", folder=folder)
    made = train_run(spec, folder, TRIALS, every=STOPPED)
    study = create_study(spec, made.path)
    for sampled, _ in TRIALS:
        study.enqueue_trial(encode(spec.search.space, sampled))
    for row in run_rows(made):
        asked = study.ask(distributions(spec.search.space))
        asked.report(row["eval_loss"], row["steps"])
        pruned = row["state"] == "stopped"
        study.tell(asked, None if pruned else row["eval_loss"], TrialState.PRUNED if pruned else TrialState.COMPLETE)
    return made


def export(run: RunDirectory, form: str, out: Path, trial: int | str = "best", *more: str) -> Path:
    assert main(["export", str(run.path), "--trial", str(trial), "--to", form, "--out", str(out), *more]) == 0
    return out


def start_script(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start an exported script as a process of its own."""
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, str(folder / "train.py"), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | quiet, cwd=folder)


def run_script(folder: Path, *arguments: str, **environment: str) -> str:
    """Run it to its end; what it printed."""
    process = start_script(folder, *arguments, **environment)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return said


SCRIPTS = ("transformers", "trl")


@pytest.fixture(scope="module")
def trained_again(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The best trial's scripts, run side by side: most of their time is what they import."""
    folders = {form: export(run, form, tmp_path_factory.mktemp(form) / "out") for form in SCRIPTS}
    if find_spec("trl") is None:
        del folders["trl"]
    started = {form: start_script(folder) for form, folder in folders.items()}
    for process in started.values():
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
    return folders


@pytest.mark.parametrize("form", SCRIPTS)
def test_training_again_from_the_script_reaches_the_same_loss(
    run: RunDirectory, trained_again: dict[str, Path], form: str
) -> None:
    if form not in trained_again:
        pytest.skip("its script is run with TRL, which is not installed")
    same_loss(run, trained_again[form], BEST)


@pytest.mark.slow
@pytest.mark.parametrize("form", SCRIPTS)
def test_training_a_stopped_trial_again_reaches_the_same_loss(run: RunDirectory, tmp_path: Path, form: str) -> None:
    out = export(run, form, tmp_path / "out", PRUNED)
    run_script(out)
    same_loss(run, out, PRUNED)


def same_loss(run: RunDirectory, out: Path, trial: int) -> None:
    row, result = run_rows(run)[trial], json.loads((out / "result.json").read_text())
    print(f"{result['eval_loss']:.4f}, the trial's {row['eval_loss']:.4f}")
    assert result["steps"] == row["steps"] == TRIALS[trial][1]
    assert result["eval_loss"] == pytest.approx(row["eval_loss"], rel=0.02)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (out / "adapter").iterdir()}


@pytest.mark.parametrize("form", ["transformers", "trl", "unsloth", "llamafactory", "axolotl", "torchtune"])
def test_stopped_trial_trains_its_steps_of_the_whole_schedule(run: RunDirectory, tmp_path: Path, form: str) -> None:
    out = export(run, form, tmp_path / "out", PRUNED)
    text = "".join(file.read_text() for file in out.iterdir() if file.suffix in (".py", ".yaml"))
    assert str(STOPPED) in text
    assert str(STEPS) in text
    page = (out / "README.md").read_text()
    assert f"trained for {STOPPED} of {STEPS} steps: ASHA stopped it" in page


def test_train_rows_are_those_that_the_trial_read_in_its_order(run: RunDirectory, tmp_path: Path) -> None:
    from lora_search.data import tokenize_data, training_rows
    from lora_search.model import load_tokenizer

    spec = load_spec(run.spec)
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    out = export(run, "transformers", tmp_path / "out")
    written = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    order = training_rows(len(data.train), spec.training.seed, 0, STEPS * spec.training.batch_size)
    assert [row["input_ids"] for row in written[: len(order)]] == [data.train.row(n)[0].tolist() for n in order]
    assert len(written) % len(data.train) == 0  # begun epochs in full: who trains on leaves out no row
    tokens, trained = data.train.row(order[0])
    labels = written[0]["labels"]
    assert [label != -100 for label in labels[1:]] == trained[1:].tolist()
    assert all(label in (-100, token) for label, token in zip(labels, tokens.tolist(), strict=True))
    for name in ("validation", "test"):
        lines = (out / f"{name}.jsonl").read_text().splitlines()
        split = getattr(data, name)
        assert [json.loads(line)["input_ids"] for line in lines] == [
            split.row(n)[0].tolist() for n in range(len(split))
        ]


def test_sweep_file_is_this_one_configuration(run: RunDirectory, tmp_path: Path) -> None:
    from lora_search.space import trial_config

    out = export(run, "yaml", tmp_path / "out", PRUNED)
    spec = load_spec(out / "sweep.yaml")
    assert spec.search.trials == 1
    fixed = {name: domain.probes()[0] for name, domain in spec.search.space.items()}
    rows = run_rows(run)
    assert trial_config(spec, fixed) == describe(run, load_spec(run.spec), rows, rows[PRUNED]).config
    assert f"trained for {STOPPED}" in (out / "README.md").read_text()


@pytest.mark.parametrize("searched", [True, False])
def test_schedule_is_the_one_that_the_trial_had(run: RunDirectory, tmp_path: Path, searched: bool) -> None:
    """Where the steps are searched, and where a resumed sweep has gone on with more of them."""
    other = RunDirectory(shutil.copytree(run.path, tmp_path / "other"))
    spec = yaml.safe_load(other.spec.read_text())
    if searched:
        spec["search"]["space"]["steps"] = {"choice": [STEPS, 2 * STEPS]}
    else:
        spec["training"]["steps"] = 2 * STEPS
    other.spec.write_text(yaml.safe_dump(spec))
    events = [json.loads(line) for line in other.trials.read_text().splitlines()]
    for event in events:
        if searched and event["event"] == "start":
            event["parameters"]["steps"] = STEPS
    other.trials.write_text("".join(json.dumps(event) + "\n" for event in events))
    trained = describe(other, load_spec(other.spec), run_rows(other), run_rows(other)[PRUNED])
    assert (trained.steps, trained.planned_steps, trained.stopped_early) == (STOPPED, STEPS, True)
    script = (export(other, "transformers", tmp_path / "script", PRUNED) / "train.py").read_text()
    assert f"\nSTEPS = {STOPPED} " in script
    assert f"\nPLANNED_STEPS = {STEPS} " in script
    alone = load_spec(export(other, "yaml", tmp_path / "alone", PRUNED) / "sweep.yaml")
    assert alone.max_steps == alone.training.steps == STEPS
    narrowed = yaml.safe_load((export(other, "wandb", tmp_path / "wandb") / "sweep.yaml").read_text())["parameters"]
    assert narrowed.get("steps") == ({"value": STEPS} if searched else None)


@pytest.mark.slow
def test_sweep_file_runs_again_with_the_same_loss(run: RunDirectory, tmp_path: Path) -> None:
    out = export(run, "yaml", tmp_path / "out")
    command = [sys.executable, "-m", "lora_search", "run", str(out / "sweep.yaml"), "--set", f"output={tmp_path}"]
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=ROOT)
    again = run_rows(RunDirectory(tmp_path / "short-best"))
    assert again[0]["eval_loss"] == pytest.approx(run_rows(run)[BEST]["eval_loss"], rel=1e-3)


def test_adapter_loads_with_peft_and_has_the_reported_loss(run: RunDirectory, tmp_path: Path) -> None:
    from lora_search.data import tokenize_data
    from lora_search.model import load_base, load_tokenizer

    out = export(run, "peft", tmp_path / "out", PRUNED)
    spec = load_spec(run.spec)
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    losses = adapter_losses(load_base(spec.base, "cpu"), out, data)
    assert losses["validation"].loss == pytest.approx(run_rows(run)[PRUNED]["eval_loss"], rel=1e-5)


def test_study_opens_with_optuna_alone_and_is_the_same(run: RunDirectory, tmp_path: Path) -> None:
    from lora_search.journal import open_study

    out = export(run, "optuna", tmp_path / "a?mode=memory" / "b?mode=memory#c")
    out = shutil.move(out, tmp_path / "out")
    code = (
        "import json, optuna, sys; (name,) = optuna.get_all_study_names(sys.argv[1]);"
        "study = optuna.load_study(study_name=name, storage=sys.argv[1]);"
        "assert 'lora_search' not in sys.modules;"
        "print(json.dumps([[t.number, t.state.name, t.params, t.value, t.intermediate_values] for t in study.trials]))"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{out / 'study.db'}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    ours = [
        [t.number, t.state.name, t.params, t.value, {str(step): v for step, v in t.intermediate_values.items()}]
        for t in open_study(run.path).trials
    ]
    assert json.loads(answer.stdout) == ours
    assert [state for _, state, *_ in ours].count("PRUNED") == 1


def test_wandb_sweep_is_narrowed_and_valid(run: RunDirectory, tmp_path: Path) -> None:
    out = export(run, "wandb", tmp_path / "out")
    config = yaml.safe_load((out / "sweep.yaml").read_text())
    assert config["metric"] == {"name": "eval_loss", "goal": "minimize"}
    assert (out / config["program"]).is_file()
    parameters = config["parameters"]
    assert parameters["rank"] == {"values": [8, 16]}
    assert parameters["alpha_ratio"] == {"values": [1, 2]}  # 2.5 occurs in no trial
    assert parameters["target_modules"] == {"values": ["attention-qv", "all-linear", "q_proj,o_proj"]}
    rate = parameters["learning_rate"]
    assert rate["distribution"] == "log_uniform_values"
    assert 1e-4 < rate["min"] < 1e-3 < 5e-3 < rate["max"] < 1e-2
    assert parameters["dropout"] == {"distribution": "uniform", "min": 0.0, "max": pytest.approx(0.0625)}
    pytest.importorskip("sweeps.config", reason="W&B's schema of sweeps, of the package sweeps")
    from sweeps import schema_violations_from_proposed_config

    assert schema_violations_from_proposed_config(config) == []


def test_wandb_program_trains_what_its_arguments_say(run: RunDirectory, tmp_path: Path) -> None:
    out = export(run, "wandb", tmp_path / "out")
    arguments = ["--rank=16", "--alpha_ratio=1", "--target_modules=attention-qv", "--dropout=0.0", "--steps=2"]
    said = run_script(out, *arguments, WANDB_MODE="offline", WANDB_SILENT="true")
    assert "Traceback" not in said
    (adapter,) = (out / "adapters").iterdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (16, 16, ["q_proj", "v_proj"])


def test_axolotl_reads_its_configuration(run: RunDirectory, tmp_path: Path) -> None:
    out = export(run, "axolotl", tmp_path / "out", PRUNED)
    raw = yaml.safe_load((out / "config.yaml").read_text())
    assert (raw["max_steps"], raw["warmup_steps"], raw["plugins"]) == (24, 3, ["stop_early.StopEarlyPlugin"])
    schema = pytest.importorskip("axolotl.utils.schemas.config", reason="checked where Axolotl is installed")
    read = schema.AxolotlInputConfig(**raw)
    assert set(raw) <= set(schema.AxolotlInputConfig.model_fields)
    assert (read.lora_r, read.lora_alpha, read.seed, read.micro_batch_size) == (16, 16, 5, 4)
    assert (read.curriculum_sampling, read.shuffle_merged_datasets) == (True, False)


def test_llamafactory_reads_its_configuration(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(run, "llamafactory", tmp_path / "out", PRUNED)
    raw = yaml.safe_load((out / "config.yaml").read_text())
    assert (raw["max_steps"], raw["lora_target"], raw["lora_alpha"]) == (24, "q_proj,v_proj", 16)
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    monkeypatch.chdir(out)
    hparams = pytest.importorskip("llamafactory.hparams", reason="checked where LLaMA-Factory is installed")
    model, data, training, tuning, _ = hparams.get_train_args(raw | {"bf16": False})
    assert (model.quantization_bit, data.tokenized_path, training.max_steps) == (4, "tokenized", 24)
    assert (tuning.lora_rank, tuning.lora_target, tuning.disable_shuffling) == (16, ["q_proj", "v_proj"], True)


def test_torchtune_names_what_it_cannot_adapt_or_quantise(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((export(run, "torchtune", tmp_path / "out", 2) / "config.yaml").read_text())
    assert config["model"]["lora_attn_modules"] == ["q_proj", "output_proj"]
    assert config["model"]["quantize_base"] is False  # 192 x 192 is no whole number of torchao's blocks
    assert "divide by 16,384" in (tmp_path / "out" / "README.md").read_text()
    raw = yaml.safe_load(run.spec.read_text())
    raw["search"]["space"]["target_modules"] = {"choice": [["down_proj"], "attention-qv", "all-linear"]}
    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    (other / "sweep.yaml").write_text(yaml.safe_dump(raw))
    text = (other / "trials.jsonl").read_text()
    (other / "trials.jsonl").write_text(text.replace('["q_proj", "o_proj"]', '["down_proj"]'))
    capsys.readouterr()
    assert main(["export", str(other), "--trial", "2", "--to", "torchtune", "--out", str(tmp_path / "no")]) == 2
    assert "it cannot adapt just down_proj" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["transformers", "trl", "unsloth", "llamafactory", "axolotl", "wandb", "torchtune"])
def test_scripts_are_python(run: RunDirectory, tmp_path: Path, form: str) -> None:
    out = export(run, form, tmp_path / "out", PRUNED)
    for script in out.glob("*.py"):
        text = script.read_text()
        ast.parse(text)
        assert "{{" not in text.replace("{{}}", "")


@pytest.mark.parametrize("form", ["transformers", "trl", "unsloth", "llamafactory", "wandb"])
def test_script_trains_on_one_gpu_as_the_trial_did(run: RunDirectory, tmp_path: Path, form: str) -> None:
    """The Trainer multiplies the batch by the GPUs it sees; the choice comes before anything that imports torch."""
    script = (export(run, form, tmp_path / "out") / "train.py").read_text()
    imported = [line.split()[1] for line in script.splitlines() if line.startswith(("import ", "from "))]
    first = next(name for name in imported if name not in sys.stdlib_module_names)
    chosen = script.index('os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")')
    assert chosen < re.search(rf"^(import|from) {first}\b", script, re.MULTILINE).start()  # type: ignore[union-attr]


def test_configuration_of_one_trial_waits_for_no_cluster(run: RunDirectory, tmp_path: Path) -> None:
    from lora_search.best import write_config

    spec = load_spec(run.spec, ["hosts.wait_s=900"])
    write_config(spec, run_rows(run)[BEST], tmp_path / "config.yaml")
    assert load_spec(tmp_path / "config.yaml").hosts == load_spec(run.spec, ["hosts.wait_s=0"]).hosts


def test_alpha_that_is_no_whole_number_and_rslora_are_kept_or_said(run: RunDirectory, tmp_path: Path) -> None:
    from lora_search.export.axolotl import write
    from lora_search.export.transformers import write as write_script
    from lora_search.space import trial_config

    spec = load_spec(run.spec)
    rows = run_rows(run)
    trained = describe(run, spec, rows, rows[BEST])
    odd = {"rank": 5, "alpha": 7.5, "use_rslora": True, "dropout": 0.0}
    trained = replace(trained, config=trial_config(spec, odd))
    (tmp_path / "a").mkdir()
    page = write(trained, tmp_path / "a")
    text = (tmp_path / "a" / "config.yaml").read_text()
    assert "lora_alpha: 8  # Axolotl takes whole numbers alone; the trial's was 7.5" in text
    assert "peft_use_rslora: true" in text
    assert any("8 stands for 7.5" in limit for limit in page.limits)
    (tmp_path / "b").mkdir()
    write_script(trained, tmp_path / "b")
    script = (tmp_path / "b" / "train.py").read_text()
    assert "lora_alpha=7.5" in script
    assert "use_rslora=True" in script


HOSTILE = "a\"); import os; os.system('touch /tmp/x') #\n```\n| x |"


def test_text_of_a_run_directory_never_becomes_code(run: RunDirectory, tmp_path: Path) -> None:
    from lora_search.errors import cell
    from lora_search.export.fill import plain_yaml, python
    from lora_search.export.page import code, code_cell
    from lora_search.export.script import where

    spec = load_spec(run.spec)
    rows = run_rows(run)
    hostile = spec.model_copy(update={"base": spec.base.model_copy(update={"model": HOSTILE})})
    line = where(replace(describe(run, spec, rows, rows[0]), spec=hostile), None)
    (assignment,) = ast.parse(line).body
    assert isinstance(assignment, ast.Assign)
    assert ast.literal_eval(assignment.value) == HOSTILE
    for value in (HOSTILE, [HOSTILE, "b" * 120], 1e-08, True, None, "😀\x7f\u2028"):
        assert ast.literal_eval(python(value)) == value
        assert yaml.safe_load(plain_yaml(value)) == value
        assert "\n" not in plain_yaml(value)
    assert "\n" not in code(HOSTILE)
    assert "`" not in code(HOSTILE)[1:-1]
    assert code_cell(".*(q_proj|v_proj)") == "`.*(q_proj\\|v_proj)`"
    assert cell("a|b\nc\\d\x1b") == "a\\|b c\\\\d\\\\x1b"


CODE = "+PWNED('touch /tmp/x')*''+"
"""Stands outside of quotes wherever text that has gone in is read for places once more."""

BETWEEN = '{{base}}{{revision}}{{> where}}\n{{> stop}}\n"); PWNED(1) #\n```\n- pwned: [1]\n${pwned}'


@pytest.fixture(scope="module")
def hostile_run(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run as somebody else may have edited it: code in every text that an export repeats."""
    from lora_search.builtin import model_folder

    folder = tmp_path_factory.mktemp("hostile")
    made = RunDirectory(shutil.copytree(run.path, folder / "run"))
    model = shutil.copytree(model_folder("demo"), folder / f"model{BETWEEN}".replace("/", "_"))
    prompts = [f"a prompt {number}" for number in range(40)]
    rows = [json.dumps({f"p{BETWEEN}": prompt, f"c{CODE}": "an answer"}) for prompt in prompts]
    data = folder / f"data{CODE}.jsonl".replace("/", "_")
    data.write_text("\n".join(rows))
    spec = yaml.safe_load(made.spec.read_text())
    spec["base"] |= {"model": str(model), "revision": CODE}
    columns = {"prompt": f"p{BETWEEN}", "completion": f"c{CODE}"}
    spec["data"] |= {"path": str(data), "columns": columns, "template": "{prompt}" + BETWEEN}
    spec["tracking"]["wandb"]["project"] = BETWEEN
    made.spec.write_text(yaml.safe_dump(spec))
    made.provenance.unlink()
    return made


@pytest.mark.parametrize("form", [*FORMATS, *LAYOUTS])
def test_text_with_places_in_it_stays_text_in_every_format(
    hostile_run: RunDirectory, tmp_path: Path, form: str
) -> None:
    base = load_spec(hostile_run.spec).base
    chosen = ["--trials", "best"] if form in LAYOUTS else ["--trial", str(PRUNED)]
    assert main(["export", str(hostile_run.path), *chosen, "--to", form, "--out", str(tmp_path / "out")]) == 0
    texts: set[str] = set()
    for script in (tmp_path / "out").glob("*.py"):
        nodes = list(ast.walk(ast.parse(script.read_text())))
        assert "PWNED" not in {node.id for node in nodes if isinstance(node, ast.Name)}
        texts |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for file in (tmp_path / "out").glob("*.yaml"):
        read = OmegaConf.to_container(OmegaConf.load(file), resolve=True) if form == "torchtune" else None
        texts |= set(scalars(read or yaml.safe_load(file.read_text())))
    for shell in (tmp_path / "out").glob("*.sh"):
        texts |= set(shlex.split(shell.read_text().removeprefix("#!/bin/sh\n")))
    if form not in ("peft", "optuna", "wandb"):
        assert base.model in texts
    if form not in ("peft", "optuna", "torchtune"):
        assert CODE in texts
    page = (tmp_path / "out" / "README.md").read_text()
    page = re.sub(r"^(````*)\w*\n(?s:.*?)\n\1$", "", page, flags=re.MULTILINE)
    assert "\n- pwned" not in page


def scalars(value: Any) -> Iterator[str]:
    """The text of a YAML document: its values, and no key that is not ours."""
    if isinstance(value, str):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from scalars(one)
    assert not (isinstance(value, dict) and "pwned" in value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "keras"], "keras"),
        (["--to", "yaml", "--trial", "99"], "--trial 99: no such trial; the run has 3"),
        (["--to", "yaml", "--trial", "first"], "must be best or a trial's number"),
        (["--to", "yaml", "--out", "{taken}"], "exists already"),
    ],
)
def test_wrong_input_exits_2_with_one_message(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    arguments = [argument.format(taken=taken) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    try:
        status = main(["export", str(run.path), *arguments])
    except SystemExit as error:
        status = int(error.code or 0)
    shown = capsys.readouterr()
    assert status == 2
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]
    assert (taken / "file").read_text() == "mine"


def test_empty_folder_is_filled(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays the folder that it is: it may be the working directory."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    export(run, "yaml", Path())
    for folder in (Path(), tmp_path / "empty"):
        assert sorted(file.name for file in folder.iterdir()) == ["README.md", "sweep.yaml"]


def test_other_data_than_the_sweeps_is_refused(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run.path, tmp_path / "other")
    (other / "provenance.json").write_text(json.dumps({"data": {"fingerprint": "0" * 64}}))
    assert main(["export", str(other), "--to", "trl", "--out", str(tmp_path / "out")]) == 2
    assert "has changed since the sweep ran" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_base_with_code_of_its_own_needs_the_users_word(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run.path, tmp_path / "other")
    spec = yaml.safe_load((other / "sweep.yaml").read_text())
    spec["base"]["trust_remote_code"] = True
    (other / "sweep.yaml").write_text(yaml.safe_dump(spec))
    assert main(["export", str(other), "--to", "trl", "--out", str(tmp_path / "out")]) == 2
    assert "--trust-remote-code allows it" in capsys.readouterr().err
    export(RunDirectory(other), "trl", tmp_path / "out", "best", "--trust-remote-code")
    assert "trust_remote_code=True" in (tmp_path / "out" / "train.py").read_text()


def test_help_lists_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown and meaning in shown for name, meaning in FORMATS.items())
