"""Human labels: the order in which pairs are asked, the page that asks, and exchange with other tools.

order, agreement → desk → page → command; exchange → command. Only ``page`` knows gradio.
"""
