"""How a stage runs: devices, locks, signals, disks, log. It imports no other room. The code digest
leaves this room out, so nothing that decides a result may live here.
"""
