"""The worker's side: stages, the sessions that use them, and the threads that serve them.

``server`` takes messages and has the table of who answers which; answers leave through ``replies``, and what takes long
runs in the threads of ``requests``, of which members get ``turns``. ``opening`` gives a session its stage
(``agreement``: what both ends must agree on; ``neighbour``: the next worker of a chain). ``sessions`` is the table of
those that are open, ``session`` one of them and what it keeps from step to step. ``steps`` computes, in the thread of
``executor``, what is within ``bounds``. ``stages`` loads what ``stage_memory`` has room for. ``loras``, ``lora_upload``
and ``lora_reuse`` find, take in and recognise LoRAs.
"""
