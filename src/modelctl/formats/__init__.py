"""The formats: one file a format; :mod:`.registry` knows them all."""
