"""Token files, windows, documents, tokenizers, downloads. Each data set is a folder in here."""
