"""Adapter methods; each is one small file over the same backbone hook."""
