"""Batch scoring over ragged prompts x responses x scorers, in C++."""

from tso_fast.scoring.aggregation import METHODS, NORMALIZATIONS, Consensus, consensus, consensus_reference

__all__ = ["METHODS", "NORMALIZATIONS", "Consensus", "consensus", "consensus_reference"]
