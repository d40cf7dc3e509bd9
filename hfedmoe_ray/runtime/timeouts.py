"""Every timeout of the project, in seconds: no wait on Ray is without one of these.

How long a client may take for a task is not here but in the configuration (`runtime.deadline_s`).
"""

CONNECT = 10.0
"""Opening a connection to a cluster's or a job server's port."""
JOB_AGENT = 60.0
"""From a cluster's start until it takes jobs: its dashboard answers before the agent that starts them is there."""
SURVEY = 60.0
"""For every node of a cluster to tell what it is: a process has to be started on each."""
JOB_STOP = 30.0
"""From asking a job to end until it has: Ray kills what is left of it after three seconds."""
CLIENT_START = 300.0
"""From creating a client actor until it has imported its libraries and loaded the model, files transferred included."""
FIRST_CALL_GRACE = 60.0
"""What an actor's first task may take beyond the deadline: it imports what loading did not, and fills caches."""
CLUSTER_POLL = 1.0
"""Between two looks at a cluster that is to grow, or to give actors room that other work on it holds."""
ROOM = 60.0
"""How long clients may wait for room that other work on the cluster holds while none of their actors has any, or
`runtime.scale_up_s` where that is longer. Starting is not waiting: it begins when Ray has given an actor its room."""
ROOM_GIVEN = 5.0
"""For Ray to give an actor room that was free a moment ago; the next one asks then."""
ROOM_TOLD = 5.0
"""From an actor's waiting for room until that is told: what a dead actor held is free only a moment later."""
STOP_GRACE = 10.0
"""From asking a late client to stop until its process is killed."""
FETCH = 120.0
"""Copying weights, files or a finished update between nodes."""
LONG_POLL = 10.0
"""How long the server holds the driver's question for news open when there are none."""
PROGRESS = 120.0
"""How long the server may leave the driver without any answer; it is busy with one array at most."""
SERVER_STOP = 30.0
"""From the last event of a run until its outcome is delivered."""
GANG_JOIN = 120.0
"""From the moment that all ranks of a client have loaded until they have joined."""
GANG_STEP = 300.0
"""How long a rank waits for another in a step, and to end a task: the first one does some things by itself (it explores
experts before the first step, and packs the update after the last). `runtime.deadline_s` may be over sooner."""
GANG_LAST_WORDS = 5.0
"""From a rank's missing another until Ray knows whether that one has died."""
LIFELINE_POLL = 10.0
"""Between two looks of a gang's first rank whether it still waits for the right thing: the others' deaths."""
LAST_WORDS = 15.0
"""For reading what a dead client left on its node: a process may have to be started for it."""
USAGE = 1.0
"""For the nodes to say how busy they are, once a round; one that does not is left out."""
