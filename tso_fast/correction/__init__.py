"""Evaluation correction: the matrix's prior order of two responses against the evidence of judges and people.

    verdicts -> evidence -> beliefs (reliability) -> decide (keep, swap, drop) -> pairing -> PreferencePair
                            held_back (calibration) measures soft labels, oracle the decisions

``make_pairs`` goes through all of it.
"""
