"""`python -m lora_search` is `lora-search`."""

from lora_search.cli import command

if __name__ == "__main__":
    command()
