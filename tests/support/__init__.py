"""Cases, inputs, comparisons and devices shared by the test files."""
