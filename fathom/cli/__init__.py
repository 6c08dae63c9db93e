"""The commands. `main` holds the table; each of the others is one command, imported when it is called."""
