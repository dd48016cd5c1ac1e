"""Dense against sparse under load: `python -m loadtest.ab`, with `vllm bench serve` as its engine.

Imports go one way: `workload` -> `prompts` -> `bench`, `counters` -> `run` -> `statistics` ->
`judge` -> `plots`, `show` -> the command.
"""
