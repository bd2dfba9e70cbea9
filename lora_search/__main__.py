"""`python -m lora_search` is `lora-search`."""

from lora_search.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
