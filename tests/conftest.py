"""What many tests stand on: a tiny Llama with its tokenizer, a small data set, and the real material where it is."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from filelock import FileLock

gc.disable()  # until all test files are imported: it would find nothing, again and again

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LORA_SEARCH_LOGICAL_GPUS", "1")  # clusters with GPUs, on machines without
os.environ.setdefault("RAY_worker_niceness", "0")  # a sweep's hosts would wait for all that other tests compute
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stand still beside others
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs are started, and sweeps by them
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # `make test`: three of us share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
    from ray.cluster_utils import Cluster

    from lora_search.data import TokenizedData
    from lora_search.engine import Evaluation
    from lora_search.model import FrozenBase
    from lora_search.spec import Base, SweepSpec
    from lora_search.storage import Folder

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

PATIENCE = 300.0
"""Seconds that a whole sweep may take to come to a point where other tests share the machine's cores."""

WORDS = "the a red blue small big cat dog bird tree house sees likes near under finds and then it is".split()


LONGEST = ("faults", "cluster", "store", "sweep", "lost_while_saving", "placement", "export", "launch", "docs")
"""Files of the tests that take longest, most of it in waiting; those after them fill what is left at the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest where files are shared out to several processes (`make test`)."""
    if hasattr(config, "workerinput"):
        places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def shared(name: str) -> Path:
    """A piece of the real material; skips the test where it is not beside the project."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared data beside the project")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, without a screen."""
    api = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium: make browser")
    with api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=program, args=sandbox)
        yield browser
        browser.close()


def require_accessible(page: Page) -> None:
    """No rule of axe-core's is broken (https://github.com/dequelabs/axe-core/blob/develop/doc/rule-descriptions.md)."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page)
    assert "color-contrast" in {rule["id"] for rule in found.response["passes"]}
    assert found.violations_count == 0, found.generate_report()


def wait_until(done: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Until something is there that a sweep writes; a failure where its process ends before, or takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert process is None or process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


@cache
def preloaded(source: str) -> str:
    """A C file beside the tests, compiled for LD_PRELOAD.

    Ray takes LD_PRELOAD from its workers, unless RAY_LD_PRELOAD_ON_WORKERS says otherwise; and gives the raylet another
    one, unless there is one in the environment of whoever starts it.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip(f"needs a C compiler, for {source}")
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file, built = Path(__file__).with_name(source), f"{folder}/{source}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", built, str(file), "-ldl"], check=True)
    return built


def flip_bit(file: Path, place: int = -1) -> None:
    """Damage one byte of a file, as a disk does: its size and all else stay."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def processes(*titles: str) -> list[int]:
    """Descendants of this process whose name, as Ray sets it, begins with one of these."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(titles):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


SOON = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4}
"""A Ray's configuration by which it learns within seconds that a node is gone."""


@contextmanager
def two_nodes(**head: Any) -> Iterator[Cluster]:
    """A Ray whose head has no GPU, and two nodes with one each, by Ray's own count.

    Args:
        head: what else Ray is told of the head.
    """
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, **head})
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=1)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def require_gives_back(folder: Folder, tmp_path: Path) -> None:
    """A folder, wherever it is, gives back what it was given, and forgets what it should."""
    assert folder.names() == []
    assert folder.modified("a") is None
    with pytest.raises(FileNotFoundError):
        folder.read("a")
    folder.write("a", b"first")
    folder.write("a", b"second")
    folder.below("sub").write("b", b"")
    assert folder.names() == ["a", "sub"]
    assert folder.read("a") == b"second"
    assert folder.below("sub").read("b") == b""
    assert folder.modified("a") is not None

    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "c").write_bytes(bytes(range(256)) * 1000)
    folder.below("sub").upload(source)
    assert folder.below("sub/deep").read("c") == bytes(range(256)) * 1000

    folder.check()
    for name in ("sub", "a", "never was"):
        folder.remove(name)
    assert folder.names() == []

    below = folder.below("gone")
    below.write("a", b"")
    below.remove_all()
    below.remove_all()
    assert folder.names() == []


def made_once(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], None]) -> Path:
    """A folder that the first of pytest's processes to ask for it fills, for all of them."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed at it
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


WATCHED_RUN = """
import sys
from lora_search.cli import main
status = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("SigCgt")).split()[1])
print(*sys.modules)
sys.exit(status)
"""
"""The command, which then says what signals its process catches, and what it has imported."""

SMALL = {"search.trials": 12, "search.scheduler": "{first_rung: 2, reduction_factor: 2}", "data.limit": 300}
SMALL |= {"training.steps": 8, "training.eval_every": 2, "base.compute_dtype": "float32"}


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sweeps of the repository and a finished run of the demo, made small; nobody writes to it."""

    def make(folder: Path) -> None:
        shutil.copytree(ROOT / "sweeps", folder / "sweeps")
        overlaid = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-c", WATCHED_RUN, "run", "sweeps/demo.yaml", *overlaid]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for name, line in zip(("caught", "modules"), done.stdout.splitlines()[-2:], strict=True):
            (folder / name).write_text(line, encoding="utf-8")

    return made_once("demo", tmp_path_factory, make)


