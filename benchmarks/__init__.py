"""Measurements; every number of the README and of results/ is made by a module in here."""
