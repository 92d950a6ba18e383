"""The programs: flags and printing. Each module's ``main`` is one; nothing is imported here."""
