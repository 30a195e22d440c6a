"""Results as documents: what ``--json`` prints, and the rows of the tables of notebooks.

A document is a frozen dataclass of plain data whose docstring describes every field with its unit; the JSON schema and
its page in the reference are made from these docstrings. Losses are nats per token (``_nats``), sizes are bytes
(``_bytes``), widths are bits a weight (``bits``), shares are between 0 and 1 (``_share``).
"""
