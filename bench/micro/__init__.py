"""What pytest-benchmark runs: pytest bench/ --benchmark-only. Options and fixtures are in bench/conftest.py."""
