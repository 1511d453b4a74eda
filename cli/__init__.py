"""The command line: parses, prints, and speaks to a node only through its local API."""

import os

# Pydantic would look through all that is installed for plugins, which takes longer than a command's own work.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
