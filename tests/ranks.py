"""Functions on n gloo ranks, for the tests: the pool of trainer/ranks.py."""

from trainer.ranks import RankFailedError, run_ranks, stop_ranks

__all__ = ["RankFailedError", "run_ranks", "stop_ranks"]
