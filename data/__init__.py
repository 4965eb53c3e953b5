"""Token files, tokenizers and downloads. Data sets that prepare.py builds lie in folders here."""