def write_tiny_model(folder: Path) -> Path:
    """A random Llama of two layers with a word-level tokenizer, in Hugging Face format."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    fast.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def write_tiny_data(file: Path, rows: int = 200) -> Path:
    """Prompts of some words, each answered by the same words in reverse."""
    import random

    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            words = [draw.choice(WORDS) for _ in range(draw.randint(2, 9))]
            lines.write(json.dumps({"prompt": " ".join(words), "completion": " ".join(reversed(words))}) + "\n")
    return file


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` and `data.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model")
    write_tiny_data(folder / "data.jsonl")
    return folder


@pytest.fixture(scope="session")
def tiny_spec(tiny: Path) -> SweepSpec:
    """A sweep over the tiny model: 12 steps, float32, the usual parameters."""
    return make_spec(tiny)


def make_spec(tiny: Path, **sections: dict[str, Any]) -> SweepSpec:
    """The tiny sweep with some of its sections changed."""
    import yaml

    from lora_search.spec import parse_spec

    raw: dict[str, Any] = {
        "name": "tiny",
        "base": {"model": str(tiny / "model"), "compute_dtype": "float32"},
        "data": {"path": str(tiny / "data.jsonl"), "max_length": 32, "template": "{prompt} :"},
        "search": {
            "space": {
                "rank": {"choice": [2, 4, 8]},
                "dropout": {"uniform": [0.0, 0.1]},
                "target_modules": {"choice": ["attention-qv", "all-linear"]},
                "learning_rate": {"log_uniform": [1.0e-4, 1.0e-2]},
            },
            "trials": 8,
            "scheduler": {"first_rung": 2, "reduction_factor": 2},
        },
        "training": {"steps": 8, "batch_size": 4, "eval_every": 2},
        "tracking": {"wandb": {"mode": "disabled"}},
        "output": str(tiny / "runs"),
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section if isinstance(section, dict) else section
    return parse_spec(yaml.safe_dump(raw), source="tiny.yaml", folder=tiny)


@pytest.fixture(scope="session")
def tiny_data(tiny_spec: SweepSpec) -> TokenizedData:
    from lora_search.data import tokenize_data
    from lora_search.model import load_tokenizer

    return tokenize_data(tiny_spec.data, load_tokenizer(tiny_spec.base))


@pytest.fixture
def tiny_base(tiny_spec: SweepSpec) -> FrozenBase:
    """Fresh for every test: adapters change the module tree."""
    from lora_search.model import load_base

    return load_base(tiny_spec.base, "cpu")


def adapter_losses(base: FrozenBase, adapter: Path, data: TokenizedData) -> dict[str, Evaluation]:
    """A saved adapter, loaded by PEFT, on the validation and test split, and the untrained base, as untrained_NAME."""
    from peft import PeftModel

    from lora_search.engine import evaluate

    splits = {"validation": data.validation, "test": data.test}
    losses = {f"untrained_{name}": evaluate(base, split, data.pad_token_id) for name, split in splits.items()}
    PeftModel.from_pretrained(base.model, str(adapter))  # puts the adapter into base.model
    return losses | {name: evaluate(base, split, data.pad_token_id) for name, split in splits.items()}


@pytest.fixture(scope="module")
def kept_verifier() -> Iterator[None]:
    """The process that verifies a merge stays for the module's next (it imports for six seconds), or is replaced."""
    import torch

    from lora_search.merge.verify import FreshProcess

    start, end = FreshProcess.__init__, FreshProcess.__exit__
    kept: list[FreshProcess] = []

    def start_or_keep(self: FreshProcess, base: Base, device: torch.device) -> None:
        while kept and kept[-1]._process.poll() is not None:
            end(kept.pop(), None, None, None)
        if not kept:
            kept.append(FreshProcess.__new__(FreshProcess))
            start(kept[-1], base, device)
        vars(self).update(vars(kept[-1]), _base=base, device=device, _threads=torch.get_num_threads())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FreshProcess, "__init__", start_or_keep)
        patch.setattr(FreshProcess, "__exit__", lambda *arguments: None)
        yield
    for process in kept:
        end(process, None, None, None)


@pytest.fixture
def unverified_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of this process merge as where a base is too large to be loaded whole, and start no process to verify."""
    from lora_search.sweep import conclude

    merge_best = conclude.merge_best

    def merge(*given: Any) -> dict[str, Any]:  # on the host, where this file is not imported
        import lora_search.merge

        lora_search.merge.lack_of_memory = lambda base, device: "as in a test"
        return merge_best(*given)

    monkeypatch.setattr(conclude, "merge_best", merge)


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """Float32 sums depend on the number of threads; every test has the same."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(2)
