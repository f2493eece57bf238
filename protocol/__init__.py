"""Pure formats and rules: bytes and values, no I/O."""
