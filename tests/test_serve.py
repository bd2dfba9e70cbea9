"""One base, many adapters: the endpoint by OpenAI's own client, its answers by transformers and PEFT alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
import torch
from conftest import ROOT, require_accessible

from lora_search import open_run
from lora_search.builtin import model_folder
from lora_search.data import tokenize_data
from lora_search.engine import Engine
from lora_search.errors import InputError
from lora_search.export.layout import vllm_limits, vllm_rank, write_layout
from lora_search.model import load_base, load_tokenizer
from lora_search.serve.fault import RequestFault
from lora_search.serve.guard import require_own_site
from lora_search.serve.model import WAITING
from lora_search.serve.prompts import Prompts
from lora_search.serve.requests import ChatRequest, CompletionRequest, Message, parse_request
from lora_search.serve.text import TextSoFar
from lora_search.space import trial_config
from lora_search.spec import dump_spec, load_spec, parse_spec

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from lora_search.spec import SweepSpec

TRIALS: list[dict[str, Any]] = [
    {"rank": 8, "learning_rate": 1e-2, "target_modules": "all-linear", "seed": 1},
    {"rank": 4, "learning_rate": 1e-2, "target_modules": "attention-qv", "seed": 2},
    {"rank": 16, "learning_rate": 5e-3, "target_modules": "mlp", "seed": 3},
]
STEPS = 12
SWEEP = """
name: demo
base: {model: "builtin:demo", compute_dtype: float32}
data: {path: "builtin:demo", limit: 200}
tracking: {wandb: {mode: disabled}}
"""
ASKED = [
    "Report the weather. town=Ashford; degrees=27; wind=north; sky=clear",
    "Tell the customer. customer=Emma; item=leather bag; town=Carlow; code=G197; days=2",
    "Write the recipe step. first=flour; second=cocoa; vessel=deep dish; minutes=40; heat=low",
    "Hello \u00e4 \N{GRINNING FACE}",
]
PROMPTS = [f"{asked}\n" for asked in ASKED]
"""As they stood in training."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of three really trained trials, as the sweep writes one, and a fourth without a checkpoint."""
    from lora_search.checkpoint import Shelf
    from lora_search.rundir import RunDirectory

    folder = tmp_path_factory.mktemp("serve") / "demo"
    folder.mkdir()
    spec = parse_spec(SWEEP, source="sweep.yaml", folder=folder)
    (folder / "sweep.yaml").write_text(dump_spec(spec))
    engine = Engine(load_base(spec.base, "cpu"), tokenize_data(spec.data, load_tokenizer(spec.base)))
    events: list[dict[str, Any]] = []
    for trial, sampled in enumerate([*TRIALS, TRIALS[0]]):
        config = trial_config(spec, sampled | {"dropout": 0.0, "steps": STEPS})
        start = {"event": "start", "trial": trial, "time": 1e9 + trial, "parameters": config.parameters()}
        events.append(start)
        loss = 9.0
        if trial < len(TRIALS):
            engine.admit("a", config)
            for _ in range(STEPS):
                engine.step(["a"])
            loss = engine.evaluate(["a"])["a"].loss
            Shelf(RunDirectory(folder).folder, trial).put_unreported(engine.snapshot("a"), None)
            engine.release("a")
        told = {"trial": trial, "time": 1e9 + trial + 0.5}
        events.append({"event": "report", **told, "step": STEPS, "steps_total": STEPS, "eval_loss": loss})
        events.append({"event": "end", **told, "state": "completed", "reason": None})
    (folder / "trials.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


@contextmanager
def serving(run: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """`lora-search serve` on a free port: the process, its address, and what it said until it was ready."""
    command = [sys.executable, "-m", "lora_search", "serve", str(run), "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said = ""
    try:
        for line in process.stderr:
            said += line
            if found := re.search(r"serving .* at (http://\S+)/v1;", line):
                yield process, found[1], said
                break
        else:
            pytest.fail(said)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[str]:
    with serving(run, "--top", "4") as (_, url, said):
        assert "left out" in said, "the trial without a checkpoint"
        yield url


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def greedy(run: Path) -> dict[tuple[str, str], str]:
    """What transformers and PEFT alone answer, by model and prompt."""
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = str(model_folder("demo"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = {}
    for name in ("base", *(f"trial-{trial}" for trial in range(len(TRIALS)))):
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=nf4)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False  # else, on such a CPU, it multiplies in bfloat16 all the same
        if name != "base":
            adapter = next((run / "tune" / f"trial-{int(name[6:]):04d}").glob("checkpoint_*"))
            model = PeftModel.from_pretrained(model, str(adapter))
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=2)
            answers[name, prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return answers


def best_of(run: Path) -> str:
    rows = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    told = [row for row in rows if row["event"] == "report"]
    return f"trial-{min(told, key=lambda row: row['eval_loss'])['trial']}"


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"base", "best", "trial-0", "trial-1", "trial-2"}


def test_adapters_answer_as_peft_does(client: openai.OpenAI, run: Path, greedy: dict[tuple[str, str], str]) -> None:
    for (model, prompt), expected in greedy.items():
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0)
        assert answer.choices[0].text == expected, (model, prompt)
        assert answer.model == model
    best = client.completions.create(model="best", prompt=PROMPTS[0], max_tokens=12, temperature=0)
    assert best.choices[0].text == greedy[best_of(run), PROMPTS[0]]
    assert len({answer for (_, asked), answer in greedy.items() if asked == PROMPTS[0]}) == 4, "the test can fail"


def test_concurrent_requests_each_get_their_own_adapter(
    client: openai.OpenAI, greedy: dict[tuple[str, str], str]
) -> None:
    asked = [key for _ in range(3) for key in greedy]

    def ask(key: tuple[str, str]) -> str:
        return client.completions.create(model=key[0], prompt=key[1], max_tokens=12, temperature=0).choices[0].text

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, asked)) == [greedy[key] for key in asked]


