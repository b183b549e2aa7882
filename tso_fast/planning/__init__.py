"""``tso-fast plan``: what a run will hold, do and write, from shapes alone.

A step is traced over tensors without memory (``trace``), what sharding, optimizer and reference add is counted
(``memory``), and so are engines (``generation``), steps and files (``work``). ``whole`` puts them together and
looks for settings that fit.
"""
