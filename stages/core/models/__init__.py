"""Diffusion models behind one interface: encode, noise, predict, decode; one adapter a family. It
imports no other room.
"""
