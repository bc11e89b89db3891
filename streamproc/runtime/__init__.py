"""The data path, one stage a file, in the order in which a record meets them.

    source → batcher → pool → worker (wire between them) → isolation → sequencer → sink → ledger

Stages do not import each other. ``task_stream`` and ``processor`` wire them; nothing else knows them all.
"""
