"""What the scripts share, one subject per file. docs/design.md describes the contracts."""
