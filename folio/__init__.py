"""What the scripts lean on, one subject a file. docs/design.md has the contracts between them."""
