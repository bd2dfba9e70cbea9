"""The commands: parse, call, print. Each command's imports wait until it runs."""

from lora_search.cli.main import command, main

__all__ = ["command", "main"]
