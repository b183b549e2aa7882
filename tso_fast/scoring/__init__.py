"""Batch scoring over ragged prompts x responses x scorers, and what follows from scores: in C++."""

from tso_fast.scoring.aggregation import METHODS, NORMALIZATIONS, Consensus, consensus
from tso_fast.scoring.aggregation_reference import consensus_reference
from tso_fast.scoring.concordance import Agreement, agreement
from tso_fast.scoring.concordance_reference import agreement_reference
from tso_fast.scoring.diversity import distinct_n, pairwise_distances, self_bleu
from tso_fast.scoring.diversity_reference import distinct_n_reference, pairwise_distances_reference, self_bleu_reference
from tso_fast.scoring.rules import DECIDED_STRATEGIES, STRATEGIES
from tso_fast.scoring.selection import select_decided, select_pairs
from tso_fast.scoring.selection_reference import select_decided_reference, select_pairs_reference
from tso_fast.scoring.strengths import bradley_terry
from tso_fast.scoring.strengths_reference import bradley_terry_reference

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
