"""The command line: parses, prints, and speaks to a node only through its local API."""
