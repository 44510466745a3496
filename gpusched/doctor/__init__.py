"""``gpusched doctor``: what this machine has, what it lacks, and how to mend each lack.

    readings.py   what can be read of a machine, as plain values
    read_*.py     reading it: each topic with a time limit, in a thread or a process; changes nothing
    judge_*.py    readings -> findings; pure, so that every machine can be scripted
    examine.py    all of it together

``gpu_probe.py`` and ``pinned_copy.py`` are programs of their own: what they touch may hang or crash. CRIU has
its trial in the disk tier (``mechanisms/criu/program.py``).
Does not cover: how findings are printed (``cli/doctor_command.py``), freezing for a trial (``gpusched/selftest.py``).
"""
