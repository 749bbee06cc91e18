"""YAML as a user means it."""

from __future__ import annotations

import re
from typing import Any

import yaml


class UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses what YAML's own loader silently reads as something else.

    It refuses a key that is given twice, and the number formats of YAML 1.1.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is given twice")
        return super().construct_mapping(node, deep)

    def construct_plain_int(self, node: yaml.ScalarNode) -> int:
        """Accepts decimal digits only: YAML 1.1 reads 010 as 8 and 1:30 as 90."""
        text = str(self.construct_scalar(node))
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text):
            raise yaml.YAMLError(
                f"{text} is not a plain decimal number, and YAML would read it as "
                f"{self.construct_yaml_int(node)}"
            )
        return int(text)


UniqueKeyLoader.add_constructor("tag:yaml.org,2002:int", UniqueKeyLoader.construct_plain_int)
