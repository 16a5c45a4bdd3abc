"""A package, so that its conftest is told from that of the other tests."""
