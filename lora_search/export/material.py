"""What a re-training needs beside its configuration: the base, the names of the modules, and the rows.

The rows go out as token ids, so that no other tool's template, splitting or truncation comes between. `train.jsonl`
holds the train split in the order in which the trial read it, every begun epoch in full: who reads it from its start,
unshuffled, trains on the same batches, and who trains on for longer leaves out no row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_search.builtin import model_folder
from lora_search.errors import InputError, SweepError
from lora_search.export.trained import Trained
from lora_search.imports import import_libraries

if TYPE_CHECKING:
    from lora_search.data import TokenizedData, TokenSplit
    from lora_search.targets import Targets

IGNORED = -100
"""The label of a token that the loss does not count."""

BASE = "base"
"""The folder of a built-in base within an export."""


@dataclass(frozen=True)
class RowFile:
    """A file of rows."""

    name: str
    rows: int
    size: int
    """Bytes."""


class Material:
    """Reads the base's configuration, tokenizer and data when they are asked for; never its weights."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained

    @cached_property
    def data(self) -> TokenizedData:
        """The tokens that the trial was trained on.

        Raises:
            InputError: the base's tokenizer or the data set cannot be read, or is another than when the sweep ran.
        """
        import_libraries()
        from lora_search.data import tokenize_data
        from lora_search.model import load_tokenizer

        spec = self._trained.spec
        data = tokenize_data(spec.data, load_tokenizer(spec.base))
        was = _fingerprint(self._trained.run.provenance)
        if was is not None and was != data.fingerprint:
            raise InputError(
                f"data.path: {spec.data.path} or the tokenizer has changed since the sweep ran: found "
                f"{data.fingerprint[:12]}, was {was[:12]} (fingerprints of the tokens)"
            )
        return data

    @cached_property
    def base_config(self) -> Any:
        """The base's own configuration, as transformers reads it."""
        return self._skeleton.config

    @cached_property
    def _skeleton(self) -> Any:
        from lora_search.targets import skeleton

        base = self._trained.spec.base
        return skeleton(base.model, trust_remote_code=base.trust_remote_code, revision=base.revision)

    def targets(self, target: str | list[str] | None = None) -> Targets:
        """The weights that the trial adapts, or that another value of `target_modules` names."""
        from lora_search.targets import module_tree, resolve

        return resolve(module_tree(self._skeleton), target or self._trained.config.lora.target_modules)

    def module_names(self, target: str | list[str] | None = None) -> list[str]:
        """Names for PEFT's `target_modules`: last parts where they mean the same modules, else the full names."""
        full = self.targets(target).modules
        last = list(dict.fromkeys(name.rpartition(".")[2] for name in full))
        meant = {name for name, _ in self._skeleton.named_modules() if name.rpartition(".")[2] in last}
        return last if meant == set(full) else list(full)

    def parameter_names(self, target: str | list[str] | None = None) -> list[str]:
        """Full names for PEFT's `target_parameters`: the fused weights of experts."""
        return list(self.targets(target).parameters)

    def sizes(self) -> list[int]:
        """Numbers in each linear weight of the base but its output head."""
        from lora_search.targets import module_tree

        return [module.in_features * module.out_features for module in module_tree(self._skeleton).modules]

    def copy_base(self, out: Path) -> str | None:
        """Copy a built-in base into an export; the folder's name there, None where the base is not a built-in one."""
        name = self._trained.spec.base.model
        if not name.startswith("builtin:"):
            return None
        shutil.copytree(model_folder(name.removeprefix("builtin:")), out / BASE)
        return BASE

    def reading_order(self) -> list[int]:
        """Rows of the train split in the trial's order, each begun epoch in full."""
        from lora_search.data import training_rows

        rows = len(self.data.train)
        read = self._trained.steps * self._trained.rows_per_step
        return training_rows(rows, self._trained.config.training.seed, 0, -(-read // rows) * rows)

    def write_rows(self, out: Path, *, in_order: bool = True) -> list[RowFile]:
        """Write the three splits.

        Args:
            in_order: the train split as the trial read it; else each row once, as it stands in the data set.
        """
        data = self.data
        train: Iterable[int] = self.reading_order() if in_order else range(len(data.train))
        return [
            _write(out / "train.jsonl", data.train, train),
            _write(out / "validation.jsonl", data.validation, range(len(data.validation))),
            _write(out / "test.jsonl", data.test, range(len(data.test))),
        ]


def row_of(split: TokenSplit, number: int) -> Mapping[str, list[int]]:
    """A row as transformers, TRL and Axolotl take it."""
    tokens, trained = split.row(number)
    ids = tokens.tolist()
    labels = [token if counts else IGNORED for token, counts in zip(ids, trained.tolist(), strict=True)]
    labels[0] = IGNORED  # predicted from nothing
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _write(file: Path, split: TokenSplit, numbers: Iterable[int]) -> RowFile:
    rows = 0
    with file.open("w", encoding="utf-8") as lines:
        for number in numbers:
            lines.write(json.dumps(row_of(split, number), separators=(",", ":")) + "\n")
            rows += 1
    return RowFile(file.name, rows, file.stat().st_size)


def _fingerprint(provenance: Path) -> str | None:
    try:
        found = json.loads(provenance.read_text(encoding="utf-8"))["data"]["fingerprint"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SweepError(f"{provenance}: is no provenance of a sweep: {type(error).__name__}: {error}") from None
    return str(found)
