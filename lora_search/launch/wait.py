"""`python -m lora_search.launch.wait`: return as soon as a Ray cluster has so many nodes."""

from __future__ import annotations

import argparse
import sys
import time

import ray

PAUSE = 0.5
"""Seconds between two looks."""


def wait_for_nodes(address: str, nodes: int, seconds: float) -> int:
    """Wait until `nodes` nodes are alive, or `seconds` have passed; how many are."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    end = time.monotonic() + seconds
    while (alive := len([node for node in ray.nodes() if node["Alive"]])) < nodes and time.monotonic() < end:
        time.sleep(PAUSE)
    return alive


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_search.launch.wait", description=__doc__)
    parser.add_argument("--address", default="auto")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to wait at most; default 600")
    arguments = parser.parse_args()
    alive = wait_for_nodes(arguments.address, arguments.nodes, arguments.seconds)
    print(f"lora-search: {alive} of {arguments.nodes} nodes of the cluster are here", file=sys.stderr)
    return int(alive < arguments.nodes)


if __name__ == "__main__":
    sys.exit(main())
