"""Orchestration: places the hosts, runs the search through Ray Tune, and concludes it.

`lora_search.sweep.run` is the way in. It is not imported here: hosts take `build` and `prepare` from this package, and
for them Ray Tune and Optuna would be two seconds of nothing.
"""
