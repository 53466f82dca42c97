"""How a state crosses a cut, seen by one end: streams, constants, what links and codecs cost, what steps cost.

Knows neither sessions nor sockets.
"""
