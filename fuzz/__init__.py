"""Hostile input, by the million: payloads, folders of pictures, and settings; `python -m fuzz --help` says how."""
