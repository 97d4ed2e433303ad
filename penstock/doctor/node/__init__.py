"""A machine that is to run engines, before it does: devices, memory, disks, limits, ports, clock.

smi       what nvidia-smi says: asked, and read; pure but for the asking
host      what Linux says in /proc and /sys, and whether ports are free
points    the checklist, each point a pure function of both
"""
