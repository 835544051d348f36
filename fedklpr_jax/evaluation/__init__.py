"""Retrieval scores: ranking on the host, a jitted validation score, re-ranking and a paired bootstrap."""

from __future__ import annotations

from fedklpr_jax.evaluation.bootstrap import RatioInterval, paired_ratio_interval
from fedklpr_jax.evaluation.ranking import QueryScores, Ranking, euclidean_distances, evaluate_ranking, query_scores
from fedklpr_jax.evaluation.rerank import rerank
from fedklpr_jax.evaluation.validation import retrieval_map

__all__ = [
    "QueryScores",
    "Ranking",
    "RatioInterval",
    "euclidean_distances",
    "evaluate_ranking",
    "paired_ratio_interval",
    "query_scores",
    "rerank",
    "retrieval_map",
]
