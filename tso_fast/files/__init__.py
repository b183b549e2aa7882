"""Files: written whole or not at all (``atomic``), rows and records (``rows``), human labels (``labels``), responses
that are never generated twice (``responses``), and the run folder (``run``).
"""
