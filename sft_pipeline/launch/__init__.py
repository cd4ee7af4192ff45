"""Running a stage in a process of its own that cannot outlive the run it belongs to.

launcher.py   the parent's side: starts, listens, raises the child's error
supervise.py  between the two: ends every process of the child when the child, the parent or the run is gone
child.py      the stage's side: builds, reports, writes the result
message.py    what the two sides write for each other
processes.py  what can be asked about, and done to, processes of this machine
reaper.py     runs whose worker died with nobody left to say so
"""
