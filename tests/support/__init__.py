"""Cases, inputs, comparisons and devices that several test files use."""
