"""Which values of a sweep file are local paths, and where they lead."""

from __future__ import annotations

from pathlib import Path

from lora_search.builtin import data_file, model_folder
from lora_search.spec.schema import SweepSpec

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
BUILTIN = "builtin:"


def resolve_paths(spec: SweepSpec, folder: Path) -> SweepSpec:
    """`spec` with every local path absolute; looked up in the working directory, then in `folder`.

    Raises:
        ValueError: a path that must be local is not there, or a builtin is unknown; the message begins with the key.
    """
    spec = resolve_base(spec, folder)
    data: dict[str, float | str] = {"path": _data("data.path", spec.data.path, folder)}
    for key in ("validation", "test"):
        value = getattr(spec.data, key)
        if isinstance(value, str):
            data[key] = _data(f"data.{key}", value, folder)
    return spec.model_copy(update={"data": spec.data.model_copy(update=data), "output": _output(spec.output)})


def resolve_base(spec: SweepSpec, folder: Path) -> SweepSpec:
    """As `resolve_paths`, of the base alone."""
    return spec.model_copy(update={"base": spec.base.model_copy(update={"model": _model(spec.base.model, folder)})})


def _output(value: str) -> str:
    """A folder that need not be there, as written but for a home; or a URI."""
    return value if "://" in value else str(_expanded("output", value))


def _model(value: str, folder: Path) -> str:
    if value.startswith(BUILTIN):
        _builtin("base.model", value, model_folder)
        return value
    found = _find("base.model", value, folder)
    if found is None:
        if _must_be_local(value):
            raise ValueError(_missing("base.model", value, folder, "a hub id, a local folder, or builtin:NAME"))
        return value
    if not (found / "config.json").is_file():
        raise ValueError(f"base.model: {found} holds no config.json; allowed: a folder in Hugging Face format")
    return str(found)


def _data(key: str, value: str, folder: Path) -> str:
    if value.startswith(BUILTIN):
        _builtin(key, value, data_file)
        return value
    found = _find(key, value, folder)
    if found is None:
        if _must_be_local(value) or value.endswith(DATA_SUFFIXES):
            raise ValueError(_missing(key, value, folder, "a data file or folder, a hub id, or builtin:NAME"))
        return value
    return str(found)


def _find(key: str, value: str, folder: Path) -> Path | None:
    path = _expanded(key, value)
    for candidate in (Path.cwd() / path, folder / path):
        try:
            if candidate.exists():
                return candidate.resolve()
        except OSError as error:  # longer than a file's name may be, or in a folder that may not be entered
            raise ValueError(f"{key}: found {_short(value)}: {error.strerror}") from None
    return None


def _expanded(key: str, value: str) -> Path:
    """`value` with the home that a leading ~ means."""
    if "\0" in value:
        raise ValueError(f"{key}: found {_short(value)}: a path has no NUL character")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"{key}: found {_short(value)}: there is no such user's home") from None


def _short(value: str) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _must_be_local(value: str) -> bool:
    """A hub id is NAME or OWNER/NAME; whatever else it looks like, it is a path."""
    return value.startswith(("/", ".", "~")) or value.count("/") > 1


def _missing(key: str, value: str, folder: Path, allowed: str) -> str:
    places = dict.fromkeys(str(place.resolve()) for place in (Path.cwd(), folder))
    return f"{key}: found {value!r}, which is neither in {' nor in '.join(places)}; allowed: {allowed}"


def _builtin(key: str, value: str, lookup: object) -> None:
    try:
        lookup(value.removeprefix(BUILTIN))  # type: ignore[operator]
    except KeyError as error:
        raise ValueError(f"{key}: found {value!r}; {error.args[0]}") from None
