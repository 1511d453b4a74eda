"""Calls, lanes and bulk on real connections."""
