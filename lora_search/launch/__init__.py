"""Launch files: a sweep's own, for Slurm, Kubernetes, `ray up` and SkyPilot, filled in from those in cluster/."""

from lora_search.launch.compose import Launch, compose
from lora_search.launch.size import Wishes
from lora_search.launch.submit import submit, write

__all__ = ["Launch", "Wishes", "compose", "submit", "write"]