def test_stream_says_the_same_piece_by_piece(client: openai.OpenAI, greedy: dict[tuple[str, str], str]) -> None:
    stream = client.completions.create(
        model="trial-0",
        prompt=PROMPTS[1],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == greedy["trial-0", PROMPTS[1]]
    assert len(pieces) > 3
    assert pieces[-1].usage is not None
    assert pieces[-2].choices[0].finish_reason in ("stop", "length")


def test_chat_writes_the_last_message_as_in_training(client: openai.OpenAI, greedy: dict[tuple[str, str], str]) -> None:
    """The demo base has no chat template: the sweep's own, a line break after the prompt, stands in."""
    messages: Any = [
        {"role": "system", "content": "not read"},
        {"role": "user", "content": ASKED[2]},
    ]
    answer = client.chat.completions.create(model="trial-1", messages=messages, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == greedy["trial-1", PROMPTS[2]]
    assert answer.choices[0].message.role == "assistant"
    assert "data.template" in answer.to_dict()["lora_search"]["chat"]  # type: ignore[index, call-overload]
    pieces = list(
        client.chat.completions.create(
            model="trial-1", messages=messages, max_completion_tokens=12, temperature=0, stream=True
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == greedy["trial-1", PROMPTS[2]]


def test_usage_counts_tokens(client: openai.OpenAI, run: Path) -> None:
    answer = client.completions.create(model="trial-0", prompt=PROMPTS[0], max_tokens=3, temperature=0)
    tokenizer = load_tokenizer(load_spec(run / "sweep.yaml").base)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer(PROMPTS[0])["input_ids"])
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_sampling_follows_its_seed(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> str:
        return client.completions.create(model="base", prompt=PROMPTS[0], max_tokens=12, **options).choices[0].text

    assert ask(seed=7, temperature=1.5) == ask(seed=7, temperature=1.5)
    assert len({ask(seed=seed, temperature=1.5) for seed in range(6)}) > 1
    assert len({ask(temperature=1.5) for _ in range(6)}) > 1
    nucleus_of_one = ask(seed=1, temperature=1.0, top_p=1e-6)
    assert nucleus_of_one == ask(temperature=0) == ask(temperature=1e-40)


def test_stop_string_ends_an_answer(client: openai.OpenAI, greedy: dict[tuple[str, str], str]) -> None:
    model, prompt = next(key for key, answer in greedy.items() if len(answer.split()) > 3)
    words = greedy[model, prompt].split()
    stop = next(word for word in words[1:] if word not in words[0])
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0, stop=[stop])
    assert answer.choices[0].text == greedy[model, prompt].partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"


def test_several_prompts_are_answered_in_their_order(client: openai.OpenAI, greedy: dict[tuple[str, str], str]) -> None:
    answer = client.completions.create(model="trial-2", prompt=PROMPTS, max_tokens=12, temperature=0)
    assert [choice.text for choice in answer.choices] == [greedy["trial-2", prompt] for prompt in PROMPTS]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model: found 'gpt-4'; served are base, best"),
        ({"max_tokens": 5000}, openai.BadRequestError, "at most 512 tokens"),
        ({"prompt": "cat " * 5000}, openai.BadRequestError, "at most 512 tokens"),
        ({"prompt": [1, 99999]}, openai.BadRequestError, "found token 99999"),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"temperature": 3}, openai.BadRequestError, "temperature: found 3"),
        ({"n": 2}, openai.BadRequestError, "n: found 2, which is not served"),
        ({"logprobs": 5}, openai.BadRequestError, "logprobs"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"stop": [""]}, openai.BadRequestError, "stop"),
    ],
)
def test_wrong_request_is_an_error_answer(
    client: openai.OpenAI, options: dict[str, Any], kind: type[openai.APIStatusError], message: str
) -> None:
    asked: dict[str, Any] = {"model": "base", "prompt": "the cat", "max_tokens": 4} | options
    with pytest.raises(kind, match=re.escape(message)) as fault:
        client.completions.create(**asked)
    assert fault.value.type == "invalid_request_error"
    assert client.completions.create(model="base", prompt="the cat", max_tokens=4, temperature=0)


