"""Batch scoring over ragged prompts x responses x scorers, in C++."""

from tso_fast.scoring.aggregation import METHODS, NORMALIZATIONS, Consensus, consensus, consensus_reference
from tso_fast.scoring.concordance import Agreement, agreement, agreement_reference
from tso_fast.scoring.strengths import bradley_terry, bradley_terry_reference

__all__ = [
    "METHODS",
    "NORMALIZATIONS",
    "Agreement",
    "Consensus",
    "agreement",
    "agreement_reference",
    "bradley_terry",
    "bradley_terry_reference",
    "consensus",
    "consensus_reference",
]
