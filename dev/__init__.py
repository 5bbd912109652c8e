"""Tools for those who work on the house; nothing in qvl/ imports them."""
