"""Batch scoring over ragged prompts x responses x scorers, and what follows from scores: in C++."""

from tso_fast.scoring.aggregation import METHODS, NORMALIZATIONS, Consensus, consensus, consensus_reference
from tso_fast.scoring.concordance import Agreement, agreement, agreement_reference
from tso_fast.scoring.diversity import (
    distinct_n,
    distinct_n_reference,
    pairwise_distances,
    pairwise_distances_reference,
    self_bleu,
    self_bleu_reference,
)
from tso_fast.scoring.selection import (
    DECIDED_STRATEGIES,
    STRATEGIES,
    select_decided,
    select_decided_reference,
    select_pairs,
    select_pairs_reference,
)
from tso_fast.scoring.strengths import bradley_terry, bradley_terry_reference

__all__ = [
    "DECIDED_STRATEGIES",
    "METHODS",
    "NORMALIZATIONS",
    "STRATEGIES",
    "Agreement",
    "Consensus",
    "agreement",
    "agreement_reference",
    "bradley_terry",
    "bradley_terry_reference",
    "consensus",
    "consensus_reference",
    "distinct_n",
    "distinct_n_reference",
    "pairwise_distances",
    "pairwise_distances_reference",
    "select_decided",
    "select_decided_reference",
    "select_pairs",
    "select_pairs_reference",
    "self_bleu",
    "self_bleu_reference",
]
