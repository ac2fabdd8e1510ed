"""Tests of the recurrent layers and cells."""
