"""Safe YAML as people write it, and no more of it than it says itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from lora_search.errors import InputError

MOST_REPEATED = 100_000
"""Values, and letters in them, that aliases may stand for: a few hundred bytes may stand for more than any memory."""

MOST_LEVELS = 64
"""Of mappings and lists, one inside of another."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a repeated key and reads 1e-4 as the number it is (YAML 1.2; PyYAML follows 1.1)."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(text: str, source: str, look: Callable[[yaml.Node], None] | None = None, *, empty: Any = None) -> Any:
    """What a YAML text says, its nodes looked at before anything is made of them.

    Raises:
        YAMLError, ValueError, OverflowError: it is none: a date that is none, a number too long.
        InputError: it is too much.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return empty
        size, levels = _measured(node, {}, source)
        if size > len(text) + MOST_REPEATED:
            raise InputError(f"{source}: its aliases stand for too much; allowed: {MOST_REPEATED:,} values and letters")
        if levels > MOST_LEVELS:
            raise RecursionError
        if look is not None:
            look(node)
        return loader.construct_document(node)
    except RecursionError:
        raise InputError(f"{source}: lists and mappings are nested too deeply; allowed: {MOST_LEVELS} levels") from None
    finally:
        loader.dispose()


def _measured(node: yaml.Node, known: dict[int, tuple[int, int]], source: str) -> tuple[int, int]:
    """Size and levels of a node, what its aliases stand for counted anew each time; no more than the text's without.

    Args:
        known: those of nodes by their identity; (0, 0) of one that is being measured.
    """
    if id(node) in known:
        if known[id(node)] == (0, 0):
            raise InputError(
                f"{source}: an alias stands inside of what it stands for, in line {node.start_mark.line + 1}"
            )
        return known[id(node)]
    known[id(node)] = 0, 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    measured = [_measured(part, known, source) for part in parts]
    own = max(1, len(node.value)) if isinstance(node, yaml.ScalarNode) else 1
    size = own + sum(size for size, _ in measured)
    known[id(node)] = size, 1 + max((levels for _, levels in measured), default=0)
    return known[id(node)]
