"""`lora-search dashboard`: Optuna's own, on a copy of a run's study."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import optuna
import pytest
import yaml
from searched_run import SWEEP

from lora_search.cli import main
from lora_search.search import create_study
from lora_search.spec import parse_spec

COMMAND = [sys.executable, "-m", "lora_search", "dashboard"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a study of one trial."""
    folder = tmp_path / "run"
    folder.mkdir()
    text = yaml.safe_dump(SWEEP)
    (folder / "sweep.yaml").write_text(text)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = create_study(parse_spec(text, source="sweep.yaml", folder=folder), folder)
    study.tell(study.ask(), 0.25)
    return folder


def test_study_is_served_to_this_machine_and_the_run_is_left_alone(run: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    before = (run / "study.journal").read_bytes()
    process = subprocess.Popen([*COMMAND, str(run), "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}api/studies", timeout=30) as answer:
            studies = json.load(answer)["study_summaries"]
        assert [study["study_name"] for study in studies] == ["searched"]
        with urllib.request.urlopen(f"{address}dashboard", timeout=30) as answer:
            assert "Optuna Dashboard" in answer.read().decode()
        note = json.dumps({"body": "written", "version": 1}).encode()
        headers = {"Content-Type": "application/json"}
        url = f"{address}api/studies/{studies[0]['study_id']}/note"
        urllib.request.urlopen(urllib.request.Request(url, note, headers, method="PUT"), timeout=30).close()
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=30)
    assert status == 130
    assert (run / "study.journal").read_bytes() == before
    assert sorted(file.name for file in run.iterdir()) == ["study.journal", "sweep.yaml"]


def test_missing_dashboard_is_one_message_with_the_command(run: Path) -> None:
    script = (
        "import sys; sys.modules['optuna_dashboard'] = None; from lora_search.cli import main;"
        "sys.exit(main(['dashboard', sys.argv[1]]))"
    )
    said = subprocess.run([sys.executable, "-c", script, run], capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert "pip install 'lora-search[dashboard]'" in said.stderr
    assert "Traceback" not in said.stderr


def test_run_without_a_study_and_a_port_that_is_none_are_one_message(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna_dashboard")
    assert main(["dashboard", str(run), "--port", "99999"]) == 2
    assert "--port 99999: " in capsys.readouterr().err
    (run / "study.journal").unlink()
    assert main(["dashboard", str(run)]) == 1
    assert "there is no study" in capsys.readouterr().err
    assert not (run / "study.journal").exists()
