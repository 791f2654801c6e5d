"""`sfa pack` and `sfa index` in the process of a test."""

from __future__ import annotations

import argparse

from sfa_dist.tools import index as index_tool
from sfa_dist.tools import pack as pack_tool


def run_tool(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    pack_tool.add_parser(commands)
    index_tool.add_parser(commands)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)
