"""What somebody's Flower app gives away: `python -m fedsec.audit FOLDER`.

The app runs unchanged, in this process, behind a tap (`tap`); what travelled (`traffic`) can be
recorded and replayed. Rules (`lint`, `mechanisms`) turn it into findings, and `outputs` writes them
for people and for CI.
"""
