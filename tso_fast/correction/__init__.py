"""Evaluation correction: checks the matrix's prior order of two responses against evidence from judges and people.

    verdicts -> evidence -> beliefs (reliability) -> decide (keep, swap, drop) -> pairing -> PreferencePair
                            held_back (calibration) measures soft labels, oracle the decisions

``make_pairs`` runs all of it.
"""
