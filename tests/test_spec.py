"""The sweep file: what it may hold, and what is said of a wrong one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from lora_search.errors import InputError
from lora_search.space import first_trials, report_steps, rungs, trial_config
from lora_search.spec import SweepSpec, dump_spec, load_spec, parse_spec
from lora_search.spec.schema import guide_space

HERE = Path(__file__).parent


def parse(text: str, *overrides: str) -> SweepSpec:
    return parse_spec(text, source="sweep.yaml", folder=HERE, overrides=overrides)


def complaint(text: str, *overrides: str) -> str:
    """What is said of a wrong sweep file."""
    with pytest.raises(InputError) as caught:
        parse(text, *overrides)
    return str(caught.value)


def test_empty_file_is_the_whole_demo() -> None:
    spec = parse("")
    assert spec.base.model == "builtin:demo"
    assert spec.search.space == guide_space()


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such sweep file"):
        load_spec(tmp_path / "nowhere.yaml")


WRONG: list[tuple[str, str, list[str]]] = [
    ("unknown key", "training:\n  stepz: 3\n", ["sweep.yaml:2: training.stepz", "'steps'", "allowed:", "batch_size"]),
    ("unknown section", "trainning: {}\n", ["sweep.yaml:1: trainning", "'training'"]),
    ("unknown parameter", "search:\n  space:\n    rnak: 3\n", ["sweep.yaml:3: search.space.rnak", "'rank'"]),
    ("word for a number", "training: {steps: many}\n", ["sweep.yaml:1: training.steps", "'many'", "integer"]),
    ("quoted number", "training: {steps: '10'}\n", ["training.steps", "'10'", "integer"]),
    ("boolean for a number", "training: {steps: true}\n", ["training.steps", "True", "integer"]),
    ("zero steps", "training: {steps: 0}\n", ["training.steps", "found 0", "greater than or equal to 1"]),
    ("a digit too many", "training: {steps: 100000000}\n", ["training.steps", "less than or equal to 10000000"]),
    ("unknown choice", "base: {quantization: int3}\n", ["base.quantization", "'int3'", "'nf4' or 'none'"]),
    ("empty choice", "search: {space: {rank: {choice: []}}}\n", ["search.space.rank", "choice is empty"]),
    ("no choice", "search: {space: {rank: [4, 8]}}\n", ["search.space.rank: found [4, 8]", "{choice: [4, 8]}"]),
    ("repeated choice", "search: {space: {rank: {choice: [4, 4]}}}\n", ["search.space.rank", "4 twice"]),
    ("unknown domain", "search: {space: {rank: {options: [4]}}}\n", ["search.space.rank", "options", "{choice:"]),
    ("upside-down range", "search: {space: {dropout: {uniform: [0.2, 0.1]}}}\n", ["search.space.dropout", "low below"]),
    ("half a range", "search: {space: {dropout: {uniform: [0.2]}}}\n", ["search.space.dropout", "two numbers"]),
    ("log of zero", "search: {space: {learning_rate: {log_uniform: [0, 1]}}}\n", ["learning_rate", "above 0"]),
    (
        "range beyond sense",
        "search: {space: {dropout: {uniform: [0.0, 1.5]}}}\n",
        ["space.dropout", "1.5", "less than 1"],
    ),
    ("fraction of a rank", "search: {space: {rank: {uniform: [1.0, 8.0]}}}\n", ["search.space.rank", "whole numbers"]),
    ("word for a rank", "search: {space: {rank: {choice: [4, big]}}}\n", ["search.space.rank", "'big'"]),
    ("empty space", "search: {space: {}}\n", ["search.space", "at least 1"]),
    ("two alphas", "search: {space: {alpha: 4.0, alpha_ratio: 2}}\n", ["search.space", "not both"]),
    (
        "grid over a range",
        "search: {sampler: {name: grid}, space: {dropout: {uniform: [0, 0.1]}}}\n",
        ["search.sampler"],
    ),
    (
        "enqueued stranger",
        "search: {space: {rank: 4}, enqueue: [{alpha: 3}]}\n",
        ["search.enqueue[0]", "alpha", "rank"],
    ),
    ("enqueued outside", "search: {space: {rank: {choice: [4]}}, enqueue: [{rank: 5}]}\n", ["enqueue[0].rank", "5"]),
    ("worse is better", "search: {metric: eval_loss, mode: max}\n", ["search.mode", "minimal", "max"]),
    ("share of nothing", "data: {validation: 0.0}\n", ["data.validation", "above 0"]),
    ("shares of everything", "data: {validation: 0.5, test: 0.5}\n", ["data", "no rows to train on"]),
    ("template without prompt", "data: {template: 'Q: '}\n", ["data.template", "{prompt}"]),
    ("no hosts", "hosts: {count: 0}\n", ["hosts.count", "at least 1", "found 0"]),
    ("missing data", "data: {path: nowhere.jsonl}\n", ["sweep.yaml:1: data.path", "nowhere.jsonl", "allowed"]),
    ("missing model", "base: {model: ./nowhere}\n", ["sweep.yaml:1: base.model", "./nowhere", "hub id"]),
    ("unknown builtin", "base: {model: builtin:dmeo}\n", ["base.model", "builtin:dmeo", "builtin:demo"]),
    ("folder that is no model", f"base: {{model: {HERE}}}\n", ["base.model", "config.json"]),
    ("bad regular expression", "search: {space: {target_modules: '(q'}}\n", ["target_modules", "'(q'", "attention-qv"]),
    ("tab", "training:\n\tsteps: 3\n", ["sweep.yaml:2", "not valid YAML"]),
    ("list at the top", "- a\n- b\n", ["sweep.yaml", "mapping", "list"]),
    (
        "key that stands twice",
        "training:\n  steps: 3\n  steps: 4\n",
        ["sweep.yaml:3: training.steps", "twice", "line 2"],
    ),
    ("python object", "name: !!python/object/apply:os.system ['true']\n", ["sweep.yaml:1", "not valid YAML"]),
    ("not a number", "training: {learning_rate: .nan}\n", ["training.learning_rate", "nan"]),
    ("section without content", "training: 3\n", ["sweep.yaml:1: training", "found 3"]),
    ("name with a slash", "name: a/b\n", ["sweep.yaml:1: name", "'a/b'"]),
    ("either or", "hosts: {count: some}\n", ["hosts.count", "'some'", "auto"]),
    ("endless bound", f"search: {{space: {{dropout: {{uniform: [0, {'9' * 400}]}}}}}}\n", ["space.dropout", "308"]),
    ("endless log", f"search: {{space: {{dropout: {{log_uniform: [1, {'9' * 400}]}}}}}}\n", ["space.dropout", "308"]),
    ("endless model", f"base: {{model: {'a' * 300}}}\n", ["sweep.yaml:1: base.model", "too long"]),
    ("endless data", f"data: {{path: {'a' * 300}.jsonl}}\n", ["sweep.yaml:1: data.path", "too long"]),
    ("nobody's model", "base: {model: ~nosuchuser/x}\n", ["sweep.yaml:1: base.model", "'~nosuchuser/x'", "home"]),
    ("nobody's data", "data: {path: ~nosuchuser/x}\n", ["sweep.yaml:1: data.path", "'~nosuchuser/x'", "home"]),
    ("nobody's output", "output: ~nosuchuser/x\n", ["sweep.yaml:1: output", "'~nosuchuser/x'", "home"]),
    ("nul in output", 'output: "a\\0b"\n', ["sweep.yaml:1: output", "NUL"]),
    ("nul in model", 'base: {model: "a\\0b"}\n', ["sweep.yaml:1: base.model", "NUL"]),
    (
        "hardly a reduction",
        "search: {scheduler: {reduction_factor: 1.0000000000000002}}\n",
        ["sweep.yaml:1: search.scheduler.reduction_factor", "1.1"],
    ),
    ("share that is a list", "data: {test: [1]}\n", ["data.test", "[1]"]),
]


@pytest.mark.parametrize(("text", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_file_gets_one_clear_message(text: str, said: list[str]) -> None:
    message = complaint(text)
    for part in said:
        assert part in message, message
    assert len(message.splitlines()) == 1, message
    for jargon in ("pydantic", "type=", "input_value", "function-", "literal[", "Value error"):
        assert jargon not in message, message


def test_every_mistake_is_listed_at_once() -> None:
    message = complaint("training: {stepz: 3, batch_size: four}\nbase: {quantization: 3}\n")
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.stepz=3", ["--set: training.stepz", "'steps'"]),
        ("training.steps", ["--set training.steps", "key.path=value"]),
        ("training.steps=lots", ["--set: training.steps", "'lots'"]),
        ("=3", ["key.path=value"]),
        ("name.first=x", ["--set name.first=x", "has no keys"]),
        ("training.steps=[1", ["--set", "not valid YAML"]),
        ("training.steps=2020-13-45", ["--set training.steps=2020-13-45", "not valid YAML", "month"]),
        ("training.steps=" + "9" * 5000, ["--set training.steps=999", "not valid YAML", "digits"]),
    ],
)
def test_wrong_override_is_told_as_one(override: str, said: list[str]) -> None:
    message = complaint("name: x\n", override)
    for part in said:
        assert part in message, message


def test_override_lies_over_the_file() -> None:
    spec = parse("training: {steps: 3}\n", "training.steps=5", "search.space.rank={choice: [2, 4]}", "data.test=0.2")
    assert (spec.training.steps, spec.data.test) == (5, 0.2)
    assert list(spec.search.space) == ["rank"]


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1.5E+2", 150.0), ("2", 2.0), (".5", 0.5), ("1_000.0", 1000.0)]
)
def test_numbers_are_read_as_people_write_them(text: str, value: float) -> None:
    assert parse(f"training: {{learning_rate: {text}}}\n").training.learning_rate == value


def test_paths_are_found_beside_the_sweep_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "sweep.yaml").write_text("data: {path: rows.jsonl}\n")
    assert load_spec(tmp_path / "sweep.yaml").data.path == str(tmp_path / "rows.jsonl")


def test_output_is_expanded_where_it_begins_with_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse("output: ~/runs\n").output == "/home/somebody/runs"
    assert parse("output: there/~/runs\n").output == "there/~/runs"
    assert parse("output: s3://bucket/~runs?region=x\n").output == "s3://bucket/~runs?region=x"


def test_hub_ids_are_left_alone() -> None:
    spec = parse("base: {model: microsoft/phi-2}\ndata: {path: openai/gsm8k, name: main}\n")
    assert (spec.base.model, spec.data.path) == ("microsoft/phi-2", "openai/gsm8k")


def test_every_key_of_training_may_be_searched() -> None:
    for name, value in SweepSpec().training.model_dump().items():
        spec = parse(yaml.safe_dump({"search": {"space": {name: {"choice": [value]}}}}))
        assert getattr(trial_config(spec, {name: value}).training, name) == value


def test_every_key_is_documented() -> None:
    """A key explains itself by its description, or by a section's docstring and a name that is the field's own word."""
    plain = {"name", "rank", "dropout", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"}
    plain |= {"optimizer", "warmup_ratio", "project", "entity", "seed", "prompt", "completion", "messages", "text"}
    plain |= {"format", "metric", "mode", "trials", "space"}

    def walk(section: type[BaseModel]) -> None:
        assert section.__doc__
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)
            else:
                assert field.description or name in plain, f"{section.__name__}.{name}"

    walk(SweepSpec)


numbers = st.floats(1e-6, 0.4, allow_nan=False)
domains = st.one_of(
    st.lists(numbers, min_size=1, max_size=4, unique=True).map(lambda values: {"choice": values}),
    st.tuples(numbers, numbers).filter(lambda pair: pair[0] < pair[1]).map(lambda pair: {"uniform": list(pair)}),
    st.tuples(numbers, numbers).filter(lambda pair: pair[0] < pair[1]).map(lambda pair: {"log_uniform": list(pair)}),
    numbers,
)
sweeps = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "training": st.fixed_dictionaries(
            {}, optional={"steps": st.integers(1, 10**6), "learning_rate": numbers, "seed": st.integers(0, 2**31 - 1)}
        ),
        "search": st.fixed_dictionaries(
            {
                "space": st.dictionaries(
                    st.sampled_from(["dropout", "learning_rate", "weight_decay", "warmup_ratio"]), domains, min_size=1
                )
            },
            optional={"trials": st.integers(1, 100), "metric": st.sampled_from(["eval_loss", "token_accuracy"])},
        ),
        "hosts": st.fixed_dictionaries({}, optional={"count": st.one_of(st.just("auto"), st.integers(1, 9))}),
    },
)


@settings(max_examples=60, deadline=None)
@given(sweeps)
def test_what_is_written_reads_back_the_same(raw: dict[str, Any]) -> None:
    spec = parse(yaml.safe_dump(raw))
    assert parse(dump_spec(spec)) == spec


def test_aliases_are_taken_in_moderation() -> None:
    spec = parse(
        "training: {steps: &n 60, eval_every: *n}\nsearch: {enqueue: [&a {rank: 8}, {<<: *a, dropout: 0.1}]}\n"
    )
    assert (spec.training.steps, spec.training.eval_every) == (60, 60)
    assert spec.search.enqueue == [{"rank": 8}, {"rank": 8, "dropout": 0.1}]
    assert len(parse("search: {enqueue: [" + "{rank: 8}, " * 20_000 + "]}").search.enqueue) == 20_000


def bomb(open_: str, close: str, between: str) -> str:
    """A few hundred bytes that stand for a billion values."""
    levels = [f"a0: &a0 {open_}x{close}", *(f"a{n}: &a{n} {open_}{aliases(n, between)}{close}" for n in range(1, 10))]
    return "\n".join(levels)


def aliases(level: int, between: str) -> str:
    return between.join([f"*a{level - 1}"] * 9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("&a [*a]", "in line 1"),
        ("name: x\ntraining: &a {steps: 1, more: {again: *a}}", "in line 2"),
        (bomb("[", "]", ", "), "aliases stand for too much; allowed: 100,000"),
        (bomb("{<<: [", "]}", ", ").replace("[x]", "{x: 1}"), "aliases stand for too much; allowed: 100,000"),
        (f"long: &a {'x' * 50_000}\nmore: [*a, *a, *a]", "aliases stand for too much; allowed: 100,000"),
        ("x: " + "[" * 100 + "]" * 100, "nested too deeply; allowed: 64"),
        ("x: " + "[" * 100_000, "nested too deeply; allowed: 64"),
        (f"a: &a {'[' * 50}{']' * 50}\nb: {'[' * 50}*a{']' * 50}", "nested too deeply; allowed: 64"),
    ],
    ids=["loop", "loop below", "lists", "merged mappings", "letters", "deep", "deeper than Python", "deep by an alias"],
)
def test_few_bytes_that_stand_for_too_much_are_one_message(text: str, said: str) -> None:
    """At once, where they took all memory."""
    message = complaint(text)
    assert message.startswith("sweep.yaml: ")
    assert said in message
    if "\n" not in text:
        assert said in complaint("name: x\n", f"data.path={text.removeprefix('x: ')}")


VALID = Path(__file__).parent.parent / "sweeps" / "demo.yaml"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_mutilated_file_gets_a_traceback(data: st.DataObject) -> None:
    """Cut, doubled, replaced: what comes of it is a sweep or a message, nothing else."""
    text = VALID.read_text(encoding="utf-8")
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    middle = data.draw(
        st.one_of(st.text(max_size=8), st.sampled_from(["[", "{", ": ", "- ", "&a ", "*a", "!!", "null"]))
    )
    with contextlib.suppress(InputError):
        parse(text[:start] + middle + text[end:])


def test_rungs_are_counted_in_steps_and_reported_at() -> None:
    spec = parse("training: {steps: 100, eval_every: 25}\nsearch: {scheduler: {first_rung: 10, reduction_factor: 3}}\n")
    assert rungs(spec) == (10, 30, 90)
    assert report_steps(spec, trial_config(spec, {})) == (10, 25, 30, 50, 75, 90, 100)
    assert report_steps(spec, trial_config(spec, {"steps": 40})) == (10, 25, 30, 40)


def test_without_a_scheduler_there_are_no_rungs() -> None:
    spec = parse("training: {steps: 20, eval_every: 50}\nsearch: {scheduler: {name: none}}\n")
    assert rungs(spec) == ()
    assert report_steps(spec, trial_config(spec, {})) == (20,)


def test_alpha_follows_the_rank_unless_it_is_given() -> None:
    spec = parse("")
    assert trial_config(spec, {"rank": 8, "alpha_ratio": 4}).alpha == 32
    assert trial_config(spec, {"rank": 8, "alpha": 5.0}).alpha == 5


def test_guide_starts_with_the_common_guess() -> None:
    assert first_trials(parse("")) == [{"rank": 16, "alpha_ratio": 2.0, "dropout": 0.05}]
    assert first_trials(parse("search: {enqueue: []}\n")) == []
