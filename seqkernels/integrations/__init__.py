"""Integrations into other libraries. Importing the module of a library enables its integration."""
