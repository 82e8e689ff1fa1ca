"""Preparation of the German-English corpora: the embedded dictionary corpus and a generated one."""
