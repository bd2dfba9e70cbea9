"""The layout for vLLM, served by a real one, whose `vllm` is on the PATH, in an environment of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_spec
from trained_run import DEMO_DATA, train_run

from lora_search.builtin import model_folder
from lora_search.cli import main

NEW_TOKENS = 16

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    base = {"model": "builtin:demo", "compute_dtype": "float32", "quantization": "none"}
    space: dict[str, Any] = {"learning_rate": 1e-2, "dropout": 0.0}
    trials = [
        (space | {"rank": 4, "target_modules": "all-linear"}, 8),
        (space | {"rank": 16, "target_modules": "attention-qv"}, 8),
    ]
    run = train_run(make_spec(folder, name="served", base=base, data=DEMO_DATA), folder, trials, every=8)
    assert main(["export", str(run.path), "--to", "vllm", "--out", str(folder / "layout")]) == 0
    return folder / "layout"


@pytest.fixture(scope="module")
def address(layout: Path) -> Iterator[str]:
    vllm = shutil.which("vllm")
    if vllm is None:
        pytest.skip("needs vllm on the PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shlex.split((layout / "serve.sh").read_text(encoding="utf-8").splitlines()[-1].removeprefix("exec "))
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (layout / "log").open("w") as log:
        process = subprocess.Popen([vllm, *command[1:]], cwd=layout, env=environment, stdout=log, stderr=log)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"{address}/v1/models", timeout=5)
            break
        except OSError:
            assert process.poll() is None, (layout / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(1)
    yield address
    process.terminate()
    process.wait(60)


def completed(address: str, model: str, prompt: str) -> str:
    asked = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=100) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def test_vllm_answers_with_each_adapter_as_peft_does(layout: Path, address: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(layout / "base"))
    rows = (model_folder("demo").parent / "data.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    prompts = [json.loads(row)["prompt"] + "\n" for row in rows]
    texts = {}
    for name in sorted(folder.name for folder in (layout / "adapters").iterdir()):
        model = AutoModelForCausalLM.from_pretrained(str(layout / "base"), dtype=torch.float32)
        adapted = PeftModel.from_pretrained(model, str(layout / "adapters" / name))
        for prompt in prompts:
            given = tokenizer(prompt, return_tensors="pt")
            made = adapted.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
            expected = tokenizer.decode(made[given["input_ids"].shape[1] :], skip_special_tokens=True)
            texts[name, prompt] = completed(address, name, prompt)
            assert texts[name, prompt] == expected
    assert len(set(texts.values())) > len(prompts), "the adapters answer differently"
