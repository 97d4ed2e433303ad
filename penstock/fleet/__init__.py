"""Planning machines: what a model needs of which hardware, what that gives, and what it costs.

Nothing here reads a clock, a network or a device: facts come from config.json files and from the two bundled
catalogues, and the answers are arithmetic that can be checked by hand.
"""
