"""Judges: candidates in, verdicts out. A judge that cannot tell abstains; it never guesses."""
