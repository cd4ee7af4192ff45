"""Running a stage in a process of its own that cannot outlive the run it belongs to.

launcher.py   the parent's side: starts the child, forwards its reports, raises its error
supervise.py  between the two: ends every process of the child when the child, the parent or the run is gone
child.py      the stage's side: builds, reports, writes the result
message.py    what the two sides write for each other
processes.py  identity, descendants and signals of the processes of this machine
reaper.py     ends, in Dagster's records, runs whose worker died with nobody left to report it
"""