def test_wrong_request_to_stream_has_its_own_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="none", prompt="the cat", stream=True)


def raw(url: str, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A request as anybody may send it."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    given = {"Content-Type": "application/json"} if method == "POST" else {}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, given)
    answer = connection.getresponse()
    return answer.status, dict(answer.headers), answer.read()


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v1/completions", b"{", {}, 400),
        ("POST", "/v1/completions", b"[" * 100_000, {}, 400),
        ("POST", "/v1/completions", b"[]", {}, 400),
        ("POST", "/v1/completions", b'{"model": "base", "prompt": "\\ud800"}', {}, 400),
        ("POST", "/v1/completions", b"\xff\xfe", {}, 400),
        ("POST", "/v1/completions", b"{}", {"Content_Type": "text/plain"}, 415),
        ("POST", "/v1/completions", b"x" * ((1 << 20) + 1), {}, 413),
        ("POST", "/v1/completions", b"{}", {"Origin": "http://evil.example"}, 403),
        ("POST", "/v1/chat/completions", b'{"model": "base", "messages": []}', {}, 400),
        (
            "POST",
            "/v1/chat/completions",
            b'{"model": "base", "messages": [{"role": "system", "content": "x"}]}',
            {},
            400,
        ),
        ("POST", "/v1/embeddings", b"{}", {}, 404),
        ("GET", "/v1/completions", b"", {}, 405),
        ("OPTIONS", "/v1/completions", b"", {}, 405),
        ("GET", "/../../etc/passwd", b"", {}, 404),
        ("GET", "/healthz", b"", {"Host": "evil.example"}, 403),
        ("GET", "/", b"", {"Host": "evil.example:80"}, 403),
        ("PUT", "/v1/models", b"", {}, 501),
    ],
)
def test_whatever_is_sent_gets_an_answer_and_the_server_goes_on(
    server: str, method: str, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    try:
        found, sent, answer = raw(server, method, path, body, **headers)
    except ConnectionError:
        assert status == 413, "the server need not read what is too long"
    else:
        assert found == status
        assert json.loads(answer)["error"]["message"]
        assert "Access-Control-Allow-Origin" not in sent
    assert raw(server, "GET", "/healthz")[0] == 200


def test_connection_that_breaks_off_ends_alone(server: str) -> None:
    host, port = server.removeprefix("http://").split(":")
    for sent in (b"", b"GET", b"\x16\x03\x01\x02", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    body = b'{"model": "base", "prompt": "the cat", "max_tokens": 50, "stream": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    for _ in range(3):  # asks, and goes at the first token
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            connection.recv(10)
    assert raw(server, "GET", "/healthz")[0] == 200


def test_abandoned_requests_hold_nobody_up(server: str) -> None:
    host, port = server.removeprefix("http://").split(":")
    body = json.dumps({"model": "base", "prompt": PROMPTS, "max_tokens": 60, "temperature": 0}).encode()
    kind = {"Content-Type": "application/json"}
    begun = time.monotonic()
    assert raw(server, "POST", "/v1/completions", body, **kind)[0] == 200
    whole = time.monotonic() - begun
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    for _ in range(12):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    begun = time.monotonic()
    short = json.dumps({"model": "base", "prompt": "a", "max_tokens": 1}).encode()
    assert raw(server, "POST", "/v1/completions", short, **kind)[0] == 200
    assert time.monotonic() - begun < 4 * whole + 1  # all twelve would take three times as long


def test_fault_after_a_stream_on_the_same_connection_has_its_own_status(server: str) -> None:
    host, port = server.removeprefix("http://").split(":")
    body = b'{"model": "base", "prompt": "the cat", "max_tokens": 3, "stream": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body + b"BREW / HTTP/1.1\r\n\r\n")
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.partition(b"data: [DONE]\n\n\r\n0\r\n\r\n")[2].startswith(b"HTTP/1.1 501 ")


def test_only_the_request_decides_how_tokens_are_chosen_and_how_long(
    run: Path, tmp_path: Path, greedy: dict[tuple[str, str], str]
) -> None:
    """What the base's generation_config.json says of penalties is not in force; nobody's answer is not made."""
    from lora_search.results import run_rows
    from lora_search.rundir import RunDirectory
    from lora_search.serve import collect_adapters
    from lora_search.serve.model import Sampling, ServedModel

    folder = shutil.copytree(model_folder("demo"), tmp_path / "model")
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) if file.exists() else {"eos_token_id": 2}
    file.write_text(json.dumps(settings | {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_p": 0.9}))
    spec = parse_spec(SWEEP, source="sweep.yaml", folder=run)
    directory = RunDirectory(run)
    adapters, _ = collect_adapters(directory, run_rows(directory)[:1], tmp_path / "adapters")
    base = spec.base.model_copy(update={"model": str(folder)})
    model = ServedModel(base, adapters, None, torch.device("cpu"))
    for (name, prompt), answer in greedy.items():
        if name in ("base", "trial-0"):
            ids = model.tokenizer(prompt)["input_ids"]
            assert model.answer(name, ids, Sampling(12, temperature=0.0)).text == answer
    looks = iter([False] * 4)
    said: list[str] = []
    ids = model.tokenizer(PROMPTS[0])["input_ids"]
    with pytest.raises(ConnectionError):
        model.answer("base", ids, Sampling(200, seed=0), said.append, lambda: next(looks, True))
    assert len(said) <= 4


def test_page_loads_nothing_from_elsewhere(server: str) -> None:
    status, headers, page = raw(server, "GET", "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    sources = re.findall(rb'(?:src|href)="([^"]+)"', page)
    assert sorted(sources) == [b"data:,", b"page.css", b"page.js"]
    script = raw(server, "GET", "/page.js")[2]
    assert not re.search(rb"innerHTML|outerHTML|insertAdjacent|document\.write|https?://|eval", script)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_server_cleanly(run: Path, number: int) -> None:
    with serving(run, "--trials", "1") as (process, url, _):
        assert {m["id"] for m in json.loads(raw(url, "GET", "/v1/models")[2])["data"]} >= {"base", "trial-1"}
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        connection.request("GET", "/healthz")  # and stays open
        connection.getresponse().read()
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        rest = process.stderr.read()
        assert "stopping" in rest
        assert "Traceback" not in rest


def test_more_than_can_wait_are_told_so_and_those_that_wait_are_told_of_the_end(run: Path) -> None:
    """Nobody is left without an answer."""
    body = json.dumps({"model": "trial-0", "prompt": PROMPTS, "n": 1, "max_tokens": 60, "temperature": 1}).encode()
    many = WAITING + 8
    with serving(run, "--trials", "0") as (process, url, _), ThreadPoolExecutor(many) as pool:
        asked = [pool.submit(raw, url, "POST", "/v1/completions", body) for _ in range(many)]
        for done in as_completed(asked):
            status, _, answer = done.result()
            if status == 429:
                assert json.loads(answer)["error"]["code"] == "rate_limit_exceeded"
                break
            assert status == 200
        assert raw(url, "GET", "/healthz")[0] == 200
        process.send_signal(signal.SIGTERM)
        statuses = Counter(done.result()[0] for done in asked)
        assert process.wait(timeout=30) == 0
    assert statuses.keys() <= {200, 429, 503}
    assert statuses[429] <= 8
    assert statuses[503] > WAITING / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trials", "99"], "--trials 99: no such trial"),
        (["--trials", "one"], "must be trials' numbers"),
        (["--trials", "3"], "has no checkpoint"),
        (["--top", "0"], "--top 0: must be at least 1"),
        (["--port", "99999"], "cannot listen there"),
        (["--host", "no.such.host.invalid"], "cannot listen there"),
    ],
)
def test_wrong_option_is_one_message(run: Path, options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "lora_search", "serve", str(run), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("asked", "origin", "host", "is_let_in"),
    [
        ("localhost:8000", None, "127.0.0.1", True),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", "127.0.0.1", True),
        ("[::1]:8000", None, "::1", True),
        ("127.0.0.1:8000", "http://127.0.0.1:9000", "127.0.0.1", False),
        ("localhost:8000", "null", "127.0.0.1", False),
        ("rebound.example:8000", None, "127.0.0.1", False),
        ("localhost.evil.example", None, "127.0.0.1", False),
        ("evil.example@localhost", None, "127.0.0.1", False),
        ("", None, "127.0.0.1", False),
        ("localhost:x", None, "127.0.0.1", False),
        ("10.0.0.5:8000", None, "127.0.0.1", False),
        ("10.0.0.5:8000", None, "0.0.0.0", True),
        ("rebound.example:8000", None, "0.0.0.0", False),
        ("gpu-box:8000", None, "gpu-box", True),
    ],
)
def test_other_sites_are_kept_out(asked: str, origin: str | None, host: str, is_let_in: bool) -> None:
    if is_let_in:
        require_own_site(asked, origin, host)
    else:
        with pytest.raises(RequestFault) as fault:
            require_own_site(asked, origin, host)
        assert fault.value.status == 403


def decode(tokens: list[int]) -> str:
    """Bytes as tokens, so that a character may come in pieces."""
    return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("plain", [], "plain"),
        ("an umlaut: ä, a face: \N{GRINNING FACE}.", [], "an umlaut: ä, a face: \N{GRINNING FACE}."),
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("aaab", ["aab"], "a"),
        ("ends with EN", ["END"], "ends with EN"),
        ("first b then a", ["a", "b"], "first "),
    ],
)
def test_pieces_of_text_are_never_taken_back(text: str, stops: list[str], expected: str) -> None:
    so_far = TextSoFar(decode, stops)
    pieces = [so_far.add(byte) for byte in text.encode()]
    assert "".join([*pieces, so_far.rest()]) == expected == so_far.text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_chat_template_is_used_where_there_is_one(tiny_spec: SweepSpec) -> None:
    tokenizer = load_tokenizer(tiny_spec.base)
    messages = [Message(role="system", content="big"), Message(role="user", content="red cat")]
    assert "data.template" in Prompts(tiny_spec.data, tokenizer).chat_format
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    prompts = Prompts(tiny_spec.data, tokenizer)
    assert prompts.chat_format == "the tokenizer's chat template"
    assert tokenizer.decode(prompts.chat_ids(messages)) == "big red cat :"
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(RequestFault, match="no system turn"):
        prompts.chat_ids(messages)


def test_neutral_values_of_keys_that_are_not_served_pass() -> None:
    body = {
        "model": "base",
        "prompt": "a",
        "n": 1,
        "logit_bias": {},
        "presence_penalty": 0.0,
        "user": "me",
        "echo": None,
    }
    assert parse_request(CompletionRequest, json.dumps(body).encode()).prompts == ["a"]
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    chat = {"model": "base", "messages": [{"role": "user", "content": parts, "name": "me"}]}
    assert parse_request(ChatRequest, json.dumps(chat).encode()).messages[0].text == "two parts"


def test_peft_layout_answers_as_the_server_does(run: Path, tmp_path: Path, greedy: dict[tuple[str, str], str]) -> None:
    from lora_search.rundir import find_run

    out = tmp_path / "layout"
    left_out = write_layout(find_run(str(run)), load_spec(run / "sweep.yaml"), open_run(run).rows, "peft-multi", out)
    assert len(left_out) == 1, "the trial without a checkpoint"
    best = best_of(run)
    names = {"best" if name == best else name for name in ("trial-0", "trial-1", "trial-2")}
    assert {path.name for path in (out / "adapters").iterdir()} == names
    for name in names:
        assert sorted(path.name for path in (out / "adapters" / name).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
    code = "import sys, load_adapters as l\nm, t = l.load('cpu')\n"
    code += "for module in m.modules(): module.support_avx512bf16_for_cpu = False\n"  # as in `greedy`
    code += "for name in sys.argv[2:]: print(repr(l.answer(m, t, name, sys.argv[1], 12)))"
    done = subprocess.run(
        [sys.executable, "-c", code, PROMPTS[0], "base", *sorted(names), "base"],
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [greedy[best if name == "best" else name, PROMPTS[0]] for name in ("base", *sorted(names), "base")]
    assert done.stdout.splitlines() == [repr(answer) for answer in expected]
    once = [sys.executable, "load_adapters.py", "--model", "best", PROMPTS[0]]
    assert subprocess.run(once, cwd=out, capture_output=True, text=True).returncode == 0


def test_vllm_layout_has_its_command(run: Path, tmp_path: Path) -> None:
    from lora_search.rundir import find_run

    out = tmp_path / "layout"
    spec = load_spec(run / "sweep.yaml")
    spec = spec.model_copy(update={"base": spec.base.model_copy(update={"model": "some/base; rm -rf"})})
    write_layout(find_run(str(run)), spec, open_run(run).rows[:3], "vllm", out)
    page = (out / "README.md").read_text()
    command = (out / "serve.sh").read_text().splitlines()[-1].removeprefix("exec ")
    assert command in page
    assert page.count("pip install vllm-bnb-plugin") == 1 == (out / "serve.sh").read_text().count("vllm-bnb-plugin")
    assert command.startswith("vllm serve 'some/base; rm -rf' --quantization bitsandbytes --enable-lora")
    assert "--max-lora-rank 16 --max-loras 3 --lora-modules" in command
    for word in command.partition("--lora-modules ")[2].split():
        name, _, place = word.partition("=")
        assert (out / place / "adapter_config.json").is_file()
        assert f"`{name}`" in page
    with pytest.raises(InputError, match="exists already"):
        write_layout(find_run(str(run)), spec, open_run(run).rows[:1], "vllm", out)
    assert subprocess.run(["sh", "-n", str(out / "serve.sh")]).returncode == 0


@pytest.mark.parametrize("form", ["vllm", "peft-multi"])
def test_layout_keeps_trust_and_says_how_prompts_stand(run: Path, tmp_path: Path, form: str) -> None:
    from lora_search.rundir import find_run

    spec = load_spec(run / "sweep.yaml")
    notes = {"prompt-completion": "as they stood in training: `", "chat": "the tokenizer's chat template"}
    for kind, note in (notes | {"text": "the beginning of one"}).items():
        base = spec.base.model_copy(update={"trust_remote_code": kind == "chat"})
        data = spec.data.model_copy(update={"format": kind})
        other = spec.model_copy(update={"base": base, "data": data})
        out = tmp_path / kind
        write_layout(find_run(str(run)), other, open_run(run).rows[:1], form, out)
        page = (out / "README.md").read_text()
        assert note in page
        assert ("{prompt}" in page) == (kind == "prompt-completion")
        script = (out / ("serve.sh" if form == "vllm" else "load_adapters.py")).read_text()
        assert (("--trust-remote-code" if form == "vllm" else "CODE = True") in script) == (kind == "chat")


@pytest.mark.parametrize(("option", "names"), [(["--trial", "1"], {"trial-1"}), ([], None)])
def test_layout_of_one_trial_holds_that_one(
    run: Path, tmp_path: Path, option: list[str], names: set[str] | None
) -> None:
    from lora_search.cli import main

    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "peft-multi", *option, "--out", str(out)]) == 0
    expected = names if best_of(run) != "trial-1" else {"best"}
    found = {path.name for path in (out / "adapters").iterdir()}
    assert found == expected if names else len(found) == 3
    both = ["--trial", "1", "--trials", "0"]
    assert main(["export", str(run), "--to", "peft-multi", *both, "--out", str(tmp_path / "no")]) == 2


def test_built_in_base_goes_with_the_adapters(run: Path, tmp_path: Path) -> None:
    from lora_search.rundir import RunDirectory

    write_layout(RunDirectory(run), load_spec(run / "sweep.yaml"), open_run(run).rows[:1], "vllm", tmp_path / "out")
    assert (tmp_path / "out" / "base" / "config.json").is_file()
    assert "vllm serve base " in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("ranks", "allowed"), [([1], 8), ([8, 4], 8), ([9], 16), ([64, 100], 128), ([512], 512)])
def test_vllm_rank_is_the_next_allowed(ranks: list[int], allowed: int) -> None:
    assert vllm_rank(ranks) == allowed


def test_what_vllm_cannot_serve_is_said() -> None:
    assert vllm_limits({"target_modules": ["q_proj", "v_proj"], "bias": "none"}) == []
    for config in (
        {"target_modules": ["transformer.h.0.attn.c_attn"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": ["q_proj"], "use_dora": True},
    ):
        assert len(vllm_limits(config)) == 1
    with pytest.raises(InputError, match="found rank 600"):
        vllm_rank([600])


@pytest.fixture
def page(browser: Browser, server: str) -> Iterator[Page]:
    """The comparison page in a real browser."""
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.goto(server)
    page.locator("#model-right option").nth(1).wait_for(state="attached")
    yield page
    assert [fault for fault in faults if "status of 400" not in fault] == []
    page.close()


def wait_for_verdict(page: Page) -> None:
    """Until both models have answered."""
    page.locator("#verdict:not(:empty)").wait_for()


@pytest.mark.browser
def test_page_compares_two_trials(page: Page, greedy: dict[tuple[str, str], str]) -> None:
    page.select_option("#model-left", "trial-0")
    page.select_option("#model-right", "trial-1")
    page.fill("#prompt", ASKED[0])
    page.fill("#max_tokens", "12")
    page.click("#go")
    wait_for_verdict(page)
    assert page.text_content("#answer-left") == greedy["trial-0", PROMPTS[0]]
    assert page.text_content("#answer-right") == greedy["trial-1", PROMPTS[0]]
    assert page.text_content("#verdict") == "The answers differ."
    assert "rank 8" in (page.text_content("#facts-left") or "")
    assert "tokens read" in (page.text_content("#usage-left") or "")


@pytest.mark.browser
def test_page_is_worked_by_keyboard_alone(page: Page, greedy: dict[tuple[str, str], str]) -> None:
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.insert_text(PROMPTS[0])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "form"
    page.keyboard.press("End")
    assert page.input_value("#form") == "plain"
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached[:9] == [
        *("temperature", "top_p", "max_tokens", "seed", "go"),
        *("model-left", "answer-left", "model-right", "answer-right"),
    ]
    page.fill("#max_tokens", "12")
    page.focus("#model-left")
    page.keyboard.press("End")
    page.keyboard.press("Control+Enter")
    wait_for_verdict(page)
    assert page.text_content("#answer-left") == greedy[page.input_value("#model-left"), PROMPTS[0]]


@pytest.mark.browser
def test_page_shows_a_fault_and_goes_on(page: Page) -> None:
    page.fill("#prompt", "<img src=x onerror=alert(1)> cat")
    page.fill("#max_tokens", "5000")
    page.click("#go")
    page.locator("#answer-left.fault").wait_for()
    assert "at most 512 tokens" in (page.text_content("#answer-left") or "")
    page.fill("#max_tokens", "4")
    page.click("#go")
    wait_for_verdict(page)
    assert "fault" not in (page.get_attribute("#answer-left", "class") or "")


@pytest.mark.browser
def test_page_keeps_nobody_out_in_light_and_dark(page: Page) -> None:
    page.fill("#prompt", ASKED[0])
    page.fill("#max_tokens", "4")
    page.click("#go")
    wait_for_verdict(page)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        require_accessible(page)
