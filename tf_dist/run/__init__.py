"""One run of ``train.py``: folder, lock, status, corpus, callbacks; and what reads a run afterwards."""
