"""What the scripts share, one subject per file. docs/design.md describes the contracts."""

__version__ = "1.0.0"
