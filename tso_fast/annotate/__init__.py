"""Labels by people: which pair is asked next, the page that asks, and other tools' files.

queue, agreement → desk → page → command; exchange → command. Only ``page`` knows gradio.
"""
