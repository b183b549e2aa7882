"""Files of a run: atomic writes (``atomic``), rows and their records (``rows``), human labels (``labels``), the store
of responses (``responses``), and the run folder (``run``).
"""
