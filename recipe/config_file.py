"""Config files: YAML, read as it looks to a person.

`010`, `1:30` and `2024-01-01` are what they say, neither 8 nor 90 nor a date; `1e-3` is a number. Values that YAML 1.1
has beside (`!!binary`, `!!set`, ...) are refused, as are anchors that make a small file a large one.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from recipe.redaction import learn_from_config

LONGEST = 200_000  # characters of a config file, which holds settings, not records
MOST_VALUES = 10_000
TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
KINDS = {type(None): "nothing", list: "a list"}
INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
NUMBER = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)


class ConfigFileError(Exception):
    """A file that holds no settings, or says more than it seems to."""


class Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2, and an error with its place for a value that is not what its tag says."""

    yaml_constructors = {  # noqa: RUF012 - as PyYAML declares it
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag and tag.split(":")[-1] in TAGS
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag.split(":")[-1] in ("null", "bool", "merge")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except (yaml.YAMLError, RecursionError, ConfigFileError):
            raise
        except Exception as error:
            said = f"{str(node.value)[:60]!r} is no {node.tag.split(':')[-1]}"
            raise ConfigFileError(f"{_line(node)}: {said}; write the value alone") from error


def _refuse_tag(_: Loader, node: yaml.Node) -> None:
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    raise ConfigFileError(f"{_line(node)}: the tag {tag} is not for settings; write the value alone")


Loader.add_constructor(None, _refuse_tag)  # type: ignore[arg-type]
for _kind, _pattern, _first in (("int", INTEGER, "-+0123456789"), ("float", NUMBER, "-+0123456789.")):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, list(_first))  # type: ignore[no-untyped-call]


def read_config(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a file; and those that are no lists or mappings, as they are written there.

    Raises:
        ConfigFileError: the file, its line where it is known, and what is wrong.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        learn_from_config(text[:LONGEST])
        content, written = parse(text)
    except FileNotFoundError as error:
        raise ConfigFileError(f"{path}: no such config file") from error
    except UnicodeDecodeError as error:
        raise ConfigFileError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigFileError(f"{path}: cannot be read: {error}") from error
    except ConfigFileError as error:
        raise ConfigFileError(f"{path}{error}") from error
    if not isinstance(content, dict):
        raise ConfigFileError(f"{path}: expected `key: value` lines, found {KINDS.get(type(content), 'one value')}")
    if {"config", "legs"} <= content.keys():
        raise ConfigFileError(
            f"{path} tells of a run; start its command again, or write its settings into another file"
        )
    return content, written


def parse(text: str) -> tuple[Any, dict[str, str]]:
    """What a YAML text holds, and of a mapping the values that are no lists or mappings, as they are written.

    >>> parse("seed: 010\\nmask_prompt: no")
    ({'seed': '010', 'mask_prompt': False}, {'seed': '010', 'mask_prompt': 'no'})

    Raises:
        ConfigFileError: in words that follow the name of the file.
    """
    if len(text) > LONGEST:
        raise ConfigFileError(f": over {LONGEST:,} characters; give a config file, and records with --data")
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _check_nodes(node)
        content = loader.construct_document(node)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigFileError(f": cannot be read as YAML: {said}") from error
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return content, {key.value: value.value for key, value in pairs if isinstance(value, yaml.ScalarNode)}


def _check_nodes(node: yaml.Node) -> None:
    """Refuse a key that is twice in a mapping, of which PyYAML keeps the last value, and anchors without end."""
    nodes = [node]
    for each in nodes:  # which grows
        pairs = each.value if isinstance(each, yaml.MappingNode) else []
        names = [key.value for key, _ in pairs]
        for index, (key, _) in enumerate(pairs):
            if key.value in names[:index]:
                raise ConfigFileError(f"{_line(key)}: the key {key.value!r} is repeated; keep one")
        nodes += [inner for pair in pairs for inner in pair]
        nodes += each.value if isinstance(each, yaml.SequenceNode) else []
        if len(nodes) > MOST_VALUES:
            raise ConfigFileError(
                f"{_line(each)}: more than {MOST_VALUES:,} values, or an anchor (&) that holds itself; write fewer"
            )


def _line(node: yaml.Node) -> str:
    return f" line {node.start_mark.line + 1}"
